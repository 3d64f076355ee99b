"""A folder that one process has to itself, which says who it is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from llava.errors import InputError
from llava.processes import name_of

LOCK = "lock"


class Lock:
    """Holds a folder until `release`, or the process's end, however it ends.

    Raises:
        InputError: another process holds it; the message is `refusal` and the process's name.
    """

    def __init__(self, folder: Path, refusal: str):
        import fcntl  # Windows has none

        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 200).decode(errors="replace").strip()
            os.close(self._file)
            raise InputError(
                f"{refusal}: {holder or 'a process'} (HOST.PID.BEGAN) is at work in {folder}"
            ) from None
        except OSError:
            pass  # a file system without locks
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, name_of().encode(), 0)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._file)
