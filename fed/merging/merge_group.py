"""The merge itself: a group of tensors of all experts in, the method's tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fed import methods
from fed.merging.task_vectors import Gram, directions, gram
from fed.numerics.chunks import blocks, empty
from fed.numerics.weighted_mean import shares
from fed.state import State, StateError, check, is_finite


@dataclass
class Job:
    """What is the same for every group of tensors.

    Attributes:
        method: name in the registry; None only measures.
        who: how messages call each expert.
        base_of: how messages call the base.
        joint: when only measuring, whether to measure in the joint basis of each layer, too.
    """

    method: str | None
    options: Mapping[str, Any]
    weights: Sequence[float]
    who: Sequence[str]
    base_of: str
    calibration: Sequence[methods.Calibration] | None = None
    joint: bool = False

    @cached_property
    def function(self) -> Callable[..., methods.Outcome]:
        return methods.get(self.method)


@dataclass
class Merged:
    """A group after the merge: in the first expert's types; what the method says of it."""

    state: State | None
    grams: Gram
    facts: dict[str, Any]


def merge_group(
    job: Job, names: Sequence[str], experts: Sequence[Mapping], base: Mapping | None
) -> Merged:
    """Read, check, measure and merge the tensors `names`.

    Where the base lacks a tensor, or there is none, the experts' weighted mean stands in.

    Raises:
        InputError, StateError: a tensor that is missing, of another shape, or not finite, with the
            expert's name; and what the method refuses.
    """
    states = [_read(who, names, expert) for who, expert in zip(job.who, experts, strict=True)]
    for who, state in zip(job.who, states, strict=True):
        check(state, states[0], who=who)
    start = {name: base[name] for name in names if base is not None and name in base}
    check(start, {name: states[0][name] for name in start}, who=job.base_of)
    start |= mean([{n: s[n] for n in names if n not in start} for s in states], job.weights)
    # Differences from the base in the finer of both types; experts of a training are often coarser.
    start = {n: start[n].to(_finest(start[n], [s[n] for s in states])) for n in names}
    grams = gram(states, start)
    if job.method is None:
        return Merged(None, grams, directions(states, start, job.weights) if job.joint else {})
    outcome = job.function(
        states,
        weights=job.weights,
        base=start,
        clients=job.who,
        calibration=job.calibration,
        **job.options,
    )
    outcome.facts.pop("clients", None)
    result = {name: outcome.state[name].to(states[0][name].dtype) for name in names}
    for name, tensor in result.items():
        if not is_finite(tensor):
            raise StateError(f"{job.method}: the result's {name} does not fit into {tensor.dtype}")
    return Merged(result, grams, outcome.facts)


def mean(states: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted mean, in float32 or better."""
    p = shares(weights)
    types = {n: torch.promote_types(t.dtype, torch.float32) for n, t in states[0].items()}
    result = {n: t.to(types[n]) for n, t in empty(states[0]).items()}
    for block in blocks(states, states[0]) if result else ():
        block.write(result, block.mix(p))
    return result


def _read(who: str, names: Sequence[str], tensors: Mapping[str, Tensor]) -> State:
    for name in names:
        if name not in tensors:
            raise StateError(f"{who}: tensor {name} is missing, which the other experts have")
    return {name: tensors[name] for name in names}


def _finest(base: Tensor, experts: Sequence[Tensor]) -> torch.dtype:
    dtype = base.dtype
    for expert in experts:
        dtype = torch.promote_types(dtype, expert.dtype)
    return dtype
