"""A folder that one process has to itself, which says who it is."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from llava.errors import InputError
from llava.processes import NAME, is_gone, name_of

_FILE = "lock"
_CHILDREN = 10.0  # seconds that processes which a killed holder has started may outlive it


class Lock:
    """Holds a folder until `release`, or the end of the process, however it ends.

    Raises:
        InputError: another process holds it; `refusal` opens the message, which names the process.
    """

    def __init__(self, folder: Path, refusal: str):
        self._file = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + _CHILDREN
        while not self._try():
            holder = os.pread(self._file, 200, 0).decode(errors="replace")
            if not (re.fullmatch(NAME, holder) and is_gone(holder)) or time.monotonic() > deadline:
                os.close(self._file)
                raise InputError(f"{refusal} ({holder or 'unknown'}, as HOST.PID.BEGAN)")
            time.sleep(0.1)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, name_of().encode(), 0)

    def _try(self) -> bool:
        import fcntl  # Windows has none

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks
        return True

    def release(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._file)


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
