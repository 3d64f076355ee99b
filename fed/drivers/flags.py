"""Flags that several drivers have; a driver's `flags` is made of them and of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class CommandFlags:
    """Clients that are commands."""

    DECIDING: ClassVar = frozenset({"fed_client_command"})

    fed_client_command: str | None = field(
        default=None,
        metadata={"help": "The command of a client's round, as 'bash train.sh'."},
    )


@dataclass
class ParallelFlags:
    """Clients that may be at work at once."""

    LEAST: ClassVar = {"fed_parallel_clients": 1}

    fed_parallel_clients: int = field(
        default=1, metadata={"help": "How many clients are at work at once."}
    )


@dataclass
class TryFlags:
    """Clients whose tries may fail or take too long."""

    LEAST: ClassVar = {"fed_client_timeout": 0, "fed_client_retries": 0}

    fed_client_timeout: float = field(
        default=0.0,
        metadata={"help": "Seconds that a client's try may take; 0: no limit."},
    )
    fed_client_retries: int = field(
        default=0, metadata={"help": "How often a client that failed is tried again."}
    )
