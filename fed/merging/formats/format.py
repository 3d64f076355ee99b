"""The protocol of a format, which has the experts' tensors in groups and writes the merged ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fed.merging.sources import Source
from fed.merging.task_vectors import stem
from fed.state import State, StateError
from llava.suggest import did_you_mean

Put = Callable[[State], None]


class Format(Protocol):
    """One way for a merge to go.

    Attributes:
        name: as merge.json calls it.
        groups: names of the tensors that are merged together, group by group.
        experts, base: their tensors by name; a base may be None, or lack some.
        size: about how many bytes are written.
        written: one sentence or two on the contents of the folder, for the card.
        notes: further sentences for the card.
        fingerprints: a sentence on how `prints` are made, for the card.
    """

    name: str
    groups: Sequence[Sequence[str]]
    experts: Sequence[Mapping[str, Tensor]]
    base: Mapping[str, Tensor] | None
    size: int
    written: str
    notes: Sequence[str]
    fingerprints: str

    def prints(self) -> tuple[list[str], str | None]:
        """A fingerprint of each expert, and of the base."""

    def writer(self, folder: Path) -> AbstractContextManager[Put]:
        """Takes each group's merged state; the folder is whole at the end of the block."""

    def release(self) -> None:
        """A group is done: let go of the memory that was read."""
        return


def check_names(sources: Sequence[Source], tensors: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse experts that have not the same tensors as the first.

    Raises:
        StateError: a tensor that is missing or too many.
    """
    for source, others in zip(sources[1:], tensors[1:], strict=True):
        first = tensors[0]
        for name in first:
            if name not in others:
                hint = did_you_mean(name, others.keys() - first.keys())
                raise StateError(
                    f"{source.label}: tensor {name} is missing{hint}, {sources[0].label} has it"
                )
        for name in others:
            if name not in first:
                raise StateError(
                    f"{source.label}: tensor {name} is not expected, {sources[0].label} has none"
                )


def stand_in(base: Source, lost: Sequence[str]) -> str:
    """The card's sentence on tensors that a base has not."""
    return (
        f"{base.label} lacks {len(lost)} of the tensors, as {lost[0]}: the experts' weighted mean "
        "stands in for them."
    )


def by_layer(names: Sequence[str]) -> list[list[str]]:
    """Tensor names in their order, a weight together with its bias."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(stem(name), []).append(name)
    return list(groups.values())


def bytes_of(state: Mapping[str, Tensor]) -> int:
    """The size of the tensors on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
