"""What a personal method gives: a state for each client, made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fed.state import State


class Each:
    """`count` states; number k is `make(k)`, anew each time that it is asked for."""

    def __init__(self, count: int, make: Callable[[int], State]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def __getitem__(self, k: int) -> State:
        if not 0 <= k < self._count:
            raise IndexError(k)
        return self._make(k)

    def __iter__(self) -> Iterator[State]:
        return (self[k] for k in range(self._count))
