"""`python -m llava.model.convert`: upstream's layout to transformers' own LLaVA-1.5, and back.

    python -m llava.model.convert --to hf --model-path LLAVA --output OUT [--model-base LLM]
    python -m llava.model.convert --to llava --model-path HF --output OUT [--vision-tower NAME]

What `--to hf` writes is read by transformers 4 and 5, and by servers built on them. Tensors are
copied bit for bit. The vocabulary gains `<image>` and `<pad>`, and rows up to a multiple of 64; a
new row is the mean of the old ones, so it is never the likeliest token. Upstream's own tokenizer
and settings are kept beside (`OUT/llava/`, and a key of config.json): with them `--to llava` cuts
the rows off again, so that there and back gives the same tensors; without, it keeps them.

`OUT` appears once it is whole; a killed run leaves `.OUT.….tmp`, which may be deleted.
"""

from __future__ import annotations

import argparse
import json
from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llava.atomic import write_text
from llava.errors import InputError, one_clear_error, reason
from llava.model.hf_layout import (
    KEPT,
    Config,
    hf_config,
    language_model_type,
    llava_config,
    rename_to_hf,
    rename_to_llava,
)
from llava.model.hf_logging import quiet
from llava.transformers_private import vision_model_class

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llava.conversation import Conversation

    Tensors = Mapping[str, torch.Tensor]
    Stream = Iterable[tuple[str, torch.Tensor]]
    Shapes = dict[str, tuple[int, ...]]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOWER = "model.vision_tower.vision_tower."
TOWER_FOLDER = "vision_tower"


def to_hf(
    model_path: str,
    output: str,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    dtype: str | None = None,
    conv_mode: str | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write a LLaVA (full; projector-only or LoRA with `model_base`) in transformers' layout.

    Args:
        vision_tower: in place of the config's `mm_vision_tower`. Weights of the tower are taken
            from there, unless the LLaVA has its own.
        dtype: `float32`, `float16` or `bfloat16`; else every tensor keeps its own.
        conv_mode: the template of the chat template; else the config's `conversation_template`,
            else `vicuna_v1`.

    Raises:
        InputError: bad input, or a model that transformers' LLaVA-1.5 cannot express.
    """
    from llava.atomic import new_folder
    from llava.model import hf_processor
    from llava.model.shards import copy_small_files, local_folder, write_shards

    folder = local_folder(model_path)
    config = _read_llava_config(folder)
    vision_tower = vision_tower or config["mm_vision_tower"]
    vision = _read_tower_config(vision_tower)
    template = hf_processor.template_of(config, conv_mode)
    hf_config(config, vision, image_token_index=0, vocab_size=1)  # refuses before the long work

    weights, beside = _llava_weights(folder, config, model_base, dtype)
    weights = _with_tower(weights, config, vision_tower, model_path)
    embedding = weights[EMBEDDING]
    mark = hf_processor.picture_mark(config)
    with_image = _with_image_token(beside, len(embedding), mark, template, model_path)
    rows = -(-max(len(embedding), len(with_image)) // 64) * 64
    values = hf_config(
        {**config, "vocab_size": len(embedding), "dtype": dtype or str(embedding.dtype)[6:]},
        vision,
        image_token_index=hf_processor.image_id(with_image),
        vocab_size=rows,
        pad_token_id=with_image.pad_token_id,
    )

    with new_folder(output) as out:
        shapes: Shapes = {}
        write_shards(out, _noted(_cast(_hf_tensors(weights, rows), dtype), shapes), shard_bytes)
        _check_whole(shapes, values, model_path)
        chat = hf_processor.chat_template(template, mark)
        hf_processor.write_tokenizer(with_image, out, chat)
        pad = config.get("image_aspect_ratio") == "pad"
        hf_processor.write_processor(out, _read_pictures(vision_tower), values, chat, pad)
        copy_small_files(beside, out / KEPT)
        _write_generation_config(out, values)
        _write_json(out / "config.json", values)


def to_llava(
    model_path: str,
    output: str,
    *,
    vision_tower: str | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write transformers' LLaVA-1.5 (any of its dialects) as a full folder in upstream's layout.

    Args:
        vision_tower: what the config is to name in place of `OUT/vision_tower`, which is not
            written then. If it is on this machine, its weights must be those of the folder.

    Raises:
        InputError: bad input, or a model that upstream's layout cannot express.
    """
    from transformers import AutoConfig

    from llava.atomic import new_folder
    from llava.json_files import read_json
    from llava.model.checkpoint import aspect_of, write_config
    from llava.model.shards import Shards, copy_small_files, local_folder, write_shards

    folder = local_folder(model_path)
    hf = read_json(folder / "config.json")
    name = vision_tower or str(Path(output).absolute() / TOWER_FOLDER)
    kept = KEPT in hf and (folder / KEPT).is_dir()
    values = llava_config(hf, name, aspect_of(folder))
    values = _upstream_config(values, hf[KEPT] if kept else {}, dtype)
    rows = values["vocab_size"]

    weights = Shards(folder)
    renamed = [(new, old) for old in weights if (new := rename_to_llava(old))]
    tower = [(new, old) for new, old in renamed if new.startswith(TOWER)]
    others = [(new, old) for new, old in renamed if not new.startswith(TOWER)]

    def tensors() -> Stream:
        for new, old in others:
            yield new, weights[old][:rows] if new in (EMBEDDING, HEAD) else weights[old]

    def tower_tensors() -> Stream:
        return ((new.removeprefix(TOWER), weights[old]) for new, old in tower)

    with new_folder(output) as out:
        shapes: Shapes = {}
        write_shards(out, _noted(_cast(tensors(), dtype), shapes), shard_bytes)
        if vision_tower is None:
            (out / TOWER_FOLDER).mkdir()
            write_shards(out / TOWER_FOLDER, _noted(tower_tensors(), shapes, TOWER), shard_bytes)
            _write_tower_config(out / TOWER_FOLDER, folder, hf)
        else:
            _check_same_tower(_noted(tower_tensors(), shapes, TOWER), vision_tower, model_path)
        shapes = {_hf_name(name): shape for name, shape in shapes.items()}
        text = {**hf["text_config"], "vocab_size": rows, "pad_token_id": None}
        _check_whole(shapes, {**hf, "text_config": text}, model_path)
        copy_small_files(folder / KEPT if kept else folder, out)
        write_config(AutoConfig.for_model(values.pop("model_type"), **values), out, full=True)


# -- the input --------------------------------------------------------------------------------


def _read_llava_config(folder: Path) -> Config:
    from llava.json_files import read_json

    config = read_json(folder / "config.json")
    if "text_config" in config:
        raise InputError(f"{folder}: is in transformers' layout already (it has text_config)")
    if not config.get("mm_vision_tower"):
        raise InputError(f"{folder}: config.json has no mm_vision_tower, so this is no LLaVA")
    return {**config, "model_type": language_model_type(config)}


def _upstream_config(values: Config, kept: Config, dtype: str | None) -> Config:
    """The config to write, of `values`; `kept` is upstream's own, if transformers' has kept it."""
    # The tower stands by itself now, where readers look that know nothing of this flag.
    values = {key: value for key, value in values.items() if key != "unfreeze_mm_vision_tower"}
    if kept:
        values |= {key: kept[key] for key in ("vocab_size", "pad_token_id")}
    if dtype:
        values["dtype"] = values["torch_dtype"] = dtype
    return values


def _read_tower_config(name: str) -> Config:
    from llava.model.multimodal_encoder.builder import plug_in_type
    from llava.model.multimodal_encoder.clip_encoder import vision_config

    if kind := plug_in_type(name):
        raise InputError(
            f"vision tower {name} is of the type {kind!r}: transformers' LLaVA-1.5 has CLIP's and "
            "SigLIP's alone"
        )
    config = vision_config(name).to_dict()
    config.pop("_name_or_path", None)
    return config


def _with_image_token(
    folder: Path, rows: int, mark: str, template: Conversation, who: str
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder with `<image>`, for which `mark` stands, and `<pad>`.

    `InputError` if it has more tokens than the embedding of `who` has rows, or if the new one
    would give a prompt of `template` other ids.
    """
    from llava.model import hf_processor
    from llava.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    if len(tokenizer) > rows:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, "
            f"the embedding of {who} only {rows} rows"
        )
    with_image = hf_processor.with_image_token(tokenizer, mark)
    hf_processor.check_same_ids(tokenizer, with_image, template)
    return with_image


def _llava_weights(
    folder: Path, config: Config, base: str | None, dtype: str | None
) -> tuple[Tensors, Path]:
    """The weights of a LLaVA by their upstream names, and the folder with its tokenizer.

    A LoRA is merged in `dtype`, by default that of its base.
    """
    import torch

    from llava.model.builder import has_weights, load_pretrained_model
    from llava.model.checkpoint_names import PROJECTOR_FILE, on_disk
    from llava.model.lora import ADAPTER_CONFIG, base_of
    from llava.model.shards import Shards, local_folder
    from llava.state import load

    lora = (folder / ADAPTER_CONFIG).is_file()
    projector = folder / PROJECTOR_FILE
    if not lora and (has_weights(folder) or not projector.is_file()):
        return Shards(folder), folder
    if lora and base is None:
        base = base_of(folder)
    if not base:
        kind = "a LoRA" if lora else f"a projector ({PROJECTOR_FILE})"
        raise InputError(f"{folder}: holds only {kind}; name its language model with --model-base")
    base_folder = local_folder(base)
    weights: Tensors = Shards(base_folder)
    if not lora:
        own = {k: v for k, v in load(projector).items() if k.startswith("model.mm_projector.")}
        return _chained(own, weights), base_folder
    merge_in = getattr(torch, dtype) if dtype else weights[EMBEDDING].dtype
    _, model, _, _ = load_pretrained_model(
        str(folder), base, folder.name, device="cpu", dtype=merge_in
    )
    merged = {name: t for name, t in model.state_dict().items() if not name.startswith(TOWER)}
    if config.get("unfreeze_mm_vision_tower") or any(name.startswith(TOWER) for name in weights):
        tower = model.get_vision_tower().vision_tower.state_dict()
        merged |= {on_disk(f"vision_tower.{name}"): tensor for name, tensor in tower.items()}
    return merged, base_folder


def _with_tower(weights: Tensors, config: Config, tower: str, who: str) -> Tensors:
    """The weights of `who`, with those of the vision tower `tower` where they have none."""
    if EMBEDDING not in weights:
        raise InputError(f"{who}: the weights have no {EMBEDDING}")
    if any(name.startswith(TOWER) for name in weights):
        return weights
    if config.get("unfreeze_mm_vision_tower"):
        raise InputError(f"{who}: its vision tower was tuned but is not in the weights")
    return _chained(weights, _tower_weights(tower))


def _tower_weights(name: str, **kwargs) -> Tensors:
    """The weights of a tower by folder or hub name, under upstream's names in a full LLaVA."""
    from transformers import AutoConfig

    from llava.model.checkpoint_names import on_disk

    try:
        with quiet():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **kwargs)
            kind: Any = vision_model_class(getattr(config, "vision_config", config))
            model = kind.from_pretrained(name, dtype="auto", **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        why = reason(error)
        raise InputError(f"vision tower {name}: its weights do not load ({why})") from None
    return {on_disk(f"vision_tower.{name}"): tensor for name, tensor in model.state_dict().items()}


def _chained(*parts: Tensors) -> Tensors:
    """One mapping over several: the first that has a name gives its tensor."""
    # ChainMap is typed as one that may be written to, which it is not here.
    return ChainMap(*(cast("MutableMapping[str, torch.Tensor]", part) for part in parts))


# -- tensors on their way -------------------------------------------------------------------------


def _hf_tensors(weights: Tensors, rows: int) -> Stream:
    """Weights under transformers' names, with `rows` tokens in embedding and head."""
    for name in weights:
        if new := rename_to_hf(name):
            tensor = weights[name]
            yield new, _add_rows(tensor, rows) if name in (EMBEDDING, HEAD) else tensor


def _add_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    import torch

    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def _cast(tensors: Stream, dtype: str | None) -> Stream:
    import torch

    return ((name, t.to(getattr(torch, dtype)) if dtype else t) for name, t in tensors)


def _noted(tensors: Stream, shapes: Shapes, prefix: str = "") -> Stream:
    """The same tensors; their shapes are put into `shapes` as they pass."""
    for name, tensor in tensors:
        shapes[prefix + name] = tuple(tensor.shape)
        yield name, tensor


# -- is it right? ---------------------------------------------------------------------------------


def _check_whole(shapes: Shapes, hf: Config, who: str) -> None:
    """`InputError` unless there is every tensor of the model that `hf` describes, and no other.

    `shapes` are by transformers' names.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_dict({key: value for key, value in hf.items() if key != KEPT})
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    expected: Shapes = {
        _hf_name(new): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if (new := rename_to_llava(name))
    }
    head = _hf_name(HEAD)
    if config.tie_word_embeddings and head not in shapes:
        del expected[head]
    for name in sorted(expected.keys() | shapes.keys()):
        found, wanted = (of.get(name, "nothing") for of in (shapes, expected))
        if found != wanted:
            raise InputError(f"{who}: tensor {name} is {found}, its config makes it {wanted}")


def _hf_name(name: str) -> str:
    """`rename_to_hf` of a tensor that both layouts have."""
    new = rename_to_hf(name)
    assert new is not None, name
    return new


def _check_same_tower(own: Stream, name: str, who: str) -> None:
    """`InputError` if the tower `name` is on this machine and is not the folder's own."""
    import torch

    from llava.model.checkpoint_names import on_disk

    tensors = dict(own)
    try:
        other = _tower_weights(name, local_files_only=True)
    except InputError:
        print(f"{name} is not on this machine: that it is the tower of {who} is taken on trust")
        return
    for key, tensor in tensors.items():
        theirs = other.get(on_disk(f"vision_tower.{key}"), tensor[:0])
        if not torch.equal(tensor, theirs.to(tensor.dtype)):
            raise InputError(
                f"--vision-tower {name}: its tensor {key} is not that of {who}, so it is another "
                "tower, or one tuned since; leave the flag out"
            )


# -- the small files ------------------------------------------------------------------------------


def _read_pictures(folder: str | Path) -> Config:
    """The picture processor of a folder or hub name, as in preprocessor_config.json."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            str(folder), backend="pil", trust_remote_code=False
        ).to_dict()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no readable picture processor ({reason(error)})") from None


def _write_tower_config(out: Path, folder: Path, hf: Config) -> None:
    from transformers import LlavaConfig

    vision: Any = LlavaConfig.from_dict(hf).vision_config  # a config, made of the dict
    kind = vision_model_class(vision).__name__
    _write_json(out / "config.json", {**vision.to_dict(), "architectures": [kind]})
    pictures = _read_pictures(folder)
    pictures["image_processor_type"] = kind.replace("VisionModel", "ImageProcessor")
    for key in ("do_pad", "processor_class"):
        pictures.pop(key, None)
    _write_json(out / "preprocessor_config.json", pictures)


def _write_generation_config(out: Path, hf: Config) -> None:
    from llava.json_files import read_json

    own = out / KEPT / "generation_config.json"
    values = {key: hf["text_config"].get(key) for key in ("bos_token_id", "eos_token_id")}
    if own.is_file():
        values |= read_json(own)
    _write_json(out / "generation_config.json", {**values, "pad_token_id": hf["pad_token_id"]})


def _write_json(path: Path, values: Config) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.model.convert",
        description="Convert between upstream's LLaVA layout and transformers' llava-1.5.",
    )
    parser.add_argument("--to", required=True, choices=["hf", "llava"], help="the layout to write")
    parser.add_argument("--model-path", required=True, help="the model, a folder or hub name")
    parser.add_argument("--output", required=True, help="a folder that is new or empty")
    parser.add_argument("--model-base", help="the language model of a projector or a LoRA")
    parser.add_argument("--vision-tower", help="another folder or hub name for the vision tower")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--conv-mode", help="the conversation template of the chat template")
    args = parser.parse_args(argv)
    shared = {"vision_tower": args.vision_tower, "dtype": args.dtype}
    if args.to == "hf":
        to_hf(args.model_path, args.output, model_base=args.model_base, conv_mode=args.conv_mode,
              **shared)  # fmt: skip
        return
    for flag in ("model_base", "conv_mode"):
        if getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')} has no meaning with --to llava")
    to_llava(args.model_path, args.output, **shared)


if __name__ == "__main__":
    with one_clear_error():
        main()
