"""What a method does within a client's turn, where it is more than a server's arithmetic.

A rule is one object a turn. It adds to the gradients just before each optimizer step, and at the
end has what the client keeps for its next turn and what travels to the server beside the state.
Who trains, and how, it does not know: its tensors have the names of the state.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from fed.state import State

# Tensors of a method's memory whose names end so are sent to the clients beside the state.
FOR_CLIENTS = ".for_clients"


class Ending(NamedTuple):
    """What a turn leaves beside the client's state: what stays with the client, what is sent."""

    kept: State
    extras: State


class ClientRule:
    """The base of all rules: adds nothing, keeps nothing, sends nothing.

    Args:
        start: the weights as the turn begins with them.
        sent: what the server sent beside the state; empty where its memory had nothing for clients.
        kept: what the client kept of its last turn; empty in its first.
        options: all options of the method.

    Attributes:
        keeps: whether a turn ends with kept tensors; their names and shapes are the state's.
        sends: the same of what is sent.
        running: what changes from step to step, in place: it lies in the trainer's checkpoints, and
            is put back when a turn goes on from one.
    """

    keeps: ClassVar[bool] = False
    sends: ClassVar[bool] = False

    def __init__(self, start: State, sent: State, kept: State, **options: Any):
        self.running: State = {}

    def step(self, gradients: State, weights: State) -> State:
        """What is to be added to the gradients of the step that is about to be made.

        Args:
            gradients: over all of the step's samples, after clipping; what has none is left out.
                Not to be changed, as `weights`.

        Returns:
            Tensors by name; what is left out gets nothing added.
        """
        return {}

    def end(self) -> Ending:
        """What is left when the last step is made."""
        return Ending({}, {})


def for_clients(memory: State) -> State:
    """The part of a method's memory that clients are sent, under the state's names."""
    return {
        name.removesuffix(FOR_CLIENTS): tensor
        for name, tensor in memory.items()
        if name.endswith(FOR_CLIENTS)
    }
