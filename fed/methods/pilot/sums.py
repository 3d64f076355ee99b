"""Pilot from sums: a task's adapter from those of its clients, LoRA from all of them.

First every task has a sum by itself, over its clients alone; then there is one of LoRA over all,
which is what `weighting=mean` asks for. Distances between two clients' LoRA are in no sum, so that
the other weightings are refused.
"""

from __future__ import annotations

from collections.abc import Collection

from fed.methods.interface.each import Each
from fed.methods.interface.method import Outcome
from fed.methods.interface.sums import (
    STATE,
    Exchanges,
    Group,
    Groups,
    Own,
    Round,
    Sums,
    differences,
    parts_of,
    weighted,
)
from fed.methods.pilot.send import ADAPTER, lora_of, of_task
from fed.state import State


class PilotSums(Sums):
    """Pilot's two sides."""

    by_task = True

    @property
    def most_exchanges(self) -> int:
        """Of the adapters, and of LoRA."""
        return 2

    def refusal(self) -> str | None:
        for option, found, summed in (
            ("weighting", self.options["weighting"], "mean"),
            ("average", self.options["average"], "factors"),
        ):
            if found != summed:
                return f"{option}={found} looks at single clients' LoRA; {option}={summed} does not"
        return None

    def terms(self, exchange: int, own: Own, given: State) -> State:
        names = _parts(own.base)[exchange]
        if names[0].startswith(ADAPTER):  # a task's clients have all begun with its adapter
            moved = differences(own.state, {name: own.base[name] for name in names})
        else:  # who missed a round has begun with an older LoRA: nothing is taken off
            moved = {name: own.state[name].double() for name in names}
        return weighted({STATE: moved}, own.weight)

    def common(self, exchange: int, names: Collection[str]) -> Collection[str]:
        """A task's adapter: LoRA may be of an earlier round, others' adapters differ by task."""
        return [name for name in names if name.startswith(ADAPTER)] if exchange == 0 else []

    def serve(self, round: Round) -> Exchanges:
        base, memory, lora = round.base, dict(round.memory), {}
        made: dict[str, list[str]] = {}
        clients_of = {
            task: tuple(
                n for n, other in zip(round.names, round.tasks, strict=True) if other == task
            )
            for task in dict.fromkeys(round.tasks)
        }
        for names in _parts(base):
            if names[0].startswith(ADAPTER):
                own = {name: base[name] for name in names}
                begun = {task: of_task(task, own, memory) for task in clients_of}
                found = yield Groups(
                    (task, Group({}, there, begun[task])) for task, there in clients_of.items()
                )
                for task, summed in found.items():
                    made[task] = list(summed.clients)
                    (moved,) = parts_of(summed.sums, STATE)
                    for name in names:
                        after = begun[task][name].double() + moved[name]
                        memory[f"{task}/{name}"] = after.to(base[name].dtype)
            else:
                (lora,) = parts_of((yield {}), STATE)

        def of_client(k: int) -> State:
            return of_task(round.tasks[k], base, memory) | lora

        return Outcome(Each(len(round.names), of_client), memory, {"tasks": made})


def _parts(state: State) -> list[list[str]]:
    """The names of an exchange each: of the task adapter, and of LoRA, as far as they train."""
    lora = lora_of(state)
    adapter = [name for name in state if name not in lora]
    return [names for names in (adapter, list(lora)) if names]
