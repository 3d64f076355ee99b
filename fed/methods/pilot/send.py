"""The states that Pilot's server sends: to a client of the run, and to one that comes after it."""

from __future__ import annotations

from collections.abc import Mapping

from fed.numerics.weighted_mean import shares, towards_mean
from fed.state import State

ADAPTER = "model.mm_projector."  # how names of the task adapter begin; the others are LoRA


def send(
    client: str, task: str, personal: Mapping[str, State], shared: State, memory: State
) -> tuple[State, State]:
    """A client's state to start from, and beside it the other tasks' adapters, as TASK/NAME.

    Both are of today for a client that is late or missed rounds too. Of another client by itself
    there is nothing, unless it is the only one of its task.
    """
    theirs, lora = personal.get(client), lora_of(shared)
    if theirs is None and len(personal) > 1:
        theirs = towards_mean(list(personal.values()), lora, shares([1] * len(personal)))
    own = {name: theirs[name] for name in lora} if theirs else {}
    return of_task(task, shared, memory) | own, {
        n: t for n, t in memory.items() if n.partition("/")[0] != task
    }


def of_task(task: str, state: State, memory: State) -> State:
    """A state with the task's adapter in the place of its own, where the task has one."""
    return {name: memory.get(f"{task}/{name}", tensor) for name, tensor in state.items()}


def lora_of(state: State) -> State:
    """The tensors of a state that are LoRA."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(ADAPTER)}
