"""An adapter's updates B A as matrices, and matrices as factors of the adapter's rank again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fed.numerics.low_rank import leading
from fed.state import State

A, B, _PRODUCT = ".lora_A.weight", ".lora_B.weight", ".lora_BA.weight"


class Products:
    """The names of an adapter's modules; other tensors pass as they are.

    In place of `X.lora_A.weight`, (r, in), and `X.lora_B.weight`, (out, r), stands
    `X.lora_BA.weight`, (out, in), in float32.
    """

    def __init__(self, adapter: Mapping[str, Tensor]):
        self.like = adapter
        stems = [name.removesuffix(A) for name in adapter if name.endswith(A)]
        self.stems = [stem for stem in stems if stem + B in adapter]

    def of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The same tensors with products in place of factors, made when they are asked for."""
        return _Multiplied(self, tensors)

    def factors(self, state: State) -> State:
        """B A = U S V^T cut to rank r; B = U sqrt(S), A = sqrt(S) V^T, in the adapter's types."""
        found: State = {}
        for name, tensor in state.items():
            if not name.endswith(_PRODUCT):
                found[name] = tensor
                continue
            stem = name.removesuffix(_PRODUCT)
            a, b = self.like[stem + A], self.like[stem + B]
            found[stem + A], found[stem + B] = factored(*truncated(tensor, len(a)), a, b)
        return found


class _Multiplied(Mapping[str, Tensor]):
    def __init__(self, products: Products, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        factors = {stem + end for stem in products.stems for end in (A, B)}
        self.stems = {s + _PRODUCT: s for s in products.stems if s + A in tensors}
        self.names = [*self.stems, *(name for name in tensors if name not in factors)]

    def __getitem__(self, name: str) -> Tensor:
        if stem := self.stems.get(name):
            return self.tensors[stem + B].float() @ self.tensors[stem + A].float()
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.stems or name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def factored(
    left: Tensor, values: Tensor, right: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """U, S, V^T as A = sqrt(S) V^T and B = U sqrt(S), in the types of `a` and `b`."""
    root = values.sqrt()
    return (root[:, None] * right).to(a.dtype), (left * root).to(b.dtype)


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of the `rank` leading singular triplets, (out, rank), (rank,), (rank, in).

    Zeros where the matrix has fewer; see `low_rank.leading`.
    """
    left, values, right = leading(matrix, rank)
    missing = rank - len(values)
    pad = torch.nn.functional.pad
    return pad(left, (0, missing)), pad(values, (0, missing)), pad(right, (0, missing)).T


def truncated_sum(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`truncated` of `left` @ `right`, (out, n) and (n, in), which is not formed.

    A sum of products is one: sum_j B_j A_j = [B_1 .. B_K] [A_1; ..; A_K].
    """
    frame, upper = torch.linalg.qr(left)
    frame_right, upper_right = torch.linalg.qr(right.T)
    u, values, v = truncated(upper @ upper_right.T, rank)
    return frame @ u, values, v @ frame_right.T
