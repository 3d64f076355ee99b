"""A full model's folder copied with some of its tensors replaced: same files, same layout.

A safetensors file says where the bytes of each tensor lie. So it is copied as a file and these
bytes are written over, or, where all tensors are replaced, its head is copied and they are filled
in one by one: no shard is ever in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fed.merging.sources import Source
from llava.errors import InputError
from llava.model.shards import INDEX, STEMS
from llava.state import read_tensors

_BESIDE = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_NOT = ("trainer_state.json", "merge.json", *(stem + INDEX for stem in STEMS))
_PARTS = ("config.json", "tokenizer_config.json")  # a tower's or a kept tokenizer's folder has one


class TensorFile:
    """A copy of a safetensors file, open for its tensors to be replaced.

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
        self._file = open(target, "r+b", buffering=0)
        self.left = set() if whole else self.header.keys() - {"__metadata__"}

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of the same type and shape in the place of the one called `name`."""
        first, last = self.header[name]["data_offsets"]
        data = memoryview(_bytes(tensor))
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
        target = folder / file.name
        if not tensors:
            shutil.copyfile(file, target)
        elif file.suffix == ".safetensors":
            copied = TensorFile(file, target, whole=True)
            with contextlib.closing(copied):
                for own, tensor in tensors.items():
                    copied.write(own, tensor)
        else:
            with open(target, "wb") as opened:
                torch.save({**read_tensors(file, mapped=True), **tensors}, opened)


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
        elif path.name in indices or path.name.startswith("LICENSE"):
            shutil.copyfile(path, folder / path.name)
        elif path.suffix in _BESIDE and path.name not in _NOT and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)


def model_bytes(source: Source) -> int:
    """How much a full folder's weights take on disk."""
    shards = source.weights.shards
    return sum(file.stat().st_size for file in {shards.place(name) for name in shards})


def _bytes(tensor: Tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
