"""A `MergeConfig` from flags and a YAML file, both as its fields say.

```yaml
method: ties
experts:                    # paths, relative to this file
  - topic/food
  - {path: topic/birds, weight: 2}
base: start/mm_projector.bin
options: {density: 0.3}
output: merged
```

The keys are the names of the flags. As in clients.yaml, paths are relative to the file; a name that
is no file or folder there stays as it is, and may be one of the hub's.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from fed.merging.config import MergeConfig
from fed.yaml_file import read_yaml
from llava.errors import InputError
from llava.flags import pairs
from llava.suggest import did_you_mean


@dataclass(frozen=True)
class _Kind:
    """A type of setting: as YAML has it, and the arguments of `add_argument`."""

    expected: str
    fits: Callable[[Any], bool]
    argument: Mapping[str, Any]


def _list_of(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(one) in types for one in value)


_KINDS: dict[Any, _Kind] = {
    bool: _Kind("true or false", lambda v: type(v) is bool, {"action": "store_true"}),
    int: _Kind("a whole number", lambda v: type(v) is int, {"type": int}),
    str: _Kind("text", lambda v: type(v) is str, {}),
    tuple[str, ...]: _Kind("a list of files", _list_of(str), {"nargs": "+"}),
    tuple[float, ...]: _Kind(
        "a list of numbers", _list_of(int, float), {"nargs": "+", "type": float}
    ),
    Mapping[str, Any]: _Kind(
        "names and values", lambda v: isinstance(v, dict | list), {"nargs": "+"}
    ),
}


def _kinds() -> dict[str, _Kind]:
    """The kind of each field of `MergeConfig`; None is no value of any, in YAML the default."""
    hints = typing.get_type_hints(MergeConfig)
    for name, hint in hints.items():
        if NoneType in typing.get_args(hint):
            (hints[name],) = (kind for kind in typing.get_args(hint) if kind is not NoneType)
    return {name: _KINDS[hint] for name, hint in hints.items()}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field; one that is not given is not in what `parser` parses to."""
    kinds = _kinds()
    for one in fields(MergeConfig):
        more = dict(kinds[one.name].argument)
        if one.metadata.get("metavar"):
            more["metavar"] = one.metadata["metavar"]
        parser.add_argument(f"--{one.name}", help=_help(one), default=argparse.SUPPRESS, **more)


def _help(one: Field) -> str:
    text = one.metadata["help"]
    return f"{text}; default {one.default}" if one.default and one.default is not MISSING else text


def read_config(path: str | None, flags: Mapping[str, Any]) -> MergeConfig:
    """MergeConfig from a YAML file, if any, and the flags that were given, which are stronger.

    Options are stronger one by one; `--experts` replaces the file's experts with their weights.

    Raises:
        InputError: no readable YAML, an unknown key, a value of another type, or settings that no
            merge can have.
    """
    values: dict[str, Any] = {} if path is None else _read(Path(path))
    if "experts" in flags:
        values.pop("weights", None)
    options = {**options_of(values.get("options")), **options_of(flags.get("options"))}
    values |= {**flags, "options": options}
    if not values.get("experts"):
        raise InputError("--experts is missing: two or more models or projector files")
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
    }
    return MergeConfig(**settings)


def options_of(options: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Options by name, of a mapping or of texts name=value; the method checks their types."""
    if isinstance(options, Mapping):
        return dict(options)
    return dict(pairs("--options", map(str, options or ())))


def _read(path: Path) -> dict[str, Any]:
    """The settings that a YAML file has, typed."""
    document, kinds = read_yaml(path), _kinds()
    if not isinstance(document, dict):
        raise InputError(f"{path}: keys and values are expected")
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            raise InputError(f"{path}: unknown key {key!r}{did_you_mean(name, kinds)}")
        if value is not None:
            values[name] = value
    if "experts" in values:
        values |= _experts(path, values)
    for one in fields(MergeConfig):
        if one.name in values:
            values[one.name] = _typed(path, one, kinds[one.name], values[one.name])
    if values.get("output"):
        values["output"] = str(path.parent / Path(values["output"]).expanduser())
    return values


def _typed(path: Path, one: Field, kind: _Kind, value: Any) -> Any:
    """A YAML value, refused where it is not of the field's type; paths as the merge needs them."""
    if kind is _KINDS[tuple[str, ...]] and isinstance(value, str):
        value = [value]
    if not kind.fits(value):
        raise InputError(f"{path}: {one.name}: {kind.expected} expected, found {value!r}")
    if not one.metadata.get("path"):
        return value
    if isinstance(value, list):
        return [_beside(path, file) for file in value]
    return value and _beside(path, value)


def _experts(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """`experts` as paths, and `weights`, of a list of paths or of {path, weight}."""
    if not isinstance(values["experts"], list):
        raise InputError(f"{path}: experts: a list expected, found {values['experts']!r}")
    paths, weights = [], []
    for number, entry in enumerate(values["experts"], 1):
        entry = {"path": entry} if isinstance(entry, str) else entry
        where = f"{path}: expert {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise InputError(f"{where}: a path, or {{path, weight}}, is expected, found {entry!r}")
        if unknown := sorted(map(str, entry.keys() - {"path", "weight"})):
            raise InputError(f"{where}: unknown key {unknown[0]!r}; path and weight are known")
        weight = entry.get("weight")
        if weight is not None and type(weight) not in (int, float):
            raise InputError(f"{where}: weight is {weight!r}, a number is expected")
        paths.append(entry["path"])
        weights.append(weight)
    if all(weight is None for weight in weights):
        return {"experts": paths}
    if "weights" in values:
        raise InputError(f"{path}: weights are given both by themselves and with the experts")
    return {"experts": paths, "weights": [1.0 if w is None else float(w) for w in weights]}


def _beside(path: Path, name: str) -> str:
    """A path relative to the YAML file's folder, if there is something; else the name itself."""
    beside = path.parent / Path(name).expanduser()
    return str(beside) if beside.exists() else name
