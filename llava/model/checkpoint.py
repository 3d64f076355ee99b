"""Every on-disk form of a LLaVA, read and written in one place.

Upstream's layout is the native one. A *projector-only* folder has `mm_projector.bin` and
`config.json`; a *full* folder has the language model's weights with the projector among them.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch
from torch import nn

from llava.atomic import write_text
from llava.errors import InputError
from llava.state import State, check

PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR_PREFIX = "model.mm_projector."


def read_config(path: str | os.PathLike):
    """The config of a LLaVA folder (or of a plain language model) with its base's `model_type`.

    transformers takes a flat config of model_type `llava` for its own LLaVA and fills in defaults
    in silence, so the JSON is read first and judged by its structure.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    folder = Path(path)
    if str(path).startswith(("/", ".", "~")) and not folder.is_dir():
        raise InputError(f"{path}: no such folder")
    try:
        file = folder / "config.json" if folder.is_dir() else cached_file(str(path), "config.json")
        raw = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no readable config.json ({error})") from None
    if "text_config" in raw:
        raise InputError(
            f"{path}: this is transformers' own LLaVA layout (it has text_config); "
            "upstream's layout is expected"
        )
    model_type = str(raw.pop("model_type", "")).removeprefix("llava_")
    if model_type in ("", "llava"):
        model_type = "llama"
    try:
        return AutoConfig.for_model(model_type, **raw)
    except ValueError as error:
        raise InputError(f"{path}: config.json has model_type {model_type!r}: {error}") from None


def write_config(config, folder: str | os.PathLike, *, full: bool) -> None:
    """Write `config.json` as upstream does: model_type `llava_<base>`, mm_* keys beside."""
    values = config.to_dict()
    values["model_type"] = f"llava_{config.model_type}"
    base = _causal_lm_class(config).__name__
    values["architectures"] = [f"Llava{base}" if full else base]
    # The names that transformers 4 reads.
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope:
        values.setdefault("rope_theta", rope["rope_theta"])
    if values.get("dtype") is not None:
        values["torch_dtype"] = values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    write_text(Path(folder) / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")


def _causal_lm_class(config) -> type:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise InputError(
            f"model_type {config.model_type!r} has no causal language model in transformers"
        ) from None


def model_class(config) -> type:
    """The class a config asks for: its language model's LLaVA, or that model if without mm keys."""
    from llava.model.llava_arch import llava_class

    base = _causal_lm_class(config)
    return llava_class(base) if getattr(config, "mm_hidden_size", None) else base


@contextlib.contextmanager
def gathered(parameters, *, write: bool = False):
    """Each parameter whole inside the block, under ZeRO-3 too; `write` keeps rank 0's edits."""
    parameters = list(parameters)
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


def projector_state(model: nn.Module) -> State:
    """The projector's tensors on the CPU, named `model.mm_projector.*`, in their training dtype.

    Under ZeRO-3 every rank must call it.
    """
    projector = model.get_model().mm_projector
    with gathered(projector.parameters()):
        return {
            PROJECTOR_PREFIX + name: tensor.detach().cpu().clone()
            for name, tensor in projector.state_dict().items()
        }


def load_projector(model: nn.Module, tensors: State, source: str) -> None:
    """Copy a state into the model's projector, in the model's dtype; under ZeRO-3 on every rank.

    Tensors that are not the projector's (upstream may save embeddings beside it) are passed over.

    Raises:
        StateError: a name, shape or type that is not the projector's, NaN or infinity; `source`
            opens the message, and nothing has been copied.
    """
    projector = model.get_model().mm_projector
    like = {
        PROJECTOR_PREFIX + name: torch.empty(getattr(p, "ds_shape", p.shape), device="meta")
        for name, p in projector.named_parameters()
    }
    own = {name: t for name, t in tensors.items() if name.startswith(PROJECTOR_PREFIX)}
    check(own, like, who=source)
    with gathered(projector.parameters(), write=True), torch.no_grad():
        for name, parameter in projector.named_parameters():
            if parameter.numel():  # ZeRO-3: only rank 0 holds what it writes
                parameter.copy_(own[PROJECTOR_PREFIX + name])
