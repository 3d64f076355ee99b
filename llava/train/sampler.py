"""Order of samples in which those of a batch are about equally long, so that little is padding.

Shuffle; cut into megabatches (one batch for every rank); sort each by length; deal it out to the
ranks so that their totals are even. With modalities, pictures and text never share a megabatch but
the last. The orders are upstream's for the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Sample indices grouped by length.

    `world_size` is ranks times gradient accumulation steps. `lengths` are those of all samples;
    with `group_by_modality` a negative length marks a text-only sample. Without `generator`,
    torch's global one is used.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int],
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = lengths
        self.generator = generator
        self.group_by_modality = group_by_modality

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        group = length_grouped_indices
        if self.group_by_modality:
            group = modality_length_grouped_indices
        return iter(group(self.lengths, self.batch_size, self.world_size, self.generator))


def length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """All indices of `lengths`, shuffled and grouped by length."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    order = []
    for megabatch in _cut(shuffled, world_size * batch_size):
        megabatch.sort(key=lambda i: lengths[i], reverse=True)
        for chunk in split_to_even_chunks(megabatch, lengths, world_size):
            order += chunk
    return order


def modality_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """As `length_grouped_indices`, in megabatches of one kind: positive lengths or negative ones.

    What fills no whole megabatch of its kind comes last, mixed.
    """
    sizes = [abs(length) for length in lengths]
    kinds = [
        [i for i, length in enumerate(lengths) if length > 0],
        [i for i, length in enumerate(lengths) if length <= 0],
    ]
    if not all(kinds):
        return length_grouped_indices(sizes, batch_size, world_size, generator)
    full, rest = [], []
    for kind in kinds:
        own = [sizes[i] for i in kind]
        grouped = length_grouped_indices(own, batch_size, world_size, generator)
        *whole, last = _cut([kind[i] for i in grouped], world_size * batch_size)
        full += whole
        rest += last
    order = []
    for i in torch.randperm(len(full), generator=generator).tolist():
        order += full[i]
    return order + sorted(rest)


def split_to_even_chunks(
    indices: Sequence[int], lengths: Sequence[int], num_chunks: int
) -> list[list[int]]:
    """Deal `indices` out into chunks of one size, each index to the chunk that is shortest so far.

    When they do not divide evenly they are dealt out in turn.
    """
    if len(indices) % num_chunks:
        return [list(indices[i::num_chunks]) for i in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals: list[float] = [0] * num_chunks
    for index in indices:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == size:
            totals[shortest] = float("inf")
    return chunks


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
