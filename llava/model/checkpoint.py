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

from llava.atomic import atomic_write, write_text
from llava.errors import InputError

PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR_PREFIX = "model.mm_projector."


def read_config(path: str | os.PathLike):
    """The config of a LLaVA folder (or of a plain language model) with its base's `model_type`.

    transformers takes a flat config of model_type `llava` for its own LLaVA and fills in defaults
    in silence, so the JSON is read first and judged by its structure.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    try:
        file = cached_file(str(path), "config.json")
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
    """Write `config.json` as upstream does: `llava_<base>` as model_type, mm_* keys beside the base's."""
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
    """The class a config asks for: its language model's LLaVA, or that model when it has no mm keys."""
    from llava.model.llava_arch import llava_class

    base = _causal_lm_class(config)
    return llava_class(base) if getattr(config, "mm_hidden_size", None) else base


@contextlib.contextmanager
def gathered(parameters, *, write: bool = False):
    """The whole of each parameter inside the block, under ZeRO-3 too; `write` keeps rank 0's edits."""
    parameters = list(parameters)
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


def projector_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The projector's tensors on the CPU, named `model.mm_projector.*`, in their training dtype.

    Under ZeRO-3 every rank must call it.
    """
    projector = model.get_model().mm_projector
    with gathered(projector.parameters()):
        return {
            PROJECTOR_PREFIX + name: tensor.detach().cpu().clone()
            for name, tensor in projector.state_dict().items()
        }


def check_projector(state: dict[str, torch.Tensor], projector: nn.Module, source: str) -> None:
    """Refuse a state whose names or shapes are not those of `projector` (whole, or under ZeRO-3)."""
    for name, tensor in projector.state_dict(keep_vars=True).items():
        expected = tuple(getattr(tensor, "ds_shape", tensor.shape))
        key = PROJECTOR_PREFIX + name
        if key not in state:
            raise InputError(f"{source}: tensor {key} is missing, the model's projector has it")
        if tuple(state[key].shape) != expected:
            raise InputError(
                f"{source}: tensor {key} has shape {tuple(state[key].shape)}, "
                f"the model's projector expects {expected}"
            )
        if not state[key].is_floating_point():
            raise InputError(f"{source}: tensor {key} is {state[key].dtype}, a float is expected")
        if not torch.isfinite(state[key]).all():
            raise InputError(f"{source}: tensor {key} holds NaN or infinity")
    known = {PROJECTOR_PREFIX + name for name in projector.state_dict(keep_vars=True)}
    for key in state:
        if key.startswith(PROJECTOR_PREFIX) and key not in known:
            raise InputError(f"{source}: tensor {key} does not exist in the model's projector")


def load_projector(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Copy a state into the model's projector, keeping the model's dtype; under ZeRO-3 on every rank."""
    projector = model.get_model().mm_projector
    check_projector(state, projector, source)
    with gathered(projector.parameters(), write=True), torch.no_grad():
        for name, parameter in projector.named_parameters():
            if parameter.numel():  # ZeRO-3: only rank 0 holds what it writes
                parameter.copy_(state[PROJECTOR_PREFIX + name])


def read_projector(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of an `mm_projector.bin` or `.safetensors`, whatever prefix they were saved under.

    Projector tensors come back as `model.mm_projector.*`, others under their own names.

    Raises:
        InputError: no such file, not tensors (nothing is unpickled but tensors), or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such projector file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            raw = load_file(path)
        else:
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: not a readable file of tensors ({reason})") from None
    if not isinstance(raw, dict) or not all(isinstance(v, torch.Tensor) for v in raw.values()):
        raise InputError(f"{path}: a flat dict of tensors is expected, found {type(raw).__name__}")
    state: dict[str, torch.Tensor] = {}
    for key, tensor in raw.items():
        name = (
            PROJECTOR_PREFIX + key.split("mm_projector.", 1)[1] if "mm_projector." in key else key
        )
        if name in state:
            raise InputError(f"{path}: two tensors would be called {name}")
        state[name] = tensor
    return state


def write_projector(state: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Write tensors to `.bin` or `.safetensors`, whole or not at all; equal states give equal bytes."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with atomic_write(path) as file:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import save

            file.write(save(state, metadata={"format": "pt"}))
        else:
            torch.save(state, file)
