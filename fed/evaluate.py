"""Held-out measures of a model: caption loss, and how many captions it gives exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from llava.constants import IGNORE_INDEX


@dataclass(frozen=True)
class EvaluationSet:
    """A named data set to measure on; `domains` has a name per sample, or None."""

    name: str
    dataset: Sequence[dict]
    domains: Sequence[str] | None = None


@torch.no_grad()  # not inference_mode: ZeRO-3 keeps tensors that it gathers here for training
def evaluate(
    forward: Callable[..., object],
    data: EvaluationSet,
    collate: Callable[[list[dict]], dict],
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> dict:
    """Measure a model on a data set.

    Args:
        forward: the model: a batch without labels → an output with `.logits`.
        collate: samples → a batch whose image tokens are expanded, so that logits and labels align.

    Returns:
        `samples`, `loss` (nats a labelled token, mean over tokens), `exact` (share of samples whose
        every labelled token is the most likely one: just those whose greedy answer is the caption
        to the last token), and the same per domain under `domains`.
    """
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    for start in range(0, len(data.dataset), batch_size):
        indices = range(start, min(start + batch_size, len(data.dataset)))
        batch = collate([data.dataset[i] for i in indices])
        labels = batch.pop("labels")[:, 1:].to(device)
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        wanted = labels != IGNORE_INDEX
        # Logits only where there is a label: columns before the first one are never read.
        first = int(wanted.any(0).float().argmax())
        columns = torch.arange(first, labels.shape[1], device=labels.device)
        logits = forward(**batch, use_cache=False, logits_to_keep=columns).logits
        labels, wanted = labels[:, first:], wanted[:, first:]
        loss = functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
        )
        hit = (logits.argmax(-1) == labels) | ~wanted
        rows = torch.stack(
            [loss.sum(1), wanted.sum(1), hit.all(1) & wanted.any(1), torch.ones_like(loss[:, 0])],
            dim=1,
        )
        for index, row in zip(indices, rows.double().cpu(), strict=True):
            sums[""] += row
            if data.domains is not None:
                sums[data.domains[index]] += row
    whole = _measures(sums.pop("", torch.zeros(4)))
    return {**whole, "domains": {name: _measures(row) for name, row in sorted(sums.items())}}


def _measures(row: torch.Tensor) -> dict:
    loss, tokens, exact, samples = row.tolist()
    return {
        "samples": int(samples),
        "loss": loss / tokens if tokens else None,
        "exact": exact / samples if samples else None,
    }
