"""Commands as process groups: each with a log and a time limit, and none left behind.

A group is ended when its leader ends, at its time limit, and when the run is stopped. Only SIGKILL
of the run itself leaves one at work: it holds the lock of its folder, which it has inherited, so
the run that goes on from there finds it and ends it first, if it is on the same host.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from llava.atomic import write_text
from llava.errors import InputError
from llava.locks import try_lock
from llava.processes import group_of, name_of

GRACE = 10.0  # seconds between SIGTERM and SIGKILL
_LEADER, _LOCK = "leader.pid", ".lock"


class StoppedError(Exception):
    """The run ends, and with it the process: nothing is to be made of how it ended."""


class ProcessGroups:
    """Process groups that are at work; `close` ends them all and lets no other begin."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._leaders: set[subprocess.Popen] = set()
        self._closed = False

    def run(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        lock: int,
        log: Path,
        env: Mapping[str, str],
        cwd: str | None = None,
        timeout: float = 0,
    ) -> str | None:
        """Run a command to its end, output and errors appended to `log`.

        Args:
            folder: held with `sole_use`, which gave `lock`.
            timeout: seconds; 0 is without limit.

        Returns:
            None if it ended with exit code 0, else how it ended: the rest of a sentence.

        Raises:
            StoppedError: `close` was called.
        """
        (folder / _LEADER).unlink(missing_ok=True)
        with open(log, "ab") as output, self._mutex:
            if self._closed:
                raise StoppedError
            try:
                leader = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=cwd,
                    start_new_session=True,
                    pass_fds=[lock],
                )
            except OSError as error:
                return f"cannot be started: {error.strerror}"
            self._leaders.add(leader)
        try:
            write_text(folder / _LEADER, name_of(leader.pid))
            code = leader.wait(timeout or None)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end([leader.pid], leader.poll)
            leader.wait()
            with self._mutex:
                self._leaders.discard(leader)
        if self._closed:
            raise StoppedError
        return f"did not end within {timeout:g} s" if code is None else _ending(code)

    def close(self) -> None:
        with self._mutex:
            self._closed = True
            leaders = list(self._leaders)
        _end([leader.pid for leader in leaders], lambda: [leader.poll() for leader in leaders])


@contextlib.contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP unwind the stack, as Ctrl-C does."""

    def unwind(number, frame):
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, signal.SIGHUP]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[int]:
    """Hold `folder`, once a process that a killed run has left at work there is ended.

    Yields:
        The descriptor of the lock; processes that inherit it hold the folder too.
    """
    lock = try_lock(folder / _LOCK)
    leader = ""
    if lock is None:
        with contextlib.suppress(OSError):
            leader = (folder / _LEADER).read_text()
        if (group := group_of(leader)) is not None:
            _end([group])
    deadline = time.monotonic() + GRACE
    while lock is None and time.monotonic() < deadline:
        time.sleep(0.05)
        lock = try_lock(folder / _LOCK)
    if lock is None:
        raise InputError(
            f"{folder}: a process of an earlier run is still at work there; end it "
            f"({leader or 'unknown'}, as HOST.PID.BEGAN)"
        )
    try:
        yield lock
    finally:
        os.close(lock)


def _end(groups: Sequence[int], reap: Callable[[], object] = lambda: None) -> None:
    """End process groups: SIGTERM, and SIGKILL to what is left after `GRACE` seconds.

    `reap` collects those leaders that are children of this process; until then a group exists.
    """
    reap()
    left = [group for group in groups if _signal(group, signal.SIGTERM)]
    deadline = time.monotonic() + GRACE
    try:
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            reap()
            left = [group for group in left if _signal(group, 0)]
    finally:
        for group in left:
            _signal(group, signal.SIGKILL)


def _signal(group: int, number: int) -> bool:
    """Send a signal to a group; False if there is none (of ours)."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _ending(code: int) -> str | None:
    names = {member.value: member.name for member in signal.Signals}
    if code == 0:
        return None
    if code < 0:
        return f"was ended by {names.get(-code, f'signal {-code}')}"
    name = names.get(code - 128)  # a shell says 128 + n of a child that signal n has ended
    return f"ended with exit code {code}" + (f" ({name})" if name else "")
