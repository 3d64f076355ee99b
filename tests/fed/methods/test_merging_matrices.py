"""What TSV-M, Iso-C, KnOTS, WUDI, RegMean and Fisher must do, on small states."""

import math

import pytest
import torch

from fed import methods
from fed.numerics import low_rank
from fed.numerics.layers import layers, to_matrix
from llava.errors import InputError

SHAPES = {
    "model.mm_projector.0.weight": (12, 8),
    "model.mm_projector.0.bias": (12,),
    "model.mm_projector.2.weight": (10, 12),
    "model.mm_projector.2.bias": (10,),
    "model.norm.weight": (10,),
}
WEIGHTS = [name for name in SHAPES if name.startswith("model.mm") and name.endswith("weight")]
OTHERS = [name for name in SHAPES if name not in WEIGHTS]
DATA_FREE = ["tsv_m", "iso_c", "knots", "wudi"]
ALL = [*DATA_FREE, "regmean", "fisher"]


class Data:
    """Inputs of each layer and gradients that are drawn once."""

    def __init__(self, seed, inputs=30):
        draw = torch.Generator().manual_seed(seed)
        self.x = {
            name.removesuffix(".weight"): torch.randn(inputs, SHAPES[name][1], generator=draw)
            for name in WEIGHTS
        }
        self.f = {name: torch.rand(s, generator=draw) + 0.05 for name, s in SHAPES.items()}

    def gram(self, _):
        ones = {n: torch.cat([x, torch.ones(len(x), 1)], 1).double() for n, x in self.x.items()}
        return {name: x.T @ x / len(x) for name, x in ones.items()}

    def fisher(self, _):
        return self.f


def draw(seed=0, clients=3, spread=0.1):
    torch.manual_seed(seed)
    base = {n: torch.randn(s) for n, s in SHAPES.items()}
    return base, [
        {n: t + spread * torch.randn(t.shape) for n, t in base.items()} for _ in range(clients)
    ]


def merge(name, base, states, weights=None, data=None, **options):
    method = methods.get(name)
    if method.needs_calibration:
        options["calibration"] = data or [Data(k) for k in range(len(states))]
    return method(states, weights=weights or [1] * len(states), base=base, **options).state


def close(a, b, atol=1e-5):
    return all(torch.allclose(a[n], b[n], atol=atol) for n in a)


def moves(base, state, name):
    return (state[name] - base[name]).double()


@pytest.mark.parametrize("name", ALL)
def test_order_and_the_scale_of_weights_are_of_no_matter(name):
    base, states = draw(1, 4)
    weights, data = [3, 1, 2, 5], [Data(k) for k in range(4)]
    found = merge(name, base, states, weights, data)
    assert close(found, merge(name, base, states[::-1], weights[::-1], data[::-1]))
    assert close(found, merge(name, base, states, [7 * w for w in weights], data))
    assert not close(found, merge(name, base, states, [5, 2, 1, 3], data), 1e-3)
    ones = merge(name, base, states, [1] * 4, data)
    assert close(ones, merge(name, base, states, [12] * 4, data))


@pytest.mark.parametrize("name", ALL)
def test_equal_experts(name):
    base, (own, _) = draw(2, 2)
    options = {"rank": 1.0} if name == "tsv_m" else {"density": 1.0} if name == "knots" else {}
    found = merge(name, base, [own] * 3, **options)
    if name != "iso_c":
        # TSV-M: three equal stacks have one direction each, of length 1
        assert close(found, own, 1e-5)
        assert close(merge(name, base, [own], **options), own, 1e-5)
    else:
        for n in WEIGHTS:
            lengths = torch.linalg.svdvals(moves(base, found, n))
            mean = 3 * torch.linalg.svdvals(moves(base, own, n)).mean()
            assert torch.allclose(lengths, mean.expand_as(lengths), rtol=1e-4)
        assert all(torch.allclose(found[n], own[n], atol=1e-6) for n in OTHERS)


def test_tsv_m_of_equal_experts_is_the_leading_part_without_noise():
    base, (own, _) = draw(2, 2)
    found = merge("tsv_m", base, [own] * 2)
    for n in WEIGHTS:
        u, s, vt = torch.linalg.svd(moves(base, own, n), full_matrices=False)
        half = len(s) // 2
        expected = u[:, :half] * s[:half] @ vt[:half]
        assert torch.allclose(moves(base, found, n), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "wudi", "regmean", "knots"])
def test_biases_and_norms_are_averaged(name):
    base, states = draw(3)
    weights = [3, 1, 2]
    found = merge(name, base, states, weights)
    free = [n for n in OTHERS if name != "knots" or n == "model.norm.weight"]
    for n in free:
        mean = sum(w * s[n] for w, s in zip(weights, states, strict=True)) / 6
        assert torch.allclose(found[n], mean, atol=1e-6)
        if name in ("tsv_m", "iso_c", "wudi", "knots"):
            half = merge(name, base, states, weights, scale=0.5)
            assert torch.allclose(half[n], (base[n] + mean) / 2, atol=1e-6)


@pytest.mark.parametrize("name", DATA_FREE)
def test_a_rotation_of_the_outputs_rotates_the_result(name):
    base, states = draw(4)
    zero = {n: torch.zeros_like(t) for n, t in base.items()}
    apart = [{n: s[n] - base[n] for n in base} for s in states]
    torch.manual_seed(5)
    turns = {n: torch.linalg.qr(torch.randn(SHAPES[n][0], SHAPES[n][0])).Q for n in WEIGHTS}

    def turned(state):
        whole = dict(state)
        for n, q in turns.items():
            bias = n.replace("weight", "bias")
            whole[n], whole[bias] = q @ state[n], q @ state[bias]
        return whole

    found = merge(name, zero, apart)
    assert close(merge(name, zero, [turned(s) for s in apart]), turned(found), 1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [("tsv_m", {}), ("knots", {"density": 1.0}), ("wudi", {}), ("wudi", {"solver": "adam"})],
)
def test_experts_of_disjoint_subspaces_are_all_kept(name, options):
    """Outputs and inputs of two experts that have nothing in common: their updates are added."""
    base, _ = draw(6)
    torch.manual_seed(7)
    states = [dict(base), dict(base)]
    for n in WEIGHTS:
        out, width = SHAPES[n]
        for k, state in enumerate(states):
            rows = slice(k * out // 2, (k + 1) * out // 2)
            columns = slice(k * width // 2, (k + 1) * width // 2)
            state[n] = base[n].clone()
            state[n][rows, columns] += (1 + k) * torch.randn(out // 2, width // 2)
    found = merge(name, base, states, **options)
    for n in WEIGHTS:
        both = sum(moves(base, s, n) for s in states)
        assert torch.allclose(moves(base, found, n), both, atol=1e-5), n


def test_tsv_m_keeps_the_lengths_of_orthogonal_experts_and_cuts_by_rank():
    base, states = draw(8, 2)
    outcome = methods.get("tsv_m")(states, weights=[1, 1], base=base, rank=0.25)
    facts = outcome.facts["layers"]["model.mm_projector.0"]
    assert facts["rank"] == 2
    assert 0 < facts["kept"] < 1
    n = WEIGHTS[0]
    assert torch.linalg.matrix_rank(moves(base, outcome.state, n), atol=1e-4) == 4
    many = merge("tsv_m", base, draw(9, 20)[1])  # more experts than directions
    assert all(torch.isfinite(t).all() for t in many.values())


def test_iso_c_has_all_directions_of_the_sum_with_its_mean_length():
    base, states = draw(10)
    found = merge("iso_c", base, states, scale=0.7)
    for n in WEIGHTS:
        u, s, vt = torch.linalg.svd(sum(moves(base, e, n) for e in states), full_matrices=False)
        assert torch.allclose(moves(base, found, n), 0.7 * s.mean() * u @ vt, atol=1e-5)


def test_knots_with_linear_is_the_mean_and_ties_is_not():
    base, states = draw(11)
    weights = [1, 2, 4]
    mean = methods.get("fedavg")(states, weights=weights, base=base).state
    assert close(merge("knots", base, states, weights, merge="linear"), mean)
    assert not close(merge("knots", base, states, weights), mean, 1e-3)
    assert close(merge("knots", base, states, weights, merge="linear", rank=3), mean)
    zero = merge("knots", base, states, weights, merge="linear", scale=0.5)
    assert close(zero, {n: (base[n] + mean[n]) / 2 for n in base})


def test_knots_of_few_directions_is_that_of_all_where_there_are_no_others():
    base, _ = draw(12)
    torch.manual_seed(13)
    shared = {layer.name: torch.randn(12 if ".0" in layer.name else 10, 3)
              for layer in layers(base)[0]}  # fmt: skip
    states = []
    for _ in range(3):
        state = dict(base)
        for layer in layers(base)[0]:
            move = shared[layer.name] @ torch.randn(3, SHAPES[layer.weight][1] + 1)
            state[layer.weight] = base[layer.weight] + move[:, :-1]
            state[layer.bias] = base[layer.bias] + move[:, -1]
        states.append(state)
    some = merge("knots", base, states, rank=3, density=1.0)
    assert close(some, merge("knots", base, states, density=1.0), 1e-4)


def _wudi_loss(base, states, state, name):
    t, loss = moves(base, state, name), 0.0
    for each in states:
        own = moves(base, each, name)
        loss += float(((t - own) @ own.T).square().sum() / own.square().sum())
    return loss


def test_wudi_exact_is_the_minimum_that_adam_goes_to():
    base, states = draw(14, 2, spread=0.02)
    exact = merge("wudi", base, states)
    few = merge("wudi", base, states, solver="adam")
    many = merge("wudi", base, states, solver="adam", iterations=5000, lr=3e-4)
    torch.manual_seed(15)
    for n in WEIGHTS:
        least = _wudi_loss(base, states, exact, n)
        for other in (few, many, states[0]):
            assert least <= _wudi_loss(base, states, other, n)
        near = {n: exact[n] + 1e-3 * torch.randn(SHAPES[n])}
        assert least < _wudi_loss(base, states, near, n)
        start = {n: base[n] + sum(s[n] - base[n] for s in states)}
        assert _wudi_loss(base, states, few, n) < _wudi_loss(base, states, start, n)
        assert _wudi_loss(base, states, many, n) < 1.01 * least + 1e-9


def test_an_expert_that_has_not_moved_does_not_disturb_wudi():
    base, states = draw(16, 2)
    alone, beside = merge("wudi", base, states), merge("wudi", base, [*states, base])
    assert all(torch.allclose(alone[n], beside[n], atol=1e-5) for n in WEIGHTS)


def test_regmean_is_the_least_squares_solution():
    base, states = draw(17)
    data, weights = [Data(k) for k in range(3)], [1.0, 2.0, 3.0]
    found = merge("regmean", base, states, weights, data, reduce=1.0)
    joint = merge("regmean", base, states, weights, data, reduce=1.0, bias="joint")
    for layer in layers(base)[0]:
        for merged, with_bias in ((found, False), (joint, True)):
            rows, wanted = [], []
            for w, d, s in zip(weights, data, states, strict=True):
                x = d.x[layer.name].double()
                x = torch.cat([x, torch.ones(len(x), 1)], 1) if with_bias else x
                own = to_matrix(s, layer)[:, : x.shape[1]]
                rows.append(math.sqrt(w) * x)
                wanted.append(math.sqrt(w) * x @ own.T)
            best = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T
            assert torch.allclose(to_matrix(merged, layer)[:, : best.shape[1]], best, atol=1e-5)


def test_regmean_without_the_off_diagonal_weighs_each_input_by_itself():
    base, states = draw(18, 2)
    data = [Data(k) for k in range(2)]
    found = merge("regmean", base, states, None, data, reduce=0.0)
    for layer in layers(base)[0]:
        a, b = (d.gram(None)[layer.name].diagonal()[:-1].float() for d in data)
        expected = (a * states[0][layer.weight] + b * states[1][layer.weight]) / (a + b)
        assert torch.allclose(found[layer.weight], expected, atol=1e-5)


def test_regmean_leaves_the_mean_where_no_input_reaches():
    base, states = draw(19, 2)
    data = [Data(k) for k in range(2)]
    for each in data:
        for x in each.x.values():
            x[:, 3] = 0
    found = merge("regmean", base, states, None, data, reduce=1.0)
    for n in WEIGHTS:
        mean = (states[0][n] + states[1][n]) / 2
        assert torch.allclose(found[n][:, 3], mean[:, 3], atol=1e-5)
        assert not torch.allclose(found[n][:, 2], mean[:, 2], atol=1e-3)


def test_fisher_by_hand():
    base, states = draw(20, 2)
    data = [Data(k) for k in range(2)]
    data[0].f[WEIGHTS[0]][0, 0] = data[1].f[WEIGHTS[0]][0, 0] = 0
    data[0].f[WEIGHTS[0]][1, 1] = 0
    found = merge("fisher", base, states, [2, 1], data)
    for n in base:
        a, b = 2 * data[0].f[n], data[1].f[n]
        expected = (a * states[0][n] + b * states[1][n]) / (a + b)
        if n == WEIGHTS[0]:
            expected[0, 0] = (2 * states[0][n][0, 0] + states[1][n][0, 0]) / 3
        assert torch.allclose(found[n], expected, atol=1e-4), n
    for values in data[1].f.values():
        values *= 1e-4  # another unit, as of a shorter caption
    assert not close(merge("fisher", base, states, [2, 1], data), found, 1e-2)
    same = merge("fisher", base, states, [2, 1], data, normalise=True)
    assert close(same, merge("fisher", base, states, [2, 1], [data[0], Scaled(data[1])],
                             normalise=True), 1e-4)  # fmt: skip


class Scaled:
    def __init__(self, data):
        self.data = data

    def fisher(self, state):
        return {n: 30 * t for n, t in self.data.fisher(state).items()}


@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
def test_large_layers_take_another_way_to_the_same(name, monkeypatch):
    base, states = draw(21)
    states = [{n: 4 * s[n] for n in s} for s in states]
    expected = merge(name, base, states)
    monkeypatch.setattr(low_rank, "LARGE", 4)
    assert close(merge(name, base, states), expected, 1e-4)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("tsv_m", "scale", [0.0, -1.0, math.inf]),
        ("tsv_m", "rank", [0.0, 1.5]),
        ("iso_c", "scale", [0.0, math.inf]),
        ("knots", "density", [0.0, 1.1]),
        ("knots", "scale", [-1.0]),
        ("knots", "rank", [0]),
        ("knots", "merge", ["dare"]),
        ("wudi", "iterations", [0]),
        ("wudi", "lr", [0.0, math.inf]),
        ("wudi", "scale", [0.0]),
        ("wudi", "solver", ["newton"]),
        ("regmean", "reduce", [-0.1, 1.1]),
        ("regmean", "bias", ["both"]),
        ("fisher", "floor", [0.0, math.inf]),
    ],
)
def test_bad_options(name, option, values):
    base, states = draw(22)
    for value in values:
        with pytest.raises(InputError, match=f"{name} option {option}: expected .* found"):
            merge(name, base, states, **{option: value})


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_without_data_there_is_a_word(name):
    base, states = draw(23)
    with pytest.raises(InputError, match=f"{name} needs data"):
        methods.get(name)(states, weights=[1] * 3, base=base)
