"""What a launcher (torchrun, deepspeed, mpirun, accelerate) tells the processes that it starts."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAMES = re.compile(
    "(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|CROSS_(RANK|SIZE)|"
    "LOCAL_SIZE|(TORCHELASTIC|ACCELERATE)_.*"
)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that starts a world of its own."""
    return {name: value for name, value in environment.items() if not _NAMES.fullmatch(name)}
