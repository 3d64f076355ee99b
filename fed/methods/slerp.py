"""Slerp (Shoemake 1985, "Animating rotation with quaternion curves"): two experts along an arc.

    A = sin((1 - t) theta) / sin(theta) * A_1 + sin(t theta) / sin(theta) * A_2

tensor by tensor, each as one vector, theta the angle between the two. What is slerped are the
weights themselves, as in mergekit: the base plays no part. Where |cos(theta)| is above 0.9995, and
where one of the two is zero, the line (1 - t) A_1 + t A_2 is taken: there is hardly an arc, or
none. mergekit has the same bound, and takes a zero to be at right angles.
"""

from __future__ import annotations

import math

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Unit
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty
from fed.numerics.pairwise import grams
from fed.numerics.weighted_mean import shares
from fed.state import State
from llava.errors import InputError

_PARALLEL = 0.9995


@method("slerp")
def slerp(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    t: Unit | None = None,
) -> Outcome:
    """From the first expert, `t` 0, to the second, 1; none takes the second's share of the weights.

    Facts: `angle` by tensor, in degrees; 0 where one of the two is zero.

    Raises:
        InputError: not exactly two experts.
    """
    if len(states) != 2:
        raise InputError(f"slerp merges exactly two experts, found {len(states)}")
    t = shares(weights)[1] if t is None else t
    products = grams((block.name, block.clients) for block in blocks(states, base))
    cosines = {name: _cosine(*gram.flatten().tolist()) for name, gram in products.items()}

    result = empty(base)
    for block in blocks(states, base):
        block.write(result, block.mix(_factors(cosines[block.name], t)))
    angles = {name: math.degrees(math.acos(cosine)) for name, cosine in cosines.items()}
    return Outcome(result, None, {"angle": angles})


def _cosine(first: float, dot: float, _: float, second: float) -> float:
    length = math.sqrt(first) * math.sqrt(second)
    return max(-1.0, min(1.0, dot / length)) if length else 1.0


def _factors(cosine: float, t: float) -> list[float]:
    if abs(cosine) > _PARALLEL:
        return [1 - t, t]
    theta = math.acos(cosine)
    return [math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]
