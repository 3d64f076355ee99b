"""The method of a merge: refused where it cannot do it, and called on one group after the other.

A group of tensors of all experts goes in, the method's tensors come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fed import methods
from fed.merging.config import MergeConfig
from fed.merging.task_vectors import Gram, directions, gram
from fed.numerics.chunks import blocks, empty
from fed.numerics.weighted_mean import shares
from fed.state import State, StateError, check, is_finite
from llava.errors import InputError


def check_method(config: MergeConfig) -> None:
    """Refuse a method that is for rounds only, or for less than what is to be merged."""
    name, method = config.method, methods.get(config.method)
    if method.personal:
        raise InputError(f"--method {name}: gives every expert a model of its own, so none merged")
    if method.client_rule is not None:
        raise InputError(
            f"--method {name}: changes how clients train in a round, which is over in a merge; "
            "fedavg is what its server does"
        )
    if method.needs_calibration and not config.calibration_data:
        raise InputError(f"--method {name}: needs data; name them with --calibration_data")
    if config.calibration_data and config.scope == "all":
        raise InputError("--calibration_data: measures projectors, so it needs --scope projector")
    if config.calibration_data and not method.takes_calibration:
        raise InputError(f"--calibration_data: {name} makes no use of data")


def rehearse(config: MergeConfig, options: Mapping[str, Any]) -> None:
    """The method on next to nothing: a value out of range is found before anything is read."""
    method = methods.get(config.method)
    if method.needs_calibration:
        return
    start = {"model.mm_projector.weight": torch.eye(2), "model.mm_projector.bias": torch.ones(2)}
    count = len(config.experts)
    states = [{n: t + t * (k + 1) / count for n, t in start.items()} for k in range(count)]
    method(states, weights=config.shares, base=start, clients=config.experts, **options)


def check_streamed(config: MergeConfig) -> None:
    """Refuse a method that needs all tensors at once where they go through layer by layer."""
    if methods.get(config.method).cross_layer:
        raise InputError(
            f"--method {config.method}: needs all layers at once, and --scope all goes through "
            "them one by one; --scope projector is possible"
        )


@dataclass
class MergeJob:
    """The merge as every group of tensors has it.

    Attributes:
        method: None only measures.
        labels: the experts in messages.
        base_label: the base in messages.
        joint: when only measuring, whether to measure in the joint basis of each layer, too.
    """

    method: methods.Method | None
    options: Mapping[str, Any]
    weights: Sequence[float]
    labels: Sequence[str]
    base_label: str
    calibration: Sequence[methods.Calibration] | None = None
    joint: bool = False


@dataclass
class Merged:
    """A group after the merge, in the first expert's types, with the method's facts on it."""

    state: State | None
    grams: Gram
    facts: dict[str, Any]


def merge_group(
    job: MergeJob,
    names: Sequence[str],
    experts: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None,
) -> Merged:
    """Read, check, measure and merge the tensors `names`.

    Where the base lacks a tensor, or there is none, the experts' weighted mean stands in.

    Raises:
        InputError, StateError: a tensor that is missing, of another shape, or not finite, with the
            expert's name; and what the method refuses.
    """
    states = [_read(label, names, e) for label, e in zip(job.labels, experts, strict=True)]
    for label, state in zip(job.labels, states, strict=True):
        check(state, states[0], who=label)
    start = {name: base[name] for name in names if base is not None and name in base}
    check(start, {name: states[0][name] for name in start}, who=job.base_label)
    start |= mean([{n: s[n] for n in names if n not in start} for s in states], job.weights)
    # Differences from the base in the finer of both types; experts of a training are often coarser.
    start = {n: start[n].to(_finest(start[n], [s[n] for s in states])) for n in names}
    grams = gram(states, start)
    if job.method is None:
        return Merged(None, grams, directions(states, start, job.weights) if job.joint else {})
    outcome = job.method(
        states,
        weights=job.weights,
        base=start,
        clients=job.labels,
        calibration=job.calibration,
        **job.options,
    )
    outcome.facts.pop("clients", None)
    merged = outcome.state
    assert isinstance(merged, dict)  # a method with a state for each client was refused
    result = {name: merged[name].to(states[0][name].dtype) for name in names}
    for name, tensor in result.items():
        if not is_finite(tensor):
            raise StateError(
                f"{job.method.name}: the result's {name} does not fit into {tensor.dtype}"
            )
    return Merged(result, grams, outcome.facts)


def mean(states: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted mean, in float32 or better."""
    p = shares(weights)
    types = {n: torch.promote_types(t.dtype, torch.float32) for n, t in states[0].items()}
    result = {n: t.to(types[n]) for n, t in empty(states[0]).items()}
    for block in blocks(states, states[0]) if result else ():
        block.write(result, block.mix(p))
    return result


def _read(label: str, names: Sequence[str], tensors: Mapping[str, Tensor]) -> State:
    for name in names:
        if name not in tensors:
            raise StateError(f"{label}: tensor {name} is missing, which the other experts have")
    return {name: tensors[name] for name in names}


def _finest(base: Tensor, experts: Sequence[Tensor]) -> torch.dtype:
    dtype = base.dtype
    for expert in experts:
        dtype = torch.promote_types(dtype, expert.dtype)
    return dtype
