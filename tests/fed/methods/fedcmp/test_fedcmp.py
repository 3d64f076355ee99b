import json
import math

import pytest
import torch

from fed import methods
from fed.methods.fedcmp.fusion import agreement, merge_rows, reliability
from fed.state import StateError
from llava.errors import InputError

SEEDS = [0, 1, 2]
LAYERS = ["model.mm_projector.0", "model.mm_projector.2"]
SHAPES = {
    "model.mm_projector.0.weight": (10, 6),
    "model.mm_projector.0.bias": (10,),
    "model.mm_projector.1.weight": (10,),  # a norm between the layers
    "model.mm_projector.2.weight": (8, 10),
    "model.mm_projector.2.bias": (8,),
}
PLAIN = dict(rescale=1.0, flatten=0.0, tau=math.inf, energy=1.0, beta=0.0)
# Options far from FedAvg, under which the properties must hold all the same.
SETTINGS = [
    {},
    dict(tau=0.2, rescale=1.0),
    dict(tau=0.5, rescale=3.0, space="weights"),
    dict(tau=1.0, basis="randomised"),
    dict(rank=2, flatten=0.7),
    dict(reliability="none", beta=0.5),
]


def fedcmp(states, weights=None, base=None, **options):
    weights = weights or [1] * len(states)
    if "tau" in options:
        options = {"reliability": "agreement", **options}
    return methods.get("fedcmp")(states, weights=weights, base=base, **options)


def fedavg(states, weights, base):
    return methods.get("fedavg")(states, weights=weights, base=base).state


def draw(seed, clients=4, dtype=torch.float32, shapes=SHAPES, step=0.1):
    """A base, and clients that moved from it partly together and partly each for itself."""
    torch.manual_seed(seed)
    base = {n: torch.randn(s).to(dtype) for n, s in shapes.items()}
    common = {n: torch.randn(s) for n, s in shapes.items()}
    states = [
        {n: (t + step * (common[n] + torch.randn(t.shape))).to(dtype) for n, t in base.items()}
        for _ in range(clients)
    ]
    return base, states


def one_layer(*rows):
    """Clients that move one (out, in) matrix without bias from zero."""
    matrices = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return {"a.weight": torch.zeros_like(matrices[0])}, [{"a.weight": m} for m in matrices]


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


def orthonormal(seed, rows, columns, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=dtype)).Q


def eye_error(u):
    return float((u.T @ u - torch.eye(u.shape[1], dtype=u.dtype)).abs().max())


# Properties that any variant must have.


@pytest.mark.parametrize("space", ["updates", "weights"])
@pytest.mark.parametrize("clients", [1, 2, 7])  # 1: layer 0 has fewer columns than rows
@pytest.mark.parametrize("seed", SEEDS)
def test_without_its_own_it_is_fedavg(seed, clients, space):
    base, states = draw(seed, clients)
    weights = list(range(1, clients + 1))
    found = fedcmp(states, weights, base, space=space, **PLAIN).state
    assert_same(found, fedavg(states, weights, base), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank_of_updates", [1, 3])
def test_it_is_fedavg_where_few_directions_are_used(rank_of_updates):
    base, states = draw(0, 5, torch.float64, {"a.weight": (12, 9)}, step=0.0)
    for state in states:
        state["a.weight"] += torch.randn(12, rank_of_updates) @ torch.randn(rank_of_updates, 9)
    found = fedcmp(states, None, base, **PLAIN).state
    assert_same(found, fedavg(states, [1] * 5, base))


def test_it_is_fedavg_above_the_side_where_float32_begins():
    base, states = draw(0, 2, torch.float32, {"a.weight": (1100, 700), "a.bias": (1100,)})
    found = fedcmp(states, [3, 1], base, **PLAIN)
    assert_same(found.state, fedavg(states, [3, 1], base), rtol=1e-5, atol=1e-5)
    facts = found.facts["layers"]["a"]
    assert (facts["basis"], facts["rank"]) == ("randomised", 64)
    assert 0.5 < facts["rest"]["share"] < 1
    assert facts["rest"]["gain"] == pytest.approx(1)


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", SEEDS)
def test_one_client_and_identical_clients_give_that_client(seed, dtype, options):
    base, states = draw(seed, 1, dtype)
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else {}
    assert_same(fedcmp(states, [5], base, **options).state, states[0], **tolerance)
    assert_same(fedcmp(states * 3, [5, 1, 2], base, **options).state, states[0], **tolerance)


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_order_scale_and_clients_without_samples(seed, options):
    base, states = draw(seed, 5)
    weights = [3, 0, 8, 1, 4]
    found = fedcmp(states, weights, base, **options)
    turned = fedcmp(states[::-1], weights[::-1], base, **options).state
    scaled = fedcmp(states, [1e6 * w for w in weights], base, **options).state
    heard = fedcmp([states[k] for k in (0, 2, 3, 4)], [3, 8, 1, 4], base, **options).state
    for other in (turned, scaled, heard):
        assert_same(other, found.state, rtol=1e-5, atol=1e-6)
    assert found.facts["clients"] == ["0", "2", "3", "4"]
    assert len(found.facts["layers"][LAYERS[0]]["reliability"]) == 4


@pytest.mark.parametrize(
    ("space", "momentum", "align"),
    [(space, "polar", align) for space in ("updates", "weights")
     for align in ("procrustes", "signs")] + [("updates", "projected", "signs")],
)  # fmt: skip
@pytest.mark.parametrize("seed", SEEDS)
def test_a_rotation_of_the_outputs_rotates_the_result(seed, space, momentum, align):
    base, states = draw(seed, 4, torch.float64)
    base2, states2 = draw(seed + 10, 4, torch.float64)
    turns = {layer: orthonormal(seed, SHAPES[f"{layer}.weight"][0], SHAPES[f"{layer}.weight"][0])
             for layer in LAYERS}  # fmt: skip

    def turn(state):
        by = {n: turns.get(n.rsplit(".", 1)[0]) for n in state}
        return {n: t if by[n] is None else by[n] @ t for n, t in state.items()}

    options = dict(space=space, momentum=momentum, align=align, tau=0.3, energy=0.8, beta=0.4)
    first = fedcmp(states, None, base, **options)
    there = fedcmp([turn(s) for s in states], None, turn(base), **options)
    assert_same(there.state, turn(first.state), rtol=1e-6, atol=1e-8)
    second = fedcmp(states2, None, base2, memory=first.memory, **options)
    there = fedcmp([turn(s) for s in states2], None, turn(base2), memory=there.memory, **options)
    # The memory is float32, so the two differ by its rounding.
    assert_same(there.state, turn(second.state), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_layers_of_the_size_of_llava_7b_in_bfloat16():
    shapes = {"a.weight": (4096, 1024), "a.bias": (4096,), "b.weight": (4096, 4096)}
    base, states = draw(0, 2, torch.bfloat16, shapes, step=0.0)
    for state in states:
        for name in ("a.weight", "b.weight"):
            out, width = shapes[name]
            state[name] += (torch.randn(out, 4) @ torch.randn(4, width)).bfloat16() * 4

    def assert_near(found, expected):
        # What rank 16 cuts off is what bfloat16 rounded away in the clients' updates of rank 4.
        for facts in found.facts["layers"].values():
            assert facts["basis"] == "randomised"
            assert facts["rank"] == 16
            assert facts["energy_kept"] > 0.999
        for name in shapes:
            error = (found.state[name].float() - expected[name].float()).norm()
            assert error <= 0.02 * (expected[name].float() - base[name].float()).norm()

    mean = fedavg(states, [3, 1], base)
    assert_near(fedcmp(states[::-1], [1, 3], base, rank=16, **PLAIN), mean)
    assert_near(fedcmp([states[0]] * 2, [3, 1], base, rank=16, tau=0.3), states[0])


# Canonical reliability-aware aggregation.


def test_rows_get_their_length_back():
    base, states = one_layer([[1, 0], [0, 0]], [[0, 1], [0, 0]])  # orthogonal rows, one direction
    half = math.sqrt(0.5)
    for rescale, row in [(1.0, 0.5), (1.2, 0.6), (4.0, half)]:
        found = fedcmp(states, None, base, rescale=rescale, flatten=0.0).state["a.weight"]
        assert found[0].tolist() == pytest.approx([row, row])
        assert found[1].tolist() == pytest.approx([0, 0])


def test_a_low_tau_follows_those_who_agree():
    base, states = one_layer([[1, 0.1]], [[1, -0.1]], [[-1, 0]])
    mean = fedcmp(states, None, base, rescale=1.0, flatten=0.0)
    firm = fedcmp(states, None, base, rescale=1.0, flatten=0.0, tau=0.1)
    assert mean.state["a.weight"].tolist()[0] == pytest.approx([1 / 3, 0])
    assert firm.state["a.weight"].tolist()[0] == pytest.approx([1, 0], abs=0.01)
    facts = firm.facts["layers"]["a"]
    assert facts["reliability"][2] < 1e-3
    assert facts["agreement"][2] == pytest.approx(-1)
    assert mean.facts["layers"]["a"]["reliability"] == pytest.approx([1 / 3] * 3)


def test_agreement_has_tau():
    base, states = draw(0, 2)
    with pytest.raises(InputError, match="tau is for reliability=agreement, not none"):
        fedcmp(states, None, base, reliability="none", tau=0.5)


def test_agreement_is_with_the_others_only():
    c = [torch.tensor([[1.0, 0], [2, 0], [0, 0]]), torch.tensor([[0.0, 3], [1, 1], [1, 1]])]
    mean = 0.3 * c[0] + 0.7 * c[1]  # float32: what is left of row 2 without client 1 is rounding
    expected = pytest.approx([0, math.sqrt(0.5), 0], abs=1e-6)
    assert agreement(c[0], 0.3, mean).tolist() == expected
    assert agreement(c[1], 0.7, mean).tolist() == expected


def test_reliability_is_the_softmax_of_the_definition():
    torch.manual_seed(0)
    p = torch.tensor([0.2, 0.3, 0.5]).double()
    a = torch.rand(3, 4).double() * 2 - 1
    for tau in (0.05, 0.3, math.inf):
        rho = torch.stack([reliability(a[k], float(p[k]), tau) for k in range(3)])
        expected = torch.softmax(p.log()[:, None] + a / tau, dim=0)
        torch.testing.assert_close(rho / rho.sum(0), expected)


@pytest.mark.parametrize(
    "options", [{}, dict(tau=0.05), dict(tau=0.3, energy=0.5, beta=0.5, momentum="polar")]
)
def test_opposite_clients_cancel(options):
    base, states = one_layer([[1, 2], [3, -1], [0.5, 1]], [[-1, -2], [-3, 1], [-0.5, -1]])
    found = fedcmp(states, None, base, **options)
    torch.testing.assert_close(found.state["a.weight"], base["a.weight"], rtol=0, atol=1e-12)
    assert found.facts["layers"]["a"]["kappa"]["max"] < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", [{}, dict(tau=0.3, rescale=2.0), dict(energy=0.7, tau=1.0)])
def test_three_sums_over_clients_are_all_the_server_needs(seed, options):
    clients = 3
    base, states = draw(seed, clients, torch.float64, {"a.weight": (6, 5), "a.bias": (6,)})
    weights = [5, 2, 9]
    expected = fedcmp(states, weights, base, flatten=0.0, rest="drop", **options).state
    tau, rescale = options.get("tau", math.inf), options.get("rescale", 4.0)

    def added(of_client):  # all that leaves the clients, as secure aggregation would give it
        parts = [of_client(k) for k in range(clients)]
        return [sum(each) for each in zip(*parts, strict=True)]

    def affine(state):
        return torch.cat([state["a.weight"], state["a.bias"][:, None]], 1)

    p = [w / sum(weights) for w in weights]
    x = [affine(s) - affine(base) for s in states]

    (second_moment,) = added(lambda k: (p[k] * x[k] @ x[k].T,))
    energies, u = torch.linalg.eigh(second_moment)
    energies, u = energies.flip(0), u.flip(1)
    r = 1 + int((energies.cumsum(0) < options.get("energy", 1.0) * energies.sum() - 1e-12).sum())
    u = u[:, :r]
    (mean,) = added(lambda k: (p[k] * u.T @ x[k],))

    def third(k):
        c = u.T @ x[k]
        rho = reliability(agreement(c, p[k], mean), p[k], tau)
        return rho[:, None] * c, rho * c.square().sum(1), rho

    rows, squares, rho = added(third)
    found = affine(base) + u @ merge_rows(rows, squares, rho, rescale)[0]
    torch.testing.assert_close(found, affine(expected))


def test_what_is_no_layer_is_averaged():
    base, states = draw(0, 3)
    found = fedcmp(states, [1, 2, 3], base)
    name = "model.mm_projector.1.weight"
    assert found.facts["averaged"] == [name]
    mean = fedavg(states, [1, 2, 3], base)[name]
    torch.testing.assert_close(found.state[name], mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, dict(energy=0.9, tau=0.1, beta=0.5), dict(rank=2)])
def test_clients_that_did_not_move(options):
    base, _ = draw(0)
    found = fedcmp([base, base], [1, 2], base, **options)
    assert_same(found.state, base, rtol=0, atol=0)
    assert found.memory is None
    json.dumps(found.facts, allow_nan=False)


# What lies outside the basis, and how lengths are evened out.


@pytest.mark.parametrize("options", [dict(rank=2), dict(energy=0.5), dict(rank=1, basis="exact")])
def test_with_the_rest_kept_a_small_basis_is_fedavg_too(options):
    base, states = draw(0, 4)
    found = fedcmp(states, [1, 2, 3, 4], base, **{**PLAIN, **options}).state
    assert_same(found, fedavg(states, [1, 2, 3, 4], base), rtol=1e-6, atol=1e-7)
    dropped = fedcmp(states, [1, 2, 3, 4], base, **{**PLAIN, **options}, rest="drop").state
    name = f"{LAYERS[0]}.weight"
    assert float((dropped[name] - found[name]).norm()) > 0.01


def test_the_rest_has_one_gain():
    # Two clients agree on the first output; on the second and third they are at right angles.
    rows = (
        [[9.0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 2, 0]],
        [[9.0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 2]],
    )
    base, states = one_layer(*rows)
    found = fedcmp(states, None, base, rank=1, flatten=0.0)
    half = math.sqrt(0.5)  # the mean of two at right angles has this much of their length
    expected = [[9.0, 0, 0, 0, 0], [0, half, half, 0, 0], [0, 0, 0, 2 * half, 2 * half]]
    torch.testing.assert_close(found.state["a.weight"], torch.tensor(expected).double())
    said = found.facts["layers"]["a"]["rest"]
    assert said == pytest.approx({"share": 5 / 86, "kappa": 0.5, "gain": math.sqrt(2)})


def test_lengths_are_evened_out_where_clients_do_not_agree():
    # All agree on the first output; on the others they are at right angles, lengths 4 and 1.
    rows = [[3.0, 0, 0], [0, 4, 0], [0, 1, 0]], [[3.0, 0, 0], [0, 0, 4], [0, 0, 1]]
    base, states = one_layer(*rows)
    plain = fedcmp(states, None, base, flatten=0.0).state["a.weight"]
    assert plain.norm(dim=1).tolist() == pytest.approx([3, 4, 1])
    found = fedcmp(states, None, base, flatten=0.5).state["a.weight"]
    # The two lie in one direction of the shared space, sqrt(17) long, whose kappa is 1/2.
    level = math.sqrt((9 + 17) / 3)
    bent = (level / math.sqrt(17)) ** (0.5 * 0.5)
    assert found.norm(dim=1).tolist() == pytest.approx([3, 4 * bent, bent])


def test_a_rank_above_the_size_is_all_of_the_layer():
    base, states = draw(0, 4)
    whole = fedcmp(states, None, base)
    found = fedcmp(states, None, base, rank=1000)
    assert_same(found.state, whole.state, rtol=0, atol=0)
    assert found.facts["layers"][LAYERS[0]]["rank"] == 10


@pytest.mark.parametrize("decay", [0.8, 0.97])
def test_the_randomised_basis_gives_what_the_exact_one_gives(decay):
    """Where energy falls so fast that what is left outside the 64 directions weighs little."""
    side, width, clients = 1100, 400, 3
    torch.manual_seed(0)
    left = orthonormal(0, side, 260, torch.float32)
    energies = decay ** torch.arange(260.0)
    base = {"a.weight": torch.zeros(side, width), "a.bias": torch.zeros(side)}
    states = []
    for _ in range(clients):
        moved = left @ (energies[:, None] * torch.randn(260, width + 1))
        states.append({"a.weight": moved[:, :-1], "a.bias": moved[:, -1]})
    fast = fedcmp(states, [1, 2, 3], base)
    slow = fedcmp(states, [1, 2, 3], base, basis="exact")
    said = fast.facts["layers"]["a"], slow.facts["layers"]["a"]
    assert [facts["basis"] for facts in said] == ["randomised", "exact"]
    error = (fast.state["a.weight"] - slow.state["a.weight"]).norm() / slow.state["a.weight"].norm()
    # What is outside may be wrong altogether, and is no longer than this.
    bound = 1e-4 + math.sqrt(said[0]["rest"]["share"])
    assert float(error) < (1e-3 if decay == 0.8 else bound)


def test_lora_and_other_connectors_are_layers_too():
    lora = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
    shapes = {
        lora.format("A"): (4, 20),
        lora.format("B"): (20, 4),
        "model.mm_projector.weight": (9, 5),  # a linear connector
        "model.mm_projector.bias": (9,),
        "model.image_newline": (9,),
    }
    base, states = draw(0, 3, shapes=shapes)
    plain = fedcmp(states, [1, 2, 3], base, **PLAIN)
    assert_same(plain.state, fedavg(states, [1, 2, 3], base), rtol=1e-6, atol=1e-7)
    found = fedcmp(states, [1, 2, 3], base)
    assert len(found.facts["layers"]) == 3
    assert found.facts["averaged"] == ["model.image_newline"]
    assert all(facts["gain"]["max"] > 1.1 for facts in found.facts["layers"].values())


# Clients that misbehave, or are not there.


@pytest.mark.parametrize(
    "options",
    [{}, dict(tau=0.3), dict(rank=3, beta=0.5), dict(rank=3, beta=0.5, momentum="polar")],
)
def test_a_client_scaled_by_a_million_is_defined_and_finite(options):
    base, states = draw(0, 5)
    states[2] = {n: base[n] + 1e6 * (t - base[n]) for n, t in states[2].items()}
    found = fedcmp(states, None, base, **options)
    loud = math.sqrt(sum(float((states[2][n] - base[n]).square().sum()) for n in base))
    moved = math.sqrt(sum(float((found.state[n] - base[n]).square().sum()) for n in base))
    assert 0 < moved < loud  # it is loud, as in every mean: norm_clip or krum are against that


def test_a_copy_counts_like_a_client_of_twice_the_size():
    base, states = draw(0, 3)
    twice = fedcmp([*states, states[0]], [1, 2, 3, 1], base, tau=0.5, flatten=0.0, rescale=1.0)
    once = fedcmp(states, [2, 2, 3], base, tau=math.inf, flatten=0.0, rescale=1.0)
    plain = fedcmp([*states, states[0]], [1, 2, 3, 1], base, flatten=0.0, rescale=1.0)
    assert_same(plain.state, once.state, rtol=1e-5, atol=1e-6)
    # With reliability two copies agree, and have more say than one of their size.
    reliability = twice.facts["layers"][LAYERS[0]]["reliability"]
    assert reliability[0] == pytest.approx(reliability[3])
    assert reliability[0] + reliability[3] > 2 / 7


def test_a_client_that_sends_its_start_takes_its_share_of_nothing():
    base, states = draw(0, 2)
    found = fedcmp([*states, base], [1, 1, 2], base, **PLAIN).state
    assert_same(found, fedavg([*states, base], [1, 1, 2], base), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", ["projected", "polar"])
def test_clients_come_and_go_over_rounds_with_momentum(momentum):
    options = dict(rank=4, momentum=momentum, beta=0.5, tau=0.5)
    base, states = draw(0, 5)
    memory = None
    for there in ([0, 1, 2], [3], [0, 4], [1, 2, 3, 4, 0]):
        found = fedcmp([states[k] for k in there], None, base, memory=memory, **options)
        memory, base = found.memory, found.state
        assert all(torch.isfinite(t).all() for t in found.state.values())
        assert len(found.facts["layers"][LAYERS[0]]["agreement"]) == len(there)


@pytest.mark.parametrize("seed", SEEDS)
def test_projected_momentum_as_defined(seed):
    base, states = draw(seed, 4, torch.float64, {"a.weight": (9, 7), "a.bias": (9,)})
    torch.manual_seed(seed)
    old = torch.randn(9, 8)
    options = dict(rank=3, beta=0.6)
    found = fedcmp(states, None, base, memory={"a.step": old}, **options)
    alone = fedcmp(states, None, base, rank=3)

    x = [torch.cat([s[n] - base[n] if s[n].ndim > 1 else (s[n] - base[n])[:, None] for n in s], 1)
         for s in states]  # fmt: skip
    u = torch.linalg.svd(torch.cat(x, 1), full_matrices=False).U[:, :3]
    carried = 0.6 * u @ u.T @ old.double()
    for name, part in (("a.weight", carried[:, :7]), ("a.bias", carried[:, 7])):
        torch.testing.assert_close(found.state[name], alone.state[name] + part)
    step = torch.cat([(found.state[n] - base[n]).reshape(9, -1) for n in base], 1)
    torch.testing.assert_close(found.memory["a.step"], step.float(), rtol=1e-5, atol=1e-6)
    said = found.facts["layers"]["a"]["momentum"]
    assert said["overlap"] == pytest.approx(float((u.T @ old.double()).norm() / old.norm()) ** 2)


def test_projected_momentum_of_the_whole_space_is_that_of_fedavgm():
    states = draw(0, 4, torch.float64)[1]
    base = start = draw(0, 4, torch.float64)[0]
    memory, velocity = None, None
    for _ in range(4):
        found = fedcmp(states, None, base, memory=memory, **{**PLAIN, "beta": 0.5})
        plain = methods.get("fedavgm")(
            states, weights=[1] * 4, base=start, memory=velocity, momentum=0.5
        )
        base, memory = found.state, found.memory
        start, velocity = plain.state, plain.memory
        for layer in LAYERS:  # the norm between them is averaged
            name = f"{layer}.weight"
            torch.testing.assert_close(base[name], start[name], rtol=1e-5, atol=1e-5)


def test_momentum_that_has_no_meaning_or_no_use():
    base, states = draw(0)
    with pytest.raises(InputError, match="momentum=polar has a meaning there"):
        fedcmp(states, None, base, space="weights", beta=0.5)
    fedcmp(states, None, base, space="weights", beta=0.0)


def test_memory_of_another_round_is_a_history_as_good_as_any():
    base, states = draw(0)
    options = dict(rank=3, momentum="polar", beta=0.5, align="signs")
    old = fedcmp(states, None, base, **options).memory
    other, moved = draw(5)
    found = fedcmp(moved, None, other, memory=old, **options)
    fresh = fedcmp(moved, None, other, **options)
    name = f"{LAYERS[0]}.weight"
    assert float((found.state[name] - fresh.state[name]).norm()) > 1e-3
    assert eye_error(found.memory[f"{LAYERS[0]}.basis"]) < 1e-5


# Orthogonality-preserved momentum.


@pytest.mark.parametrize("align", ["procrustes", "signs"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_basis_stays_orthonormal_over_rounds_of_any_rank(seed, align):
    memory = None
    for round, energy in enumerate([0.6, 0.95, 1.0, 0.4]):
        base, states = draw(10 * seed + round)
        options = dict(energy=energy, momentum="polar", beta=0.7, align=align)
        found = fedcmp(states, None, base, memory=memory, **options)
        memory = found.memory
        assert sorted(memory) == [f"{layer}.basis" for layer in LAYERS]
        for layer in LAYERS:
            basis, facts = memory[f"{layer}.basis"], found.facts["layers"][layer]
            assert basis.shape == (facts["side"], facts["rank"])
            assert eye_error(basis) < 1e-5
            assert (facts["momentum"] is None) == (round == 0)
    json.dumps(found.facts, allow_nan=False)


def test_beta_zero_is_the_aggregation_alone_whatever_the_memory():
    base, states = draw(0)
    memory = {f"{LAYERS[0]}.basis": orthonormal(1, 10, 3, torch.float32)}
    options = dict(energy=0.8, tau=0.3, momentum="polar")
    alone = fedcmp(states, None, base, **options)
    found = fedcmp(states, None, base, memory=memory, beta=0.0, **options)
    assert_same(found.state, alone.state, rtol=0, atol=0)
    assert found.memory is None
    assert found.facts == alone.facts


@pytest.mark.parametrize("seed", SEEDS)
def test_momentum_as_defined_turning_the_new_basis_to_the_old(seed):
    base, states = draw(seed, 4, torch.float64, {"a.weight": (9, 7)})
    old = orthonormal(seed, 9, 3).float()
    beta = 0.6
    options = dict(rank=3, rescale=1.0, flatten=0.0, rest="drop", momentum="polar")
    found = fedcmp(states, None, base, memory={"a.basis": old}, beta=beta, **options)

    # In a space of rank 3 and without gains, U C is the projection of the mean update on U.
    x = [s["a.weight"] - base["a.weight"] for s in states]
    u = torch.linalg.svd(torch.cat(x, 1), full_matrices=False).U[:, :3]
    c = u.T @ (sum(x) / 4)
    left, _, right = torch.linalg.svd(u.T @ old.double())
    u, c = u @ left @ right, (left @ right).T @ c
    left, _, right = torch.linalg.svd(beta * old.double() + (1 - beta) * u, full_matrices=False)
    torch.testing.assert_close(found.state["a.weight"], base["a.weight"] + left @ right @ c)


@pytest.mark.parametrize("align", ["procrustes", "signs"])
def test_momentum_brings_the_basis_nearer_to_its_history(align):
    base, states = draw(0, 4, torch.float64, {"a.weight": (9, 7)})
    old = orthonormal(0, 9, 3)
    options = dict(rank=3, momentum="polar", align=align)
    plain = fedcmp(states, None, base, beta=1e-9, **options)
    overlaps = []
    for beta in (0.0, 0.3, 0.6, 0.9):
        memory = {"a.basis": old.float()}
        found = fedcmp(states, None, base, memory=memory, beta=beta, **options)
        basis = (found.memory or plain.memory)["a.basis"].double()
        overlaps.append(float((old.T @ basis).square().sum() / 3))
        said = found.facts["layers"]["a"]["momentum"]
        assert not said or said["overlap"] == pytest.approx(overlaps[0], abs=1e-6)
    assert overlaps == sorted(overlaps)
    assert overlaps[-1] > overlaps[0] + 0.1
    assert said["turned"] > 0.1


def test_a_square_basis_has_nothing_to_turn():
    base, states = draw(0, 6)
    first = fedcmp(states, None, base, beta=0.9, momentum="polar")
    base, states = draw(1, 6)
    second = fedcmp(states, None, base, beta=0.9, momentum="polar", memory=first.memory)
    assert_same(second.state, fedcmp(states, None, base).state, rtol=0, atol=0)
    said = second.facts["layers"][LAYERS[0]]["momentum"]
    assert said == {"overlap": pytest.approx(1), "turned": 0.0}


@pytest.mark.parametrize("momentum", ["projected", "polar"])
def test_a_round_in_which_nobody_moved_keeps_the_history(momentum):
    base, states = draw(0)
    options = dict(momentum=momentum, beta=0.5, energy=0.7)
    memory = fedcmp(states, None, base, **options).memory
    found = fedcmp([base, base], None, base, memory=memory, **options)
    assert_same(found.memory, memory, rtol=0, atol=0)
    assert_same(found.state, base, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("momentum", "memory", "said"),
    [
        ("polar", {"b.basis": torch.eye(3)}, "b.basis is no layer"),
        ("polar", {"a.basis": torch.ones(4, 2)}, r"shape \(4, 2\), expected \(3, r\)"),
        ("polar", {"a.basis": torch.ones(3, 4)}, r"\(3, 4\)"),
        ("polar", {"a.basis": torch.ones(3)}, r"\(3,\)"),
        ("polar", {"a.basis": torch.eye(3) / 0}, "NaN"),
        ("projected", {"a.basis": torch.eye(3)}, "a.basis is no layer"),
        ("projected", {"a.step": torch.ones(3, 4)}, r"shape \(3, 4\), expected \(3, 5\)"),
        ("projected", {"a.step": torch.ones(3, 5) / 0}, "NaN"),
    ],
)
def test_memory_that_does_not_fit(momentum, memory, said):
    base, states = draw(0, shapes={"a.weight": (3, 5)})
    with pytest.raises(StateError, match=said):
        fedcmp(states, None, base, memory=memory, momentum=momentum, beta=0.5)


@pytest.mark.parametrize(
    "option",
    [
        dict(energy=0.0), dict(energy=1.1), dict(rank=0), dict(tau=0.0), dict(tau=-1.0),
        dict(rescale=0.5), dict(rescale=math.inf), dict(flatten=1.5), dict(flatten=-0.1),
        dict(rest="all"), dict(beta=1.0), dict(beta=-0.1),
        dict(space="weight"), dict(align="sign"), dict(basis="fast"), dict(rank=1.5),
    ],
)  # fmt: skip
def test_options_out_of_range(option):
    base, states = draw(0)
    with pytest.raises(InputError, match=f"fedcmp option {next(iter(option))}: expected"):
        fedcmp(states, None, base, **option)


def test_facts_of_a_layer():
    base, states = draw(0, 4)
    facts = fedcmp(states, [1, 2, 3, 4], base, energy=0.8, tau=0.5).facts["layers"][LAYERS[0]]
    assert facts["side"] == 10
    assert 0.8 <= facts["energy_kept"] < 1
    assert facts["rank"] < 10
    assert facts["basis"] == "exact"
    assert sum(facts["spectrum"]) <= 1 + 1e-9
    assert facts["spectrum"] == sorted(facts["spectrum"], reverse=True)
    kappa = facts["kappa"]
    assert 0 <= kappa["min"] <= kappa["median"] <= kappa["max"] <= 1
    assert kappa["min"] <= kappa["mean"] <= kappa["max"]
    assert sum(facts["reliability"]) == pytest.approx(1)
    assert 0 < facts["gain"]["min"] <= facts["gain"]["mean"] <= facts["gain"]["max"] <= 8
    assert facts["rest"]["share"] == pytest.approx(1 - facts["energy_kept"])
    assert facts["chance"] == pytest.approx(0.3)
    assert len(facts["agreement"]) == 4
