"""site.yaml: what a site has, and what it lets the driver decide.

```yaml
name: st-mary                        # as in the run's clients.yaml
data_path: captions.json             # LLaVA JSON; paths are relative to this file
image_folder: images                 # pictures are opened below it alone
model_name_or_path: vicuna-7b-v1.5   # a folder, or a name on the hub
vision_tower: clip-vit-large-patch14-336
work: work                           # the site's own files; made when missing
gpus: [0]                            # as CUDA_VISIBLE_DEVICES
flags: {feature_cache: cache}        # of its own, stronger than the run's
allow: [learning_rate, …]            # the flags that a run may set, where not all of the usual ones
command: bash train.sh               # its own training script, as clients of the script driver have
cwd: ~/LLaVA                         # where that is started
env: {PATH: "/opt/llava/bin:${PATH}"}
trust: {north: 3f2a…}                # the others' public keys: only runs with secure sums
secure_min: 3                        # the fewest sites that it is summed with
courier: folder                      # folder, or flare
folder: /cluster/run/fed/spool       # folder: OUTPUT/fed/spool of the run; * stands for any name
kit: kit                             # flare: the site's kit
```
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fed.clients.yaml_values import flag_of, text_of, unquoted
from fed.drivers.client_process import PROCESS_KEYS, ProcessSpec, read_process
from fed.remote.ticket import OWN_FLAGS, run_flags
from fed.yaml_file import read_yaml
from llava.errors import InputError
from llava.suggest import did_you_mean

_REQUIRED = ("name", "data_path", "model_name_or_path", "vision_tower", "courier")
KEYS = (
    *_REQUIRED,
    "image_folder",
    "work",
    "flags",
    "allow",
    "trust",
    "secure_min",
    *PROCESS_KEYS,
    "folder",
    "kit",
)


@dataclass(frozen=True)
class SiteConfig:
    """A site's settings; paths are absolute, but for names on a hub.

    Attributes:
        source: the file that they were read from.
        flags: of its own, as on a command line.
        allow: the flags that a run may set; None: all of `run_flags()`.
        process: the command that trains, where it has one, and the GPUs.
        trust: the public keys, 64 hex digits, of the sites that it takes part in secure sums with.
            A site with any takes part in no other run: its update leaves it in sums alone.
        secure_min: the fewest sites of such a sum.
    """

    source: Path
    name: str
    data_path: Path
    image_folder: Path | None
    model_name_or_path: str
    vision_tower: str
    work: Path
    courier: str
    folder: str | None = None
    kit: Path | None = None
    flags: dict[str, str] = field(default_factory=dict)
    allow: frozenset[str] | None = None
    process: ProcessSpec = field(default_factory=ProcessSpec)
    trust: dict[str, str] = field(default_factory=dict)
    secure_min: int = 3

    @property
    def allowed(self) -> frozenset[str]:
        return run_flags() if self.allow is None else self.allow


def read_site(path: str | Path) -> SiteConfig:
    """Read site.yaml.

    Raises:
        InputError: no such file, not YAML, an unknown or missing key, a bad value, or a file or
            folder that does not exist. The message names the key.
    """
    path = Path(path)
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise InputError(f"{path}: keys and values are expected, such as `name: st-mary`")
    for key in document:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}{did_you_mean(str(key), KEYS)}")
    entry = {key: value for key, value in document.items() if value is not None}
    for key in _REQUIRED:
        if key not in entry:
            raise InputError(f"{path}: {key} is missing")
    name = entry["name"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"{path}: name is {name!r}; letters, digits, '.', '_' and '-' are expected"
            f"{unquoted('name', name)}"
        )
    if entry["courier"] == "folder" and "folder" not in entry:
        raise InputError(f"{path}: courier folder needs folder, the run's OUTPUT/fed/spool")
    folder = entry.get("folder")
    kit = entry.get("kit")
    return SiteConfig(
        source=path,
        name=name,
        data_path=_there(entry, "data_path", path, Path.is_file),
        image_folder=_there(entry, "image_folder", path, Path.is_dir)
        if "image_folder" in entry
        else None,
        model_name_or_path=_model(entry, "model_name_or_path", path),
        vision_tower=_model(entry, "vision_tower", path),
        work=_path(path, "work", entry.get("work", "work")),
        courier=text_of("courier", entry["courier"], str(path)),
        folder=None if folder is None else str(_path(path, "folder", folder)),
        kit=None if kit is None else _there(entry, "kit", path, Path.is_dir),
        flags=_flags(entry.get("flags", {}), path),
        allow=None if "allow" not in entry else _allow(entry["allow"], path),
        process=read_process(entry, path.parent, str(path)),
        trust=_trust(entry.get("trust", {}), path),
        secure_min=_least(entry.get("secure_min", 3), path),
    )


def _trust(value: object, file: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InputError(f"{file}: trust is {value!r}, sites and their public keys are expected")
    for name, key in value.items():
        if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key):
            raise InputError(
                f"{file}: trust has {key!r} for {name}; 64 hex digits are expected, in quotes, as "
                "`python -m fed.site site.yaml --key` prints them there"
            )
    return {str(name): str(key) for name, key in value.items()}


def _least(value: object, file: Path) -> int:
    if type(value) is not int or value < 2:
        raise InputError(f"{file}: secure_min is {value!r}, 2 or more is expected")
    return value


def _path(file: Path, key: str, value: object) -> Path:
    return (file.parent / Path(text_of(key, value, str(file))).expanduser()).absolute()


def _there(entry: Mapping[str, Any], key: str, file: Path, kind: Any) -> Path:
    path = _path(file, key, entry[key])
    if not kind(path):
        raise InputError(f"{file}: {key} {path} does not exist")
    return path


def _model(entry: Mapping[str, Any], key: str, file: Path) -> str:
    """A folder, made absolute; what is no folder here and looks like no path is a hub's name."""
    text = text_of(key, entry[key], str(file))
    path = _path(file, key, text)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return str(path)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise InputError(f"{file}: {key} {path} does not exist")
    return text


def _flags(value: object, file: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InputError(f"{file}: flags is {value!r}, names and values are expected")
    _check_names(value, OWN_FLAGS, f"{file}: flags", "which a site does not set")
    return {name: flag_of(name, given, f"{file}: flags") for name, given in value.items()}


def _allow(value: object, file: Path) -> frozenset[str]:
    known = run_flags()
    if not isinstance(value, list):
        raise InputError(f"{file}: allow is {value!r}, a list of flags is expected")
    _check_names(value, known, f"{file}: allow", "which no run sets")
    return frozenset(value)


def _check_names(names: Iterable, known: Collection[str], where: str, why: str) -> None:
    for name in names:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise InputError(f"{where} has {name!r}, {why}{hint}")
