"""A LLaVA's folder and a model in memory: configs, projectors and whole models between the two.

Upstream's layout is the native one. A *projector-only* folder has `mm_projector.bin` and
`config.json`; a *full* folder has the language model's weights with the projector, and perhaps the
vision tower, among them; a *LoRA* folder is described in `lora.py`, transformers' own layout in
`hf_layout.py`. The tensors' names are in `checkpoint_names.py`; `builder.py` makes a model of a
folder of any form.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from llava.atomic import write_text
from llava.errors import InputError, reason
from llava.json_files import read_json
from llava.model.checkpoint_names import (
    EXTRA_PREFIX,
    NEWLINE,
    PROJECTOR_PREFIX,
    ROWS,
    SEPARATE,
    on_disk,
    projector_name,
    tower_name,
)
from llava.model.gguf import find_gguf, gguf_config
from llava.model.hf_layout import language_model_type, llava_config
from llava.model.shards import Shards, check_hub_name, not_found, write_shards
from llava.model.tokenizer import write_tokenizer
from llava.state import State, check
from llava.transformers_private import causal_lm_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llava.model.llava_arch import LlavaMixin


def read_config(path: str | os.PathLike):
    """The config of a LLaVA folder (or of a plain language model) with its base's `model_type`.

    transformers takes a flat config of model_type `llava` for its own LLaVA and fills in defaults
    in silence, so the JSON is read first and judged by its structure. One with `text_config` is
    transformers' own layout, and becomes upstream's; the tower is then the folder itself.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    if gguf := find_gguf(path):
        return gguf_config(gguf)
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        check_hub_name(path)
        try:
            cached = cached_file(str(path), "config.json")
        except OSError as error:
            raise InputError(f"{path}: {not_found(error)}") from None
        assert cached is not None  # else it has raised
        file = Path(cached)
    raw = read_json(file)
    kinds = {"mm_vision_tower": str, "mm_vision_tower_type": str, "mm_hidden_size": int}
    for key, kind in kinds.items():
        if not isinstance(raw.get(key) or kind(), kind):
            expected = f"expected a value of type {kind.__name__}"
            raise InputError(f"{path}: config.json has {key} {raw[key]!r}, {expected}")
    if "text_config" in raw:
        raw = llava_config(raw, vision_tower=str(path), image_aspect_ratio=aspect_of(folder))
    model_type = language_model_type(raw)
    raw.pop("model_type", None)
    if raw.get("rope_parameters") or raw.get("rope_scaling") is None:
        raw.pop("rope_scaling", None)  # transformers 4's name, which 5 complains about
    try:
        return AutoConfig.for_model(model_type, **raw)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(
            f"{path}: config.json has model_type {model_type!r}: {reason(error)}"
        ) from None


def aspect_of(folder: Path) -> str:
    """`image_aspect_ratio` of a folder in transformers' layout: `pad` if its processor pads."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            if values.get("image_processor", values).get("do_pad"):
                return "pad"
    return "square"


def write_config(config, folder: str | os.PathLike, *, full: bool) -> None:
    """Write `config.json` as upstream does: model_type `llava_<base>`, mm_* keys beside."""
    values = config.to_dict()
    values.pop("quantization_config", None)  # in which bits a base is loaded is not its own matter
    values["model_type"] = f"llava_{config.model_type}"
    base = _causal_lm_class(config).__name__
    values["architectures"] = [f"Llava{base}" if full else base]
    values |= _rope_for_transformers_4(values.get("rope_parameters") or {})
    if values.get("dtype") is not None:
        values["torch_dtype"] = values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    write_text(Path(folder) / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")


def _rope_for_transformers_4(rope: dict) -> dict:
    """The keys that transformers 4 reads in place of `rope_parameters`."""
    if "rope_theta" not in rope:
        return {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {"rope_theta": rope["rope_theta"]}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if kind in ("linear", "dynamic"):
        scaling = {"type": kind, "factor": float(rope["factor"])}  # 4.37 takes just these two
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _causal_lm_class(config: Any) -> type[PreTrainedModel]:
    try:
        return causal_lm_class(config)
    except KeyError:
        raise InputError(
            f"model_type {config.model_type!r} has no causal language model in transformers"
        ) from None


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class a config asks for: its language model's LLaVA, or that model if without mm keys."""
    from llava.model.llava_arch import llava_class

    base = _causal_lm_class(config)
    return llava_class(base) if getattr(config, "mm_hidden_size", None) else base


def grafted(model: nn.Module) -> LlavaMixin:
    """`model`, a LLaVA, which peft may have wrapped: a wrapper has the attributes of its model."""
    return cast("LlavaMixin", model)


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Each parameter whole inside the block, under ZeRO-3 too; `write` keeps rank 0's edits."""
    parameters = list(parameters)
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


def copies(parameters: Mapping[str, nn.Parameter]) -> State:
    """Whole copies on the CPU, in their own types; under ZeRO-3 every rank must call it."""
    with gathered(parameters.values()):
        return {name: p.detach().cpu().clone() for name, p in parameters.items()}


def copy_in(tensors: State, parameters: Mapping[str, nn.Parameter], who: str) -> None:
    """Copy by name into parameters, in their types; under ZeRO-3 every rank must call it.

    Raises:
        StateError: names or shapes are not those of `parameters`, or a value is not finite; `who`
            opens the message, and nothing has been copied.
    """
    like = {
        name: torch.empty(getattr(p, "ds_shape", p.shape), device="meta")
        for name, p in parameters.items()
    }
    check(tensors, like, who=who)
    with gathered(parameters.values(), write=True), torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.numel():  # ZeRO-3: only rank 0 holds what it writes
                parameter.copy_(tensors[name])


def projector_state(model: nn.Module) -> State:
    """The projector's tensors on the CPU, named `model.mm_projector.*`, in their training dtype.

    The newline token of `spatial_unpad` is one of them, and the rows of start and end token, where
    they train. Under ZeRO-3 every rank must call it.
    """
    parameters = projector_parameters(model)
    return copies(parameters)


def load_projector(model: nn.Module, tensors: State, source: str) -> None:
    """Copy a state into the model's projector, in the model's dtype; under ZeRO-3 on every rank.

    Tensors that are not the projector's are passed over (embeddings that upstream may save beside
    it are, too, unless rows of theirs train in `model`); a newline token that is not there
    (upstream saves none) stays as it is, and so do such rows. Where a file has the
    base of a connector alone, an mlp2x_gelu for `pilot`, the rest is derived from it.

    Raises:
        StateError: a name, shape or type that is not the projector's, NaN or infinity; `source`
            opens the message, and nothing has been copied.
    """
    parameters = projector_parameters(model)
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(PROJECTOR_PREFIX) or name in parameters
    }
    if ROWS in own:
        own[ROWS] = own_rows(own[ROWS], {grafted(model).get_input_embeddings().num_embeddings})
    base_alone = not any(name.startswith(EXTRA_PREFIX) for name in own)
    left_out = {NEWLINE, ROWS} - own.keys()
    if base_alone:
        left_out |= {name for name in parameters if name.startswith(EXTRA_PREFIX)}
    copy_in(own, {name: p for name, p in parameters.items() if name not in left_out}, source)
    if base_alone:
        derive_projector(model)


def derive_projector(model: nn.Module) -> None:
    """Set what a connector has beside its base from the base; under ZeRO-3 on every rank."""
    projector = grafted(model).get_model().mm_projector
    with gathered(projector.parameters(), write=True):
        projector.derive()


def projector_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The projector's own parameters, named as in `projector_state`."""
    parts = grafted(model).get_model()
    found = {projector_name(name): p for name, p in parts.mm_projector.named_parameters()}
    if hasattr(parts, "image_newline"):
        found[NEWLINE] = parts.image_newline
    if (rows := separated_rows(model)) is not None:
        found[ROWS] = rows
    return found


def separated_rows(model: nn.Module) -> nn.Parameter | None:
    """The rows (2, hidden) of start and end token, where they are a parameter of their own."""
    return getattr(grafted(model).get_input_embeddings(), SEPARATE, None)


def own_rows(tensor: torch.Tensor, tables: Container[int]) -> torch.Tensor:
    """The start and end token's rows of what a file has for the embedding: the two by themselves,
    or the last of a whole table of `tables` rows; else it stays as it is."""
    return tensor[-2:] if tensor.ndim == 2 and len(tensor) in tables else tensor


def tower_weights(folder: str | os.PathLike) -> State | None:
    """The vision tower's tensors in a full folder, named as in the tower itself; None if none."""
    shards = Shards(folder)
    names = {short: name for name in shards if (short := tower_name(name))}
    return {short: shards[name] for short, name in names.items()} or None


def save_full(
    model: PreTrainedModel, tokenizer, folder: str | os.PathLike, state: State | None = None
) -> None:
    """Write a full folder: weights under upstream's names, config, tokenizer.

    Args:
        state: the model's state dict, if it has been gathered already.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    tied = getattr(model.config, "tie_word_embeddings", False)

    names = {name: on_disk(name) for name in state if not (tied and name == "lm_head.weight")}
    write_shards(folder, ((names[name], state[name]) for name in names))
    if model.can_generate():
        # Its save_pretrained refuses what Vicuna has: a temperature without do_sample.
        write_text(folder / "generation_config.json", model.generation_config.to_json_string())
    write_tokenizer(tokenizer, folder)
    write_config(model.config, folder, full=True)


def load_full(model: nn.Module, folder: str | os.PathLike) -> None:
    """Load the weights that `save_full` wrote into the model that they are of."""
    shards = Shards(folder)
    own = {on_disk(name): tensor for name, tensor in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        own.pop("lm_head.weight", None)
    check({name: shards[name] for name in shards}, own, who=str(folder))
    with torch.no_grad():
        for name in shards:
            own[name].copy_(shards[name])
