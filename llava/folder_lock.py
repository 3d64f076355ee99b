"""A folder that one process has to itself, which says who it is."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from llava.errors import InputError
from llava.locks import is_of, try_lock, unlock
from llava.processes import NAME, host, is_gone, name_of

LOCK_FILE = ".lock"
# Seconds for which a holder that is dead may seem to hold on:
_CHILDREN = 10.0  # processes that it has started outlive it
_ELSEWHERE = 120.0  # on another host, which crashed: a file server drops its locks by and by


class Lock:
    """Holds a folder until `release`, or the end of the process, however it ends.

    Raises:
        InputError: another process holds it; `refusal` opens the message, which names the process.
    """

    def __init__(self, folder: Path, refusal: str):
        began, told = time.monotonic(), False
        while (lock := try_lock(folder / LOCK_FILE)) is None:
            holder = _holder(folder / LOCK_FILE)
            if time.monotonic() - began >= _patience(holder) and (folder / LOCK_FILE).exists():
                raise InputError(f"{refusal} ({holder or 'unknown'}, as HOST.PID.BEGAN)")
            if not told and time.monotonic() - began > 1:
                print(f"{folder}: waiting for {holder} to let go of it", flush=True)
                told = True
            time.sleep(0.1)
        self._file, self._place = lock, folder / LOCK_FILE
        with contextlib.suppress(OSError):  # another user's file can be locked and not written
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, name_of().encode(), 0)

    def release(self) -> None:
        """Give the folder back, and leave nothing in it."""
        if is_of(self._file, self._place):
            with contextlib.suppress(OSError):
                self._place.unlink()
        unlock(self._file)
        self._file = -1  # once more is no harm


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


def _patience(holder: str) -> float:
    """How many seconds a holder of this name may take to let go of its folder."""
    if not re.fullmatch(NAME, holder):
        return 0.0
    if not holder.startswith(f"{host()}."):
        return _ELSEWHERE
    return _CHILDREN if is_gone(holder) else 0.0


def _holder(file: Path) -> str:
    """What a lock's file says of its holder; nothing where it has gone."""
    try:
        return file.read_bytes()[:200].decode(errors="replace")
    except FileNotFoundError:
        return ""


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder; it is not taken in asking."""
    import fcntl

    try:
        with open(folder / LOCK_FILE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
