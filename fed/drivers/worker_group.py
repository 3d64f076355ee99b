"""Processes side by side, each of which trains clients of its own on a device of its own.

A launcher starts them, but they are no process group of torch: each is alone in its world, so that
a client's steps are those of a run of one process, to the bit. They share the run's folder, where
updates lie, and the launcher's key-value store, by which they count the work, wait for each other
and notice that one has ended. Process 0 makes a round of the updates; the others only train.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fed.drivers.launcher import without_launcher
from llava.errors import InputError, reason
from llava.processes import is_gone, name_of

_POLL = 0.02  # seconds
_FAILED = "failed"


@dataclass
class WorkerGroup:
    """The processes of a run; by default this one alone.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        store: of torch.distributed; None where there is one process.
        names: of the others, by rank, as `llava.processes` has them.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    names: dict[int, str] = field(default_factory=dict)
    _meetings: int = 0  # the same in all of them: it tells one share-out of work from the next

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all; `InputError` if one of them has ended."""
        if self.alone:
            return
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        self._ask("add", key, 1)
        while self._ask("add", key, 0) < self.size:
            self.rest()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The block is process 0's, then that of the others."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()

    def take(self, count: int) -> int | None:
        """The next of `count` pieces of work that nobody has taken since the last barrier."""
        taken = self._ask("add", f"taken/{self._meetings}", 1) - 1
        return taken if taken < count else None

    def tell(self, piece: int, text: str) -> None:
        """Say that a piece of work is done, with a word on it."""
        self._ask("set", f"done/{self._meetings}/{piece}", text)

    def told(self, piece: int) -> str | None:
        """What was said of a piece of work that is done."""
        key = f"done/{self._meetings}/{piece}"
        return self._ask("get", key).decode() if self._ask("check", [key]) else None

    def rest(self) -> None:
        """Wait a little for the others; they must be at work."""
        time.sleep(_POLL)
        if self._ask("check", [_FAILED]):
            raise SystemExit(2)  # whoever failed has said why
        if gone := self._gone():
            raise InputError(
                f"process {gone[0]} of {self.size} (from 0) has ended before the run was over; the "
                "same command goes on from what is finished"
            )

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The run: only process 0 is heard, and of errors the first one."""
        if self.alone:
            yield
            return
        try:
            with contextlib.ExitStack() as quiet:
                if not self.main:
                    nowhere = quiet.enter_context(open(os.devnull, "w"))
                    quiet.enter_context(contextlib.redirect_stdout(nowhere))
                    quiet.enter_context(contextlib.redirect_stderr(nowhere))
                yield
            self._leave()
        except BaseException:
            if self._is_first_to_fail():
                raise
            raise SystemExit(2) from None

    def _leave(self) -> None:
        """Process 0, which may keep the store, is the last to go."""
        self._ask("add", "left", 1)
        while self.main and self._ask("add", "left", 0) < self.size:
            if len(self._gone()) == len(self.names):
                return
            time.sleep(_POLL)

    def _is_first_to_fail(self) -> bool:
        try:
            return self.store.add(_FAILED, 1) == 1
        except RuntimeError:
            return True

    def _gone(self) -> list[int]:
        return [rank for rank, name in self.names.items() if is_gone(name)]

    def _ask(self, what: str, *values: Any) -> Any:
        try:
            return getattr(self.store, what)(*values)
        except RuntimeError as error:  # torch's errors of a connection are such
            raise InputError(
                f"the launcher's store cannot be reached any more: process 0 of {self.size} has "
                f"ended; the same command goes on from what is finished ({reason(error)})"
            ) from None


def join(size: int, on_gpu: bool = True) -> WorkerGroup:
    """The group of the launcher that has started this process as one of `size`.

    Its variables go from the environment, and of the GPUs the one that is this process's stays:
    what is made afterwards finds one process with one device.

    Raises:
        InputError: there are fewer GPUs than processes on this host, or the others do not come.
    """
    from torch.distributed.rendezvous import rendezvous

    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    device = _device(local, torch.cuda.device_count()) if on_gpu else None
    try:
        store, rank, _ = next(iter(rendezvous("env://")))
        store.set(f"process/{rank}", name_of())
        names = {other: store.get(f"process/{other}").decode() for other in range(size)}
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the {size} processes of the launcher do not find each other: {reason(error)}"
        ) from None
    del names[rank]
    kept = without_launcher(os.environ)
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    return WorkerGroup(rank, size, store, names)


def _device(local: int, there: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of the host's process `local`, where there are so many GPUs.

    None where there is none. The count is NVML's: CUDA itself must not have been started.
    """
    if not there:
        return None
    if local >= there:
        raise InputError(
            f"process {local} (from 0) of this host has no GPU, there are {there}: each process of "
            "--fed_parallel_clients needs one of its own"
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[local].strip() if named else str(local)
