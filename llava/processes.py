"""A process by a name that no other has, and whether it is gone.

Folders are shared by hosts and containers, where one number names many processes; and a number is
given anew once its process has ended. So a process is called `HOST.PID.BEGAN`: the host with the
process namespace, the number there, and when it began in clock ticks since the host's start (0
where the system does not say). Others' names tell nothing about whether they live.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
from pathlib import Path

NAME = r"[\w-]+\.\d+\.\d+"


@functools.cache
def host() -> str:
    """The machine or container that process numbers are of; letters, digits, `_` and `-`."""
    name = socket.gethostname()
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    mark = hashlib.sha256(f"{name}\0{space}".encode()).hexdigest()[:6]
    return f"{re.sub('[^A-Za-z0-9]+', '-', name)[:24].strip('-')}-{mark}"


def name_of(pid: int | None = None) -> str:
    """The name of this process, or of a living one on this host."""
    pid = os.getpid() if pid is None else pid
    return f"{host()}.{pid}.{_began(pid) or 0}"


def is_gone(name: str) -> bool:
    """Whether the process of that name has surely ended. False for what another host knows."""
    where, pid, began = name.split(".")
    if where != host():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    now = _began(int(pid))
    return now is not None and began != "0" and str(now) != began


def group_of(name: str) -> int | None:
    """The group that the process of that name leads or led, to be signalled; None if it may not be.

    A group outlives its leader, whose number is not given anew before the group's last has ended.
    """
    if not re.fullmatch(NAME, name):
        return None
    where, pid, began = name.split(".")
    now = _began(int(pid))
    mine = where == host() and (now is None or str(now) == began)
    return int(pid) if mine else None


def _began(pid: int) -> int | None:
    """When a process began; None where there is no /proc, or no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # a program may be called `a) b`
