"""What is refused and what is warned of before a merge, and after its layers have been measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fed import methods
from fed.merging.compatibility import backbone_differences, differences
from fed.merging.config import Settings
from fed.merging.sources import WHOLE, Source
from llava.errors import InputError

# A base is not the experts' common start where all task vectors have one direction, the detour from
# it by the start; or where little of it is left in the experts. <A_k, A_0> / |A_0|^2 is about 1 for
# what was trained from A_0, as training adds to what was there, and 0 for what knows nothing of it.
SAME_WAY = 0.9  # least cosine between task vectors
LEFT = 0.5  # least of these shares


def check_method(settings: Settings) -> None:
    """Refuse a method that is for rounds only, or for less than what is to be merged."""
    name, function = settings.method, methods.get(settings.method)
    if function.personal:
        raise InputError(f"--method {name}: gives every expert a model of its own, so none merged")
    if function.client_rule is not None:
        raise InputError(
            f"--method {name}: changes how clients train in a round, which is over in a merge; "
            "fedavg is what its server does"
        )
    whole = settings.scope == "all"
    if function.needs_calibration and not settings.calibration_data:
        raise InputError(f"--method {name}: needs data; name them with --calibration_data")
    if settings.calibration_data and whole:
        raise InputError("--calibration_data: measures projectors, so it needs --scope projector")
    if settings.calibration_data and not function.takes_calibration:
        raise InputError(f"--calibration_data: {name} makes no use of data")


def rehearse(settings: Settings, options: Mapping[str, Any]) -> None:
    """The method on next to nothing: a value out of range is found before anything is read."""
    function = methods.get(settings.method)
    if settings.calibration_data and function.calibrated_by:
        option, value = function.calibrated_by
        found = {**function.defaults, **options}[option]
        if found != value:
            raise InputError(
                f"--calibration_data: {settings.method} looks at it with --options "
                f"{option}={value} only, {option} is {found}"
            )
    if function.needs_calibration or settings.calibration_data:
        return
    start = {"model.mm_projector.weight": torch.eye(2), "model.mm_projector.bias": torch.ones(2)}
    count = len(settings.experts)
    states = [{n: t + t * (k + 1) / count for n, t in start.items()} for k in range(count)]
    function(states, weights=settings.shares, base=start, clients=settings.experts, **options)


def check_streamed(settings: Settings) -> None:
    """Refuse a method that needs all tensors at once where they go through layer by layer."""
    if methods.get(settings.method).cross_layer:
        raise InputError(
            f"--method {settings.method}: needs all layers at once, and --scope all goes through "
            "them one by one; --scope projector is possible"
        )


def check_identity(experts: Sequence[Source], base: Source | None, settings: Settings) -> list[str]:
    """Refuse models on different backbones; with --force, say in which way they are.

    Returns:
        What was forced, one sentence each; empty where all is well.
    """
    found = differences([*experts, *([base] if base else [])])
    hint = ""
    if settings.scope == "projector" and all(e.kind in WHOLE for e in experts):
        tuned = backbone_differences(experts)
        hint = "; --scope all merges language models that were tuned, too" if tuned else ""
        found += tuned
    if found and not settings.force:
        raise InputError(
            f"the models are not on one backbone: {found[0]}{hint}; --force merges all the same"
        )
    return [f"Merged by force: {clause}." for clause in found]


def check_known(experts: Sequence[Source]) -> list[str]:
    """Warn of experts whose language model nothing tells."""
    silent = [expert.given for expert in experts if not expert.config]
    if not silent:
        return []
    return [
        f"no config.json tells the language model and tower of {', '.join(silent)}: that all "
        "experts have the same ones is taken on trust."
    ]


def check_same(
    experts: Sequence[Source], prints: Sequence[str], base: Source | None, of_base: str | None
) -> list[str]:
    """Refuse where nobody learnt anything; warn of experts that are equal, or equal to the base."""
    warnings = []
    first: dict[str, Source] = {}
    for expert, fingerprint in zip(experts, prints, strict=True):
        other = first.setdefault(fingerprint, expert)
        if other is not expert:
            warnings.append(f"{expert.who} is the same as {other.who}: it counts twice.")
    if base is not None and all(fingerprint == of_base for fingerprint in prints):
        raise InputError(f"every expert is equal to {base.who}: there is nothing to merge")
    for expert, fingerprint in zip(experts, prints, strict=True):
        if base is not None and fingerprint == of_base:
            warnings.append(f"{expert.who} is equal to {base.who}: it has learnt nothing.")
    return warnings


def check_start(facts: dict[str, Any], base: Source) -> list[str]:
    """Warn where the directions of the task vectors say that the base is not the common start.

    Args:
        facts: of all layers together, see `fed.merging.task_vectors.describe`.
    """
    cosines = [c for j, row in enumerate(facts["cosines"]) for c in row[:j] if c is not None]
    left = [share for share in facts["left"] if share is not None]
    if not cosines or not left or (min(cosines) <= SAME_WAY and min(left) >= LEFT):
        return []
    return [
        f"{base.who} does not look like the experts' common start: the task vectors from it have "
        f"cosines of {min(cosines):.2f} to {max(cosines):.2f} (above {SAME_WAY} all go one way), "
        f"and of it {min(left):.2f} to {max(left):.2f} is left in the experts (1 is all)."
    ]
