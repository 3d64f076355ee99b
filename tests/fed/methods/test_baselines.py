"""FedAvg's variants, the adaptive servers and FedExP, and how clients are read."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fed import methods
from fed.numerics.chunks import blocks, empty
from fed.state import StateError
from llava.errors import InputError
from tests.conftest import near

SHAPES = {
    "model.mm_projector.0.weight": (7, 5),
    "model.mm_projector.0.bias": (7,),
    "model.mm_projector.2.weight": (6, 7),
    "scale": (),
}
ADAPTIVE = ["fedadam", "fedyogi", "fedadagrad"]
WITH_MEMORY = ["fedavgm", *ADAPTIVE]
AVERAGES = ["fedavg", *WITH_MEMORY, "fedexp"]
ROBUST = ["median", "trimmed_mean", "krum", "geometric_median", "norm_clip"]


def call(name, states, weights=None, base=None, memory=None, **options):
    weights = weights or [1] * len(states)
    return methods.get(name)(states, weights=weights, base=base, memory=memory, **options)


def draw(seed, clients=3, dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(seed)
    base = {n: torch.randn(s).to(dtype) for n, s in shapes.items()}
    common = {n: torch.randn(s) for n, s in shapes.items()}
    states = [
        {n: (t + 0.1 * (common[n] + torch.randn(t.shape))).to(dtype) for n, t in base.items()}
        for _ in range(clients)
    ]
    return base, states


def one(*values):
    """A base of zeros, and clients with one tensor of one value each."""
    clients = [{"a": torch.tensor([v], dtype=torch.float64)} for v in values]
    return {"a": torch.zeros(1, dtype=torch.float64)}, clients


def vector(state):
    return torch.cat([t.double().flatten() for t in state.values()])


def close(a, b, **tolerance):
    for name in b:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# By hand.


def test_plain_means_where_research_code_has_them():
    base, states = one(0.0, 4.0)
    for name, options in [
        ("fedavg", {}),
        ("fedexp", dict(eps=9.0)),
        ("fedavgm", dict(momentum=0.0)),
    ]:
        assert call(name, states, [3, 1], base, **options).state["a"].item() == near(1)
        compat = dict(options, paper_compat=True)
        assert call(name, states, [3, 1], base, **compat).state["a"].item() == near(2)


def test_fedavgm_by_hand():
    options = dict(momentum=0.5, server_lr=2.0)
    base, states = one(1.0, 3.0)
    first = call("fedavgm", states, [1, 1], base, **options)
    assert first.state["a"].item() == near(4)
    assert first.memory["a.velocity"].item() == near(2)
    # From 4 the clients' mean 2 is an update of -2: v = 0.5 * 2 - 2 = -1.
    second = call("fedavgm", states, [1, 1], first.state, first.memory, **options)
    assert second.state["a"].item() == near(2)
    assert second.memory["a.velocity"].item() == near(-1)
    assert second.facts["update_norm"] == near(2)
    assert second.facts["step_norm"] == near(2)
    # One step ahead: 0.5 * -1 - 2 = -2.5.
    ahead = call("fedavgm", states, [1, 1], first.state, first.memory, nesterov=True, **options)
    assert ahead.state["a"].item() == near(-1)
    assert ahead.memory["a.velocity"].item() == near(-1)


def test_fedavgm_as_an_average_of_updates():
    options = dict(momentum=0.75, paper_compat=True)
    base, states = one(2.0, 6.0)
    first = call("fedavgm", states, [3, 1], base, **options)
    assert first.state["a"].item() == near(1)  # a quarter of 4, the plain mean
    second = call("fedavgm", states, [3, 1], first.state, first.memory, **options)
    assert second.state["a"].item() == near(1 + 0.75 + 0.25 * 3)
    ahead = call("fedavgm", states, [3, 1], first.state, first.memory, nesterov=True, **options)
    assert ahead.state["a"].item() == near(1 + 0.75 * 1.5 + 0.25 * 3)


@pytest.mark.parametrize(
    ("name", "update", "options", "v", "step"),
    [
        ("fedadagrad", 3.0, dict(tau=4.0), 16 + 9, 3 / (5 + 4)),
        ("fedadam", 7.0, dict(tau=1.0, beta1=0.0, beta2=0.5), 0.5 + 24.5, 7 / (5 + 1)),
        ("fedadam", 7.0, dict(tau=1.0, beta1=0.5, beta2=0.5), 25, 3.5 / (5 + 1)),
        ("fedyogi", 3.0, dict(tau=1.0, beta1=0.0, beta2=2 / 3), 1 + 3, 3 / (2 + 1)),
        ("fedyogi", 4.0, dict(tau=6.0, beta1=0.0, beta2=0.25), 36 - 12, 4 / (math.sqrt(24) + 6)),
        # From 0, v of the first round is the share of Delta^2 alone.
        ("fedadagrad", 3.0, dict(tau=1.0, paper_compat=True), 9, 3 / 4),
        ("fedadam", 4.0, dict(tau=1.0, beta1=0.0, beta2=0.75, paper_compat=True), 4, 4 / 3),
        ("fedyogi", 4.0, dict(tau=1.0, beta1=0.0, beta2=0.75, paper_compat=True), 4, 4 / 3),
        # Corrected as Adam's first step: by sqrt(1 - beta2) / (1 - beta1).
        (
            "fedadam",
            4.0,
            dict(tau=1.0, beta1=0.5, beta2=0.75, paper_compat=True, bias_correction=True),
            4,
            (0.5 / 0.5) * 2 / 3,
        ),
    ],
)
def test_a_first_adaptive_step_by_hand(name, update, options, v, step):
    base, states = one(update, update)
    outcome = call(name, states, [3, 1], base, server_lr=0.5, **options)
    assert outcome.state["a"].item() == pytest.approx(0.5 * step, rel=1e-12)
    assert outcome.memory["a.v"].item() == pytest.approx(v, rel=1e-6)
    assert outcome.memory["step"].item() == 1
    assert outcome.facts["update_norm"] == near(update)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("seed", range(3))
def test_rounds_of_the_adaptive_servers_follow_algorithm_2(name, seed, correct):
    if name == "fedadagrad" and correct:
        with pytest.raises(InputError, match="no option 'bias_correction'"):
            call(name, *reversed(draw(seed)), bias_correction=True)
        return
    lr, b1, b2, tau = 0.3, 0.8, 0.9, 0.02
    options = dict(server_lr=lr, beta1=b1, tau=tau)
    options |= {} if name == "fedadagrad" else dict(beta2=b2, bias_correction=correct)
    weights = torch.tensor([3, 1, 4], dtype=torch.float64)
    base, memory = draw(seed, dtype=torch.float64)[0], None
    x = vector(base)
    m, v = torch.zeros_like(x), torch.full_like(x, tau**2)
    for t in (1, 2, 3, 4):
        _, states = draw(10 * seed + t, dtype=torch.float64)
        outcome = call(name, states, weights.tolist(), base, memory, **options)
        base, memory = outcome.state, outcome.memory

        d = (weights / 8) @ torch.stack([vector(s) for s in states]) - x
        m = b1 * m + (1 - b1) * d
        if name == "fedadagrad":
            v = v + d * d
        elif name == "fedadam":
            v = b2 * v + (1 - b2) * d * d
        else:
            v = torch.where(v < d * d, v + (1 - b2) * d * d, v - (1 - b2) * d * d)
        eta = lr * math.sqrt(1 - b2**t) / (1 - b1**t) if correct else lr
        x = x + eta * m / (v.sqrt() + tau)
        torch.testing.assert_close(vector(base), x, rtol=1e-6, atol=1e-6)
        assert memory["step"].item() == t


def test_fedexp_by_hand():
    base = {"a": torch.zeros(2, dtype=torch.float64)}
    across = [{"a": torch.tensor(v, dtype=torch.float64)} for v in ([3.0, 0], [0, 3])]
    # At right angles: (9 + 9) / (2 * 2 * 4.5) = 1, and with eps below it.
    outcome = call("fedexp", across, None, base, eps=0.0)
    assert outcome.facts["eta"] == near(1)
    assert outcome.state["a"].tolist() == near([1.5, 1.5])
    four = [*across, {"a": -across[0]["a"]}, {"a": across[1]["a"]}]
    # Mean (0, 1.5); 4 * 9 / (2 * 4 * (2.25 + 0.75)) = 1.5.
    outcome = call("fedexp", four, None, base, eps=0.75)
    assert outcome.facts["eta"] == near(1.5)
    assert outcome.state["a"].tolist() == near([0, 2.25])
    assert outcome.facts["update_norm"] == near(1.5)
    assert outcome.facts["step_norm"] == near(2.25)
    # By samples 1, 1, 1, 3 in both places: 9 / (2 * (2^2 + 0.5)) = 1.
    outcome = call("fedexp", four, [1, 1, 1, 3], base, eps=0.5)
    assert outcome.facts["eta"] == near(1)
    assert outcome.state["a"].tolist() == near([0, 2])
    outcome = call("fedexp", four, [1, 1, 1, 3], base, eps=0.75, paper_compat=True)
    assert outcome.facts["eta"] == near(1.5)


def test_fedexp_of_unrelated_clients_steps_by_half_their_number():
    base, _ = one()
    base = {"a": torch.zeros(64)}
    states = [{"a": torch.eye(64)[k]} for k in range(16)]
    outcome = call("fedexp", states, None, base, eps=0.0)
    assert outcome.facts["eta"] == pytest.approx(8)
    opposite = [states[0], {"a": -states[0]["a"]}]
    outcome = call("fedexp", opposite, None, base, eps=0.0)
    assert outcome.facts["eta"] == near(1)
    assert outcome.state["a"].abs().max() < 1e-12


# Properties.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fedavg", "fedexp"])
def test_one_client_and_identical_clients_give_that_client_to_the_bit(name, dtype):
    for seed in range(3):
        base, states = draw(seed, 1, dtype)
        for found in (call(name, states, [7], base), call(name, states * 3, [1, 5, 11], base)):
            close(found.state, states[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_identical_clients_are_as_one_in_every_round(name):
    alone = together = None
    for seed in range(3):
        base, states = draw(seed, 1)
        alone = call(name, states, [7], base, alone and alone.memory)
        together = call(name, states * 3, [1, 5, 11], base, together and together.memory)
        close(together.state, alone.state, rtol=1e-6, atol=1e-6)
        close(together.memory, alone.memory, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", AVERAGES)
def test_order_scale_and_clients_without_samples(name):
    memory = turned_memory = None
    for seed in range(3):
        base, states = draw(seed, 5)
        weights = [3, 0, 8, 1, 4]
        found = call(name, states, weights, base, memory)
        turned = call(name, states[::-1], weights[::-1], base, turned_memory)
        scaled = call(name, states, [1e6 * w for w in weights], base, memory)
        heard = call(name, [states[k] for k in (0, 2, 3, 4)], [3, 8, 1, 4], base, memory)
        for other in (turned, scaled, heard):
            close(other.state, found.state, rtol=1e-6, atol=1e-6)
            if memory:
                close(other.memory, found.memory, rtol=1e-5, atol=1e-9)
        memory, turned_memory = found.memory, turned.memory
        assert found.facts["clients"] == ["0", "2", "3", "4"]


@pytest.mark.parametrize("options", [{}, dict(server_lr=0.5)])
def test_without_momentum_fedavgm_is_fedavg(options):
    base, states = draw(0, 5, torch.float64)
    weights = [3, 2, 8, 1, 4]
    mean = call("fedavg", states, weights, base, **options)
    found = call("fedavgm", states, weights, base, momentum=0.0, **options)
    close(found.state, mean.state, rtol=1e-12, atol=1e-12)
    # And in a first round whatever the momentum, but for nesterov.
    found = call("fedavgm", states, weights, base, momentum=0.9, **options)
    close(found.state, mean.state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", AVERAGES + ROBUST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types_facts_and_arguments(name, dtype):
    base, states = draw(0, 5, dtype)
    before = [{n: t.clone() for n, t in s.items()} for s in (base, *states)]
    memory = None
    for _ in range(2):
        given = {n: t.clone() for n, t in (memory or {}).items()}
        outcome = call(name, states, [1, 2, 3, 4, 5], base, memory)
        assert list(outcome.state) == list(base)
        for n, tensor in outcome.state.items():
            assert tensor.dtype == dtype
            assert tensor.shape == base[n].shape
        close(memory or {}, given, rtol=0, atol=0)
        memory = outcome.memory
        assert (memory is not None) == (name in WITH_MEMORY)
        assert all(tensor.dtype == torch.float32 for tensor in (memory or {}).values())
        json.dumps(outcome.facts, allow_nan=False)
    for old, new in zip(before, [base, *states], strict=True):
        close(new, old, rtol=0, atol=0)


@pytest.mark.parametrize("name", AVERAGES + ROBUST)
def test_an_identity_connector_has_nothing_to_aggregate(name):
    outcome = call(name, [{}, {}, {}], [1, 2, 3], {})
    assert outcome.state == {}
    json.dumps(outcome.facts, allow_nan=False)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memory_that_was_on_disk_goes_on_as_if_it_had_not(name, tmp_path):
    base, states = draw(0)
    first = call(name, states, [3, 1, 2], base)
    save_file(first.memory, tmp_path / "memory.safetensors")
    back = load_file(tmp_path / "memory.safetensors")
    on = call(name, states, [3, 1, 2], first.state, first.memory)
    again = call(name, states, [3, 1, 2], first.state, back)
    close(again.state, on.state, rtol=0, atol=0)
    # And memory says something: without it the next round is another.
    fresh = call(name, states, [3, 1, 2], first.state)
    assert not torch.equal(vector(fresh.state), vector(on.state))


# Wrong options and memory.


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("fedavg", dict(server_lr=0.0)),
        ("fedavg", dict(server_lr=math.inf)),
        ("fedavg", dict(paper_compat=1.0)),
        ("fedavgm", dict(momentum=1.0)),
        ("fedavgm", dict(momentum=-0.1)),
        ("fedavgm", dict(server_lr=-1.0)),
        ("fedavgm", dict(nesterov="yes")),
        *[
            (n, {o: v})
            for n in ADAPTIVE
            for o in ("server_lr", "tau")
            for v in (0.0, -1.0, math.inf)
        ],
        *[(n, dict(beta1=v)) for n in ADAPTIVE for v in (1.0, -0.1)],
        *[(n, dict(beta2=v)) for n in ADAPTIVE[:2] for v in (1.0, -0.1)],
        ("fedexp", dict(eps=-1.0)),
        ("fedexp", dict(eps=math.inf)),
    ],
)
def test_options_out_of_range(name, option):
    base, states = draw(0)
    with pytest.raises(InputError, match=f"{name} option {next(iter(option))}: expected .*found"):
        call(name, states, None, base, **option)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda memory, key: memory.pop(key), "tensor {key} is missing"),
        (lambda memory, key: memory.update({"b" + key: torch.zeros(1)}), "tensor b{key} is not"),
        (
            lambda memory, key: memory.update({key: torch.zeros(5, 7)}),
            r"{key} has shape \(5, 7\), expected \(7, 5\)",
        ),
        (lambda memory, key: memory[key].fill_(math.nan), "{key} holds NaN"),
        (lambda memory, key: memory.update({key: memory[key].long()}), "{key} is torch.int64"),
    ],
)
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memory_of_another_model(name, change, said):
    base, states = draw(0)
    memory = call(name, states, None, base).memory
    key = "model.mm_projector.0.weight." + ("velocity" if name == "fedavgm" else "v")
    change(memory, key)
    with pytest.raises(StateError, match=f"{name} memory: {said.format(key=key)}"):
        call(name, states, None, base, memory)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_memory_of_another_method(name):
    base, states = draw(0)
    velocity = call("fedavgm", states, None, base).memory
    with pytest.raises(StateError, match=f"{name} memory: tensor .* is missing"):
        call(name, states, None, base, velocity)
    with pytest.raises(StateError, match="fedavgm memory: tensor .* is missing"):
        call("fedavgm", states, None, base, call(name, states, None, base).memory)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_updates_too_large_for_the_memory_are_refused_when_they_come(name):
    base, states = one(1e30, 1e30)
    with pytest.raises(StateError, match=f"{name} memory: a.v holds NaN or infinity"):
        call(name, states, None, base)


# How clients are read.


@pytest.mark.parametrize("clients", [1, 3, 100])
def test_blocks_hold_every_value_once(clients):
    shapes = {"a": (300, 301), "b": (), "c": (0, 4), "d": (5,)}
    base, states = draw(0, clients, torch.bfloat16, shapes)
    states[0] = {n: t.float() for n, t in states[0].items()}
    base["a"] = base["a"].T.contiguous().T  # not in the order of its values
    copies = [empty(base, torch.float64) for _ in range(clients + 1)]
    for block in blocks(states, base):
        assert block.clients.dtype == block.base.dtype == torch.float64
        block.write(copies[0], block.base)
        for copy, values in zip(copies[1:], block.clients, strict=True):
            block.write(copy, values)
        assert torch.equal(block.read(states[-1]), block.clients[-1])
    for copy, state in zip(copies, [base, *states], strict=True):
        close(copy, {n: t.double() for n, t in state.items()}, rtol=0, atol=0)


class Made(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made with more than 2^18 values, by type."""

    def __init__(self):
        super().__init__()
        self.large = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        large = isinstance(out, torch.Tensor) and not func.is_view and out.numel() > 2**18
        if large and out.data_ptr() not in {a.data_ptr() for a in args if torch.is_tensor(a)}:
            self.large[out.dtype] = self.large.get(out.dtype, 0) + out.nbytes
        return out


@pytest.mark.parametrize("name", AVERAGES + ROBUST)
def test_beside_blocks_no_method_makes_more_than_three_states_in_float32(name):
    values, clients = 300_000, 10
    base, states = draw(0, clients, torch.bfloat16, {"a": (values,)})
    # Without what is common to all methods, which checks and copies.
    raw = methods.get(name).function
    memory = {}
    for _ in range(2):
        with Made() as made, torch.no_grad():
            kept = {"memory": memory} if "memory" in methods.get(name).arguments else {}
            memory = raw(states, weights=[1.0] * clients, base=base, **kept).memory or {}
        assert made.large
        assert torch.float64 not in made.large
        assert sum(made.large.values()) <= 3 * 4 * values


def test_fedcmp_makes_as_much_for_many_clients_as_for_few():
    shapes = {"a.weight": (1100, 600), "a.bias": (1100,)}
    base, states = draw(0, 12, torch.bfloat16, shapes)
    made = []
    for clients in (3, 12):
        with Made() as found, torch.no_grad():
            raw, ones = methods.get("fedcmp").function, [1.0] * clients
            outcome = raw(states[:clients], weights=ones, base=base, memory={})
        assert outcome.facts["layers"]["a"]["basis"] == "randomised"
        assert torch.float64 not in found.large
        made.append(sum(found.large.values()))
    assert made[0] == made[1] <= 3 * 4 * 1100 * 601
