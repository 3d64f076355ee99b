"""LoRA: small matrices that train beside the frozen linear layers of the language model.

On disk, as upstream writes it, a LoRA folder has three parts: the *adapter*
(`adapter_config.json`, `adapter_model.safetensors`), *everything else that trained*
(`non_lora_trainables.bin`: the projector, a tuned tower), and `config.json`. The names in both
tensor files are those of the model wrapped by peft: `base_model.model.model.layers.0.…`.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from llava.atomic import write_text
from llava.errors import InputError
from llava.model.checkpoint import copies, copy_in, on_disk
from llava.state import State, StateError, read_tensors, save

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
OLD_ADAPTER_FILE = "adapter_model.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
PEFT_PREFIX = "base_model.model."

PICTURE_PARTS = ("mm_projector", "vision_tower", "vision_resampler")
_PICTURE = re.compile(rf"(?:.*\.)?(?:{'|'.join(PICTURE_PARTS)})(?:\..*)?")
# The keys of peft 0.7, which upstream's users have and which dies of any other.
_CONFIG_KEYS = set(
    "peft_type task_type base_model_name_or_path revision auto_mapping inference_mode r lora_alpha "
    "lora_dropout bias target_modules modules_to_save fan_in_fan_out init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern".split()
)


# -- a model gets its LoRA ------------------------------------------------------------------------


def find_all_linear_names(model: nn.Module) -> list[str]:
    """The layers that get LoRA, by the last part of their names (`q_proj`, `down_proj`, …).

    All linear layers of the language model but its head.
    """
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not _PICTURE.fullmatch(name)
        }
        - {"lm_head"}
    )


def add_lora(
    model: nn.Module, *, r: int, alpha: int, dropout: float, bias: str = "none", cast: bool = True
) -> PeftModel:
    """Put fresh LoRA into `model`; nothing but LoRA (and biases, as `bias` says) trains then.

    Args:
        bias: `none`, `all` biases of the language model, or `lora_only`, those of layers with LoRA.
        cast: hold LoRA in float32 beside a 16-bit model, as AdamW needs; DeepSpeed, which keeps a
            float32 copy of its own, wants one type instead.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,
        target_modules=find_all_linear_names(model),
        task_type="CAUSAL_LM",
    )
    return _inject(model, config, cast)


def attach_lora(
    model: nn.Module, folder: str | os.PathLike, trainable: bool = False, cast: bool = True
) -> PeftModel:
    """Put the adapter of a LoRA folder into `model`; `non_lora_trainables.bin` is not read.

    `.merge_and_unload()` of the result is the plain model with the adapter in its weights.

    Raises:
        InputError: the adapter cannot be read or is none, or was trained on another base: a tensor
            that is missing, matches nothing or has the wrong shape. `model` is then as it was.
    """
    config = _read_config(Path(folder))
    config.inference_mode = not trainable
    file, tensors = _read_adapter(Path(folder))
    leaked = any(".lora_" in name and _PICTURE.fullmatch(name) for name in tensors)
    try:
        wrapped = _inject(model, config, cast, spare_tower=not leaked)
    except ValueError as error:
        raise InputError(f"{folder}: the adapter does not fit this base model: {error}") from None
    try:
        load_adapter(wrapped, tensors, str(file))
    except StateError:
        wrapped.unload()
        raise
    return wrapped


def _inject(model: nn.Module, config: LoraConfig, cast: bool, spare_tower=True) -> PeftModel:
    from peft import get_peft_model

    # Layers are named by their last part, which a vision tower's layers may share (upstream put
    # LoRA into those). Old adapters that have such tensors are taken as they are.
    if spare_tower and any(_PICTURE.fullmatch(name) for name, _ in model.named_modules()):
        config.exclude_modules = _PICTURE.pattern
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own, on transformers' names
        return get_peft_model(model, config, autocast_adapter_dtype=cast)


# -- its tensors ----------------------------------------------------------------------------------


def is_lora(model: nn.Module) -> bool:
    """Whether `model` is one that `add_lora` or `attach_lora` gave."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def adapter_state(model: PeftModel) -> State:
    """The adapter's tensors on the CPU under their names on disk; under ZeRO-3 on every rank."""
    return copies(adapter_parameters(model))


def non_lora_state(model: PeftModel) -> State:
    """What trains beside the adapter, under upstream's names; under ZeRO-3 on every rank."""
    return copies(other_parameters(model))


def load_adapter(model: PeftModel, tensors: State, source: str) -> None:
    """Copy an adapter's tensors, named as on disk, into a model that has LoRA already.

    Raises:
        StateError: a tensor is missing, not expected, or of a wrong shape; nothing is copied then.
    """
    # With --lora_bias all upstream stores the biases of projector and tower a second time.
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if ".lora_" in name or not _PICTURE.fullmatch(name)
    }
    _copy_in(own, adapter_parameters(model), source)


def load_non_lora(model: nn.Module, tensors: State, source: str) -> None:
    """Copy what `read_non_lora` gave into a model, with or without LoRA.

    Raises:
        StateError: a tensor that the model does not have, or of a wrong shape; nothing is copied.
    """
    own = {on_disk(name): tensor for name, tensor in tensors.items()}
    parameters = {on_disk(_plain(name)): p for name, p in model.named_parameters()}
    _copy_in(own, {name: p for name, p in parameters.items() if name in own}, source)


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """What belongs into the adapter's file, as peft has it: LoRA, and the biases that train."""
    bias = model.peft_config["default"].bias
    found = {}
    for name, parameter in model.named_parameters():
        is_bias = name.endswith(".bias") and not _PICTURE.fullmatch(name)
        if ".lora_" in name:
            found[name.replace(".default", "")] = parameter
        elif is_bias and (bias == "all" or (bias == "lora_only" and ".base_layer." in name)):
            found[name] = parameter
    return found


def other_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """What belongs into `non_lora_trainables.bin`: whatever else trains, and all of a connector of
    which a part trains."""
    adapter = {id(parameter) for parameter in adapter_parameters(model).values()}
    others = {n: p for n, p in model.named_parameters() if id(p) not in adapter}
    connector = {n for n in others if ".mm_projector." in n}
    if not any(others[name].requires_grad for name in connector):
        connector = set()
    return {
        PEFT_PREFIX + on_disk(name.removeprefix(PEFT_PREFIX)): parameter
        for name, parameter in others.items()
        if parameter.requires_grad or name in connector
    }


def _copy_in(tensors: State, parameters: dict[str, nn.Parameter], source: str) -> None:
    try:
        copy_in(tensors, parameters, source)
    except StateError as error:
        raise StateError(f"{error}; was it trained on another base model?") from None


def _plain(name: str) -> str:
    """A name in a wrapped model → the name in the model itself."""
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    return re.sub(r"^model\.model\.", "model.", name)


# -- on disk --------------------------------------------------------------------------------------


def read_non_lora(folder: str | os.PathLike, mapped: bool = False) -> State:
    """`non_lora_trainables.bin` of a LoRA folder, under the names of the model itself.

    `mapped` as `llava.state.read_tensors` takes it.

    Raises:
        StateError: the file is missing, cut short, or holds anything but named tensors.
    """
    file = Path(folder) / NON_LORA_FILE
    return {_plain(name): tensor for name, tensor in read_tensors(file, mapped).items()}


def _read_adapter(folder: Path) -> tuple[Path, State]:
    file = folder / ADAPTER_FILE
    if not file.is_file() and (folder / OLD_ADAPTER_FILE).is_file():
        file = folder / OLD_ADAPTER_FILE
    return file, read_tensors(file)


def _read_config(folder: Path) -> LoraConfig:
    from peft import LoraConfig

    file = folder / ADAPTER_CONFIG
    try:
        values = json.loads(file.read_text())
        kind = values.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: no readable adapter config ({error})") from None
    if kind != "LORA":
        raise InputError(f"{file}: peft_type is {kind!r}, expected 'LORA'")
    try:
        return LoraConfig.from_peft_type(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: {error}") from None


def write_adapter_config(model: PeftModel, folder: str | os.PathLike) -> None:
    """Write `adapter_config.json` such that any peft since 0.7 reads it.

    Of the keys that 0.7 does not know, those that say something are written all the same.
    """
    from peft import LoraConfig

    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    config.pop("exclude_modules")  # which modules have LoRA is seen from the tensors
    usual = LoraConfig().to_dict()
    values = {k: v for k, v in config.items() if k in _CONFIG_KEYS or v != usual[k]}
    text = json.dumps(values, indent=2, sort_keys=True, default=sorted)  # peft has sets of names
    write_text(Path(folder) / ADAPTER_CONFIG, text + "\n")


def load_lora(model: PeftModel, folder: str | os.PathLike) -> None:
    """Load what `save_lora` wrote into a model in which the same trains."""
    file, tensors = _read_adapter(Path(folder))
    load_adapter(model, tensors, str(file))
    file = Path(folder) / NON_LORA_FILE
    _copy_in(read_tensors(file), other_parameters(model), str(file))


def save_lora(model: PeftModel, folder: str | os.PathLike, write: bool = True) -> None:
    """Write both halves and the adapter's config; all ranks call it, those that `write` write."""
    files = {ADAPTER_FILE: adapter_state(model), NON_LORA_FILE: non_lora_state(model)}
    if write:
        for name, tensors in files.items():
            save(tensors, Path(folder) / name)
        write_adapter_config(model, folder)
