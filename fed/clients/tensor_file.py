"""A file of the run's own: tensors, facts about them as JSON, and a digest of each.

A `.safetensors` file. Its metadata has `facts`; `sha256`, by name a digest of each tensor's bytes
(SHA-256 of the digests of its pieces of 4 MiB, which are computed side by side); and `head`, the
digest of the head itself with `head` as zeros. It is written in one pass, tensor by tensor, and
read as a mapped file: values are on the disk until they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fed.state import State
from llava.atomic import atomic_write
from llava.errors import InputError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ZEROS = "0" * 64
_MOST = 100_000_000  # bytes of a head; safetensors reads no longer one
_PIECE = 2**22  # bytes
_POOL = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="digest")


def save_with_facts(tensors: Mapping[str, torch.Tensor], facts: dict, path: Path) -> None:
    """Write the file, whole or not at all; no tensor is copied, whatever its size.

    Args:
        facts: JSON types.
    """
    # The order in which the library lays tensors out: those of wide types first.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    layout, end = {}, 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        layout[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    digests = dict.fromkeys(order, _ZEROS)
    with atomic_write(path) as file:
        file.write(_head(layout, facts, digests))
        for name in order:
            values = _bytes(tensors[name])
            pieces = _digests_of_pieces(values)
            file.write(values)
            digests[name] = hashlib.sha256(b"".join(pieces)).hexdigest()
        file.seek(0)  # digests are as long as the zeros were
        file.write(_head(layout, facts, digests, signed=True))


def load_with_facts(path: Path, check: bool = True) -> tuple[State, dict]:
    """The tensors, mapped, and the facts.

    Args:
        check: compare all bytes with the digests; without, the head alone.

    Raises:
        InputError: no such file, not one of this kind, cut short, or damaged; the message names the
            tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        metadata = _checked_metadata(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts, digests = json.loads(metadata["facts"]), json.loads(metadata["sha256"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a file of this run ({error})") from None
    for name, tensor in tensors.items() if check else ():
        if _digest(_bytes(tensor)) != digests.get(name):
            raise InputError(
                f"{path}: tensor {name} is damaged: its bytes are not those that were written"
            )
    return tensors, facts


def _head(layout: dict, facts: dict, digests: dict, signed: bool = False) -> bytes:
    """The length and the text of a safetensors head, padded to eight bytes."""

    def text(head: str) -> bytes:
        metadata = {"head": head, "facts": json.dumps(facts), "sha256": json.dumps(digests)}
        whole = json.dumps({"__metadata__": metadata, **layout}).encode()
        return whole + b" " * (-len(whole) % 8)

    plain = text(_ZEROS)
    if len(plain) > _MOST:
        raise InputError(f"the facts of a tensor file have {len(plain)} bytes, at most {_MOST}")
    if signed:
        plain = text(hashlib.sha256(plain).hexdigest())
    return struct.pack("<Q", len(plain)) + plain


def _checked_metadata(path: Path) -> dict[str, str]:
    """The head's metadata; `ValueError` if the head is not as it was written."""
    with open(path, "rb") as file:
        start = file.read(8)
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (0,)
        if not 0 < length <= _MOST:
            raise ValueError("it has no head")
        plain = file.read(length)
    if len(plain) < length:
        raise ValueError("it is cut short")
    metadata = json.loads(plain)["__metadata__"]
    head = metadata["head"]
    if hashlib.sha256(plain.replace(head.encode(), _ZEROS.encode(), 1)).hexdigest() != head:
        raise ValueError("its head is damaged")
    return metadata


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's values as they lie on the disk; a copy only where they are not in one piece."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data


def _digests_of_pieces(values: memoryview) -> Iterator[bytes]:
    """Begun at once, on several cores: hashing takes longer than writing."""
    pieces = [values[start : start + _PIECE] for start in range(0, len(values), _PIECE)]
    return _POOL.map(lambda piece: hashlib.sha256(piece).digest(), pieces)


def _digest(values: memoryview) -> str:
    """SHA-256 of the digests of a tensor's pieces."""
    return hashlib.sha256(b"".join(_digests_of_pieces(values))).hexdigest()
