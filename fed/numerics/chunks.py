"""Clients read side by side, one block of values at a time: no state is ever held as a copy.

    result = empty(base)
    for block in blocks(states, base):
        block.write(result, block.mix(p))

A projector of LLaVA-1.5-7B has 21 million values and lies on disk as bfloat16. A method that works
block by block needs, beside its result and its memory, a few megabytes, however many the clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fed.state import State

# A block has CHUNK values of few clients and fewer of many, so that all clients fit into a cache.
CHUNK = 2**16
_ALL = 2**18
_LEAST = 2**12


@dataclass(frozen=True)
class Block:
    """Some values of one tensor, on the CPU, of the base (float64) and of every client.

    `clients` is overwritten by the next block.
    """

    name: str
    start: int  # of these values in the flattened tensor
    base: Tensor  # (n,)
    clients: Tensor  # (K, n)

    def mix(self, factors: Sequence[float]) -> Tensor:
        """sum_k f_k x_k, (n,)."""
        return torch.tensor(factors, dtype=torch.float64) @ self.clients

    def read(self, state: Mapping[str, Tensor], suffix: str = "") -> Tensor:
        """These values of tensor `name` + `suffix` of another state, (n,), as float64."""
        return _slice(state[self.name + suffix], self.start, len(self.base))

    def write(self, state: State, values: Tensor, suffix: str = "") -> None:
        """Put them into tensor `name` + `suffix` of a state that `empty` made."""
        flat = state[self.name + suffix].view(-1)
        flat[self.start : self.start + len(values)].copy_(values)


def blocks(
    states: Sequence[State],
    base: State,
    dtype: torch.dtype = torch.float64,
    width: int | None = None,
) -> Iterator[Block]:
    """All values of `base`, block by block, tensors in `base`'s order.

    The clients' values come as `dtype`, `width` of each at most. Those that are not contiguous, as
    no tensor from a file is, are copied for as long as they last.
    """
    width = width or min(CHUNK, max(_LEAST, _ALL // len(states)))
    clients = torch.empty(len(states), width, dtype=dtype)
    for name, tensor in base.items():
        flat, parts = tensor.reshape(-1), [state[name].reshape(-1) for state in states]
        for start in range(0, tensor.numel(), width):
            n = min(width, tensor.numel() - start)
            for row, part in zip(clients, parts, strict=True):
                row[:n].copy_(part[start : start + n])
            yield Block(name, start, _slice(flat, start, n), clients[:, :n])


def empty(like: State, dtype: torch.dtype | None = None, suffix: str = "") -> State:
    """A contiguous state to write into: names with `suffix`, shapes and, unless given, types."""
    return {
        name + suffix: torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device)
        for name, t in like.items()
    }


def squares(rows: Tensor) -> Tensor:
    """Squared length of every row: (K,) of (K, n)."""
    return rows.square().sum(-1)


def _slice(tensor: Tensor, start: int, n: int) -> Tensor:
    return tensor.reshape(-1)[start : start + n].to("cpu", torch.float64)
