"""A folder that one process has to itself, which says who it is."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from llava.errors import InputError
from llava.locks import try_lock
from llava.processes import NAME, is_gone, name_of

_FILE = ".lock"
_CHILDREN = 10.0  # seconds that processes which a killed holder has started may outlive it


class Lock:
    """Holds a folder until `release`, or the end of the process, however it ends.

    Raises:
        InputError: another process holds it; `refusal` opens the message, which names the process.
    """

    def __init__(self, folder: Path, refusal: str):
        deadline = time.monotonic() + _CHILDREN
        while (lock := try_lock(folder / _FILE)) is None:
            holder = _holder(folder / _FILE)
            if not (re.fullmatch(NAME, holder) and is_gone(holder)) or time.monotonic() > deadline:
                raise InputError(f"{refusal} ({holder or 'unknown'}, as HOST.PID.BEGAN)")
            time.sleep(0.1)
        self._file = lock
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, name_of().encode(), 0)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._file)


@contextlib.contextmanager
def sole_run(output_dir: str | Path, main: bool = True) -> Iterator[None]:
    """Hold a run's --output_dir, in which two runs would spoil each other's checkpoints.

    Args:
        main: whether this process holds it, of those that run together.

    Raises:
        InputError: another run is at work there.
    """
    if not main:
        yield
        return
    lock = Lock(Path(output_dir), f"--output_dir {output_dir}: another run is at work there")
    try:
        yield
    finally:
        lock.release()


def _holder(file: Path) -> str:
    """What a lock's file says of its holder."""
    return file.read_bytes()[:200].decode(errors="replace")


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder; it is not taken in asking."""
    import fcntl

    try:
        with open(folder / _FILE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
