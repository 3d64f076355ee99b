"""The end of a process group: no thread of gloo's outlives the interpreter with work in hand."""

from __future__ import annotations

import time
from pathlib import Path

_WORKER = "pt_gloo_runloop"  # as PyTorch names these threads
_LOOK, _PATIENCE = 0.005, 5.0  # seconds


def end_process_group() -> None:
    """Destroy all process groups of this process, if it has any, and let gloo's workers finish.

    A worker may be the last to hold a tensor, and needs the interpreter to let go of it. One that
    comes too late for that aborts the process, its work done. Destroying a group joins its workers
    only where nothing refers to the group any more, and DeepSpeed's modules always do.
    """
    import torch

    if not torch.distributed.is_initialized():
        return
    torch.distributed.destroy_process_group()
    deadline = time.monotonic() + _PATIENCE
    before = _workers()
    while before and time.monotonic() < deadline:
        time.sleep(_LOOK)  # the interpreter is free for them meanwhile
        now = _workers()
        if now == before and all(state == "S" for state, _ in now.values()):
            return  # asleep all the while, so none waited for the interpreter
        before = now


def _workers() -> dict[str, tuple[str, str]]:
    """Of each of gloo's workers its state and how often it has gone to sleep; Linux only."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            lines = (task / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        facts = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if facts["Name"] == _WORKER:
            found[task.name] = (facts["State"][0], facts["voluntary_ctxt_switches"])
    return found
