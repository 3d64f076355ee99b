"""clients.yaml: the clients of a run and their data.

```yaml
clients:
  - name: st-mary                     # letters, digits, . _ -
    data_path: st-mary/captions.json  # LLaVA JSON; relative to this file
    image_folder: st-mary/images
    task: captions                    # letters, digits, - _: the kind of data, for methods that ask
    from_round: 3                     # has no part in the rounds before; 1 when not given
    learning_rate: 5e-4               # a flag of its own; fed/arguments.py lists them
```

A driver may have keys of its own: for --fed_driver script see fed/drivers/client_process.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fed.clients.yaml_values import flag_of, text_of, unquoted
from fed.yaml_file import read_yaml
from llava.errors import InputError
from llava.suggest import did_you_mean

DATA_KEYS = ("name", "data_path", "image_folder", "task", "from_round")


@dataclass(frozen=True)
class ClientSpec:
    """One client: a name, its data, and the flags that are its own (flag name → value as text).

    `task` names the kind of its data; of one file's clients all have one or none has. `driver` is
    what the driver has read of its own keys.
    """

    name: str
    data_path: str
    image_folder: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    driver: Any = None
    task: str | None = None
    from_round: int = 1


class KeyReader(Protocol):
    """A driver, as much as clients.yaml knows of it; `fed.drivers.driver.Driver`."""

    keys: ClassVar[tuple[str, ...]]
    data_here: ClassVar[bool]

    @classmethod
    def read_keys(cls, entry: Mapping[str, Any], folder: Path, where: str) -> Any: ...


@contextlib.contextmanager
def named(spec: ClientSpec) -> Iterator[None]:
    """An `InputError` inside says whose input it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"client {spec.name}: {error}") from None


def load_clients(
    path: str | Path,
    flags: Sequence[str],
    driver: type[KeyReader] | None = None,
    of_others: Mapping[str, str] | None = None,
) -> list[ClientSpec]:
    """Read clients.yaml.

    Args:
        flags: the names that a client may override.
        driver: the run's; it reads its own keys.
        of_others: keys that only other drivers have, with the driver's name.

    Raises:
        InputError: no such file, not YAML, an unknown or missing key, a bad or doubled name, a
            data file that does not exist, or a task that only others have. The message names the
            client.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--fed_clients {path}: no such file")
    document = read_yaml(path, "--fed_clients")
    entries = document.get("clients") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"--fed_clients {path}: a list under the key `clients` is expected")
    if unknown := sorted(map(str, set(document) - {"clients"})):
        raise InputError(f"--fed_clients {path}: unknown key {unknown[0]!r} beside `clients`")
    clients = [
        _client(path, i, entry, flags, driver, of_others or {}) for i, entry in enumerate(entries)
    ]
    seen: set[str] = set()
    for client in clients:
        # Names become folders, and some file systems do not tell cases apart.
        if client.name.lower() in seen:
            raise InputError(f"--fed_clients {path}: two clients are called {client.name!r}")
        seen.add(client.name.lower())
    without = [client.name for client in clients if client.task is None]
    if 0 < len(without) < len(clients):
        raise InputError(f"--fed_clients {path}: client {without[0]} has no task, others have one")
    return clients


def _client(
    path: Path,
    index: int,
    entry: object,
    flags: Sequence[str],
    driver: type[KeyReader] | None,
    of_others: Mapping[str, str],
) -> ClientSpec:
    where = f"--fed_clients {path}: client {index + 1}"
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {type(entry).__name__}, keys and values are expected")
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"{where} has name {name!r}; letters, digits, '.', '_' and '-' are expected"
            f"{unquoted('name', name)}"
        )
    where = f"--fed_clients {path}: client {name}"
    if name in ("global", "pool"):
        raise InputError(f"{where}: that name stands for all clients together; choose another")
    known = [*DATA_KEYS, *flags, *(driver.keys if driver else ())]
    for key in entry:
        if key in of_others and key not in known:
            raise InputError(f"{where} has {key}, which is for --fed_driver {of_others[key]}")
        if key not in known:
            raise InputError(f"{where} has unknown key {key!r}{did_you_mean(str(key), known)}")
    data_path, image_folder = _data(path, entry, where, driver is None or driver.data_here)
    task = entry.get("task")
    if "task" in entry and not (isinstance(task, str) and re.fullmatch(r"[A-Za-z0-9_-]+", task)):
        raise InputError(
            f"{where} has task {task!r}; letters, digits, '-' and '_' are expected"
            f"{unquoted('task', task)}"
        )
    first = entry.get("from_round", 1)
    if not isinstance(first, int) or isinstance(first, bool) or first < 1:
        raise InputError(f"{where} has from_round {first!r}; a round's number is expected, from 1")
    overrides = {key: flag_of(key, value, where) for key, value in entry.items() if key in flags}
    of_driver = driver.read_keys(entry, path.parent, where) if driver else None
    return ClientSpec(name, data_path, image_folder, overrides, of_driver, task, first)


def _data(path: Path, entry: dict, where: str, here: bool) -> tuple[str, str | None]:
    """A client's data_path and image_folder; "" and None where its data are not on this machine."""
    if not here:
        for key in ("data_path", "image_folder"):
            if key in entry:
                raise InputError(f"{where} has {key}; where a site's data lie, its site.yaml says")
        return "", None
    if entry.get("data_path") is None:
        raise InputError(f"{where} has no data_path")
    data_path = _path(path.parent, "data_path", entry["data_path"], where)
    if not data_path.is_file():
        raise InputError(f"{where}: data_path {data_path} does not exist")
    if entry.get("image_folder") is None:
        return str(data_path), None
    folder = _path(path.parent, "image_folder", entry["image_folder"], where)
    if not folder.is_dir():
        raise InputError(f"{where}: image_folder {folder} does not exist")
    return str(data_path), str(folder)


def _path(folder: Path, key: str, value: object, where: str) -> Path:
    return folder / Path(text_of(key, value, where)).expanduser()
