"""Median, trimmed mean, Krum, geometric median and norm clipping: by hand, and with bad clients."""

import itertools
import math

import numpy as np
import pytest
import torch

from fed import methods
from fed.methods.median import by_samples
from llava.errors import InputError
from tests.conftest import near

SHAPES = {"model.mm_projector.0.weight": (7, 5), "model.mm_projector.0.bias": (7,), "scale": ()}
ROBUST = {
    "median": {},
    "trimmed_mean": dict(trim=0.3),
    "krum": dict(byzantine=2),
    "geometric_median": {},
    "norm_clip": {},
}
WEIGHTED = [("median", dict(weighted=True)), ("krum", dict(byzantine=1, keep=3, weighted=True))]
EACH = [*ROBUST.items(), *WEIGHTED, ("norm_clip", dict(bound=0.3))]


def call(name, states, weights=None, base=None, **options):
    weights = weights or [1] * len(states)
    return methods.get(name)(states, weights=weights, base=base, **options)


def draw(seed, clients=7, dtype=torch.float32):
    torch.manual_seed(seed)
    base = {n: torch.randn(s).to(dtype) for n, s in SHAPES.items()}
    common = {n: torch.randn(s) for n, s in SHAPES.items()}
    states = [
        {n: (t + 0.1 * (common[n] + torch.randn(t.shape))).to(dtype) for n, t in base.items()}
        for _ in range(clients)
    ]
    return base, states


def points(*rows):
    """A base of zeros, and clients with one tensor each."""
    clients = [{"a": torch.tensor(row, dtype=torch.float64)} for row in rows]
    return {"a": torch.zeros_like(clients[0]["a"])}, clients


def vector(state):
    return torch.cat([t.double().flatten() for t in state.values()])


def distance(a, b):
    return float((vector(a) - vector(b)).norm())


def mean(states):
    return {n: sum(s[n].double() for s in states) / len(states) for n in states[0]}


def close(a, b, **tolerance):
    for name in b:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# By hand.


def test_median_by_hand():
    base, states = points([1.0, 9], [2, 7], [50, 8])
    outcome = call("median", states, [100, 1, 1], base)
    assert outcome.state["a"].tolist() == near([2, 8])
    assert outcome.facts["distance"] == near([math.sqrt(2), 1, 48])
    base, states = points([1.0], [50], [2], [4])
    assert call("median", states, None, base).state["a"].item() == near(3)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1, 3], 10), ([1, 1, 2], 6), ([1, 3, 1], 2), ([3, 2, 1], 1.5), ([0.1, 0.1, 0.2], 6)],
)
def test_median_by_samples_by_hand(weights, expected):
    base, states = points([1.0], [2], [10])
    outcome = call("median", states, weights, base, weighted=True)
    assert outcome.state["a"].item() == near(expected)


def test_median_by_samples_is_that_of_repeated_clients():
    random = np.random.default_rng(0)
    for k in range(1, 9):
        columns, n = random.normal(size=(50, k)), random.integers(1, 5, size=k)
        expected = np.median(np.repeat(columns, n, axis=1), axis=1)
        np.testing.assert_allclose(by_samples(columns, n / n.sum()), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("trim", "cut", "expected"),
    [(0.0, 0, 12), (0.19, 0, 12), (0.2, 1, 17 / 3), (0.4, 2, 5), (0.499, 2, 5)],
)
def test_trimmed_mean_by_hand(trim, cut, expected):
    base, states = points([3.0], [40], [9], [5], [3])
    outcome = call("trimmed_mean", states, [9, 1, 1, 1, 1], base, trim=trim)
    assert outcome.facts["cut"] == cut
    assert outcome.state["a"].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("trim", "clients", "cut"), [(0.29, 100, 29), (0.1, 30, 3), (0.49999999999, 2, 0)]
)
def test_how_many_are_cut_is_no_matter_of_rounding(trim, clients, cut):
    base, states = points(*([float(k)] for k in range(clients)))
    assert call("trimmed_mean", states, None, base, trim=trim).facts["cut"] == cut


def test_krum_by_hand():
    # Squared distances to the two nearest others: 0: 1 + 9, 1: 1 + 4, 3: 4 + 9, 6: 9 + 25.
    base, states = points([6.0], [0], [1], [100], [3])
    weights = [1, 3, 1, 1, 1]
    outcome = call("krum", states, weights, base, byzantine=1)
    assert outcome.state["a"].item() == near(1)
    assert outcome.facts["kept"] == [False, False, True, False, False]
    assert outcome.facts["byzantine"] == 1
    expected = [math.sqrt(s / 2) for s in (34, 10, 5, 94**2 + 97**2, 13)]
    assert outcome.facts["score"] == near(expected)
    outcome = call("krum", states, weights, base, byzantine=1, keep=2)
    assert outcome.state["a"].item() == near(0.5)
    outcome = call("krum", states, weights, base, byzantine=1, keep=2, weighted=True)
    assert outcome.state["a"].item() == near(0.25)
    assert outcome.facts["kept"] == [False, True, True, False, False]
    everyone = call("krum", states, weights, base, byzantine=1, keep=5)
    assert everyone.state["a"].item() == near(22)


def test_the_ties_of_krum():
    base, states = points([10.0], [0], [1])
    for order in itertools.permutations(range(3)):  # 0 and 1 are nearest; 1 is nearer to 10
        turned = [states[k] for k in order]
        assert call("krum", turned, None, base).state["a"].item() == near(1)
    base, states = points([-1.0], [1], [0])
    outcome = call("krum", states, [1, 9, 1], base)
    assert outcome.state["a"].item() == near(0)  # equal scores, but in the middle
    base, states = points([0.0, 0], [1, 0], [0.5, math.sqrt(0.75)])  # nothing but samples differs
    outcome = call("krum", states, [1, 1, 2], base)
    assert outcome.facts["kept"] == [False, False, True]


@pytest.mark.parametrize(
    ("clients", "byzantine", "said"),
    [
        (1, None, "0 bad clients need at least 3 clients in a round, found 1"),
        (2, 0, "0 bad clients need at least 3 clients in a round, found 2"),
        (4, 1, "1 bad clients need at least 5 clients in a round, found 4"),
        (6, 2, "2 bad clients need at least 7 clients in a round, found 6"),
    ],
)
def test_too_few_clients_for_krum(clients, byzantine, said):
    base, states = draw(0, clients)
    with pytest.raises(InputError, match=f"krum option byzantine: {said}"):
        call("krum", states, None, base, byzantine=byzantine)
    # Those without samples are not counted.
    with pytest.raises(InputError, match=said):
        call("krum", [*states, base], [1] * clients + [0], base, byzantine=byzantine)


@pytest.mark.parametrize(("clients", "f"), [(3, 0), (4, 0), (5, 1), (6, 1), (7, 2), (11, 4)])
def test_krum_bears_as_many_as_it_can_unless_told(clients, f):
    base, states = draw(0, clients)
    outcome = call("krum", states, None, base)
    assert outcome.facts["byzantine"] == f
    told = call("krum", states, None, base, byzantine=f)
    assert told.facts == outcome.facts
    assert sum(told.facts["kept"]) == 1


def test_geometric_median_by_hand():
    # On a line it is the median by samples, whatever the lengths.
    base, states = points([0.0], [1], [5])
    outcome = call("geometric_median", states, None, base, iterations=200)
    assert outcome.state["a"].item() == pytest.approx(1, abs=1e-4)
    outcome = call("geometric_median", states, [1, 1, 5], base, iterations=200)
    assert outcome.state["a"].item() == pytest.approx(5, abs=1e-4)
    # One step from the mean (1, 1), at distances sqrt 2, sqrt 2, and sqrt 2 * 2 with half of all.
    base, states = points([0.0, 0], [0, 0], [3, 3])
    outcome = call("geometric_median", states, None, base, iterations=1)
    assert outcome.facts["weight"] == pytest.approx([0.4, 0.4, 0.2])
    assert outcome.state["a"].tolist() == pytest.approx([0.6, 0.6])
    assert outcome.facts["distance"] == pytest.approx([0.6 * 2**0.5, 0.6 * 2**0.5, 2.4 * 2**0.5])
    assert outcome.facts["iterations"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_pulls_of_all_clients_cancel_at_the_geometric_median(seed):
    base, states = draw(seed, dtype=torch.float64)
    p = torch.tensor([3.0, 1, 4, 1, 5, 2, 6], dtype=torch.float64) / 22
    outcome = call("geometric_median", states, p.tolist(), base, iterations=500)
    apart = torch.stack([vector(s) - vector(outcome.state) for s in states])
    lengths = apart.norm(dim=1)
    assert float((p @ (apart / lengths[:, None])).norm()) < 1e-4
    assert outcome.facts["distance"] == pytest.approx(lengths.tolist(), rel=1e-9)
    assert sum(outcome.facts["weight"]) == pytest.approx(1)
    assert 1 < outcome.facts["iterations"] < 500
    at_mean = torch.stack([vector(s) - vector(mean(states)) for s in states]).norm(dim=1)
    assert p @ lengths < p @ at_mean


def test_no_iterations_are_fedavg():
    base, states = draw(0)
    weights = [3, 1, 4, 1, 5, 9, 2]
    outcome = call("geometric_median", states, weights, base, iterations=0)
    close(outcome.state, call("fedavg", states, weights, base).state, rtol=1e-6, atol=0)


def test_norm_clip_by_hand():
    base, states = points([3.0, 4], [0, 1])
    outcome = call("norm_clip", states, [3, 1], base, bound=2.5)
    assert outcome.facts["norm"] == near([5, 1])
    assert outcome.facts["scale"] == near([0.5, 1])
    assert outcome.state["a"].tolist() == near([1.125, 1.75])
    outcome = call("norm_clip", states, [3, 1], base)  # the median of 5 and 1
    assert outcome.facts["bound"] == near(3)
    assert outcome.facts["scale"] == near([0.6, 1])
    outcome = call("norm_clip", states, [3, 1], base, multiple=0.2)
    assert outcome.facts["scale"] == pytest.approx([0.12, 0.6])
    # The base counts: the same clients seen from (0, 1).
    outcome = call("norm_clip", states, [3, 1], {"a": states[1]["a"]}, bound=math.sqrt(4.5))
    assert outcome.facts["scale"] == pytest.approx([0.5, 1])
    assert outcome.state["a"].tolist() == pytest.approx([1.125, 1 + 1.125])
    base, states = points([2.0], [0], [0])
    assert call("norm_clip", states, None, base).state["a"].item() == near(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_clipped_is_fedavg_to_the_bit(dtype):
    base, states = draw(0, dtype=dtype)
    weights = [3, 1, 4, 1, 5, 9, 2]
    outcome = call("norm_clip", states, weights, base, bound=1e3)
    assert set(outcome.facts["scale"]) == {1.0}
    close(outcome.state, call("fedavg", states, weights, base).state, rtol=0, atol=0)


# Properties.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["median", "trimmed_mean", "geometric_median", "norm_clip"])
def test_one_client_and_two(name, dtype):
    base, states = draw(0, 2, dtype)
    close(call(name, states[:1], [5], base).state, states[0], rtol=0, atol=0)
    outcome = call(name, states, [1, 1], base)
    if name != "norm_clip":  # which shortens the longer one
        between = {n: t.to(dtype) for n, t in mean(states).items()}
        close(outcome.state, between, rtol=1e-6, atol=1e-7)
    if name == "geometric_median":
        heavier = call(name, states, [1, 3], base)
        close(heavier.state, states[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), EACH[:-1])
def test_identical_clients_give_that_client_to_the_bit(name, options, dtype):
    base, states = draw(0, 1, dtype)
    outcome = call(name, states * 7, [1, 5, 11, 2, 3, 1, 1], base, **options)
    close(outcome.state, states[0], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), EACH)
@pytest.mark.parametrize("seed", range(3))
def test_order_scale_and_clients_without_samples(name, options, seed):
    base, states = draw(seed, 8)
    weights = [3, 0, 8, 1, 4, 1, 5, 9]
    found = call(name, states, weights, base, **options)
    turned = call(name, states[::-1], weights[::-1], base, **options)
    scaled = call(name, states, [1e6 * w for w in weights], base, **options)
    heard = [k for k in range(8) if weights[k]]
    without = call(name, [states[k] for k in heard], [weights[k] for k in heard], base, **options)
    for other in (turned, scaled, without):
        close(other.state, found.state, rtol=1e-6, atol=1e-6)
    lists = [key for key, fact in found.facts.items() if isinstance(fact, list)]
    assert len(lists) > 1
    for key in lists:
        assert len(found.facts[key]) == 7
        if key != "clients":
            assert turned.facts[key][::-1] == pytest.approx(found.facts[key], rel=1e-6)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum"])
def test_as_published_samples_count_for_nothing(name):
    base, states = draw(0)
    found = call(name, states, [1, 1, 1, 1, 1, 1, 1], base)
    other = call(name, states, [900, 1, 1, 1, 1, 1, 50], base)
    close(other.state, found.state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["geometric_median", "norm_clip"])
def test_where_samples_count(name):
    base, states = draw(0)
    found = call(name, states, [1, 1, 1, 1, 1, 1, 1], base)
    other = call(name, states, [90, 1, 1, 1, 1, 1, 5], base)
    assert distance(found.state, other.state) > 0.1


# Bad clients: two of seven, all with one sample.


def bad_clients(kind, states, base):
    if kind == "nearly zero":  # all zero is refused before any method sees it
        bad = [{n: torch.full_like(t, 1e-6) for n, t in base.items()}] * 2
    elif kind == "one sent twice":
        bad = [{n: t + 3 for n, t in base.items()}] * 2
    elif kind == "scaled":
        bad = [{n: 1e6 * t for n, t in s.items()} for s in states[5:]]
    else:  # against the others, in two sizes
        move = {n: t - base[n] for n, t in mean(states[:5]).items()}
        bad = [{n: (t - f * move[n]).to(t.dtype) for n, t in base.items()} for f in (20, 1e6)]
    return [*states[:5], *bad]


@pytest.mark.parametrize("kind", ["nearly zero", "one sent twice", "scaled", "against the others"])
@pytest.mark.parametrize(("name", "options"), list(ROBUST.items()) + WEIGHTED[:1])
@pytest.mark.parametrize("seed", range(3))
def test_bad_clients_are_bounded(name, options, kind, seed):
    base, states = draw(seed)
    clients = bad_clients(kind, states, base)
    good = mean(clients[:5])
    spread = max(distance(s, good) for s in clients[:5])
    reach = spread
    if name == "norm_clip":  # it bounds how far they move the mean, not in which direction
        longest = sorted(distance(s, base) for s in clients)[3]
        reach = longest + max(distance(s, base) for s in clients[:5])
    outcome = call(name, clients, None, base, **options)
    assert distance(outcome.state, good) <= reach
    # The bound says something: the mean goes beyond it.
    average = call("fedavg", clients, None, base).state
    assert distance(average, good) > (reach if kind in ("scaled", "against the others") else spread)


def test_who_is_told_to_be_bad():
    base, states = draw(0)
    clients = bad_clients("scaled", states, base)
    names = ["sea", "hill", "town", "wood", "bog", "x", "y"]
    krum = call("krum", clients, None, base, clients=names, keep=5)
    assert krum.facts["clients"] == names
    assert krum.facts["kept"] == [True] * 5 + [False] * 2
    assert min(krum.facts["score"][5:]) > 1e5 * max(krum.facts["score"][:5])
    facts = call("geometric_median", clients, None, base).facts
    assert max(facts["weight"][5:]) < 1e-5 < 0.05 < min(facts["weight"][:5])
    facts = call("norm_clip", clients, None, base).facts
    assert max(facts["scale"][5:]) < 1e-5
    assert min(facts["scale"][:5]) > 0.5
    for name in ("median", "trimmed_mean"):
        far = call(name, clients, None, base, **ROBUST[name]).facts["distance"]
        assert min(far[5:]) > 1e5 * max(far[:5])


def test_an_identical_pair_of_honest_clients_is_no_trouble():
    base, states = draw(0)
    clients = [*states[:6], states[0]]
    for name, options in EACH:
        outcome = call(name, clients, None, base, **options)
        assert distance(outcome.state, mean(states)) < max(
            distance(s, mean(states)) for s in states
        )


# Wrong options.


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("median", dict(weighted=1)),
        ("trimmed_mean", dict(trim=0.5)),
        ("trimmed_mean", dict(trim=-0.1)),
        ("krum", dict(byzantine=-1)),
        ("krum", dict(byzantine=0.5)),
        ("krum", dict(keep=0)),
        ("krum", dict(keep=8)),
        ("geometric_median", dict(iterations=-1)),
        ("geometric_median", dict(eps=0.0)),
        ("geometric_median", dict(eps=math.inf)),
        ("norm_clip", dict(bound=0.0)),
        ("norm_clip", dict(bound=math.inf)),
        ("norm_clip", dict(multiple=0.0)),
        ("norm_clip", dict(multiple=math.inf)),
    ],
)
def test_options_out_of_range(name, option):
    base, states = draw(0)
    with pytest.raises(InputError, match=f"{name} option {next(iter(option))}: expected .*found"):
        call(name, states, None, base, **option)
