"""A method's rule for the steps of clients, where it is more than a server's arithmetic.

A rule is one object a client's task. It adds to the gradients just before each optimizer step, and
ends with the tensors that the client keeps for its next task and those that it sends to the server
beside the state. It knows nothing of the trainer: its tensors have the names of the state.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from fed.state import State

# Tensors of a method's memory whose names end so are sent to the clients beside the state.
FOR_CLIENTS = ".for_clients"


class Ending(NamedTuple):
    """The tensors that a task ends with beside the state: some are kept, others sent."""

    kept: State
    extras: State


class ClientRule:
    """The base of all rules: adds nothing, keeps nothing, sends nothing.

    Args:
        start: the weights at the task's beginning.
        sent: what the server sent beside the state; empty where its memory had nothing for clients.
        kept: what the client kept of its last task; empty in its first.
        options: all options of the method.

    Attributes:
        keeps: whether a task ends with kept tensors; their names and shapes are the state's.
        sends: the same of what is sent.
        running: tensors that change from step to step, in place: saved in the trainer's
            checkpoints, and put back when a task goes on from one.
    """

    keeps: ClassVar[bool] = False
    sends: ClassVar[bool] = False

    def __init__(self, start: State, sent: State, kept: State, **options: Any):
        self.running: State = {}

    def step(self, gradients: State, weights: State) -> State:
        """The tensors to add to the gradients of the step that is about to be made.

        Args:
            gradients: over all of the step's samples, after clipping; what has none is left out.
                Not to be changed, as `weights`.

        Returns:
            Tensors by name; what is left out gets nothing added.
        """
        return {}

    def end(self) -> Ending:
        """The tensors kept and sent, after the last step."""
        return Ending({}, {})


def for_clients(memory: State) -> State:
    """The part of a method's memory that clients are sent, under the state's names."""
    return {
        name.removesuffix(FOR_CLIENTS): tensor
        for name, tensor in memory.items()
        if name.endswith(FOR_CLIENTS)
    }
