"""A state: the trainable part as a flat dict of named tensors, in memory and on disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from llava.atomic import atomic_write
from llava.errors import InputError
from llava.suggest import did_you_mean

State: TypeAlias = dict[str, torch.Tensor]

SUFFIXES = (".bin", ".safetensors")
_PROJECTOR = re.compile(r"(?:.*?\.)??(mm_projector\..+)")


class StateError(InputError):
    """A state that cannot be read, or is not what it should be."""


def load(path: str | os.PathLike, mapped: bool = False) -> State:
    """Read a state from a `.bin` or `.safetensors` file, onto the CPU; `mapped` as `read_tensors`.

    Whatever stands before `mm_projector.` in a name becomes `model.`; other names stay as they are.
    An empty state is allowed: it is what an identity connector has.

    Raises:
        StateError: the file is missing, cut short, holds anything but a flat dict of named dense
            tensors (nothing else is ever unpickled), a tensor without values, two names that become
            one, or no projector.
    """
    state: State = {}
    for key, tensor in read_tensors(path, mapped).items():
        match = _PROJECTOR.fullmatch(key)
        name = f"model.{match[1]}" if match else key
        if name in state:
            raise StateError(f"{path}: {key} is the second tensor that would be called {name}")
        state[name] = tensor
    if state and not any(_PROJECTOR.fullmatch(name) for name in state):
        raise StateError(f"{path}: no mm_projector tensor among its {len(state)}: {_some(state)}")
    return state


def read_tensors(path: str | os.PathLike, mapped: bool = False) -> State:
    """Read any named tensors from a `.bin` or `.safetensors` file, names as they are in it.

    Args:
        mapped: leave the values of a `.bin` on the disk until they are used, as those of a
            `.safetensors` always are. Nobody may write into the file for as long.

    Raises:
        StateError: as `load`, but for the names.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise StateError(f"{path}: no such file")
    found = _read(path, mapped)
    if not isinstance(found, dict):
        raise StateError(f"{path}: expected a flat dict of tensors, found a {type(found).__name__}")
    for key, tensor in found.items():
        if not isinstance(key, str) or not _is_dense(tensor):
            kind = type(tensor).__name__
            raise StateError(f"{path}: expected dense tensors by name, found {kind} under {key!r}")
        refuse_empty(key, tensor.shape, str(path))
    return {key: tensor.detach().contiguous() for key, tensor in found.items()}


def refuse_empty(name: str, shape: Sequence[int], who: str) -> None:
    """`StateError` for a tensor without values, which no part of a model is; `who` opens it."""
    if 0 in shape:
        raise StateError(
            f"{who}: tensor {name} is empty, of shape {tuple(shape)}; DeepSpeed's ZeRO-3 leaves "
            "such tensors where a model is saved and its shards were not gathered"
        )


def save(state: State, path: str | os.PathLike) -> None:
    """Write a state to a `.bin` or `.safetensors` file, whole or not at all.

    Equal states give equal bytes, whatever the file is called and however the dict is ordered.
    """
    path = Path(path)
    _check_suffix(path)
    # A copy of each: a view would drag the whole of its storage into the file.
    plain = {
        name: state[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        for name in sorted(state)
    }
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save as to_bytes

            file.write(to_bytes(plain, metadata={"format": "pt"}))
        else:
            torch.save(plain, file)


def check(state: State, like: State, *, who: str) -> None:
    """Refuse a state that has not the names and shapes of `like`, or is not of finite floats.

    `who` opens the message: a file, or `client 'hospital'`. Floating types may differ.
    """
    for name in like:
        if name not in state:
            hint = did_you_mean(name, state.keys() - like.keys())
            raise StateError(f"{who}: tensor {name} is missing{hint}")
    for name, tensor in state.items():
        if name not in like:
            raise StateError(f"{who}: tensor {name} is not expected{did_you_mean(name, like)}")
        refuse_empty(name, tensor.shape, who)
        shape, expected = tuple(tensor.shape), tuple(like[name].shape)
        if shape != expected:
            raise StateError(f"{who}: tensor {name} has shape {shape}, expected {expected}")
        if not tensor.is_floating_point():
            raise StateError(f"{who}: tensor {name} is {tensor.dtype}, expected a floating type")
        if not is_finite(tensor):
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise StateError(
                f"{who}: tensor {name} has {bad} NaN or infinite of {tensor.numel()} values"
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; read once, nothing is written."""
    # The extremes are NaN where any value is, and this is many times as fast as torch.isfinite.
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def fingerprint(state: State) -> str:
    """SHA-256 over names, types, shapes and values in 64 hex digits; the order is nothing."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(state: State) -> dict[str, str]:
    """Those of each tensor with its name, by name."""
    return {name: fingerprint({name: tensor}) for name, tensor in state.items()}


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise StateError(f"{path}: a state's file ends in {' or '.join(SUFFIXES)}")


def _read(path: Path, mapped: bool) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        mapped = mapped and zipfile.is_zipfile(path)  # not the form that torch wrote before 1.6
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken file makes the readers fail in many ways
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's word; a cut zip is an invalid argument
        if "unsupported global" in str(error).lower():
            reason = "holds objects other than tensors, which are never unpickled"
        else:
            reason = "empty, cut short or not a file of tensors"
        raise StateError(f"{path}: {reason}") from error


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
