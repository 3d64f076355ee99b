"""Features of pictures from a frozen tower, computed once.

A frozen tower gives the same features for a picture at every visit, so they are kept: in memory, or
on disk for later runs. Bits matter here: a run that is killed and resumed meets its pictures
in other company than before, and must still get the same features. Measured on an x86 CPU (torch
2.13; CLIP of width 192 in fp32, bf16 and fp16, of width 1024 in fp32): a picture's features depend
neither on its neighbours nor on its row, nor on the batch size but for one case, fp16 with eager
attention and a batch of one. Kernels are chosen by shape, so every batch is filled up with zeros to
the same size, and the question does not arise.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from llava.atomic import atomic_write
from llava.errors import InputError

BATCH_SIZE = 64


class FeatureCache:
    """Features by picture: `prefetch` computes what is missing, `get` looks up.

    `encode` maps pixels (B, 3, H, W) to features (B, N, C) and is called without gradient;
    `preprocess` maps a path to pixels (3, H, W). `key` is the caller's fingerprint of tower and
    processing: features under another key are never seen. A picture is known by its real path, size
    and time of change. Features keep the dtype of `encode` and live on the CPU.

    With `directory` each picture is one safetensors file under `directory/key/`, which other
    processes may read and write at the same time; without, features are held in memory. Once
    `limit_bytes` are stored nothing more is, and nothing is evicted: a one-pass run never comes
    back to a picture. The same lists prefetched in the same order store the same pictures.
    """

    def __init__(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        preprocess: Callable[[str], torch.Tensor],
        key: str,
        limit_bytes: int,
        directory: str | os.PathLike | None = None,
    ) -> None:
        self.encode = encode
        self.preprocess = preprocess
        self.limit_bytes = limit_bytes
        self.directory = directory
        self._store: _Store = _Memory() if directory is None else _Disk(Path(directory) / key)
        self._full = False

    def get(self, path: str | os.PathLike) -> torch.Tensor | None:
        """Features (N, C) of the picture at `path`; None when they are not stored, or damaged."""
        name = _name(path)
        return None if name is None else self._store.get(name)

    def __contains__(self, path: str | os.PathLike) -> bool:
        name = _name(path)
        return name is not None and self._store.has(name)

    def prefetch(
        self, paths: Sequence[str], batch_size: int = BATCH_SIZE, progress: bool = False
    ) -> None:
        """Compute and store the features of those `paths` that are not there yet.

        A picture that cannot be decoded is left out: whoever asks for it gets None, reads the
        picture, and meets the error where the sample has a name.
        """
        if self._full:
            return
        missing = {}
        for path in paths:
            name = _name(path)
            if name and not self._store.has(name):
                missing[name] = path
        with (
            ThreadPoolExecutor() as pool,
            tqdm(total=len(missing), desc="features", disable=not progress) as bar,
        ):
            for batch in self._decoding(pool, list(missing.items()), batch_size):
                pixels = {name: f.result() for name, f in batch.items() if _readable(f)}
                if pixels:
                    features = self._encode(list(pixels.values()), batch_size)
                    self._keep(pool, dict(zip(pixels, features, strict=True)))
                if self._full:
                    return
                bar.update(len(batch))

    def _decoding(
        self, pool: ThreadPoolExecutor, missing: list[tuple[str, str]], batch_size: int
    ) -> Iterator[dict[str, Future]]:
        """Batches of pictures, by name; the next batch is decoded while one is in use."""
        ahead: dict[str, Future] = {}
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            batch, ahead = ahead, {name: pool.submit(self.preprocess, path) for name, path in part}
            if batch:
                yield batch
        if ahead:
            yield ahead

    def _encode(self, pixels: list[torch.Tensor], batch_size: int) -> torch.Tensor:
        """Features (B, N, C) on the CPU of B <= batch_size pictures, filled up with zeros."""
        batch = torch.zeros(batch_size, *pixels[0].shape, dtype=pixels[0].dtype)
        batch[: len(pixels)] = torch.stack(pixels)
        with torch.no_grad():
            return self.encode(batch)[: len(pixels)].cpu()

    def _keep(self, pool: ThreadPoolExecutor, features: dict[str, torch.Tensor]) -> None:
        """Store what there is room for, in order; the waits for the disk overlap."""
        writes = []
        for name, rows in features.items():
            packed, size = self._store.pack(rows)
            if self._store.used + size > self.limit_bytes:
                self._full = True
                warnings.warn(
                    f"the feature cache has reached its limit of {self.limit_bytes / 1e9:.3g} GB; "
                    "the other pictures go through the vision tower at every visit",
                    stacklevel=3,
                )
                break
            self._store.used += size
            writes.append(pool.submit(self._store.put, name, packed))
        for write in writes:
            write.result()


class _Store(Protocol):
    """Features by name; `used` counts bytes, and `pack` makes what `put` takes, with its size."""

    used: int

    def has(self, name: str) -> bool: ...

    def get(self, name: str) -> torch.Tensor | None: ...

    def pack(self, features: torch.Tensor) -> tuple[Any, int]: ...

    def put(self, name: str, packed: Any) -> None: ...


class _Memory:
    """Features in a dict; `used` counts their bytes."""

    def __init__(self) -> None:
        self.used = 0
        self._features: dict[str, torch.Tensor] = {}

    def has(self, name: str) -> bool:
        return name in self._features

    def get(self, name: str) -> torch.Tensor | None:
        return self._features.get(name)

    def pack(self, features: torch.Tensor) -> tuple[torch.Tensor, int]:
        return features.clone(), features.nbytes  # a view would keep its whole batch alive

    def put(self, name: str, packed: torch.Tensor) -> None:
        self._features[name] = packed


class _Disk:
    """Features in files with a checksum; `used` counts the bytes of all that lie in the folder."""

    def __init__(self, folder: Path) -> None:
        self.used = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        self._folder = folder
        self._whole: set[str] = set()  # names that this process has read, or written, whole

    def _file(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        return name in self._whole or self.get(name) is not None

    def get(self, name: str) -> torch.Tensor | None:
        try:
            with safetensors.safe_open(self._file(name), framework="pt") as file:
                features = file.get_tensor("features")
                stated = (file.metadata() or {}).get("crc32")
        except (OSError, safetensors.SafetensorError):
            return None
        if stated != _crc32(features):
            return None
        self._whole.add(name)
        return features

    def pack(self, features: torch.Tensor) -> tuple[bytes, int]:
        features = features.contiguous()
        data = safetensors.torch.save({"features": features}, {"crc32": _crc32(features)})
        return data, len(data)

    def put(self, name: str, packed: bytes) -> None:
        with atomic_write(self._file(name), sync=False) as file:  # the checksum tells
            file.write(packed)
        self._whole.add(name)


def _readable(decoding: Future) -> bool:
    error = decoding.exception()
    if error is not None and not isinstance(error, InputError):
        raise error
    return error is None


def _name(path: str | os.PathLike) -> str | None:
    """A name that no other picture has, nor a later version of this one; None if it is missing."""
    try:
        path = os.path.realpath(path)
        stat = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    name = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:40]  # a path may be no UTF-8


def _crc32(features: torch.Tensor) -> str:
    return f"{zlib.crc32(features.view(torch.uint8).numpy().data):08x}"
