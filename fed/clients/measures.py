"""Measures of a model on samples: caption loss, exact captions, and what the pictures explain.

How much a picture tells of its caption is measured by showing another one: H nats with a caption's
own pictures, H + I with those of another sample. I estimates what passes from picture to caption,
and I / (H + I) is the **explained share** of the captions: 0 where pictures tell nothing, below 0
where they mislead. Reading and name are ours.

The other pictures are those of the next sample in the list that has as many, and not the same
files; after the last sample comes the first. So they depend on the samples and their order alone,
not on batches. Text alone, and a sample that nobody can lend to, is left out.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

Forward = Callable[..., Any]
Collate = Callable[[list[dict]], dict]


class Samples(Protocol):
    """A data set: samples by number, and the paths of a sample's pictures."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...

    def paths(self, index: int, /) -> list[str]: ...


@dataclass(frozen=True)
class EvaluationSet:
    """A named data set to measure on; `domains` has a name per sample, or None."""

    name: str
    dataset: Samples
    domains: Sequence[str] | None = None


class Explained(NamedTuple):
    """Captions with their own pictures and with others': nats over all of `tokens`.

    `spread` is sum_i (own_i - own / other other_i)^2 over samples: spread / other^2 is the variance
    of the share, which is a ratio of two sums.
    """

    own: float
    other: float
    spread: float
    tokens: int
    samples: int

    @property
    def share(self) -> float | None:
        """I / (H + I), not clipped; None where no sample could borrow."""
        return 1 - self.own / self.other if self.other else None


class _Sample(NamedTuple):
    """What was measured on one sample; `other` are the nats with other pictures, or None."""

    nats: float
    tokens: int
    wrong: int
    other: float | None


@torch.no_grad()  # not inference_mode: ZeRO-3 keeps tensors that it gathers here for training
def evaluate(
    forward: Forward,
    data: EvaluationSet,
    collate: Collate,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    explained: bool = False,
) -> dict:
    """Measure a model on a data set.

    Args:
        forward: the model: a batch with `label_positions` → an output whose `.logits` are theirs,
            (1, positions, vocabulary).
        collate: samples → a batch whose image tokens are expanded.
        explained: measure the explained share, too, by a second pass.

    Returns:
        `samples`, `loss` (nats a labelled token, mean over tokens), `exact` (share of samples whose
        every labelled token is the most likely one: just those whose greedy answer is the caption
        to the last token), with `explained` that (the explained share) and `other_loss` (as `loss`,
        with other pictures), and the same per domain under `domains`. None is of no sample.
    """
    every = range(len(data.dataset))
    measured = list(_measure(forward, data.dataset, collate, batch_size, device, every, explained))
    by_domain: dict[str, list[_Sample]] = defaultdict(list)
    for name, sample in zip(data.domains or (), measured, strict=data.domains is not None):
        by_domain[name].append(sample)
    domains = {name: _summary(own, explained) for name, own in sorted(by_domain.items())}
    return {**_summary(measured, explained), "domains": domains}


@torch.no_grad()
def explained_share(
    forward: Forward,
    data: Samples,
    collate: Collate,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    indices: Sequence[int] | None = None,
) -> Explained:
    """What the pictures explain of the captions of some samples, or of all; no gradient is made.

    Args:
        forward, collate: as `evaluate` takes them; the model is in `eval` mode.
        indices: the samples; pictures are borrowed among them alone.
    """
    chosen = range(len(data)) if indices is None else indices
    return _explained(_measure(forward, data, collate, batch_size, device, chosen, True))


def other_pictures(data: Samples, indices: Sequence[int] | None = None) -> dict[int, int]:
    """Of each sample the one whose pictures it borrows; some are left out (see above)."""
    indices = range(len(data)) if indices is None else indices
    paths = {i: [os.path.realpath(path) for path in data.paths(i)] for i in indices}
    groups: dict[int, list[int]] = defaultdict(list)
    for i in indices:
        groups[len(paths[i])].append(i)
    groups.pop(0, None)
    found: dict[int, int] = {}
    for group in groups.values():
        lender = None
        # Backwards, for a sample with the pictures of the next one borrows what that one does; and
        # twice around, for those at the end do not yet know the first time.
        for i, after in 2 * list(zip(group, group[1:] + group[:1], strict=True))[::-1]:
            lender = after if paths[after] != paths[i] else lender
            if lender is not None:
                found[i] = lender
    return found


def _measure(
    forward: Forward,
    data: Samples,
    collate: Collate,
    batch_size: int,
    device: torch.device | str,
    indices: Sequence[int],
    explained: bool,
) -> Iterator[_Sample]:
    """The samples one by one. A batch of other pictures is the same batch but for these."""
    lender = other_pictures(data, indices) if explained else {}
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        items = {i: data[i] for i in chosen}
        own = _rows(forward, collate([items[i] for i in chosen]), device)
        others = own
        if borrowing := lender.keys() & items.keys():
            for i in sorted({lender[i] for i in borrowing} - items.keys()):
                items[i] = data[i]
            shown = [_shown(items[i], items[lender.get(i, i)]) for i in chosen]
            others = _rows(forward, collate(shown), device)
        for i, (nats, tokens, wrong), (other, as_many, _) in zip(chosen, own, others, strict=True):
            # Tiles of another size may leave less room for the text: then there is no comparison.
            compared = i in lender and as_many == tokens
            yield _Sample(nats, int(tokens), int(wrong), other if compared else None)


def _shown(item: dict, other: dict) -> dict:
    """A sample with another one's pictures."""
    pictures = ("images", "image_tokens", "image_sizes")
    return {**item, **{key: other[key] for key in pictures if key in other}}


def _rows(forward: Forward, batch: dict, device: torch.device | str) -> list[list[float]]:
    """Nats, labelled tokens, and those that are not the most likely one, of each row."""
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    labels, places = batch["labels"], batch["label_positions"]
    logits = forward(**batch, use_cache=False).logits[0].float()
    targets = labels.flatten()[places + 1]
    loss = functional.cross_entropy(logits, targets, reduction="none").double()
    missed = (logits.argmax(-1) != targets).double()
    sums = torch.zeros(len(labels), 3, dtype=torch.float64, device=loss.device)
    rows = torch.stack([loss, torch.ones_like(loss), missed], 1)
    return sums.index_add_(0, places // labels.shape[1], rows).tolist()


def _explained(samples: Iterable[_Sample]) -> Explained:
    compared = [(s.nats, s.other, s.tokens) for s in samples if s.other is not None]
    own, other, tokens = zip(*compared, strict=True) if compared else ((), (), ())
    ratio = sum(own) / sum(other) if sum(other) else 0.0
    spread = sum((a - ratio * b) ** 2 for a, b in zip(own, other, strict=True))
    return Explained(sum(own), sum(other), spread, sum(tokens), len(compared))


def _summary(samples: Sequence[_Sample], explained: bool) -> dict:
    tokens = sum(s.tokens for s in samples)
    exact = sum(s.tokens > 0 and s.wrong == 0 for s in samples)
    found = {
        "samples": len(samples),
        "loss": sum(s.nats for s in samples) / tokens if tokens else None,
        "exact": exact / len(samples) if samples else None,
    }
    if explained:
        both = _explained(samples)
        other_loss = both.other / both.tokens if both.tokens else None
        found |= {"explained": both.share, "other_loss": other_loss}
    return found
