"""The keys of clients.yaml that describe a client's process, for clients that are run as one.

```yaml
  - name: st-mary
    data_path: st-mary/captions.json
    command: bash scripts/v1_5/pretrain.sh  # instead of --fed_client_command
    cwd: ~/LLaVA                            # where it is started; relative to this file
    env: {PATH: "/opt/llava/bin:${PATH}"}   # added to the run's own environment
    gpus: [0, 1]                            # as CUDA_VISIBLE_DEVICES
```
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fed.clients.yaml_values import text_of, unquoted
from fed.drivers.launcher import without_launcher
from llava.errors import InputError

PROCESS_KEYS = ("command", "cwd", "env", "gpus")


@dataclass(frozen=True)
class ProcessSpec:
    """A client's process; what is None is as for the other clients."""

    command: tuple[str, ...] | None = None
    cwd: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] | None = None

    def environment(self, outer: Mapping[str, str]) -> dict[str, str]:
        """`outer` without what a launcher put there, with what is the client's own."""
        kept = without_launcher(outer)
        kept |= {"PYTHONUNBUFFERED": "1", **self.env}  # or a log would lack its end
        if self.gpus is not None:
            kept["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        return kept


def read_process(entry: Mapping, folder: Path, where: str) -> ProcessSpec:
    """The `PROCESS_KEYS` of a client's entry; `where` opens the message of an `InputError`."""
    command, cwd, env, gpus = (entry.get(key) for key in PROCESS_KEYS)
    return ProcessSpec(
        command=None if command is None else split_command(command, f"{where}: command"),
        cwd=None if cwd is None else _folder(cwd, folder, where),
        env={} if env is None else _environment(env, where),
        gpus=None if gpus is None else _gpus(gpus, where),
    )


def split_command(command: object, where: str) -> tuple[str, ...]:
    """A command's words, split as a shell would; nothing in it is expanded."""
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError as error:
        raise InputError(f"{where} is {command!r}: {error}") from None
    if not words:
        raise InputError(
            f"{where} is {command!r}, one text with a program and its arguments is expected"
        )
    return tuple(words)


def check_command(command: tuple[str, ...], cwd: str | None, path: str, where: str) -> None:
    """Refuse a program that is not there, and a shell script that drops the arguments it is given.

    Args:
        path: the PATH of the client's environment.
    """
    program = command[0]
    if os.path.dirname(program):
        program = os.path.join(cwd or "", program)
    if shutil.which(program, path=path) is None:
        raise InputError(f"{where}: {command[0]} is no program that can be run")
    words = command if command[0].endswith(".sh") else command[1:]
    if not words or words[0].startswith("-") or not words[0].endswith(".sh"):
        return
    script = Path(cwd or "", words[0])
    try:
        text = script.read_text(errors="replace")
    except OSError as error:
        raise InputError(f"{where}: {script}: {error.strerror}") from None
    if not re.search(r"\$\{?[@*1]", text):
        raise InputError(
            f"{where}: {script} does not hand its arguments on; end the training command in it "
            'with "$@"'
        )


def _folder(cwd: object, folder: Path, where: str) -> str:
    path = (
        folder / os.path.expanduser(_expanded(text_of("cwd", cwd, where), f"{where}: cwd"))
    ).absolute()
    if not path.is_dir():
        raise InputError(f"{where}: cwd {path} does not exist")
    return str(path)


def _environment(env: object, where: str) -> dict[str, str]:
    if not isinstance(env, dict):
        raise InputError(f"{where}: env is {env!r}, names and values are expected")
    for name, value in env.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^=\0]+", name):
            raise InputError(f"{where}: env has the name {name!r}, a text is expected")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise InputError(
                f"{where}: env {name} is {value!r}, a text is expected{unquoted(name, value)}"
            )
    return {name: _expanded(str(value), f"{where}: env {name}") for name, value in env.items()}


def _expanded(text: str, where: str) -> str:
    """`text` with `${NAME}` replaced by the variable of this process."""

    def value(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise InputError(f"{where} names the variable {match[1]}, which is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _gpus(gpus: object, where: str) -> tuple[str, ...]:
    parts = gpus if isinstance(gpus, list) else str(gpus).split(",") if gpus != "" else []
    names = tuple(str(part).strip() for part in parts)
    if not all(re.fullmatch(r"[\w/:.-]+", name) for name in names) or isinstance(gpus, bool):
        raise InputError(f"{where}: gpus is {gpus!r}, numbers such as 0,1 are expected")
    if len(set(names)) < len(names):
        raise InputError(f"{where}: gpus is {gpus!r}: one is named twice")
    return names
