"""Clients: what clients.yaml says of them, and which of their samples a round sees.

```yaml
clients:
  - name: st-mary                     # letters, digits, . _ -
    data_path: st-mary/captions.json  # LLaVA JSON; relative to this file
    image_folder: st-mary/images
    task: captions                    # letters, digits, - _: the kind of data (--fed_method pilot)
    from_round: 3                     # has no part in the rounds before; 1 when not given
    learning_rate: 5e-4               # a flag of its own; fed/arguments.py lists them
```

Where clients are processes (--fed_driver script), fed/client_process.py has four keys more.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fed.client_process import PROCESS_KEYS, ProcessSpec, read_process
from fed.yaml_values import flag_of, text_of, unquoted
from llava.errors import InputError

DATA_KEYS = ("name", "data_path", "image_folder", "task", "from_round")


@dataclass(frozen=True)
class ClientSpec:
    """One client: a name, its data, and the flags that are its own (flag name → value as text).

    `task` names the kind of its data; of one file's clients all have one or none has.
    """

    name: str
    data_path: str
    image_folder: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    process: ProcessSpec = field(default_factory=ProcessSpec)
    task: str | None = None
    from_round: int = 1


@contextlib.contextmanager
def named(spec: ClientSpec) -> Iterator[None]:
    """An `InputError` inside says whose input it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"client {spec.name}: {error}") from None


def load_clients(
    path: str | Path, flags: Sequence[str], processes: bool = False
) -> list[ClientSpec]:
    """Read clients.yaml.

    Args:
        flags: the names that a client may override.
        processes: whether clients are processes, which have keys of their own.

    Raises:
        InputError: no such file, not YAML, an unknown or missing key, a bad or doubled name, a
            data file that does not exist, or a task that only others have. The message names the
            client.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise InputError(f"--fed_clients {path}: no such file")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--fed_clients {path}: not YAML ({error})") from None
    entries = document.get("clients") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"--fed_clients {path}: a list under the key `clients` is expected")
    if unknown := sorted(map(str, set(document) - {"clients"})):
        raise InputError(f"--fed_clients {path}: unknown key {unknown[0]!r} beside `clients`")
    clients = [_client(path, i, entry, flags, processes) for i, entry in enumerate(entries)]
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
    path: Path, index: int, entry: object, flags: Sequence[str], processes: bool
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
    known = [*DATA_KEYS, *flags, *(PROCESS_KEYS if processes else ())]
    for key in entry:
        if key in PROCESS_KEYS and not processes:
            raise InputError(f"{where} has {key}, which is for --fed_driver script")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise InputError(f"{where} has unknown key {key!r}{hint}")
    if entry.get("data_path") is None:
        raise InputError(f"{where} has no data_path")
    data_path = path.parent / Path(text_of("data_path", entry["data_path"], where)).expanduser()
    if not data_path.is_file():
        raise InputError(f"{where}: data_path {data_path} does not exist")
    image_folder = entry.get("image_folder")
    if image_folder is not None:
        image_folder = path.parent / Path(text_of("image_folder", image_folder, where)).expanduser()
        if not image_folder.is_dir():
            raise InputError(f"{where}: image_folder {image_folder} does not exist")
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
    process = read_process(entry, path.parent, where)
    folder = image_folder and str(image_folder)
    return ClientSpec(name, str(data_path), folder, overrides, process, task, first)


def seed_of(*parts: object) -> int:
    """A 31-bit seed that depends on all parts, the same on every machine and Python."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def slices(samples: int, rounds: int, seed: int) -> list[list[int]]:
    """Cut a shard of `samples` into one slice a round: every sample in exactly one (one pass).

    The order is drawn with `seed`; sizes differ by at most one, and are 0 in some rounds when
    there are fewer samples than rounds.
    """
    import random

    order = list(range(samples))
    random.Random(seed).shuffle(order)
    bounds = [r * samples // rounds for r in range(rounds + 1)]
    return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
