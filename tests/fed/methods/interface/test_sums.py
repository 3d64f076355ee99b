"""Methods from sums over clients alone: the outcome is that of their function on the states."""

from __future__ import annotations

import math

import pytest
import torch

from fed import methods
from fed.methods.interface.explained_sums import ExplainedSums
from fed.methods.interface.sums import WEIGHT, Own, Round
from fed.numerics import joint_basis
from fed.numerics.shrinkage import drawn_shares
from fed.server.reliability import weighed
from llava.errors import InputError

SHAPES = {"0.weight": (12, 7), "0.bias": (12,), "2.weight": (5, 12), "2.bias": (5,), "scale": (6,)}
CASES = [
    ("fedavg", {}),
    ("fedavg", {"server_lr": 1.5}),
    ("fedavg", {"paper_compat": True}),
    ("fedprox", {"mu": 0.1}),
    ("fedavgm", {"momentum": 0.5, "nesterov": True}),
    ("fedadam", {"bias_correction": True}),
    ("fedyogi", {}),
    ("fedadagrad", {"paper_compat": True}),
    ("fedexp", {}),
    ("fedexp", {"paper_compat": True, "eps": 1e-6}),
    ("scaffold", {}),
    ("scaffold", {"weighting": "samples", "server_lr": 1.5}),
    ("norm_clip", {"bound": 0.9}),
    ("norm_clip", {"bound": 100.0}),
    ("fedcmp", {}),
    ("fedcmp", {"rank": 3, "rest": "drop", "reliability": "none"}),
    ("fedcmp", {"energy": 0.8, "beta": 0.5}),
    ("fedcmp", {"momentum": "polar", "beta": 0.5, "rank": 4}),
    ("fedcmp", {"space": "weights", "momentum": "polar", "beta": 0.3, "rank": 2}),
    ("fedcmp", {"reliability": "agreement", "tau": 0.5}),
    ("fedcmp", {"rank": 3, "basis": "randomised"}),
    ("fedcmp", {"rank": 3, "basis": "randomised", "reliability": "agreement", "tau": 1.0}),
]


def draw(seed, clients=4, size=0.3, shapes=SHAPES):
    torch.manual_seed(seed)
    base = {n: torch.randn(s) for n, s in shapes.items()}
    common = {n: size * torch.randn(s) for n, s in shapes.items()}
    states = [
        {n: t + common[n] + size * torch.randn(t.shape) for n, t in base.items()}
        for _ in range(clients)
    ]
    extras = [{n: 0.1 * torch.randn(t.shape) for n, t in base.items()} for _ in range(clients)]
    return base, states, extras


def _length(own, whole):
    """Of what a client sends: its state or what it changed, and its extras."""
    sent = own.state if whole else {n: t - own.base[n] for n, t in own.state.items()}
    parts = [sum(float(t.double().square().sum()) for t in p.values()) for p in (sent, own.extras)]
    return math.sqrt(max(parts))


def summed(
    name, states, weights, base, memory=None, extras=None, total=None, explained=None, **options
):
    """A round from sums, which are added here; the outcome, and what the server was sent."""
    sums = methods.get(name).summed(options)
    sums = sums if explained is None else ExplainedSums(sums)
    parts = extras or [{}] * len(states), explained or [None] * len(states)
    owns = [Own(s, base, w, *p) for s, w, *p in zip(states, weights, *parts, strict=True)]
    server = sums.exchanges(Round(base, memory or {}, len(states), total or len(states)))
    given, seen = next(server), []
    while True:
        terms = [sums.terms(len(seen), own, given) for own in owns]
        assert all(of.keys() == terms[0].keys() for of in terms)
        norm = max(_length(own, options.get("space") == "weights") for own in owns)
        for name, tensor in ((n, t) for of in terms for n, t in of.items()):
            assert tensor.is_floating_point()
            assert tensor.shape
            most = sums.bound(name, max(weights), norm)
            assert tensor.abs().max() <= most * (1 + 1e-5), name
        seen.append({n: sum(of[n].double() for of in terms) for n in terms[0]})
        try:
            given = server.send(seen[-1])
        except StopIteration as end:
            return end.value, seen


@pytest.mark.parametrize(("name", "options"), CASES)
def test_rounds_from_sums_are_rounds_from_states(name, options):
    memory = kept = None
    weights = [3.0, 1.0, 2.0, 7.0]
    for seed in (1, 2):  # the second with a memory
        base, states, extras = draw(seed)
        sends = methods.get(name).sends_extras
        more = {"extras": extras, "total": 6} if sends else {}
        expected = methods.get(name)(
            states, weights=weights, base=base, memory=memory, **more, **options
        )
        found, _ = summed(name, states, weights, base, kept, **more, **options)
        for part in ("state", "memory"):
            one, other = (getattr(outcome, part) or {} for outcome in (found, expected))
            assert one.keys() == other.keys()
            for key, wanted in other.items():
                assert one[key].dtype == wanted.dtype
                torch.testing.assert_close(one[key], wanted, rtol=1e-5, atol=1e-5)
        memory, kept = expected.memory, found.memory


def test_a_large_layer_is_found_by_frames():
    shapes = {"a.weight": (1040, 30), "a.bias": (1040,)}
    base, states, _ = draw(3, 40, 0.05, shapes)
    weights = [1.0 + k for k in range(40)]
    found, seen = summed("fedcmp", states, weights, base)
    expected = methods.get("fedcmp")(states, weights=weights, base=base)
    facts = [outcome.facts["layers"]["a"] for outcome in (found, expected)]
    assert facts[0]["basis"] == facts[1]["basis"] == "randomised"
    assert len(seen) == joint_basis.PASSES + 1
    assert not any(math.prod(t.shape) > 1040 * 80 for sums in seen for t in sums.values())
    for name, tensor in expected.state.items():
        moved = (tensor - base[name]).norm()
        assert (found.state[name] - tensor).norm() < 1e-3 * moved


def test_what_the_server_is_sent_are_sums_of_what_all_send():
    base, states, _ = draw(4)
    _, seen = summed("fedcmp", states, [1, 2, 3, 4], base, reliability="agreement", tau=0.5)
    assert len(seen) == 2
    assert float(seen[0][WEIGHT]) == 10
    _, seen = summed("fedcmp", states, [1, 2, 3, 4], base)
    assert len(seen) == 1


def test_who_looks_at_single_clients_has_no_sums():
    for name in ("median", "krum", "trimmed_mean", "geometric_median", "local"):
        with pytest.raises(InputError, match=f"{name} .*single clients"):
            methods.get(name).summed({})
    with pytest.raises(InputError, match="norm_clip .*compares the lengths"):
        methods.get("norm_clip").summed({})
    with pytest.raises(InputError, match="tau is for reliability=agreement"):
        methods.get("fedcmp").summed({"reliability": "none", "tau": 0.5})


@pytest.mark.parametrize("name", ["fedavg", "fedcmp"])
def test_clients_weigh_what_their_pictures_explain_and_the_server_knows_of_none(name):
    base, states, _ = draw(6)
    told = [[6.0, 10.0, 0.1], [9.5, 10.0, 0.2], None, [2.0, 9.0, 0.1]]
    known = {str(k): sums for k, sums in enumerate(told) if sums}
    shares = drawn_shares(known, "0123")
    assert len({round(share, 6) for share in shares.values()}) == 4
    samples = [3.0, 1.0, 2.0, 7.0]
    weights = weighed(samples, list(shares.values()))
    found, seen = summed(name, states, samples, base, explained=told)
    expected = methods.get(name)(states, weights=weights, base=base)
    for key, tensor in expected.state.items():
        torch.testing.assert_close(found.state[key], tensor, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2
    assert all(tensor.shape == (1,) for tensor in seen[0].values())
    nobody, _ = summed(name, states, samples, base, explained=[None] * 4)
    plain = methods.get(name)(states, weights=samples, base=base)
    for key, tensor in plain.state.items():
        torch.testing.assert_close(nobody.state[key], tensor, rtol=1e-5, atol=1e-5)
