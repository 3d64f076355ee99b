"""PivotMerge: what must hold for any of its settings, and what each part does."""

import math

import pytest
import torch

from fed import methods
from fed.clients.measures import Explained
from fed.methods import Outcome
from fed.methods.pivotmerge.shared_space import EXACT, LEADING, Shared, by_subspace, filtered
from fed.numerics.shrinkage import LEAST
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
    for options in ({}, {"power": 0.5}, {"conflict": 0.0, "specific": 0.0}, {"rank": 3}):
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
    options = dict(mode=mode, power=0.2, conflict=0.0, specific=0.5)
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
    p = [0.5, 0.5]
    shared = Shared.of([x, y], p, None)
    total = sum(shared.parts)
    low = shared.kappa < 1.0
    assert low.any()
    for before, after in zip(shared.parts, filtered(shared.parts, p, low, 1.0), strict=True):
        along = (before * total).sum(1)
        assert torch.allclose((after * total).sum(1), along.clamp(min=0), atol=1e-12)
    assert all((c[low] == 0).all() for c in filtered(shared.parts, p, low, 0.0))
    assert filtered(shared.parts, p, ~low & low, 0.0) is shared.parts


def unrelated(seed, experts, side=60, width=90):
    """Matrices of experts that have nothing to do with each other."""
    torch.manual_seed(seed)
    return [torch.randn(side, width, dtype=torch.float64) for _ in range(experts)]


@pytest.mark.parametrize("p", [[0.5, 0.5], [0.2] * 5, [0.6, 0.3, 0.1]])
def test_unrelated_experts_are_rarely_in_conflict(p):
    shared = Shared.of(unrelated(1, len(p)), p, None)
    assert shared.conflicts(None).sum() == 0
    assert shared.conflicts(5.0).sum() == 0
    # The deviation is that of kappa: about one direction in six lies more than one below.
    assert 0.02 < float(shared.conflicts(1.0).double().mean()) < 0.35


def test_experts_that_oppose_each_other_are_in_conflict_there_alone():
    x, y, z = unrelated(2, 3)
    opposed = torch.zeros(60, 1, dtype=torch.float64)
    opposed[:10] = 1.0
    y = torch.where(opposed > 0, -x + 0.1 * y, 4 * y)  # some rows are the other's, turned round
    shared = Shared.of([x, y, z], [1 / 3] * 3, None)
    directions = shared.basis.vectors * shared.conflicts(3.0)
    there = directions.square().sum(1)
    assert shared.conflicts(3.0).any()
    assert there[:10].mean() > 5 * there[10:].mean()
    agreed = Shared.of([x, x + 0.1 * y, x], [1 / 3] * 3, None)
    assert not agreed.conflicts(0.0).any()


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
    nowhere = shared.conflicts(None)
    how = dict(specific=1.0, subspace=None)
    merged, facts = shared.joined(nowhere, [0.5, 0.5], rescale=4.0, power=0.5, **how)
    assert merged.norm() == pytest.approx(2.0)
    assert facts["gain"] == pytest.approx(math.sqrt(2))
    capped, _ = shared.joined(nowhere, [0.5, 0.5], rescale=1.1, power=0.5, **how)
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


class Told:
    """Calibration data that has a share for each state it is asked of, and counts the questions."""

    def __init__(self, share, spread=0.0):
        self.share, self.spread, self.calls = share, spread, 0

    def explained(self, state):
        self.calls += 1
        return Explained(1 - self.share(state), 1.0, self.spread, 10, 10)


def told(*shares):
    return [Told(lambda state, share=share: share) for share in shares]


def test_an_expert_weighs_what_its_pictures_explain():
    base, states = draw(7, experts=3)
    data = told(0.6, 0.3, -0.2)
    found = merge(states, base, [1, 2, 5], contribution="expert", calibration=data)
    assert found.facts["explained"] == pytest.approx([0.6, 0.3, -0.2])
    assert near(found.state, merge(states, base, [0.6, 0.6, 5 * LEAST]).state, 1e-9)
    assert [each.calls for each in data] == [1, 1, 1]
    sound = merge(states[:2], base, [0.6, 0.6])
    without = merge(states, base, [1, 2, 5], contribution="expert", calibration=told(0.6, 0.3, 0.0))
    assert near(without.state, sound.state, 0.02)


@pytest.mark.parametrize("contribution", ["layer", "expert"])
@pytest.mark.parametrize("mode", MODES)
def test_equal_shares_give_what_no_data_give(mode, contribution):
    base, states = draw(8)
    options = dict(mode=mode, contribution=contribution)
    found = merge(states, base, [1, 2, 3], **options, calibration=told(0.4, 0.4, 0.4))
    assert near(found.state, merge(states, base, [1, 2, 3], mode=mode).state)
    unsure = [Told(each.share, spread=1.0) for each in told(0.4, 0.1, 0.5)]
    found = merge(states, base, [1, 2, 3], **options, calibration=unsure)
    if contribution == "expert":  # nothing can be told apart
        assert near(found.state, merge(states, base, [1, 2, 3], mode=mode).state)


def test_an_expert_that_explains_nothing_has_layers_as_the_others_have():
    base, states = draw(10)

    def half(state):  # half of its share hangs on each layer
        return 0.2 * sum(not torch.equal(state[n], base[n]) for n in ("0.weight", "2.weight"))

    unsure = [Told(half, spread=1.0), *told(0.0), Told(half, spread=1.0)]  # all are drawn alike
    found = merge(states, base, contribution="layer", calibration=unsure)
    for facts in found.facts["layers"].values():
        assert facts["alpha"] == pytest.approx([1 / 3] * 3)


def test_data_is_not_looked_at_where_nothing_is_weighed_by_it():
    base, states = draw(9)
    data = told(0.6, 0.3, 0.1)
    found = merge(states, base, contribution="none", calibration=data)
    assert near(found.state, merge(states, base).state)
    assert "explained" not in found.facts
    assert not any(each.calls for each in data)


def test_a_layer_that_nothing_depends_on_has_little_weight():
    base, states = draw(10, experts=2)

    def second(state):  # all of its share hangs on the layer 2
        return 0.8 if not torch.equal(state["2.weight"], base["2.weight"]) else 0.2

    def both(state):  # half of it on each
        return 0.4 * sum(not torch.equal(state[n], base[n]) for n in ("0.weight", "2.weight"))

    data = [Told(second), Told(both)]
    found = merge(states, base, contribution="layer", calibration=data)
    alphas = {name: facts["alpha"] for name, facts in found.facts["layers"].items()}
    assert alphas["0"] == pytest.approx([LEAST / (LEAST + 0.5), 0.5 / (LEAST + 0.5)])
    assert alphas["2"] == pytest.approx([0.75 / 1.25, 0.5 / 1.25])
    assert [each.calls for each in data] == [3, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": 0.0}, "noise: expected a positive number"),
        ({"floor": 0.0}, "floor"),
        ({"conflict": -1.0}, "conflict"),
        ({"contribution": "all"}, "expert, layer, none"),
        ({"specific": -1.0}, "specific"),
        ({"rescale": 0.5}, "rescale"),
        ({"power": 2.0}, "power"),
        ({"rank": 0}, "rank"),
        ({"mode": "calibration"}, "uniform, energy, subspace"),
    ],
)
def test_options_out_of_range(options, said):
    base, states = draw(0)
    with pytest.raises(InputError, match=said):
        merge(states, base, **options)
