"""Measures of a model on samples: caption loss, exact captions, and what the pictures explain."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional


class Samples(Protocol):
    """A data set: samples by number, and the paths of a sample's pictures."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...

    def paths(self, index: int) -> list[str]: ...


@dataclass(frozen=True)
class EvaluationSet:
    """A named data set to measure on; `domains` has a name per sample, or None."""

    name: str
    dataset: Samples
    domains: Sequence[str] | None = None


@torch.no_grad()  # not inference_mode: ZeRO-3 keeps tensors that it gathers here for training
def evaluate(
    forward: Callable[..., Any],
    data: EvaluationSet,
    collate: Callable[[list[dict]], dict],
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    explained: bool = False,
) -> dict:
    """Measure a model on a data set.

    Args:
        forward: the model: a batch with `label_positions` → an output whose `.logits` are theirs,
            (1, positions, vocabulary).
        collate: samples → a batch whose image tokens are expanded.
        explained: measure `explained`, too; every sample with a picture is then run twice.

    Returns:
        `samples`, `loss` (nats a labelled token, mean over tokens), `exact` (share of samples whose
        every labelled token is the most likely one: just those whose greedy answer is the caption
        to the last token), if asked for `explained` (see `explained_share`; None where no sample
        has another one's picture), and the same per domain under `domains`.
    """
    whole = torch.zeros(6, dtype=torch.float64)
    of_domains: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros_like(whole))
    dataset = data.dataset
    others = other_pictures(dataset) if explained else {}

    def add(i: int, *row: float) -> None:
        sums = torch.tensor(row, dtype=torch.float64)
        whole.add_(sums)
        if data.domains is not None:
            of_domains[data.domains[i]] += sums

    for indices, items in _batches(dataset, range(len(dataset)), batch_size):
        rows = _rows(forward, collate(items), device)
        for i, (nats, tokens, wrong) in zip(indices, rows, strict=True):
            exact = tokens > 0 and wrong == 0
            add(i, nats, tokens, exact, 1, nats if i in others else 0, 0)
    for indices, items in _batches(dataset, sorted(others), batch_size):
        shown = [
            _with_pictures(item, dataset[others[i]]) for i, item in zip(indices, items, strict=True)
        ]
        for i, (nats, _, _) in zip(indices, _rows(forward, collate(shown), device), strict=True):
            add(i, 0, 0, 0, 0, 0, nats)
    domains = {name: _measures(row, explained) for name, row in sorted(of_domains.items())}
    return {**_measures(whole, explained), "domains": domains}


def explained_share(
    forward: Callable[..., Any],
    dataset: Samples,
    collate: Callable[[list[dict]], dict],
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> float | None:
    """The share of the captions that the pictures explain.

    I / (H + I), where H are the nats of all captions with their own pictures, and H + I those with
    the pictures of the next sample that has others, and as many (after the last comes the first).
    0: the pictures tell nothing; below 0: they mislead. None: no sample has another's picture.
    Reading and name are ours.
    """
    data = EvaluationSet("", dataset)
    return evaluate(forward, data, collate, batch_size, device, explained=True)["explained"]


def other_pictures(dataset: Samples) -> dict[int, int]:
    """Sample with a picture → the next sample that has as many and others; none is left out."""
    paths = [tuple(dataset.paths(i)) for i in range(len(dataset))]
    by_count: dict[int, list[int]] = defaultdict(list)
    for i, own in enumerate(paths):
        by_count[len(own)].append(i)
    by_count.pop(0, None)
    taken = {}
    for members in by_count.values():
        following: int | None = None
        # Backwards and twice around: what follows the last is the first of other pictures.
        for i, after in zip(reversed(members * 2), reversed([*members * 2, None][1:]), strict=True):
            if after is not None and paths[after] != paths[i]:
                following = after
            if following is not None:
                taken[i] = following
    return taken


def _batches(
    dataset: Samples, chosen: Sequence[int], size: int
) -> Iterator[tuple[Sequence[int], list[dict]]]:
    for start in range(0, len(chosen), size):
        indices = chosen[start : start + size]
        yield indices, [dataset[i] for i in indices]


def _with_pictures(item: dict, other: dict) -> dict:
    keys = ("images", "image_tokens", "image_sizes")
    return {**item, **{key: other[key] for key in keys if key in other}}


def _rows(forward, batch: dict, device) -> list[list[float]]:
    """Of each sample: its nats, labelled tokens, and how many of them are not the likeliest."""
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    labels, places = batch["labels"], batch["label_positions"]
    logits = forward(**batch, use_cache=False).logits[0].float()
    targets = labels.flatten()[places + 1]
    loss = functional.cross_entropy(logits, targets, reduction="none").double()
    missed = (logits.argmax(-1) != targets).double()
    of_row = torch.zeros(3, len(labels), dtype=torch.float64, device=loss.device)
    of_row.index_add_(
        1, places // labels.shape[1], torch.stack([loss, torch.ones_like(loss), missed])
    )
    return of_row.T.tolist()


def _measures(row: torch.Tensor, explained: bool) -> dict:
    loss, tokens, exact, samples, own, other = row.tolist()
    found = {
        "samples": int(samples),
        "loss": loss / tokens if tokens else None,
        "exact": exact / samples if samples else None,
    }
    return {**found, "explained": (other - own) / other if other else None} if explained else found
