"""A full model's folder copied with some of its tensors replaced: same files, same layout.

A safetensors file says where the bytes of each tensor lie. So it is copied as a file and these
bytes are written over, or, where all tensors are replaced, its head is copied and they are filled
in one by one: no shard is ever in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fed.merging.sources import Source, Weights
from fed.state import read_tensors
from llava.errors import InputError
from llava.model.shards import INDEX, STEMS

_BESIDE = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_NOT = ("trainer_state.json", "merge.json", *(stem + INDEX for stem in STEMS))
_PARTS = ("config.json", "tokenizer_config.json")  # a tower's or a kept tokenizer's folder has one


class TensorFile:
    """A copy of a safetensors file, open for its tensors to be replaced, as `PickleFile` is.

    Args:
        whole: copy the values too; else every one has to be written.
    """

    def __init__(self, source: Path, target: Path, whole: bool):
        with open(source, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            self.header = json.loads(file.read(size))
        self.start, self.path = 8 + size, target
        if whole:
            shutil.copyfile(source, target)
        else:
            with open(source, "rb") as old, open(target, "wb") as new:
                new.write(old.read(self.start))
                new.truncate(os.path.getsize(source))
        self._file = open(target, "r+b", buffering=0)  # noqa: SIM115
        self.left = set() if whole else self.header.keys() - {"__metadata__"}

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of the same type and shape in the place of the one called `name`."""
        first, last = self.header[name]["data_offsets"]
        data = _bytes(tensor)
        if len(data) != last - first:
            raise InputError(f"{self.path}: {name} takes {last - first} bytes, not {len(data)}")
        self._file.seek(self.start + first)
        while data:
            data = data[self._file.write(data) :]
        self.left.discard(name)

    def close(self) -> None:
        if self.left:
            raise InputError(f"{self.path}: {sorted(self.left)[0]} was not written")
        os.fsync(self._file.fileno())
        self._file.close()


class PickleFile:
    """A copy of a `.bin` with its tensors replaced; those that are new stay in memory till then."""

    def __init__(self, source: Path, target: Path, whole: bool):
        self.path = target
        self._tensors = read_tensors(source, mapped=True)
        self.left = set() if whole else set(self._tensors)

    def write(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor
        self.left.discard(name)

    def close(self) -> None:
        with open(self.path, "wb") as file:
            torch.save(self._tensors, file)
            os.fsync(file.fileno())
        self._tensors = {}


def copy_of(source: Path, folder: Path, whole: bool) -> TensorFile | PickleFile:
    """A copy of one file of tensors in a folder, of the same name, open for replacements."""
    kind = TensorFile if source.suffix == ".safetensors" else PickleFile
    return kind(source, folder / source.name, whole)


class Streamed:
    """The files of a folder's weights, written tensor by tensor as they come.

    A file is closed when it has all of its tensors. Those that have no place in a merge, as
    buffers, are the source's own.
    """

    def __init__(self, weights: Weights, folder: Path):
        self.weights, self.folder = weights, folder
        self._open: dict[Path, TensorFile | PickleFile] = {}
        self._names: dict[Path, list[str]] = {}
        for own in weights.shards:
            self._names.setdefault(weights.shards.place(own), []).append(own)

    def put(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            own = self.weights.own[name]
            file = self.weights.shards.place(own)
            if file not in self._open:
                self._open[file] = self._start(file)
            self._open[file].write(own, tensor)
            if not self._open[file].left:
                self._open.pop(file).close()
                self._names.pop(file)

    def _start(self, file: Path) -> TensorFile | PickleFile:
        copy = copy_of(file, self.folder, whole=False)
        merged = set(self.weights.own.values())
        for own in self._names[file]:
            if own not in merged:
                copy.write(own, self.weights.shards[own])
        return copy

    def close(self) -> None:
        """Copy the files in which nothing was to be merged.

        Raises:
            InputError: a tensor that was to be merged never came.
        """
        for file, copy in self._open.items():
            raise InputError(f"{file}: nothing was written for {sorted(copy.left)[0]}")
        for file in self._names:
            shutil.copyfile(file, self.folder / file.name)


def copy_model(source: Source, folder: Path, changed: Mapping[str, Tensor]) -> None:
    """Copy a full folder; `changed` are tensors by upstream's names, in their types and shapes."""
    weights = source.weights
    copy_beside(source.path, folder)
    by_file: dict[Path, dict[str, Tensor]] = {}
    for own in weights.shards:
        by_file.setdefault(weights.shards.place(own), {})
    for name, tensor in changed.items():
        own = weights.own[name]
        by_file[weights.shards.place(own)][own] = tensor
    for file, tensors in by_file.items():
        if not tensors:
            shutil.copyfile(file, folder / file.name)
            continue
        copy = copy_of(file, folder, whole=True)
        for own, tensor in tensors.items():
            copy.write(own, tensor)
        copy.close()


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what stands beside the weights: configs, tokenizer, index, a tower in its own folder.

    What training leaves (checkpoints, logs, optimizer states) stays where it is.
    """
    indices = {stem + INDEX for stem in STEMS if (source / (stem + INDEX)).is_file()}
    indices = {stem for stem in sorted(indices, key=lambda name: STEMS[0] not in name)[:1]}
    for path in sorted(source.iterdir()):
        if path.is_dir():
            part = any((path / name).is_file() for name in _PARTS)
            if part and not path.name.startswith((".", "checkpoint-")):
                shutil.copytree(path, folder / path.name)
        elif (
            path.name in indices
            or path.name.startswith("LICENSE")
            or path.suffix in _BESIDE
            and path.name not in _NOT
            and not path.name.startswith(".")
        ):
            shutil.copyfile(path, folder / path.name)


def model_bytes(source: Source) -> int:
    """The size of a full folder's weights on disk."""
    shards = source.weights.shards
    return sum(file.stat().st_size for file in {shards.place(name) for name in shards})


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
