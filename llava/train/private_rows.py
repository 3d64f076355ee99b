"""Whose each row of a batch's tensors is: pictures in a connector, positions in a language model.

A batch is padded, (samples, positions); a connector has a row for each picture, and the last layer
of the language model one row of the labelled positions of all samples (`llava.model.llava_arch`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.errors import InputError


@dataclass(frozen=True)
class Rows:
    """The sample of each row of what enters a layer, for a batch of `samples`.

    `pictures` are those of the rows that enter the connector, which has a row for each picture, or
    for each tile of one; `labelled` those of the positions that the loss reads.
    """

    samples: int
    pictures: Tensor
    labelled: Tensor

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any]) -> Rows:
        """Of a batch of `DataCollatorForSupervisedDataset`; samples have one picture, or none."""
        count, length = batch["labels"].shape
        labelled = batch["label_positions"] // length
        images = batch.get("images")
        if images is None:
            return cls(count, labelled.new_zeros(0), labelled)
        owners = (batch["image_positions"] // length).unique_consecutive()
        if len(owners) != len(images):
            raise InputError(
                f"a batch has {len(images)} pictures in {len(owners)} samples, private training "
                "takes one a sample"
            )
        tiles = [len(image) if image.ndim == 4 else 1 for image in images]
        repeats = torch.tensor(tiles, device=owners.device)
        return cls(count, owners.repeat_interleave(repeats), labelled)

    def entering(self, shape: torch.Size, in_connector: bool, name: str) -> Tensor | None:
        """The sample of each row, all axes of `shape` but the last as one.

        None for the zeros that a batch without pictures sends through the connector.
        """
        first, rows = shape[0], shape[:-1].numel()
        if in_connector:
            if not len(self.pictures):
                return None
            if first != len(self.pictures):
                raise InputError(
                    f"{name}: {first} rows enter it for {len(self.pictures)} pictures; private "
                    "training needs a row for each"
                )
            return self.pictures.repeat_interleave(rows // first)
        if first == self.samples:
            samples = torch.arange(self.samples, device=self.labelled.device)
            return samples.repeat_interleave(rows // first)
        if first == 1 and rows == len(self.labelled):
            return self.labelled
        raise InputError(
            f"{name}: what enters it, {tuple(shape)}, has no row for each of {self.samples} "
            "samples; private training cannot tell them apart there"
        )


class Flat(NamedTuple):
    """A call's rows, float32: what entered (R, in), the loss's gradient of what left (R, out), and
    whose they are (R,)."""

    entered: Tensor
    left: Tensor
    owners: Tensor


def by_sample(flat: Flat, rows: Rows) -> tuple[Tensor, Tensor]:
    """Rows as (samples, most rows, …), filled up with zeros, which add nothing to a gradient."""
    order = flat.owners.argsort(stable=True)
    owners = flat.owners[order]
    counts = owners.bincount(minlength=rows.samples)
    within = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
    most = int(counts.max())
    entered, left = (
        part.new_zeros(rows.samples * most, part.shape[-1])
        .index_copy(0, owners * most + within, part[order])
        .view(rows.samples, most, part.shape[-1])
        for part in flat[:2]
    )
    return entered, left
