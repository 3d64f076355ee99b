"""Pilot (arXiv 2501.13985): adapters shared within a task, LoRA averaged for each client by itself.

Client k has n_k samples of one task and sends its task's adapter psi^t, which is a projector, and
its LoRA Theta_k. What comes back:

    psi^t    = sum_k n_k psi^t_k / sum_k n_k                     over the task's clients    Eq. 10
    d_kj     = || Theta_k - Theta_j ||                           over all LoRA parameters
    Theta_k' = [n_k Theta_k + sum_j Theta_j / d_kj] / [n_k + sum_j 1 / d_kj]               Eq. 11-12

with j over the M clients that are nearest to k. The equations are known through secondary sources,
M = 3 from a re-implementation. Our reading:

- Neighbours are of this round and have samples; where there are fewer than M, all of them.
- n_k and 1 / d have no common scale: `weighting` normalise gives k itself the share p_k and its
  neighbours 1 - p_k in proportion to 1 / d; p_k is n_k over the samples of k and its neighbours, or
  the number `own`. mean is without distances: the mean by samples over all clients.
- Equal Theta_k and Theta_j (d = 0) have the limit of the formulas: the neighbours' part belongs to
  those at no distance, so that Theta_k' = Theta_k.
- `average` factors takes Theta as A and B; product as the updates B A (`lora_average`).
  Distances are between factors in both.
- A client that has no LoRA of its own yet begins with the plain mean of all personal ones, if there
  are two or more, else with the common start; a task that nobody has trained yet, with its adapter.

Memory holds every task's adapter as TASK/NAME. A task whose clients are away keeps what it has.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from torch import Tensor

from fed.methods.interface.checks import check_memory
from fed.methods.interface.each import Each
from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Natural, Range
from fed.methods.interface.registry import method
from fed.methods.pilot import run
from fed.methods.pilot.lora_average import averaged_lora
from fed.methods.pilot.neighbours import distances, mixture, nearest
from fed.methods.pilot.send import ADAPTER, lora_of, of_task, send
from fed.methods.pilot.sums import PilotSums
from fed.numerics.weighted_mean import shares, towards_mean
from fed.state import State
from llava.errors import InputError


@method(
    "pilot",
    personal=True,
    cross_layer=True,
    send=send,
    exchanges=run.exchanges,
    sums=PilotSums,
    connector="pilot",
    flags=run.PilotFlags,
    prepare=run.prepare,
    store=run.store,
    personalise=run.personalise,
)
def pilot(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    memory: dict[str, Tensor],
    clients: list[str],
    tasks: list[str],
    neighbours: Natural = 3,
    weighting: Literal["literal", "normalise", "mean"] = "literal",
    own: Annotated[float, Range("[0, 1]", "0 (by samples) to 1")] = 0.0,
    average: Literal["factors", "product"] = "factors",
) -> Outcome:
    """One state a client: its task's adapter and its own average of LoRA.

    `own` 0 is by samples. Facts: `tasks`, who made each task's adapter; `lora`, by client the
    weight of its `own` LoRA, and its `neighbours` with their `distance` and `weight`.
    """
    if own != 0 and weighting != "normalise":
        raise InputError(
            f"pilot option own: expected 0, as only weighting=normalise knows it, found {own}"
        )
    memory, made = _adapters(states, weights, base, memory, tasks)
    lora = lora_of(base)
    facts: dict[str, Any] = {"tasks": {t: [clients[k] for k in of] for t, of in made.items()}}
    theirs = Each(len(states), lambda k: {})
    if lora:
        apart = distances(states, lora, clients)
        near = nearest(apart, weights, len(states) if weighting == "mean" else neighbours)
        mix = mixture(apart, weights, near, weighting, own)
        theirs = averaged_lora(states, lora, mix, average == "product")
        facts["lora"] = {
            clients[k]: {
                "own": float(mix[k, k]),
                "neighbours": {
                    clients[j]: {"distance": float(apart[k, j]), "weight": float(mix[k, j])}
                    for j in of
                },
            }
            for k, of in enumerate(near)
        }

    def of_client(k: int) -> State:
        return of_task(tasks[k], base, memory) | theirs[k]

    return Outcome(Each(len(states), of_client), memory, facts)


def _adapters(
    states: list[State], weights: list[float], base: State, memory: State, tasks: list[str]
) -> tuple[State, dict[str, list[int]]]:
    """Memory with the adapters of the tasks that are here anew, and whose states made them."""
    adapter = {name: tensor for name, tensor in base.items() if name.startswith(ADAPTER)}
    known = {name.partition("/")[0] for name in memory}
    shapes = {f"{t}/{n}": tuple(adapter[n].shape) for t in sorted(known) for n in adapter}
    check_memory("pilot", memory, shapes)
    made = {}
    for task in dict.fromkeys(tasks):
        of = [k for k, other in enumerate(tasks) if other == task and weights[k] > 0]
        if of and adapter:
            made[task] = of
            p = shares([weights[k] for k in of])
            mean = towards_mean([states[k] for k in of], adapter, p)
            memory = memory | {f"{task}/{name}": tensor for name, tensor in mean.items()}
    return memory, made
