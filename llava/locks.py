"""A lock that lasts as long as its holder, however that ends."""

from __future__ import annotations

import os
from pathlib import Path


def try_lock(file: Path) -> int | None:
    """A descriptor that locks `file`, made when missing, until all its copies are closed.

    None if another one holds it. It locks a file and no folder: NFS, where locks hold between
    hosts, locks no folders.
    """
    import fcntl  # Windows has none, and much of this package does without

    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        pass  # a file system without locks
    return lock
