"""Held-out measures of a model: caption loss, and how many captions it gives exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional


class Samples(Protocol):
    """A data set: samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...


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
) -> dict:
    """Measure a model on a data set.

    Args:
        forward: the model: a batch with `label_positions` → an output whose `.logits` are theirs,
            (1, positions, vocabulary).
        collate: samples → a batch whose image tokens are expanded.

    Returns:
        `samples`, `loss` (nats a labelled token, mean over tokens), `exact` (share of samples whose
        every labelled token is the most likely one: just those whose greedy answer is the caption
        to the last token), and the same per domain under `domains`.
    """
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    for start in range(0, len(data.dataset), batch_size):
        indices = range(start, min(start + batch_size, len(data.dataset)))
        batch = collate([data.dataset[i] for i in indices])
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
        nats, tokens, wrong = of_row.cpu()
        exact = (tokens > 0) & (wrong == 0)
        for i, row in zip(indices, torch.stack([nats, tokens, exact], 1), strict=True):
            for name in ("",) if data.domains is None else ("", data.domains[i]):
                sums[name] += torch.cat([row, torch.ones(1)])
    whole = _measures(sums.pop("", torch.zeros(4)))
    return {**whole, "domains": {name: _measures(row) for name, row in sorted(sums.items())}}


def _measures(row: torch.Tensor) -> dict:
    loss, tokens, exact, samples = row.tolist()
    return {
        "samples": int(samples),
        "loss": loss / tokens if tokens else None,
        "exact": exact / samples if samples else None,
    }
