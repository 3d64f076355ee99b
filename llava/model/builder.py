"""`load_pretrained_model`: from files on disk to a model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llava.conversation import template_of
from llava.errors import InputError, reason
from llava.model import lora
from llava.model.checkpoint import (
    derive_projector,
    gathered,
    load_projector,
    model_class,
    read_config,
    tower_weights,
)
from llava.model.checkpoint_names import (
    EXTRA_PREFIX,
    NEWLINE,
    PROJECTOR_FILE,
    PROJECTOR_PREFIX,
    ROWS,
    SEPARATE_ROWS,
    split_tower,
)
from llava.model.gguf import find_gguf, gguf_weights, named
from llava.model.hf_layout import FROM_HF
from llava.model.hf_logging import quiet
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.pilot import EXTRA
from llava.model.picture_tokens import add_picture_tokens, grow_embeddings
from llava.model.quantize import check_4bit_on_cpu, quantization
from llava.model.shards import Shards, check_hub_name, local_folder
from llava.model.tokenizer import load_tokenizer
from llava.state import State, load


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    **kwargs: Any,
):
    """Load any LLaVA, judged by its files and its config.

    A folder with `adapter_config.json` is a LoRA, which is merged into its base; one with
    `mm_projector.bin` and no weights is a projector, which goes onto its base; one with weights is
    a full model, in upstream's layout or in transformers'. A vision tower among the weights is the
    one that is used.

    Args:
        model_path: the LLaVA: a folder or a hub name.
        model_base: the language model of a LoRA or a projector; for a LoRA that names its own, it
            may be None.
        model_name: upstream's argument; what a folder is called decides nothing here.
        load_8bit, load_4bit: quantise the language model with bitsandbytes. The projector stays as
            it is, and a LoRA stays beside the quantised layers instead of being merged.
        device: `cuda`, `cpu`, …; the CPU computes in float32, other devices in float16 unless
            `dtype=` says otherwise.
        device_map: how a model is spread over GPUs; of use with `cuda` only.
        kwargs: `gguf_file`, which file of the language model's folder; others as
            `from_pretrained` of transformers takes them.

    Returns:
        (tokenizer, model, image_processor, context_len), as upstream; image_processor is None for
        a language model without pictures.

    Raises:
        InputError: a file that is missing, broken, or of another model.
    """
    device = device if device != "cuda" or torch.cuda.is_available() else "cpu"
    bits = 4 if load_4bit else 8 if load_8bit else 16
    gguf_file = kwargs.pop("gguf_file", None)
    if model_base:
        model_base = named(model_base, gguf_file)
    else:
        model_path = named(model_path, gguf_file)
    gguf = find_gguf(model_path)
    folder = gguf.parent if gguf else local_folder(model_path)
    is_lora = (folder / lora.ADAPTER_CONFIG).is_file()
    is_projector = (folder / PROJECTOR_FILE).is_file() and not has_weights(folder)
    source = str(gguf or _source(folder, model_base, is_lora, is_projector))
    config = _config(folder, source, is_lora, is_projector)

    options = _load_options(device, device_map, bits, use_flash_attn, kwargs)
    model, missing, tower = _base(source, config, device, options)
    tokenizer = load_tokenizer(source)
    trained: State = {}
    if is_projector:
        trained = load(folder / PROJECTOR_FILE)
        load_projector(model, trained, str(folder / PROJECTOR_FILE))
    if is_lora:
        model, own_tokenizer, own_tower, trained = _with_lora(model, folder, merged=bits == 16)
        tokenizer, tower = own_tokenizer or tokenizer, own_tower or tower
    if bits == 4 and device == "cpu":
        check_4bit_on_cpu(model)
    _check_loaded(missing, trained, folder, source)
    return _with_pictures(model.eval(), tokenizer, tower, options["dtype"], trained, str(folder))


def _rows_of_tokens(trained: State) -> State:
    """`trained` with the rows of start and end token, if it has them, as the embedding's.

    They go into it once it has their tokens; a whole embedding is there already.
    """
    others = {n: t for n, t in trained.items() if n not in (ROWS, SEPARATE_ROWS)}
    return {**others, ROWS: trained[SEPARATE_ROWS]} if SEPARATE_ROWS in trained else others


def _load_options(
    device: str,
    device_map: str | dict,
    bits: int,
    use_flash_attn: bool,
    given: dict[str, Any],
) -> dict[str, Any]:
    """The arguments of `from_pretrained`; without `device_map` if the model is to be moved later.

    `given` are the caller's own, perhaps under older names.
    """
    options = dict(given)
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    use_flash_attn |= bool(options.pop("use_flash_attention_2", False))
    options.setdefault("attn_implementation", "flash_attention_2" if use_flash_attn else "sdpa")
    on_gpu = device.startswith("cuda")
    # "auto" spreads over all GPUs, so not when one of them is named.
    spread = device == "cuda" or (on_gpu and device_map != "auto")
    placement = device_map if spread else {"": device}
    if on_gpu and bits == 16:
        options["device_map"] = placement
    return {**options, "dtype": dtype, **quantization(bits, dtype, placement)}


def _base(
    source: str, config, device: str, options: dict[str, Any]
) -> tuple[Any, list[str], State | None]:
    """The model with the weights of `source`, which of the projector's they lack, and the tower's
    weights if they are among them."""
    model, missing = _from_pretrained(source, config, **options)
    if "device_map" not in options:
        model.to(device)
    if find_gguf(source) or not hasattr(model, "get_vision_tower"):
        return model, missing, None
    return model, missing, tower_weights(folder_of(source))


def _check_loaded(missing: list[str], trained: State, folder: Path, source: str) -> None:
    """`InputError` for a tensor `missing` in the weights of `source` that `folder` lacks, too."""
    extra = PROJECTOR_PREFIX + EXTRA
    loaded = {n.replace(EXTRA_PREFIX, extra, 1) for n in trained} | trained.keys()
    if lost := [name for name in missing if name not in loaded and name != NEWLINE]:
        raise InputError(f"{folder}: no {lost[0]} there, nor in {source}")


def _config(folder: Path, source: str, is_lora: bool, is_projector: bool):
    """The config of the model that is built of `folder` and its language model `source`."""
    if is_lora and not (folder / "config.json").is_file():
        config = read_config(source)
        _find_tower(config, folder_of(source))
        return config
    config = read_config(folder)
    _find_tower(config, folder)
    if getattr(config, "mm_vision_tower", None):  # of another width or kind? Before all is loaded
        build_vision_tower(config, delay_load=True)
    if is_projector and not getattr(config, "mm_hidden_size", None):
        raise InputError(f"{folder}: config.json has no mm_hidden_size, so this is no LLaVA's")
    if is_projector or is_lora:
        # The base has no rows yet for the tokens that training added; they are added again.
        config.vocab_size = min(config.vocab_size, read_config(source).vocab_size)
    return config


def _with_lora(model, folder: Path, merged: bool) -> tuple[Any, Any, State, State]:
    """The model with the LoRA of `folder`, and what lies beside the adapter: its tokenizer if it
    has one of its own, the tower's tensors, and the others as `_rows_of_tokens` has them."""
    tower, beside = split_tower(lora.read_beside(folder))
    tokenizer = _own_tokenizer(folder, beside)
    for name in (ROWS, lora.HEAD):
        if name in beside:
            grow_embeddings(model, len(beside[name]))
    loaded = {name: tensor for name, tensor in beside.items() if name != SEPARATE_ROWS}
    lora.load_non_lora(model, loaded, lora.beside_file(folder))
    adapted = lora.attach_lora(model, folder)
    # What is quantised cannot take the adapter in without a loss.
    model = lora.merge(adapted, folder) if merged else adapted.get_base_model()
    return model, tokenizer, tower, _rows_of_tokens(beside)


def _own_tokenizer(folder: Path, beside: State):
    """The tokenizer of an adapter with an embedding of its own, which may have more tokens."""
    has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return load_tokenizer(str(folder)) if ROWS in beside and has_one else None


def _find_tower(config, folder: Path) -> None:
    """A tower is found by its relative path from the LLaVA's own folder, too, and in that folder,
    wherever that was moved.

    Raises:
        InputError: a path, and no name of the hub, at which there is no folder.
    """
    named = getattr(config, "mm_vision_tower", None)
    if not named or Path(named).expanduser().is_dir():
        return
    for place in (folder / named, folder / Path(named).name):
        if (place / "config.json").is_file():
            config.mm_vision_tower = str(place)
            return
    try:
        check_hub_name(named)
    except InputError:
        raise InputError(
            f"{folder}: config.json has mm_vision_tower {named!r}: there is no such folder, "
            f"neither from {Path.cwd()} nor from {folder}; put the tower's folder there, or its "
            "place or hub name into config.json"
        ) from None


def _with_pictures(
    model, tokenizer, tower: State | None, dtype: torch.dtype, trained: State, source: str
):
    """Tokens, tower and picture processor of a LLaVA; the tuple that upstream returns.

    `trained`, from `source`, may have the rows of tokens.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding only {rows} rows"
        )
    image_processor = None
    if hasattr(model, "get_vision_tower"):
        add_picture_tokens(model, tokenizer, trained, source)
        weight = next(
            model.get_model().mm_projector.parameters(), model.get_input_embeddings().weight
        )
        loaded = model.load_vision_tower(dtype, weight.device, weights=tower)
        image_processor = loaded.image_processor
    if not getattr(model.config, "conversation_template", None) and (own := template_of(tokenizer)):
        model.config.conversation_template = own
    context_len = getattr(model.config, "max_sequence_length", None) or 2048
    return tokenizer, model, image_processor, context_len


def _source(folder: Path, model_base: str | None, is_lora: bool, is_projector: bool) -> str:
    """The place of the language model's weights: the folder itself, or its base."""
    if is_lora:
        model_base = model_base or lora.base_of(folder)
        if not model_base:
            raise InputError(f"{folder}: a LoRA; name its language model with --model-base")
        return str(model_base)
    if is_projector:
        if model_base is None:
            raise InputError(
                f"{folder}: holds only a projector ({PROJECTOR_FILE}); "
                "name its language model with --model-base"
            )
        return str(model_base)
    if not has_weights(folder):
        raise InputError(
            f"{folder}: neither weights nor {PROJECTOR_FILE} nor {lora.ADAPTER_CONFIG} are there"
        )
    return str(folder)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a language model's weights, or their index."""
    patterns = ("model*.safetensors*", "pytorch_model*.bin*")
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def folder_of(path: str) -> Path:
    """The folder of weights that have been loaded from `path`, a folder or a hub name."""
    if Path(path).is_dir():
        return Path(path)
    if gguf := find_gguf(path):
        return gguf.parent
    from transformers.utils import cached_file

    file = cached_file(path, "config.json")
    assert file is not None  # else it has raised
    return Path(file).parent


def from_pretrained(path: str, config, **kwargs):
    """`from_pretrained` of the class that `config` asks for, in upstream's layout or transformers'.

    A projector that the weights do not hold starts as torch's own layers do (as upstream's does),
    from torch's global seed.

    Raises:
        InputError: the files do not load, or lack a tensor of the language model.
    """
    return _from_pretrained(path, config, **kwargs)[0]


def _from_pretrained(path: str, config, **kwargs) -> tuple[Any, list[str]]:
    """The model, and which of the projector's tensors the weights lacked."""
    source: str | None = path
    if gguf := find_gguf(path):
        source, kwargs["state_dict"] = None, gguf_weights(gguf, kwargs.get("dtype", torch.float32))
    elif Path(path).is_dir():
        _check_kind(Path(path))
        _check_weights(path, config)
    try:
        with quiet():
            loaded: Any = model_class(config).from_pretrained(
                source, config=config, output_loading_info=True, key_mapping=FROM_HF, **kwargs
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: the weights do not load ({reason(error)})") from None
    model, found = loaded  # as `output_loading_info` asks
    model.config.name_or_path = model.name_or_path = str(path)  # also where it came as tensors
    # A projector that is not there yet is no news; what else is missing is an error.
    missing = sorted(found["missing_keys"])
    own = [name for name in missing if name.startswith(PROJECTOR_PREFIX) or name == NEWLINE]
    if lost := [name for name in missing if name not in own]:
        raise InputError(f"{path}: {len(lost)} tensors are missing from the weights, as {lost[0]}")
    if own:
        _fresh_projector(model, own)
    return model, own


def _fresh_projector(model, missing: list[str]) -> None:
    parts = model.get_model()
    extra = PROJECTOR_PREFIX + EXTRA
    if any(name.startswith(PROJECTOR_PREFIX) and not name.startswith(extra) for name in missing):
        with gathered(parts.mm_projector.parameters(), write=True):
            for layer in parts.mm_projector.modules():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
    if any(name.startswith(extra) for name in missing):
        derive_projector(model)
    if NEWLINE in missing:
        with gathered([parts.image_newline], write=True), torch.no_grad():
            parts.image_newline.normal_(std=model.config.hidden_size**-0.5)


def _check_kind(folder: Path) -> None:
    """Say what to do with a folder that is a LLaVA, but has no language model in it."""
    if has_weights(folder):
        return
    if (folder / lora.ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{folder}: a LoRA without its language model; merge them with "
            "scripts/merge_lora_weights.py, or train on with --lora_weight_path"
        )
    if (folder / PROJECTOR_FILE).is_file():
        raise InputError(
            f"{folder}: a projector without its language model; name that as the model, and "
            f"{PROJECTOR_FILE} with --pretrain_mm_mlp_adapter"
        )


def _check_weights(path: str, config) -> None:
    """Refuse weights that are not those of `config`, before they are loaded."""
    shards = Shards(path)
    shards.check_files()
    projector = [name for name in shards if "mm_projector." in name or "multi_modal_proj" in name]
    if projector and not getattr(config, "mm_hidden_size", None):
        raise InputError(
            f"{path}: the weights hold a projector ({projector[0]}), "
            "but config.json has no mm_hidden_size"
        )
    embedding = next((name for name in shards if name.endswith("embed_tokens.weight")), None)
    if embedding:
        if shards[embedding].ndim != 2:
            shape = tuple(shards[embedding].shape)
            raise InputError(f"{path}: {embedding} has shape {shape}, (rows, width) is expected")
        rows, width = shards[embedding].shape
        for found, key in ((rows, "vocab_size"), (width, "hidden_size")):
            expected = getattr(config, key, found)
            if found != expected:
                raise InputError(
                    f"{path}: {embedding} is {rows} x {width}, the config has {key} {expected}"
                )
