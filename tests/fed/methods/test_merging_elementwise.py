"""Methods that merge value by value, or by one factor a tensor: by hand, and their properties."""

import itertools
import math

import numpy as np
import pytest
import torch

from fed import methods
from fed.methods.breadcrumbs import middle
from fed.methods.ties import disjoint_mean
from fed.numerics.dare import dropped
from fed.numerics.magnitude_cutoff import count, order_statistics
from llava.errors import InputError
from tests.conftest import near

SHAPES = {
    "model.mm_projector.0.weight": (11, 5),
    "model.mm_projector.0.bias": (11,),
    "model.mm_projector.2.scale": (),
}
ALL = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "model_stock",
    "slerp",
]
MANY = ALL[:-1]


def call(name, states, weights=None, base=None, **options):
    weights = weights or [1] * len(states)
    return methods.get(name)(states, weights=weights, base=base, **options)


def draw(seed, experts=4, dtype=torch.float32, spread=0.1):
    torch.manual_seed(seed)
    base = {n: torch.randn(s).to(dtype) for n, s in SHAPES.items()}
    common = {n: torch.randn(s) for n, s in SHAPES.items()}
    states = [
        {n: (t + spread * (common[n] + torch.randn(t.shape))).to(dtype) for n, t in base.items()}
        for _ in range(experts)
    ]
    return base, states


def points(*rows, dtype=torch.float64):
    """A base of zeros, and experts with one tensor each."""
    experts = [{"a": torch.tensor(row, dtype=dtype)} for row in rows]
    return {"a": torch.zeros_like(experts[0]["a"])}, experts


def moved(state, base):
    return torch.cat([(state[n].double() - base[n].double()).flatten() for n in base])


def close(a, b, **tolerance):
    for name in b:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# By hand.


def test_linear_and_task_arithmetic_by_hand():
    base, experts = points([1.0, 4], [3, -2])
    base["a"] += 1
    assert call("linear", experts, [1, 1], base).state["a"].tolist() == near([2, 1])
    assert call("linear", experts, [3, 1], base).state["a"].tolist() == near([1.5, 2.5])
    task = call("task_arithmetic", experts, [1, 1], base, scale=0.5).state["a"].tolist()
    assert task == near([2, 1])  # 1 + (0 + 2) / 2 and 1 + (3 - 3) / 2
    task = call("task_arithmetic", experts, [3, 1], base, scale=1.0).state["a"].tolist()
    assert task == near([2, 4])  # 1 + 2 (3 * 0 + 1 * 2) / 4 and 1 + 2 (3 * 3 - 1 * 3) / 4


def test_ties_by_hand():
    base, experts = points([9.0, -5, 1, 2], [4, 8, -7, 1], [-2, 6, 3, 1])
    merged = call("ties", experts, None, base, density=0.5).state["a"].tolist()
    # Trimmed: (9, -5, 0, 0), (0, 8, -7, 0), (0, 6, 3, 0).
    assert merged == near([9, 7, -7, 0])
    merged = call("ties", experts, None, base, density=1.0, scale=2.0).state["a"].tolist()
    assert merged == near([13, 14, -14, 8 / 3])
    merged = call("ties", experts, [1, 1, 5], base, density=0.5).state["a"].tolist()
    # Mass: 9; -5 + 8 + 30; -7 + 15; means over 8, 6 with 1 and 5, and 3 alone.
    assert merged == near([9, 38 / 6, 3, 0])


def test_signs_that_cancel_leave_the_base():
    base, experts = points([0.1, 3], [0.2, -3], [-0.3, 2])
    experts = [{"a": e["a"].float()} for e in experts]
    assert abs(call("ties", experts[:2], None, base, density=1.0).state["a"][1]) < 1e-12
    weights = [3.0, 1.0, 4.0]
    moves = torch.tensor([[0.75], [-2.25], [0.0]], dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        turned = moves[list(order)]
        assert disjoint_mean(turned, [weights[k] for k in order]).item() == near(0)


def test_breadcrumbs_by_hand():
    base, experts = points([9.0, -5, 1, 2, 0], [4, 8, -7, 1, 2])
    merged = call("breadcrumbs", experts, None, base, density=0.4, gamma=0.2, scale=0.5)
    # Without 9 and 8, the two largest: (0, -5, 0, 2, 0) and (4, 0, -7, 0, 0).
    assert merged.state["a"].tolist() == near([2, -2.5, -3.5, 1, 0])
    # There are only five: of a density of 0.8 one is dropped, and it is the largest.
    merged = call("breadcrumbs", experts, None, base, density=0.8, gamma=0.6, scale=1.0)
    assert merged.state["a"].tolist() == near([4, -5, -6, 3, 2])


@pytest.mark.parametrize(
    ("n", "density", "gamma", "expected"),
    [
        (100, 0.29, 0.0, (71, 99)),
        (100, 0.29, 0.1, (61, 89)),
        (100, 0.95, 0.1, (0, 94)),
        (100, 1.0, 0.5, (0, 99)),
        (1, 0.1, 0.9, (0, 0)),
        (3, 0.1, 0.4, (1, 1)),
    ],
)
def test_the_ranks_that_breadcrumbs_keeps(n, density, gamma, expected):
    assert tuple(middle(n, density, gamma)) == expected


def test_slerp_by_hand():
    base, experts = points([3.0, 0], [0, 3])
    outcome = call("slerp", experts, None, base, t=1 / 3)
    expected = [3 * math.cos(math.pi / 6), 3 * math.sin(math.pi / 6)]
    assert outcome.state["a"].tolist() == pytest.approx(expected)
    assert outcome.facts["angle"] == {"a": pytest.approx(90)}
    # By weights the second has a third of them.
    assert call("slerp", experts, [2, 1], base).state["a"].tolist() == pytest.approx(expected)
    base, experts = points([1.0, 0], [3, 0])
    assert call("slerp", experts, None, base, t=0.25).state["a"].tolist() == near([1.5, 0])
    base, experts = points([1.0, 0], [-3, 0])
    assert call("slerp", experts, None, base, t=0.25).state["a"].tolist() == near([0, 0])


def test_slerp_where_one_tensor_is_zero():
    base, experts = points([0.0, 0], [2, 4])
    experts = [{**e, "b": torch.ones(1)} for e in experts]
    base["b"] = torch.ones(1)
    outcome = call("slerp", experts, None, base, t=0.5)
    assert outcome.state["a"].tolist() == near([1, 2])
    assert outcome.facts["angle"]["a"] == near(0)


def test_model_stock_by_hand():
    base, experts = points([1.0, 0], [0.6, 0.8])
    base["a"] += torch.tensor([0.0, 0])
    outcome = call("model_stock", experts, None, base)
    assert outcome.facts["t"] == {"a": pytest.approx(1.2 / 1.6)}
    assert outcome.state["a"].tolist() == pytest.approx([0.6, 0.3])
    base, experts = points([1.0, 0, 0], [0, 1, 0], [0.6, 0.8, 0])
    outcome = call("model_stock", experts, None, base)
    c = (0 + 0.6 + 0.8) / 3
    assert outcome.facts["t"]["a"] == pytest.approx(3 * c / (1 + 2 * c))
    # With shares of 1/2, 1/4, 1/4 pairs count as 2, 2 and 1, and s is 3/8.
    outcome = call("model_stock", experts, [2, 1, 1], base)
    c = (2 * 0 + 2 * 0.6 + 0.8) / 5
    assert outcome.facts["t"]["a"] == pytest.approx(c / (3 / 8 + 5 / 8 * c))


def test_the_step_of_model_stock_is_the_paper_s_geometry_for_unequal_weights_too():
    """The point on the line from the base to the mean that is nearest to the centre.

    T_k = mu + e_k with e_k at right angles to mu and to each other, all of one length.
    """
    mu, noise, p = 2.0, 3.0, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    moves = torch.cat([torch.full((3, 1), mu), noise * torch.eye(3)], 1).double()
    mean = p @ moves
    centre = torch.tensor([mu, 0, 0, 0], dtype=torch.float64)
    nearest = float(mean @ centre / (mean @ mean))
    base, experts = points(*moves.tolist())
    outcome = call("model_stock", experts, (10 * p).tolist(), base)
    assert outcome.facts["t"]["a"] == pytest.approx(nearest)


def test_a_task_vector_of_length_0_is_at_right_angles():
    base, experts = points([1.0, 0], [0, 0])
    experts[1]["b"], experts[0]["b"], base["b"] = torch.ones(1), torch.ones(1), torch.zeros(1)
    outcome = call("model_stock", experts, None, base)
    assert outcome.facts["t"] == near({"a": 0, "b": 1})
    assert outcome.state["a"].tolist() == near([0, 0])


# What is kept.


@pytest.mark.parametrize("density", [0.01, 0.29, 0.5, 1.0])
def test_as_many_values_of_each_tensor_stay_as_asked(density):
    base, (state,) = draw(0, 1)
    merged = call("ties", [state], None, base, density=density).state
    for name, tensor in base.items():
        kept = merged[name] != tensor
        n = tensor.numel()
        assert int(kept.sum()) == max(1, int(density * n + 1e-9)) == count(density, n)
        rest = (state[name] - tensor).abs()[~kept]
        assert rest.numel() == 0 or rest.max() < (state[name] - tensor).abs()[kept].min()
        torch.testing.assert_close(merged[name][kept], state[name][kept], rtol=1e-6, atol=1e-7)


def test_equal_magnitudes_are_kept_or_dropped_together():
    base, experts = points([1.0, -1, 1, 1, 3])
    for density, expected in [(0.4, [1, -1, 1, 1, 3]), (0.2, [0, 0, 0, 0, 3])]:
        found = call("ties", experts, None, base, density=density).state["a"]
        assert found.tolist() == near(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ranks_are_those_of_the_whole_tensor_however_it_is_read(dtype, monkeypatch):
    from fed.numerics import chunks

    monkeypatch.setattr(chunks, "CHUNK", 7)
    base, states = draw(0, 3, dtype)
    found = order_statistics(states, base, lambda n: [0, n // 2, n - 1])
    for name, tensor in base.items():
        for row, state in zip(found[name], states, strict=True):
            size = np.sort((state[name].double() - tensor.double()).abs().float().numpy().ravel())
            assert row.tolist() == [size[0], size[len(size) // 2], size[-1]]


def test_what_is_dropped_follows_from_the_expert_alone():
    base, states = draw(0, 4)

    def masks(order, seed):
        found = {}
        for block, moves in dropped([states[k] for k in order], base, 0.5, seed):
            for k, row in zip(order, moves, strict=True):
                found[k, block.name] = (row != 0).tolist()
        return found

    everyone = masks([0, 1, 2, 3], 0)
    assert masks([3, 1, 0, 2], 0) == everyone
    alone = masks([2], 0)
    assert all(everyone[key] == mask for key, mask in alone.items())
    weight = next(iter(SHAPES))
    assert masks([0, 1, 2, 3], 1)[0, weight] != everyone[0, weight]
    assert everyone[0, weight] != everyone[1, weight]
    # Equal values under two names are two tensors.
    values = torch.randn(50)
    twins, zeros = {"a": values, "b": values}, {"a": 0 * values, "b": 0 * values}
    kept = {b.name: (m != 0).tolist() for b, m in dropped([twins], zeros, 0.5, 0)}
    assert kept["a"] != kept["b"]


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_is_the_same_for_a_seed_and_however_it_is_read(name, monkeypatch):
    from fed.numerics import chunks

    base, states = draw(0)
    found = call(name, states, None, base, density=0.5, seed=3).state
    monkeypatch.setattr(chunks, "CHUNK", 7)
    close(call(name, states, None, base, density=0.5, seed=3).state, found, rtol=1e-6, atol=1e-7)
    other = call(name, states, None, base, density=0.5, seed=-1).state
    assert (moved(other, base) - moved(found, base)).abs().max() > 0.01


def test_nothing_dropped_or_cut():
    base, states = draw(0)
    weights = [3, 1, 4, 2]
    task = call("task_arithmetic", states, weights, base, scale=0.3).state
    dare = call("dare_linear", states, weights, base, density=1.0, scale=0.3).state
    crumbs = call("breadcrumbs", states, weights, base, density=1.0, gamma=0.0, scale=0.3).state
    close(dare, task, rtol=1e-6, atol=1e-7)
    close(crumbs, task, rtol=1e-6, atol=1e-7)
    for scale in (1.0, 0.5):
        ties = call("ties", states, weights, base, density=1.0, scale=scale).state
        dare = call("dare_ties", states, weights, base, density=1.0, scale=scale).state
        close(dare, ties, rtol=1e-6, atol=1e-7)


# Properties.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("slerp", {}),
        ("slerp", {"t": 0.9}),
        ("model_stock", {}),
        ("ties", {"density": 1.0}),
        ("dare_ties", {"density": 1.0}),
        ("task_arithmetic", {"scale": 0.5}),
        ("dare_linear", {"density": 1.0, "scale": 0.5}),
        ("breadcrumbs", {"density": 1.0, "scale": 0.5}),
    ],
)
def test_equal_experts_give_that_expert(name, options, dtype):
    base, (state,) = draw(0, 1, dtype)
    found = call(name, [state] * 2, [1, 5], base, **options).state
    tolerance = dict(rtol=0, atol=0) if dtype == torch.bfloat16 else dict(rtol=1e-6, atol=1e-7)
    close(found, state, **tolerance)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_experts_that_did_not_move_give_the_base(name):
    base, _ = draw(0)
    close(call(name, [base] * 3, None, base).state, base, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["linear", "task_arithmetic", "ties", "breadcrumbs", "model_stock"]
)
def test_opposite_updates_cancel_to_the_base(name):
    base, (state,) = draw(0, 1, torch.float64)
    other = {n: 2 * base[n] - t for n, t in state.items()}
    found = call(name, [state, other], None, base).state
    close(found, base, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ties", "task_arithmetic", "breadcrumbs", "model_stock"])
def test_the_mirrored_experts_give_the_mirrored_result(name):
    base, states = draw(1, 3, torch.float64)
    zero = {n: torch.zeros_like(t) for n, t in base.items()}
    tasks = [{n: t - base[n] for n, t in s.items()} for s in states]
    mirrored = [{n: -t for n, t in s.items()} for s in tasks]
    found = call(name, tasks, [1, 2, 4], zero).state
    other = call(name, mirrored, [1, 2, 4], zero).state
    assert moved(found, zero).abs().max() > 0.01
    close({n: -t for n, t in other.items()}, found, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("seed", range(3))
def test_order_scale_and_experts_of_weight_0(name, seed):
    base, states = draw(seed, 5)
    weights = [3, 0, 8, 1, 4]
    found = call(name, states, weights, base).state
    turned = call(name, states[::-1], weights[::-1], base).state
    scaled = call(name, states, [1e6 * w for w in weights], base).state
    heard = [k for k in range(5) if weights[k]]
    without = call(name, [states[k] for k in heard], [weights[k] for k in heard], base).state
    small = call(name, states, [1e-6 * w for w in weights], base).state
    for other in (turned, scaled, small, without):
        close(other, found, rtol=1e-6, atol=1e-6)
    plain = call(name, states, None, base).state
    assert (moved(plain, base) - moved(found, base)).abs().max() > 1e-3  # weights count


def test_slerp_turned_round():
    base, states = draw(0, 2, spread=1.0)
    found = call("slerp", states, [3, 1], base).state
    close(call("slerp", states[::-1], [1, 3], base).state, found, rtol=1e-6, atol=1e-6)
    close(call("slerp", states, [3e6, 1e6], base).state, found, rtol=1e-6, atol=1e-6)
    close(call("slerp", states, None, base, t=0.0).state, states[0], rtol=1e-6, atol=1e-7)
    close(call("slerp", states, None, base, t=1.0).state, states[1], rtol=1e-6, atol=1e-7)


def test_linear_is_fedavg_to_the_bit():
    base, states = draw(0, 5, torch.bfloat16)
    weights = [3, 1, 4, 1, 5]
    expected = call("fedavg", states, weights, base).state
    close(call("linear", states, weights, base).state, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear", "slerp"])
def test_where_the_base_plays_no_part(name):
    base, states = draw(0, 2, spread=1.0)
    other = {n: 3 * t + 1 for n, t in base.items()}
    found = call(name, states, None, base).state
    close(call(name, states, None, other).state, found, rtol=0, atol=0)


# What does not fit.


@pytest.mark.parametrize("experts", [1, 3])
def test_slerp_needs_two(experts):
    base, states = draw(0, experts)
    with pytest.raises(InputError, match=f"slerp merges exactly two experts, found {experts}"):
        call("slerp", states, None, base)
    base, states = draw(0, 3)
    with pytest.raises(InputError, match="exactly two experts, found 1"):
        call("slerp", states, [0, 1, 0], base)


def test_model_stock_needs_two():
    base, states = draw(0, 1)
    with pytest.raises(InputError, match="model_stock needs at least two experts, found 1"):
        call("model_stock", states, None, base)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("slerp", dict(t=-0.1)),
        ("slerp", dict(t=1.1)),
        *[("task_arithmetic", dict(scale=scale)) for scale in (0.0, -1.0, math.inf)],
        *[
            (name, option)
            for name in ("ties", "dare_linear", "dare_ties", "breadcrumbs")
            for option in (dict(density=0.0), dict(density=1.1), dict(scale=0.0))
        ],
        *[("breadcrumbs", dict(gamma=gamma)) for gamma in (-0.1, 1.0)],
        ("dare_ties", dict(seed=0.5)),
    ],
)
def test_options_out_of_range(name, option):
    base, states = draw(0, 2)
    with pytest.raises(InputError, match=f"{name} option {next(iter(option))}: expected .*found"):
        call(name, states, None, base, **option)
