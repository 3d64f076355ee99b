"""The form in which what a client has learnt travels to the server: --fed_wire.

`float32` is its state. `bf16` is half as long: end - start, each value rounded to bfloat16, from
which the server makes start + change in float32. A change keeps eight bits of its own, and is off
by 0.4 % at most, whatever the size of the weight that it changes; a weight in bfloat16 would be off
by as much of the weight, which is more than a round's change of it.

What goes beside the state (`Update.extras`) is the method's own, and stays float32.
"""

from __future__ import annotations

import dataclasses

import torch

from fed import state as states
from fed.clients.update import Update
from fed.state import State, StateError

WIRES = ("float32", "bf16")


def encode(update: Update, start: State, wire: str) -> Update:
    """An update as it travels; under `bf16` its `state` holds the changes, in bfloat16."""
    if wire == "float32":
        return update
    changes = {n: (end - start[n]).bfloat16() for n, end in update.state.items()}
    return dataclasses.replace(update, state=changes)


def decode(update: Update, start: State, who: str) -> Update:
    """The update of what has travelled, with a float32 state; its types say in which form it came.

    Raises:
        StateError: names or shapes are not those of `start`, a value is not finite, or the types
            are those of no form; `who` opens the message.
    """
    states.check(update.state, like=start, who=who)
    form = form_of(update)
    if form == "float32":
        return update
    if form != "bf16":
        raise StateError(f"{who}: its tensors are {form}; all torch.float32 or all torch.bfloat16")
    whole = {name: start[name] + change.float() for name, change in update.state.items()}
    return dataclasses.replace(update, state=whole)


def form_of(update: Update) -> str:
    """The form in which an update has travelled; the types of its state where that is none."""
    types = {tensor.dtype for tensor in update.state.values()}
    for form, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        if types <= {dtype}:
            return form
    return ", ".join(sorted(map(str, types)))


def carried(update: Update, start: State, wire: str, who: str) -> Update:
    """An update as the server has it, of a client that is on the server's own machine."""
    return update if wire == "float32" else decode(encode(update, start, wire), start, who)
