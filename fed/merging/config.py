"""The settings of a merge, stated once, and the command line that does it again.

`fed.merging.recipe` makes flags and the keys of a YAML file of the fields.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from llava.errors import InputError

_FIRST = ("method", "experts", "weights", "options")  # of a command line
_NEVER = ("dry_run",)


def _flag(text: str, metavar: str | None = None, default: Any = MISSING, **more: Any) -> Any:
    """A field with its help; `more` may have `choices`, and `path` where YAML holds paths."""
    return field(default=default, metadata={"help": text, "metavar": metavar, **more})


@dataclass(frozen=True)
class MergeConfig:
    """One merge. `weights` None is 1 for each expert; `options` are as given, text or values."""

    experts: tuple[str, ...] = _flag("projector files, or folders of any form", "PATH", path=True)
    output: str | None = _flag("the folder to write", "OUT", None)
    base: str | None = _flag(
        "what the experts were trained from; else their mean", "PATH", None, path=True
    )
    method: str = _flag("the method, see --methods", "NAME", "pivotmerge")
    weights: tuple[float, ...] | None = _flag("one for each expert; else 1", "W", None)
    options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "the method's options", "metavar": "NAME=VALUE"}
    )
    scope: str = _flag(
        "projector, or all that is trainable: LoRA, full weights", "SCOPE", "projector",
        choices=("projector", "all"),
    )  # fmt: skip
    lora: str = _flag(
        "with --scope all: factors merges A and B, product merges BA", "FORM", "factors",
        choices=("factors", "product"),
    )  # fmt: skip
    config: str | None = _flag(
        "config.json for OUT, where projector files have none", "FILE", None, path=True
    )
    dry_run: bool = _flag("print how the experts relate; write nothing", None, False)
    force: bool = _flag("merge models of different backbones; the card says so", None, False)
    overwrite: bool = _flag("replace OUT", None, False)
    calibration_data: tuple[str, ...] = _flag(
        "LLaVA data: one, or one an expert", "JSON", (), path=True
    )
    image_folder: str | None = _flag("the pictures of the calibration data", "DIR", None, path=True)
    model_base: str | None = _flag("language model to calibrate with", "LLM", None, path=True)
    calibration_samples: int = _flag("records of each file", "N", 256)
    version: str = _flag("conversation template of the calibration", "NAME", "plain")
    device: str = _flag("device of the calibration", "DEVICE", "cpu")

    def __post_init__(self) -> None:
        if len(self.experts) < 2:
            raise InputError(f"--experts: {len(self.experts)} given, at least two are expected")
        for one in fields(self):
            known, value = one.metadata.get("choices"), getattr(self, one.name)
            if known and value not in known:
                raise InputError(f"--{one.name} is {value!r}; known are {', '.join(known)}")
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
            words += ["--options", *(f"{k}={option_text(v)}" for k, v in options.items())]
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


def option_text(value: Any) -> str:
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
