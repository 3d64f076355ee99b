"""LoRA: small matrices that train beside the frozen linear layers of the language model.

On disk, as upstream writes it, a LoRA folder has three parts: the *adapter*
(`adapter_config.json`, `adapter_model.safetensors`), *everything else that trained*
(`non_lora_trainables.bin`: the projector, a tuned tower), and `config.json`. The names in both
tensor files are those of the model wrapped by peft: `base_model.model.model.layers.0.…`.

peft itself puts everything else that trained into the adapter's file, as modules that its config
calls `modules_to_save`. Either way it is what lies *beside* the adapter.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import nn

from llava.atomic import write_text
from llava.errors import InputError, reason
from llava.json_files import read_json
from llava.model.checkpoint import copies, copy_in, separated_rows
from llava.model.checkpoint_names import ROWS, SEPARATE, on_disk
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
HEAD = "lm_head.weight"
# What peft puts between a module's name and those of its tensors, and what it replaces.
_WRAPPED = re.compile(r"\.(?:(?:token_adapter\.)?base_layer|modules_to_save(?:\.default)?)\.")
_REPLACED = ".original_module."
# The keys of peft 0.7, which upstream's users have and which dies of any other.
_CONFIG_KEYS = set(
    "peft_type task_type base_model_name_or_path revision auto_mapping inference_mode r lora_alpha "
    "lora_dropout bias target_modules modules_to_save fan_in_fan_out init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern".split()
)
# What later peft writes and an adapter may have here. What else it may have (routers, adapters that
# are on after certain tokens alone, …) does more than add a matrix to a layer.
_KNOWN_KEYS = _CONFIG_KEYS | set(
    "use_rslora use_dora lora_bias exclude_modules target_parameters trainable_token_indices "
    "ensure_weight_tying eva_config peft_version megatron_core loftq_config runtime_config".split()
)
# A start that takes a part out of the base's weights, which only who has seen the same data, or
# drawn the same numbers, takes out again. The two of `_REPEATED` are computed from the weights.
_REPEATED = ("pissa", "olora")
TAKES_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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

    known_bias: Any = bias  # peft has the check
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=known_bias,
        target_modules=find_all_linear_names(model),
        task_type="CAUSAL_LM",
    )
    return _inject(model, config, cast)


def attach_lora(
    model: nn.Module, folder: str | os.PathLike, trainable: bool = False, cast: bool = True
) -> PeftModel:
    """Put the adapter of a LoRA folder into `model`; what lies beside it is not read.

    `.merge_and_unload()` of the result is the plain model with the adapter in its weights.

    Raises:
        InputError: the adapter cannot be read or is none, or was trained on another base: a tensor
            that is missing, matches nothing or has the wrong shape. `model` is then as it was,
            unless the adapter's start has taken something out of its weights (`pissa`, `olora`).
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    config.inference_mode = not trainable
    saved, config.modules_to_save = config.modules_to_save or (), None  # these lie beside it
    if config.trainable_token_indices and separated_rows(model) is not None:
        raise InputError(f"{folder}: trainable_token_indices do not go with mm_use_im_start_end")
    tensors = _adapter_alone(folder)
    leaked = [name for name in tensors if ".lora_" in name and _PICTURE.fullmatch(name)]
    on_tower = [name for name in leaked if "vision_tower." in name]
    if on_tower and not any("vision_tower." in name for name, _ in model.named_modules()):
        raise InputError(
            f"{folder}: it has LoRA on the vision tower ({on_tower[0]}), as upstream trains it "
            "where the tower lies in the base model's folder; such an adapter is not supported"
        )
    try:
        wrapped = _inject(model, config, cast, spare_tower=not leaked)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{folder}: the adapter does not fit this base model: {reason(error)}"
        ) from None
    try:
        load_adapter(wrapped, tensors, str(_adapter_file(folder)))
    except StateError:
        wrapped.unload()
        raise
    for name, parameter in wrapped.named_parameters():
        if trainable and any(f".{module}." in name for module in saved):
            parameter.requires_grad_(True)
    return wrapped


def merge(wrapped: PeftModel, folder: str | os.PathLike) -> nn.Module:
    """The plain model with the adapter, which is from `folder`, in its weights.

    Raises:
        InputError: a layer cannot take it in.
    """
    try:
        return wrapped.merge_and_unload()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise InputError(f"{folder}: the adapter cannot be merged: {reason(error)}") from None


def _inject(model: nn.Module, config: LoraConfig, cast: bool, spare_tower=True) -> PeftModel:
    from peft import get_peft_model

    # Layers are named by their last part, which a vision tower's layers may share (upstream put
    # LoRA into those). Old adapters that have such tensors are taken as they are.
    if spare_tower and any(_PICTURE.fullmatch(name) for name, _ in model.named_modules()):
        config.exclude_modules = _excluded(config.exclude_modules)
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own, on transformers' names
        return get_peft_model(model, config, autocast_adapter_dtype=cast)


def _excluded(also: str | Iterable[str] | None) -> str:
    """A pattern for the parts between picture and tokens, and for what peft's key excludes."""
    if not also:
        return _PICTURE.pattern
    if not isinstance(also, str):
        also = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(also)))})"
    return f"{_PICTURE.pattern}|{also}"


# -- its tensors ----------------------------------------------------------------------------------


def is_lora(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether `model` is one that `add_lora` or `attach_lora` gave."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def adapter_state(model: PeftModel) -> State:
    """The adapter's tensors on the CPU under their names on disk; under ZeRO-3 on every rank."""
    return copies(adapter_parameters(model))


def non_lora_state(model: PeftModel) -> State:
    """The other tensors that train, under upstream's names; under ZeRO-3 on every rank."""
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
    """Copy what `read_beside` gave into a model, with or without LoRA.

    Raises:
        StateError: a tensor that the model does not have, or of a wrong shape; nothing is copied.
    """
    own = {on_disk(name): tensor for name, tensor in tensors.items()}
    _check_tables(model, own, source)
    parameters = {on_disk(_plain(name)): p for name, p in model.named_parameters()}
    _copy_in(own, {name: p for name, p in parameters.items() if name in own}, source)


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters of the adapter's file, as peft has it: LoRA, and the biases that train."""
    bias = cast("LoraConfig", model.peft_config["default"]).bias
    found = {}
    for name, parameter in model.named_parameters():
        is_bias = name.endswith(".bias") and not _PICTURE.fullmatch(name)
        if ".lora_" in name or name.endswith(".trainable_tokens_delta.default"):
            name = name.replace(".default", "")
            # DoRA's was no module's weight once, and is still written so.
            found[name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")] = (
                parameter
            )
        elif is_bias and (bias == "all" or (bias == "lora_only" and ".base_layer." in name)):
            found[name] = parameter
    return found


def other_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters of `non_lora_trainables.bin`: whatever else trains, all of a connector of
    which a part trains, rows of start and end token, and what `keep_beside` names."""
    adapter = {id(parameter) for parameter in adapter_parameters(model).values()}
    others = {n: p for n, p in model.named_parameters() if id(p) not in adapter}
    connector = {n for n in others if ".mm_projector." in n}
    if not any(others[name].requires_grad for name in connector):
        connector = set()
    kept: frozenset[str] = getattr(model, "kept_beside", frozenset())
    return {
        PEFT_PREFIX + on_disk(name.removeprefix(PEFT_PREFIX)): parameter
        for name, parameter in others.items()
        if parameter.requires_grad
        or name in connector
        or name.endswith(f".{SEPARATE}")
        or on_disk(_plain(name)) in kept
    }


def keep_beside(model: PeftModel, names: Iterable[str]) -> None:
    """Have these tensors of the model saved beside the adapter, whether they train or not.

    They are what the run began from: without them the adapter would be on another base.
    """
    wrapper: Any = model
    wrapper.kept_beside = frozenset(map(on_disk, names))


def _check_tables(model: nn.Module, tensors: State, source: str) -> None:
    """Refuse one of embedding and head where the model has one table for both."""
    if getattr(model.config, "tie_word_embeddings", False):
        found = [tensors[name] for name in (ROWS, HEAD) if name in tensors]
        if len(found) == 1 or (found and not torch.equal(*found)):
            raise StateError(
                f"{source}: holds an embedding and a head of its own, or one of them; the base "
                "model has one table for both (tie_word_embeddings)"
            )


def _copy_in(tensors: State, parameters: dict[str, nn.Parameter], source: str) -> None:
    try:
        copy_in(tensors, parameters, source)
    except StateError as error:
        raise StateError(f"{error}; was it trained on another base model?") from None


def _plain(name: str) -> str:
    """A name in a wrapped model → the name in the model itself."""
    name = re.sub(_WRAPPED, ".", name.removeprefix(PEFT_PREFIX))
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


def read_beside(folder: str | os.PathLike, mapped: bool = False) -> State:
    """All that a LoRA folder holds beside LoRA, under the names of the model itself; may be empty.

    That is what upstream writes into `non_lora_trainables.bin`, and what peft writes into the
    adapter's file: `modules_to_save`, embeddings that have grown, biases of the projector.

    Raises:
        InputError: a file that is broken, or lacks a module that the adapter's config names.
    """
    folder = Path(folder)
    config, tensors = read_adapter_config(folder), _read_adapter(folder)
    saved = [name for name in tensors if _is_beside(name, config)]
    for module in config.modules_to_save or ():
        if not any(f".{module}." in name for name in saved):
            raise StateError(
                f"{_adapter_file(folder)}: holds no tensor of {module}, which {ADAPTER_CONFIG} "
                "names in modules_to_save"
            )
    found = read_non_lora(folder, mapped) if (folder / NON_LORA_FILE).is_file() else {}
    return found | {_plain(name): tensors[name] for name in saved}


def beside_file(folder: str | os.PathLike) -> str:
    """The file of what `read_beside` gives, for messages."""
    file = Path(folder) / NON_LORA_FILE
    return str(file if file.is_file() else _adapter_file(Path(folder)))


def _is_beside(name: str, config: LoraConfig) -> bool:
    """Whether a tensor of the adapter's file is no part of LoRA, but one of the model itself."""
    if ".lora_" in name or _REPLACED in name or name.endswith("trainable_tokens_delta"):
        return False
    if not name.endswith(".bias") or any(f".{m}." in name for m in config.modules_to_save or ()):
        return True
    # With bias "all" peft has all biases; those of a tower never train under LoRA.
    return ".mm_projector." in name


def _adapter_alone(folder: Path) -> State:
    """The tensors of the adapter's file that are no module's of the model itself."""
    config = read_adapter_config(folder)
    tensors = {n: t for n, t in _read_adapter(folder).items() if _REPLACED not in n}
    return {name: tensor for name, tensor in tensors.items() if not _is_beside(name, config)}


def copy_adapter(folder: str | os.PathLike, out: str | os.PathLike) -> None:
    """Copy an adapter and its config, but not what lies beside it in its file."""
    save(_adapter_alone(Path(folder)), Path(out) / ADAPTER_FILE)
    values = {**read_json(Path(folder) / ADAPTER_CONFIG), "modules_to_save": None}
    write_text(Path(out) / ADAPTER_CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _adapter_file(folder: Path) -> Path:
    old = folder / OLD_ADAPTER_FILE
    return old if old.is_file() and not (folder / ADAPTER_FILE).is_file() else folder / ADAPTER_FILE


def _read_adapter(folder: Path) -> State:
    return read_tensors(_adapter_file(folder))


def base_of(folder: str | os.PathLike) -> str | None:
    """The base that a LoRA folder names: a path or a hub name; None where it names none."""
    return read_json(Path(folder) / ADAPTER_CONFIG).get("base_model_name_or_path") or None


def read_adapter_config(folder: str | os.PathLike) -> LoraConfig:
    """`adapter_config.json` of a LoRA that can be put into a model here.

    Raises:
        InputError: none that can be read, another adapter than LoRA, or a LoRA that does something
            which is not known here; the message names it.
    """
    from peft import LoraConfig

    file = Path(folder) / ADAPTER_CONFIG
    values = read_json(file)
    if (kind := values.get("peft_type")) != "LORA":
        raise InputError(f"{file}: peft_type is {kind!r}, expected 'LORA'")
    usual = LoraConfig().to_dict()
    for key, value in values.items():
        if key not in _KNOWN_KEYS and value and value != usual.get(key):
            raise InputError(
                f"{file}: {key} is {value!r}, which is not supported here; let peft merge the "
                "adapter into its base, if it can"
            )
    start = str(values.get("init_lora_weights")).lower()
    if start.startswith(TAKES_FROM_BASE) and start not in _REPEATED:
        raise InputError(
            f"{file}: init_lora_weights is {start!r}: training took a part out of the base's "
            "weights that is not in the adapter; let peft save it as a plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, on keys that do not matter together
            return LoraConfig.from_peft_type(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: {reason(error)}") from None


def write_adapter_config(model: PeftModel, folder: str | os.PathLike) -> None:
    """Write `adapter_config.json` such that any peft since 0.7 reads it.

    Of the keys that 0.7 does not know, those that say something are written all the same.
    """
    from peft import LoraConfig

    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    # Ours is seen from the tensors' names.
    excluded = str(config.pop("exclude_modules") or "").removeprefix(_PICTURE.pattern)
    if excluded := excluded.removeprefix("|"):
        config["exclude_modules"] = excluded
    usual = LoraConfig().to_dict()
    values = {k: v for k, v in config.items() if k in _CONFIG_KEYS or v != usual[k]}
    text = json.dumps(values, indent=2, sort_keys=True, default=sorted)  # peft has sets of names
    write_text(Path(folder) / ADAPTER_CONFIG, text + "\n")


def load_lora(model: PeftModel, folder: str | os.PathLike) -> None:
    """Load what `save_lora` wrote into a model in which the same trains."""
    folder = Path(folder)
    load_adapter(model, _read_adapter(folder), str(_adapter_file(folder)))
    file = Path(folder) / NON_LORA_FILE
    _copy_in(read_tensors(file), other_parameters(model), str(file))


def save_lora(model: PeftModel, folder: str | os.PathLike, write: bool = True) -> None:
    """Write both halves and the adapter's config; all ranks call it, those that `write` write."""
    files = {ADAPTER_FILE: adapter_state(model), NON_LORA_FILE: non_lora_state(model)}
    if write:
        for name, tensors in files.items():
            save(tensors, Path(folder) / name)
        write_adapter_config(model, folder)
