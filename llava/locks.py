"""A lock that lasts as long as its holder, however that ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def try_lock(file: Path) -> int | None:
    """A descriptor that locks `file`, made when missing, until `unlock` or its copies are gone.

    None if another one holds it, or has just removed the file. It locks a file and no folder: NFS,
    where locks hold between hosts, locks no folders.
    """
    import fcntl  # Windows has none, and much of this package does without

    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's
        lock = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        pass  # a file system without locks
    if not is_of(lock, file):  # its holder has removed it meanwhile: another one may hold the next
        os.close(lock)
        return None
    return lock


def is_of(lock: int, file: Path) -> bool:
    """Whether `file` is still the one that a descriptor of `try_lock` is of."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(file))
    except OSError:
        return False


def unlock(lock: int) -> None:
    """Give back what `try_lock` gave, also where children have copies of it."""
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    with contextlib.suppress(OSError):
        os.close(lock)
