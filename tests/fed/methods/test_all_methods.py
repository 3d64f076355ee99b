import json
import math
from typing import Literal

import pytest
import torch

from fed import methods
from fed.methods import Outcome
from fed.methods.interface import registry
from fed.numerics.layers import layers, to_matrix
from fed.state import StateError
from llava.errors import InputError

SHAPES = {
    "model.mm_projector.0.weight": (7, 5),
    "model.mm_projector.0.bias": (7,),
    "model.mm_projector.2.weight": (6, 7),
    "model.mm_projector.2.bias": (6,),
}
ALL = methods.names()
SHARED = [name for name in ALL if not methods.get(name).personal]


def call(name, states, **arguments):
    """A method, with what its clients would send beside their states if it asks for that."""
    function = methods.get(name)
    if (
        function.client_rule is not None
        and function.client_rule.sends
        and "extras" not in arguments
    ):
        arguments["extras"] = [{n: 0.01 * t.float() for n, t in s.items()} for s in states]
    if function.needs_calibration:
        arguments.setdefault("calibration", [Measured()] * len(states))
    weights = arguments["weights"]
    if name == "slerp" and len(weights) == len(states):  # which takes two: the last two have a say
        arguments["weights"] = [w * (k >= len(states) - 2) for k, w in enumerate(weights)]
    return function(states, **arguments)


class Measured:
    """A calibration whose numbers come from a state's own values: symmetric, positive, fixed."""

    def loss(self, state):
        return float(sum(t.double().square().sum() for t in state.values()))

    def gram(self, state):
        found = {}
        for layer in layers(state)[0]:
            x = to_matrix(state, layer).double()
            found[layer.name] = x.T @ x / len(x)
        return found

    def fisher(self, state):
        return {n: t.float().square() + 0.1 for n, t in state.items()}


def draw(seed, clients=3, dtype=torch.float32):
    torch.manual_seed(seed)
    base = {n: torch.randn(s).to(dtype) for n, s in SHAPES.items()}
    states = [{n: (t + 0.1 * torch.randn(t.shape)).to(dtype) for n, t in base.items()}]
    states += [
        {n: (t + 0.1 * torch.randn(t.shape)).to(dtype) for n, t in base.items()}
        for _ in range(clients - 1)
    ]
    return base, states


@pytest.fixture
def toy(monkeypatch):
    """A method with an option of every kind, in a registry of its own."""
    methods.names()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @methods.method("toy")
    def toy(
        states,
        *,
        weights,
        base,
        memory,
        number: float = 1.0,
        count: int = 1,
        flag: bool = False,
        text: str = "",
        choice: Literal["left", "right"] = "left",
        maybe: int | None = None,
    ) -> Outcome:
        return Outcome({n: t * number for n, t in base.items()}, memory, {"weights": weights})

    return toy


def test_names_and_get():
    assert methods.names() == sorted(methods.names())
    assert {"fedavg", "fedcmp", "local"} <= set(methods.names())
    with pytest.raises(InputError, match="did you mean fedavg"):
        methods.get("fedavgg")
    with pytest.raises(InputError, match="fedavg, .*fedcmp, .*local"):
        methods.get("???")


def test_a_second_method_of_a_name_is_refused(toy):
    with pytest.raises(InputError, match="two methods are called toy"):
        methods.method("toy")(lambda: None)
    assert methods.get("toy") is toy


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["number=0.3"], {"number": 0.3}),
        (["number=inf", "count=-2"], {"number": math.inf, "count": -2}),
        (["flag=true", "text=a=b", "choice=right"], dict(flag=True, text="a=b", choice="right")),
        (["maybe=none"], {"maybe": None}),
        (["maybe=3"], {"maybe": 3}),
        ([], {}),
        ({"number": 2, "flag": False, "maybe": None}, dict(number=2.0, flag=False, maybe=None)),
        ({"number": "1e-3", "count": "4"}, {"number": 1e-3, "count": 4}),
    ],
)
def test_options_are_read_by_their_types(toy, given, expected):
    parsed = methods.get("toy").parse(given)
    assert parsed == expected
    assert [type(v) for v in parsed.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["numbr=1"], "no option 'numbr' (did you mean number?)"),
        (["memory=1"], "no option 'memory'"),
        (["number"], "expected name=value"),
        (["number=1", "number=2"], "number is given twice"),
        (["number=much"], "expected a number, found 'much'"),
        (["number=nan"], "expected a number"),
        (["number=none"], "expected a number"),
        (["count=1.5"], "expected a whole number, found '1.5'"),
        (["flag=1"], "expected true or false"),
        (["choice=up"], "expected one of left, right, found 'up'"),
        (["maybe=x"], "expected a whole number or none"),
        ({"count": True}, "expected a whole number, found True"),
        ({"number": [1]}, "expected a number, found [1]"),
        ({"number": None}, "expected a number, found None"),
        ({"text": 3}, "expected text"),
        ({"choice": 3}, "expected one of"),
    ],
)
def test_wrong_options(toy, given, said):
    with pytest.raises(InputError) as caught:
        methods.get("toy").parse(given)
    assert said in str(caught.value)
    assert "toy" in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_wrong_options_in_a_direct_call(name):
    base, states = draw(0)
    with pytest.raises(InputError, match="no option 'server_rl'"):
        call(name, states, weights=[1, 1, 1], base=base, server_rl=1.0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(weights=[1, 2]), "3 client states, 2 weights"),
        (dict(states=[], weights=[]), "no client states"),
        (dict(weights=[0, 0, 0]), "sum to 0"),
        (dict(weights=[1, -1, 1]), "client 1 has weight -1"),
        (dict(weights=[1, 1, math.nan]), "client 2 has weight nan"),
        (dict(weights=[1, 1, math.inf]), "client 2 has weight inf"),
        (dict(weights=[1, 1e308, 1e308]), "sum to inf"),
        (dict(clients=["a"]), "1 client names"),
        (dict(tasks=["a", "b"]), "2 tasks, expected one of each of 3 clients"),
    ],
)
def test_arguments_that_do_not_fit(name, change, said):
    base, states = draw(0)
    arguments = dict(states=states, weights=[1, 1, 1], base=base) | change
    with pytest.raises(InputError, match=said):
        call(name, arguments.pop("states"), **arguments)


@pytest.mark.parametrize("name", ALL)
def test_bad_states_name_client_and_tensor(name):
    base, states = draw(0)
    tensor = "model.mm_projector.2.weight"

    def said(**arguments):
        with pytest.raises(StateError) as caught:
            call(name, states, weights=[1, 1, 1], **{"base": base, **arguments})
        return str(caught.value)

    good = states[1]
    states[1] = {**good, tensor: good[tensor].T}
    assert all(s in said() for s in ["client 1", tensor, "(7, 6)", "(6, 7)"])
    states[1] = {n: t for n, t in good.items() if n != tensor}
    assert "client hill: tensor" in said(clients=["sea", "hill", "town"])
    states[1] = {**good, tensor: good[tensor] * math.nan}
    assert "client 1" in said()
    assert tensor in said()
    states[1] = {n: 0 * t for n, t in good.items()}
    assert "client 1: all 4 tensors are zero" in said()
    states[1] = good
    assert "the base" in said(base={**base, tensor: base[tensor] / 0})


@pytest.mark.parametrize("name", SHARED)
def test_all_may_be_zero_where_the_base_is(name):
    base, states = draw(0)
    zero = {n: 0 * t for n, t in base.items()}
    found = call(name, [zero, *states[1:]], weights=[1, 1, 1], base=zero)
    assert all(torch.isfinite(t).all() for t in found.state.values())


@pytest.mark.parametrize("name", SHARED)
def test_copies_and_loud_clients_give_finite_states(name):
    base, states = draw(0, 5)
    copies = call(name, [*states[:4], states[0]], weights=[1] * 5, base=base).state
    states[2] = {n: base[n] + 1e6 * (t - base[n]) for n, t in states[2].items()}
    loud = call(name, states, weights=[1] * 5, base=base).state
    for state in (copies, loud):
        assert all(torch.isfinite(t).all() for t in state.values())
    longest = max(float((loud[n] - base[n]).norm()) for n in base)
    if name in ("median", "trimmed_mean", "krum", "geometric_median", "norm_clip"):
        assert longest < 2
    elif name in ("fedavg", "fedprox", "scaffold", "fedavgm"):
        assert longest > 1e4  # a mean has no defence


@pytest.mark.parametrize("name", SHARED)
def test_memory_of_another_model_is_refused(name):
    base, states = draw(0)
    memory = call(name, states, weights=[1, 1, 1], base=base).memory
    if name == "fedcmp":
        options = dict(beta=0.5, rank=2)
        memory = call(name, states, weights=[1, 1, 1], base=base, **options).memory
    if not memory:
        pytest.skip("keeps none")
    other = {f"{n}x": t for n, t in base.items()}
    theirs = [{f"{n}x": t for n, t in s.items()} for s in states]
    with pytest.raises(StateError, match=f"{name} memory"):
        call(name, theirs, weights=[1, 1, 1], base=other, memory=memory)
    tall = {n: torch.cat([t, t]) for n, t in base.items()}
    taller = [{n: torch.cat([t, t]) for n, t in s.items()} for s in states]
    with pytest.raises(StateError, match=f"{name} memory"):
        call(name, taller, weights=[1, 1, 1], base=tall, memory=memory)


@pytest.mark.parametrize("name", ALL)
def test_arguments_are_left_as_they_were(name):
    base, states = draw(0)
    memory = {}
    before = [{n: t.clone() for n, t in s.items()} for s in [base, *states]]
    outcome = call(name, states, weights=[1, 1, 1], base=base, memory=memory)
    if methods.get(name).personal:
        assert len(list(outcome.state)) == 3  # made now
    else:
        for tensor in outcome.state.values():
            tensor.fill_(9)
    assert memory == {}
    for old, new in zip(before, [base, *states], strict=True):
        assert all(torch.equal(old[n], new[n]) for n in old)


def test_a_result_that_does_not_fit_the_type(toy):
    base, states = draw(0, dtype=torch.float16)
    with pytest.raises(StateError, match="does not fit into torch.float16"):
        methods.get("toy")(states, weights=[1, 1, 1], base=base, number=1e9)


def test_what_a_method_is_given_and_what_comes_back(toy):
    base, states = draw(0)
    outcome = methods.get("toy")(states, weights=[2, 0, 1], base=base, clients=["a", "b", "c"])
    assert outcome.facts == {"weights": [2.0, 1.0], "clients": ["a", "c"]}
    assert outcome.memory is None
    memory = {"x": torch.ones(1)}
    outcome = methods.get("toy")(states, weights=[1, 1, 1], base=base, memory=memory)
    assert outcome.memory == memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_results_have_the_type_of_the_base_and_facts_are_json(name, dtype):
    base, states = draw(0, dtype=dtype)
    states[0] = {n: torch.nn.Parameter(t.float()) for n, t in states[0].items()}
    outcome = call(name, states, weights=torch.tensor([1, 2, 3]), base=base)
    for state in outcome.state if methods.get(name).personal else [outcome.state]:
        assert list(state) == list(base)
        for n, tensor in state.items():
            assert tensor.dtype == dtype
            assert tensor.shape == base[n].shape
            assert not tensor.requires_grad
    json.dumps(outcome.facts, allow_nan=False)


@pytest.mark.parametrize("name", [n for n in ALL if methods.get(n).personal])
def test_a_client_s_state_is_the_same_whenever_it_is_asked_for(name):
    base, states = draw(0)
    found = call(name, states, weights=[1, 2, 3], base=base).state
    for state, k in zip(list(found)[::-1], (2, 1, 0), strict=True):
        assert all(torch.equal(state[n], found[k][n]) for n in base)
    with pytest.raises(IndexError):
        found[3]


@pytest.mark.parametrize("name", SHARED)
def test_an_identity_connector_has_nothing_to_aggregate(name):
    assert call(name, [{}, {}, {}], weights=[1, 2, 3], base={}).state == {}


@pytest.mark.parametrize("name", [n for n in SHARED if not methods.get(n).cross_layer])
def test_a_layer_depends_on_itself_alone(name):
    """What a merge of whole models, which goes layer by layer, relies on."""
    base, states = draw(3)
    together = call(name, states, weights=[1, 2, 3], base=base).state
    for layer in ("model.mm_projector.0", "model.mm_projector.2"):
        base_of, *states_of = (
            {n: t for n, t in s.items() if n.startswith(layer)} for s in (base, *states)
        )
        alone = call(name, states_of, weights=[1, 2, 3], base=base_of).state
        for n, tensor in alone.items():
            assert torch.allclose(tensor, together[n], rtol=1e-5, atol=1e-6), n


def test_a_method_that_asks_is_told_clients_and_tasks(toy):
    @methods.method("curious", send=lambda *given: given)
    def asks(states, *, weights, base, memory, clients, tasks, scale: float = 1.0) -> Outcome:
        return Outcome(states[0], facts={"told": [clients, tasks]})

    base, states = draw(0)
    given, curious = dict(weights=[1, 0, 2], base=base), methods.get("curious")
    assert curious(states, **given).facts["told"] == [["0", "2"], ["", ""]]
    found = curious(states, **given, clients=["a", "b", "c"], tasks=["x", "y", "z"])
    assert found.facts["told"] == [["a", "c"], ["x", "z"]]
    with pytest.raises(InputError, match="no option 'tasks'.*it has scale$"):
        methods.get("curious").parse(["tasks=1"])
    assert curious.send(1, 2) == (1, 2)
    assert methods.get("toy").send is None


def test_a_method_that_needs_data_says_so(toy):
    @methods.method("judged")
    def judged(states, *, weights, base, memory, calibration, scale: float = 1.0) -> Outcome:
        return Outcome(states[calibration[0].loss(states[0]) < calibration[1].loss(states[1])])

    base, states = draw(0)
    given = dict(weights=[1, 0, 1], base=base)
    with pytest.raises(InputError, match="judged needs data to calibrate on"):
        methods.get("judged")(states, **given)
    with pytest.raises(InputError, match="no option 'calibration'"):
        methods.get("judged").parse(["calibration=1"])
    best = methods.get("judged")(states, **given, calibration=[Measured()] * 3)
    assert best.facts["clients"] == ["0", "2"]


def test_fedavg_by_hand():
    base = {"a": torch.zeros(2)}
    states = [{"a": torch.tensor([1.0, 2])}, {"a": torch.tensor([5.0, -2])}]
    outcome = methods.get("fedavg")(states, weights=[3, 1], base=base)
    assert outcome.state["a"].tolist() == pytest.approx([2, 1])
    assert outcome.memory is None
    base["a"] += 1
    outcome = methods.get("fedavg")(states, weights=[3, 1], base=base, server_lr=2.0)
    assert outcome.state["a"].tolist() == pytest.approx([3, 1])
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(InputError, match="server_lr"):
            methods.get("fedavg")(states, weights=[3, 1], base=base, server_lr=bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_properties_of_fedavg(seed, dtype):
    base, states = draw(seed, 5, dtype)
    fedavg = methods.get("fedavg")

    def same(a, b):
        """Of this type the nearest value, or where float64 lies between two, the next."""
        return all(torch.allclose(a[n], b[n], rtol=torch.finfo(dtype).eps, atol=0) for n in SHAPES)

    one = fedavg(states[:1], weights=[7], base=base).state
    equal = fedavg([states[0]] * 3, weights=[1, 5, 11], base=base).state
    for state in (one, equal):  # to the bit, as its docstring says
        assert all(torch.equal(state[n], states[0][n]) for n in SHAPES)
    weights = [3, 0, 8, 1, 4]
    mean = fedavg(states, weights=weights, base=base).state
    assert same(mean, fedavg(states[::-1], weights=weights[::-1], base=base).state)
    assert same(mean, fedavg(states, weights=[8 * w for w in weights], base=base).state)
    heard = [s for s, w in zip(states, weights, strict=True) if w]
    assert same(mean, fedavg(heard, weights=[3, 8, 1, 4], base=base).state)


def test_local_leaves_every_client_alone():
    base, states = draw(0)
    outcome = methods.get("local")(states, weights=[1, 0, 5], base=base)
    assert len(outcome.state) == 3
    assert outcome.facts["clients"] == ["0", "1", "2"]
    for mine, theirs in zip(outcome.state, states, strict=True):
        assert all(torch.equal(mine[n], theirs[n]) for n in SHAPES)
