"""PivotMerge: what must hold for any of its settings, and what each part does."""

import math

import pytest
import torch

from fed import methods
from fed.methods import Outcome
from fed.methods.pivotmerge.shared_space import EXACT, LEADING, Shared, by_leaving_out, by_subspace
from fed.numerics.layers import Layer, Parts, layers
from llava.errors import InputError

SHAPES = {"0.weight": (12, 7), "0.bias": (12,), "2.weight": (9, 12), "2.bias": (9,), "scale": (5,)}
MODES = ("uniform", "energy", "subspace")


def draw(seed, experts=3, size=0.3):
    torch.manual_seed(seed)
    base = {n: torch.randn(s, dtype=torch.float64) for n, s in SHAPES.items()}
    return base, [
        {n: t + size * torch.randn_like(t) for n, t in base.items()} for _ in range(experts)
    ]


def merge(states, base, weights=None, **options) -> Outcome:
    weights = weights or [1] * len(states)
    return methods.get("pivotmerge")(states, weights=weights, base=base, **options)


def near(a, b, tolerance=1e-9):
    return all(torch.allclose(a[n], b[n], rtol=0, atol=tolerance) for n in SHAPES)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("mode", MODES)
def test_equal_experts_give_that_expert(mode, side):
    base, (expert, _, _) = draw(0)
    for options in ({}, {"power": 0.5}, {"kappa_min": 0.9, "specific": 0.0}, {"rank": 3}):
        merged = merge([expert] * 4, base, [1, 2, 3, 4], mode=mode, side=side, **options).state
        assert near(merged, expert, 1e-7), options


def test_without_gain_and_filter_uniform_is_the_weighted_mean():
    base, states = draw(1)
    weights = [1, 2, 5]
    mean = {n: sum(w * s[n] for w, s in zip(weights, states, strict=True)) / 8 for n in SHAPES}
    assert near(merge(states, base, weights, mode="uniform").state, mean)
    assert near(merge(states, base, weights, mode="uniform", rank=2).state, mean)
    assert not near(merge(states, base, weights, mode="uniform", power=0.3).state, mean, 1e-3)
    assert not near(merge(states, base, weights).state, mean, 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_neither_the_order_of_experts_nor_the_scale_of_weights_matters(mode):
    base, states = draw(2)
    options = dict(mode=mode, power=0.2, kappa_min=0.3, specific=0.5)
    one = merge(states, base, [1, 2, 3], **options).state
    other = merge(states[::-1], base, [30, 20, 10], **options).state
    assert near(one, other)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("mode", MODES)
def test_opposite_updates_cancel_to_the_base(mode, side):
    base, (expert, *_) = draw(3)
    opposite = {n: 2 * base[n] - expert[n] for n in SHAPES}
    for power in (0.0, 0.5):
        merged = merge([expert, opposite], base, mode=mode, side=side, power=power).state
        assert near(merged, base, 1e-6)


@pytest.mark.parametrize(("side", "axis"), [("input", 1), ("output", 0)])
def test_experts_of_disjoint_directions_are_all_kept(side, axis):
    """A mean halves both; matrix weights hear each where it has moved."""
    torch.manual_seed(4)
    base = {"0.weight": torch.zeros(10, 8, dtype=torch.float64)}
    moves = torch.randn(10, 8, dtype=torch.float64)
    cut = torch.arange(moves.shape[axis]) < moves.shape[axis] // 2
    first = moves * (cut if axis else cut[:, None])
    states = [{"0.weight": first}, {"0.weight": moves - first}]
    merged = merge(states, base, side=side, floor=1e-6, noise=1e-6).state["0.weight"]
    assert torch.allclose(merged, moves, atol=1e-3)
    halved = merge(states, base, side=side, mode="uniform").state["0.weight"]
    assert torch.allclose(halved, moves / 2)


def test_what_opposes_the_sum_is_filtered_where_experts_disagree():
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[-1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    shared = Shared.of([x, y], [0.5, 0.5], None)
    total = sum(shared.parts)
    for before, after in zip(shared.parts, shared.filtered(1.0, 1.0), strict=True):
        along = (before * total).sum(1)
        assert torch.allclose((after * total).sum(1), along.clamp(min=0), atol=1e-12)
    nothing = shared.filtered(1.0, 0.0)
    low = shared.kappa < 1.0
    assert low.any()
    assert all((c[low] == 0).all() for c in nothing)
    assert all(a is b for a, b in zip(shared.filtered(0.0, 0.0), shared.parts, strict=True))


def test_matrix_weights_by_their_definition():
    torch.manual_seed(5)
    parts = [torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]
    alpha, noise, floor = [0.2, 0.3, 0.5], 0.7, 0.05
    weights = []
    for c in parts:
        g = c @ c.T
        weights.append(g @ torch.linalg.inv(g + noise * g.trace() / 4 * torch.eye(4)))
    level = floor * sum(a * w.trace() for a, w in zip(alpha, weights, strict=True)) / 4
    weights = [a * (w + level * torch.eye(4)) for a, w in zip(alpha, weights, strict=True)]
    expected = torch.linalg.inv(sum(weights)) @ sum(
        w @ c for w, c in zip(weights, parts, strict=True)
    )
    assert torch.allclose(by_subspace(parts, alpha, noise, floor), expected)
    longer = [10 * parts[0], *parts[1:]]
    moved = by_subspace(longer, alpha, noise, 1e9)  # by the floor alone: a plain mean
    assert torch.allclose(moved, sum(a * c for a, c in zip(alpha, longer, strict=True)), atol=1e-6)


def test_the_gain_gives_back_the_length_of_unrelated_rows():
    x = torch.zeros(2, 4, dtype=torch.float64)
    y = x.clone()
    x[0, 0], y[0, 1] = 2.0, 2.0
    shared = Shared.of([x, y], [0.5, 0.5], None)
    how = dict(kappa_min=0.0, subspace=None)
    merged, facts = shared.joined(shared.parts, [0.5, 0.5], rescale=4.0, power=0.5, **how)
    assert merged.norm() == pytest.approx(2.0)
    assert facts["gain"] == pytest.approx(math.sqrt(2))
    capped, _ = shared.joined(shared.parts, [0.5, 0.5], rescale=1.1, power=0.5, **how)
    assert capped.norm() == pytest.approx(1.1 * math.sqrt(2))


def test_a_large_layer_takes_leading_directions_and_the_mean_of_the_rest():
    torch.manual_seed(6)
    side = EXACT + 1
    base = {"0.weight": torch.zeros(140, side)}
    common = torch.randn(140, 20) @ torch.randn(20, side)
    states = [{"0.weight": common + 0.01 * torch.randn(140, side)} for _ in range(12)]
    outcome = merge(states, base)
    facts = outcome.facts["layers"]["0"]
    assert (facts["side"], facts["rank"]) == (side, LEADING)
    mean = sum(s["0.weight"] for s in states) / 12
    assert torch.allclose(outcome.state["0.weight"], mean, atol=0.05)
    uniform = merge(states, base, mode="uniform").state["0.weight"]
    assert torch.allclose(uniform, mean, atol=1e-4)


class Distance:
    """A loss that can be seen through: how far the state is from a goal, and who asked."""

    def __init__(self, goal):
        self.goal, self.calls = goal, 0

    def loss(self, state):
        self.calls += 1
        return float(sum((state[n] - self.goal[n]).square().sum() for n in self.goal))


def test_calibration_trusts_whom_the_loss_misses_most():
    base, states = draw(7, experts=3)
    good = Distance(states[0])
    found = merge(states, base, mode="calibration", calibration=[good] * 3)
    assert good.calls == 1 + 2 * 3  # with all, then without each expert's part of each layer
    for facts in found.facts["layers"].values():
        assert facts["alpha"][0] == max(facts["alpha"])
        assert sum(facts["alpha"]) == pytest.approx(1)
    plain = merge(states, base, mode="uniform")
    assert good.loss(found.state) < good.loss(plain.state)


def test_leaving_out_ends_with_all_experts_there():
    base, states = draw(8)
    state = {n: t.clone() for n, t in base.items()}
    seen = []

    def write(layer: Layer, alpha):
        seen.append(list(alpha))
        mean = sum(
            a * x for a, x in zip(alpha, map(torch.clone, Parts(states, layer)), strict=True)
        )
        state[layer.weight] = mean[:, :-1]

    first = layers(base)[0][0]
    by_leaving_out([first], write, [0.5, 0.25, 0.25], [Distance(states[0])] * 3, state)
    expected = [[0.0, 0.5, 0.5], [2 / 3, 0.0, 1 / 3], [2 / 3, 1 / 3, 0.0], [0.5, 0.25, 0.25]]
    assert seen[:4] == [pytest.approx(alpha) for alpha in expected]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": 0.0}, "noise: expected a positive number"),
        ({"floor": 0.0}, "floor"),
        ({"kappa_min": 1.5}, r"kappa_min: expected in \[0, 1\]"),
        ({"specific": -1.0}, "specific"),
        ({"rescale": 0.5}, "rescale"),
        ({"power": 2.0}, "power"),
        ({"rank": 0}, "rank"),
        ({"mode": "calibration"}, "--calibration_data"),
        ({"mode": "subspaces"}, "uniform, energy, subspace, calibration"),
    ],
)
def test_options_out_of_range(options, said):
    base, states = draw(0)
    with pytest.raises(InputError, match=said):
        merge(states, base, **options)
