"""What a merge is asked to do, and the command line that does it again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from llava.errors import InputError

SCOPES = ("projector", "all")
LORA = ("factors", "product")
_FIRST = ("method", "experts", "weights", "options")  # of a command line
_NEVER = ("dry_run",)


@dataclass(frozen=True)
class Settings:
    """One merge. `weights` None is 1 for each expert; `options` are as given, text or values."""

    experts: tuple[str, ...]
    output: str | None = None
    base: str | None = None
    method: str = "pivotmerge"
    weights: tuple[float, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "projector"
    lora: str = "factors"
    config: str | None = None
    dry_run: bool = False
    force: bool = False
    overwrite: bool = False
    calibration_data: tuple[str, ...] = ()
    image_folder: str | None = None
    model_base: str | None = None
    calibration_samples: int = 256
    version: str = "plain"
    device: str = "cpu"

    def __post_init__(self):
        if len(self.experts) < 2:
            raise InputError(f"--experts: {len(self.experts)} given, at least two are expected")
        for name, known in (("scope", SCOPES), ("lora", LORA)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"--{name} is {getattr(self, name)!r}; known are {', '.join(known)}"
                )
        _check_weights(self.weights, self.experts)
        if self.calibration_data and len(self.calibration_data) not in (1, len(self.experts)):
            raise InputError(
                f"--calibration_data: {len(self.calibration_data)} files for {len(self.experts)} "
                "experts; one for all, or one for each, is expected"
            )

    @property
    def shares(self) -> list[float]:
        """The experts' weights."""
        return list(self.weights or [1.0] * len(self.experts))

    def command(self, options: Mapping[str, Any]) -> str:
        """The command line that does this again, with all of the method's `options` spelt out."""
        words = ["python", "-m", "fed.merge", "--method", self.method, "--experts", *self.experts]
        if self.weights:
            words += ["--weights", *(f"{weight:.17g}" for weight in self.weights)]
        if options:
            words += ["--options", *(f"{name}={text(value)}" for name, value in options.items())]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in (*_FIRST, *_NEVER) or value == one.default:
                continue
            words.append(f"--{one.name}")
            if isinstance(value, tuple):
                words += value
            elif value is not True:
                words.append(str(value))
        return shlex.join(words)


def text(value: Any) -> str:
    """An option's value as the command line takes it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _check_weights(weights: Sequence[float] | None, experts: Sequence[str]) -> None:
    if weights is None:
        return
    if len(weights) != len(experts):
        raise InputError(f"--weights: {len(weights)} for {len(experts)} experts; one each expected")
    for expert, weight in zip(experts, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise InputError(
                f"--weights: {weight} for expert {expert}; 0 or a positive number is expected"
            )
    if sum(weight > 0 for weight in weights) < 2:
        raise InputError("--weights: fewer than two experts have any; nothing would be merged")
