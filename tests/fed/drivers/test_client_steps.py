"""Methods with a rule for the clients' steps: FedProx and SCAFFOLD, by hand and in the trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fed import methods, state, validation
from fed.arguments import CLIENT_FLAGS
from fed.clients.clients_yaml import load_clients
from fed.clients.task import ClientTask
from fed.clients.update import Update
from fed.drivers.client_steps import ClientSteps
from fed.drivers.driver import Run
from fed.drivers.resident import ResidentDriver
from fed.methods.interface.client_rule import FOR_CLIENTS, ClientRule, for_clients
from fed.server.round_state import RoundState
from fed.server.tracking import RunLogger
from fed.state import StateError
from fed.train import train
from llava.errors import InputError

PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1}


def one(*values: float) -> state.State:
    return {"w": torch.tensor(values)}


def scaffold(states, extras, **changes):
    arguments = {"weights": [1] * len(states), "base": one(0.0), "extras": extras} | changes
    return methods.get("scaffold")(states, **arguments)


# -- the rules and the server's arithmetic, by hand -----------------------------------------------


def test_fedprox_adds_the_pull_to_the_start():
    rule = methods.get("fedprox").rule({"mu": 0.5})(one(1.0, 2.0), {}, {})
    assert rule.step(one(9.0, 9.0), one(1.0, 2.0))["w"].tolist() == pytest.approx([0, 0])
    assert rule.step(one(9.0, 9.0), one(3.0, 1.0))["w"].tolist() == pytest.approx([1, -0.5])
    assert rule.end() == ({}, {})
    assert rule.running == {}
    assert methods.get("fedprox").rule({"mu": 0})(one(1.0), {}, {}).step({}, one(2.0)) == {}
    by_default = methods.get("fedprox").rule({})(one(1.0), {}, {})
    assert by_default.step({}, one(2.0))["w"].item() == pytest.approx(0.01)


def test_fedprox_averages_as_fedavg_does():
    states, base = [one(1.0), one(5.0)], one(0.0)
    for options in ({}, {"server_lr": 0.5}, {"paper_compat": True}):
        prox = methods.get("fedprox")(states, weights=[3, 1], base=base, mu=1.0, **options)
        mean = methods.get("fedavg")(states, weights=[3, 1], base=base, **options)
        assert prox.state["w"].item() == pytest.approx(mean.state["w"].item())
        assert prox.memory is None


def test_scaffolds_client_by_hand():
    rule = methods.get("scaffold").rule({})(one(0.0), one(5.0), one(2.0))  # c = 5, c_k = 2
    assert rule.step(one(1.0), one(0.0))["w"].item() == pytest.approx(3)
    assert rule.step(one(-4.0), one(0.0))["w"].item() == pytest.approx(3)
    kept, extras = rule.end()
    # The mean of the client's own gradients, without the addition.
    assert kept["w"].item() == pytest.approx(-1.5)
    assert extras["w"].item() == pytest.approx(-3.5)
    first = methods.get("scaffold").rule({})(one(0.0), {}, {})
    assert first.step(one(1.0), one(0.0))["w"].item() == pytest.approx(0)
    assert [part["w"].item() for part in first.end()] == pytest.approx([1, 1])
    # A step in which the tensor has no gradient counts as one of gradient 0.
    first.step({}, one(0.0))
    assert first.end().kept["w"].item() == pytest.approx(0.5)
    idle = methods.get("scaffold").rule({})(one(0.0), one(5.0), one(2.0))
    assert [part["w"].item() for part in idle.end()] == pytest.approx([2, 0])


def test_scaffolds_server_by_hand():
    states, extras = [one(2.0), one(6.0)], [one(1.0), one(-5.0)]
    outcome = scaffold(states, extras, total=8)
    assert outcome.state["w"].item() == pytest.approx(4)
    assert list(outcome.memory) == ["w.for_clients"]
    assert outcome.memory["w.for_clients"].item() == pytest.approx(-0.5)  # 2/8 of the mean, -2
    assert outcome.facts.pop("clients") == ["0", "1"]
    assert outcome.facts == pytest.approx({"c": 0.5, "share": 0.25})
    more = scaffold(states, extras, total=8, memory=outcome.memory, server_lr=2.0)
    assert more.state["w"].item() == pytest.approx(8)
    assert more.memory["w.for_clients"].item() == pytest.approx(-1)
    # Published is the plain mean, whatever the samples are; the option takes both by samples.
    assert scaffold(states, extras, weights=[3, 1]).state["w"].item() == pytest.approx(4)
    samples = scaffold(states, extras, weights=[3, 1], weighting="samples")
    assert samples.state["w"].item() == pytest.approx(3)
    assert samples.memory["w.for_clients"].item() == pytest.approx(-0.5)
    # Who had no sample is not in S, and its extras are not looked at.
    absent = scaffold([*states, one(99.0)], [*extras, one(99.0)], weights=[1, 1, 0])
    assert absent.state["w"].item() == pytest.approx(4)
    assert absent.memory["w.for_clients"].item() == pytest.approx(-4 / 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extras": None}, "scaffold needs extras"),
        ({"extras": [one(1.0)]}, "1 extras, expected one of each of 2 clients"),
        ({"extras": [one(1.0), {}]}, "client 1, beside its state: tensor w is missing"),
        ({"extras": [one(1.0), one(math.nan)], "clients": ["a", "b"]}, "client b, .*NaN"),
        ({"extras": [one(1.0, 2.0), one(1.0)]}, r"client 0, .*shape \(2,\)"),
        ({"total": 1}, "2 client states of 1 clients"),
        ({"memory": one(1.0)}, "scaffold memory: tensor w.for_clients is missing"),
        ({"memory": {"w.for_clients": torch.zeros(3)}}, r"scaffold memory: .*shape \(3,\)"),
        ({"server_lr": 0.0}, "server_lr: expected a positive number"),
        ({"weighting": "size"}, "weighting: expected one of uniform, samples"),
    ],
)
def test_what_scaffolds_server_refuses(change, said):
    arguments = {"extras": [one(1.0), one(1.0)]} | change
    with pytest.raises(InputError, match=said):
        scaffold([one(1.0), one(2.0)], **arguments)


def test_other_methods_take_no_extras():
    mean = methods.get("fedavg")
    with pytest.raises(StateError, match="client 0, beside its state: tensor w is not expected"):
        mean([one(1.0)], weights=[1], base=one(0.0), extras=[one(1.0)])
    found = mean([one(1.0)], weights=[1], base=one(0.0), extras=[{}], total=4)
    assert found.state["w"].item() == pytest.approx(1)
    assert methods.get("fedavg").rule({}) is None


# -- many rounds of plain SGD on |w - optimum|^2 * slope / 2, in float64 --------------------------

OPTIMA = [(1.0, -2.0), (4.0, 0.0), (-3.0, 5.0)]
SLOPES = [(1.0, 0.5), (0.3, 2.0), (1.5, 1.0)]
LR = 0.1


def play(name, rounds, steps=5, take=lambda round: range(3), clients=None, **options):
    """Rounds of a method on such clients; gives the last state, its memory, and what they keep."""
    clients = clients or list(zip(OPTIMA, SLOPES, strict=True))
    make = methods.get(name).rule(options) or ClientRule
    now, memory, kept = {"w": torch.zeros(2, dtype=torch.float64)}, {}, {}
    for round in range(rounds):
        states, extras = [], []
        for k in take(round):
            rule, w = make(now, for_clients(memory), kept.get(k, {})), now["w"].clone()
            for _ in range(steps):
                g = (w - torch.tensor(clients[k][0])) * torch.tensor(clients[k][1])
                w = w - LR * (g + rule.step({"w": g}, {"w": w}).get("w", 0))
            kept[k], sent = rule.end()
            states.append({"w": w})
            extras.append(sent)
        outcome = methods.get(name)(
            states,
            weights=[1.0] * len(states),
            base=now,
            memory=memory,
            extras=extras,
            total=len(clients),
            **options,
        )
        now, memory = outcome.state, outcome.memory or {}
    return now["w"], memory, kept


def optimum():
    slopes = torch.tensor(SLOPES).double()
    return (slopes * torch.tensor(OPTIMA)).sum(0) / slopes.sum(0)


def test_scaffold_ends_at_the_common_optimum_where_fedavg_does_not():
    off = {name: (play(name, 400)[0] - optimum()).norm() for name in ("fedavg", "scaffold")}
    assert off["fedavg"] > 0.05
    assert off["scaffold"] < 1e-5


def test_scaffold_ends_there_with_some_clients_a_round_and_one_that_comes_late():
    def some(round):
        if round < 30:
            return [round % 2]
        return [[0, 2], [1], [2, 1], [0]][round % 4]

    w, memory, kept = play("scaffold", 1500, take=some)
    assert (w - optimum()).norm() < 1e-4
    mean = sum(own["w"] for own in kept.values()) / 3
    assert torch.allclose(memory["w.for_clients"], mean, atol=1e-5)
    # Before it comes, the late one counts with c_k = 0.
    _, memory, kept = play("scaffold", 3, take=some)
    assert set(kept) == {0, 1}
    mean = (kept[0]["w"] + kept[1]["w"]) / 3
    assert torch.allclose(memory["w.for_clients"], mean, atol=1e-5)
    assert mean.norm() > 0.1


def test_absent_clients_keep_what_they_had():
    _, _, once = play("scaffold", 1)
    _, _, twice = play("scaffold", 2, take=lambda round: range(3) if round == 0 else [1])
    assert torch.equal(once[0]["w"], twice[0]["w"])
    assert torch.equal(once[2]["w"], twice[2]["w"])
    assert not torch.equal(once[1]["w"], twice[1]["w"])


@pytest.mark.parametrize("clients", [1, 3])
def test_where_clients_are_alike_scaffold_is_fedavg(clients):
    same = [(OPTIMA[0], SLOPES[0])] * clients
    runs = [play(n, 6, take=lambda r: range(clients), clients=same) for n in ("scaffold", "fedavg")]
    a, b = (run[0] for run in runs)
    assert torch.allclose(a, b, atol=1e-6)
    assert not torch.equal(b, torch.zeros(2).double())


def test_the_mean_gradient_is_the_papers_option_two_for_plain_sgd():
    common, own = one(0.3, -0.2), one(-1.0, 0.5)
    rule = methods.get("scaffold").rule({})(one(0.0, 0.0), common, own)
    w = torch.zeros(2)
    for i in range(7):
        g = torch.sin(w + i)
        w = w - LR * (g + rule.step({"w": g}, {"w": w})["w"])
    option_two = own["w"] - common["w"] + (0 - w) / (7 * LR)
    assert torch.allclose(rule.end().kept["w"], option_two, atol=1e-6)


def test_a_larger_mu_keeps_clients_nearer_and_zero_is_fedavg():
    start = torch.zeros(2).double()
    moved = [(play("fedprox", 1, mu=mu)[0] - start).norm() for mu in (0.0, 0.1, 1.0, 5.0)]
    assert moved[0].item() == pytest.approx((play("fedavg", 1)[0] - start).norm().item())
    assert all(a > b for a, b in zip(moved, moved[1:], strict=False))
    assert moved[3] > 0


# -- in LLaVA's own trainer -----------------------------------------------------------------------


def run(flags, output_dir, clients, **changes) -> list[dict]:
    """One run; the records of its rounds."""
    train(flags(**{"fed_clients": clients, "output_dir": output_dir, **changes}))
    return [json.loads(line) for line in (output_dir / "rounds.jsonl").read_text().splitlines()]


def result(folder: Path) -> bytes:
    return (folder / "mm_projector.bin").read_bytes()


def same(a: state.State, b: state.State, **tolerance) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], **tolerance) for n in a)


class Bench:
    """The resident driver with the tiny model: `turn(method, ...)` is one turn of client a."""

    def __init__(self, flags, tiny, folder: Path, **changes):
        changes = {"fed_clients": tiny / "clients.yaml", "output_dir": folder / "run", **changes}
        argv = flags(**{**PLAIN, "max_grad_norm": 0, **changes})
        arguments, _ = validation.check_flags(validation.parse_arguments(argv))
        specs = load_clients(arguments.fed.fed_clients, CLIENT_FLAGS)
        own = [validation.arguments_of(spec, argv, arguments) for spec in specs]
        log_of = RunLogger(arguments.training, []).of_client
        self.driver = ResidentDriver(Run(specs, arguments, own, methods.get("fedavg"), {}, log_of))
        self.client, self.start = self.driver.clients[0], self.driver.initial
        self.folder = folder

    def turn(self, method="fedavg", extras=None, kept=None, **options) -> Update:
        self.driver.rule = methods.get(method).rule(options)
        given = {"extras": extras or {}, "kept": kept or {}}
        return self.driver.fit(ClientTask(self.client, self.start, 1, self.folder, **given))


@pytest.fixture
def bench(flags, tiny, tmp_path):
    return lambda **changes: Bench(flags, tiny, tmp_path, **changes)


def normal(like: state.State, seed: int) -> state.State:
    torch.manual_seed(seed)
    return {name: 1e-2 * torch.randn_like(tensor) for name, tensor in like.items()}


def test_one_step_by_hand_with_accumulated_batches(bench):
    """Twelve samples in two halves that make one step: all gradients in it, the addition once."""
    b = bench(per_device_train_batch_size=6, gradient_accumulation_steps=2)
    plain = b.turn()
    assert plain.metrics["steps"] == 1
    assert plain.extras == plain.kept == {}
    common, own = normal(b.start, 1), normal(b.start, 2)
    turn = b.turn("scaffold", common, own)
    gradient = {n: (b.start[n] - t) / 0.1 for n, t in plain.state.items()}
    assert same(turn.kept, gradient, atol=1e-6)
    assert not list((b.folder / "a").glob("*"))  # no checkpoint is due
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-2
    assert same(turn.extras, {n: gradient[n] - own[n] for n in own}, atol=1e-6)
    by_hand = {n: t - 0.1 * (common[n] - own[n]) for n, t in plain.state.items()}
    assert same(turn.state, by_hand, atol=1e-7)
    assert not same(turn.state, plain.state, atol=1e-5)
    # The first step of FedProx starts where the pull is to.
    prox = b.turn("fedprox", mu=5.0)
    assert all(torch.equal(prox.state[n], t) for n, t in plain.state.items())
    assert prox.extras == prox.kept == {}


def test_two_steps_of_fedprox_by_hand(bench):
    b = bench(per_device_train_batch_size=6)
    plain, prox = b.turn(), b.turn("fedprox", mu=2.0)
    b.client.args.max_steps = 1
    first = b.turn().state
    # The second step's own gradients are taken at the same weights.
    by_hand = {n: t - 0.1 * 2 * (first[n] - b.start[n]) for n, t in plain.state.items()}
    assert same(prox.state, by_hand, atol=1e-7)
    assert not same(prox.state, plain.state, atol=1e-5)


def test_option_two_holds_in_the_trainer_with_clipping(bench):
    b = bench(max_grad_norm=0.05)
    common, own = normal(b.start, 1), normal(b.start, 2)
    turn = b.turn("scaffold", common, own)
    k = turn.metrics["steps"]
    assert k == 6
    option_two = {
        n: own[n] - common[n] + (b.start[n] - y) / (k * 0.1) for n, y in turn.state.items()
    }
    assert same(turn.kept, option_two, atol=1e-6)


def test_lora_and_what_trains_beside_it(bench):
    b = bench(tune_mm_mlp_adapter=False, lora_enable=True, lora_r=4, lora_dropout=0.0)
    common, own = normal(b.start, 1), normal(b.start, 2)
    assert any("lora_A" in n for n in common)
    assert any("mm_projector" in n for n in common)
    turn = b.turn("scaffold", common, own)
    option_two = {n: own[n] - common[n] + (b.start[n] - y) / 0.6 for n, y in turn.state.items()}
    assert same(turn.kept, option_two, atol=1e-6)
    near, far = (b.turn("fedprox", mu=mu).state for mu in (8.0, 0.0))
    for part in ("lora_B", "mm_projector"):
        moved = [
            sum(float((end[n] - t).square().sum()) for n, t in b.start.items() if part in n)
            for end in (near, far)
        ]
        assert 0 < moved[0] < moved[1]


def test_frozen_tensors_and_missing_gradients_and_skipped_steps():
    class Args:
        fp16 = False

    class Seen(ClientRule):
        def step(self, gradients, weights):
            self.seen = sorted(gradients)
            return {name: torch.ones_like(t) for name, t in self.start.items()}

        def __init__(self, start, sent, kept):
            super().__init__(start, sent, kept)
            self.start = start

    parameters = {n: torch.nn.Parameter(torch.zeros(2)) for n in ("a", "b", "frozen")}
    parameters["frozen"].requires_grad = False
    parameters["a"].grad = torch.full((2,), 3.0)
    steps = ClientSteps(Seen, parameters, {}, {})
    steps.on_pre_optimizer_step(Args, None, None)
    assert steps.rule.seen == ["a"]
    assert parameters["frozen"].grad is None
    assert parameters["a"].grad.tolist() == pytest.approx([4, 4])
    assert parameters["b"].grad.tolist() == pytest.approx([1, 1])
    Args.fp16 = True  # what the scaler of the loss is to leave out is no step
    parameters["b"].grad[0] = math.inf
    steps.rule.seen = None
    steps.on_pre_optimizer_step(Args, None, None)
    assert steps.rule.seen is None
    assert parameters["a"].grad.tolist() == pytest.approx([4, 4])


def test_mu_zero_is_fedavg_to_the_bit_and_a_large_mu_stays_near(flags, tiny, tmp_path):
    ends = {}
    for name, method, options in (
        ("fedavg", "fedavg", None),
        ("zero", "fedprox", ["mu=0"]),
        ("small", "fedprox", ["mu=0.1"]),
        ("large", "fedprox", ["mu=30"]),
    ):
        run(
            flags,
            tmp_path / name,
            tiny / "clients.yaml",
            fed_rounds=2,
            fed_method=method,
            fed_options=options,
            **{**PLAIN, "learning_rate": 0.03},
        )
        ends[name] = result(tmp_path / name)
    assert ends["zero"] == ends["fedavg"] != ends["small"]
    start = RoundState.load(tmp_path / "zero/fed")
    assert start.memory == {}
    assert start.kept == {}
    first = Bench(flags, tiny, tmp_path / "bench").start
    moved = {
        name: sum(float((t - first[n]).square().sum()) for n, t in load(tmp_path / name).items())
        for name in ends
    }
    assert moved["large"] < moved["small"] < moved["fedavg"]


def load(folder: Path) -> state.State:
    return state.load(folder / "mm_projector.bin")


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_scaffold_in_rounds(flags, tiny, tmp_path, optim):
    common = {**PLAIN, "optim": optim, "learning_rate": 1e-2, "fed_method": "scaffold"}
    records = run(flags, tmp_path / "x", tiny / "clients.yaml", fed_rounds=3, **common)
    assert [record["facts"]["share"] for record in records] == pytest.approx([1, 1, 1])
    now = RoundState.load(tmp_path / "x/fed")
    assert set(now.kept) == {"a", "b"}
    mean = {n: (now.kept["a"][n] + t) / 2 for n, t in now.kept["b"].items()}
    assert same(mean, for_clients(now.memory), atol=1e-6)
    assert records[-1]["facts"]["c"] == pytest.approx(
        math.sqrt(sum(float(t.square().sum()) for t in now.memory.values())), rel=1e-4
    )
    # The first round corrects nothing, and is the plain mean of what clients do in FedAvg.
    run(flags, tmp_path / "one", tiny / "clients.yaml", **common)
    apart = run(
        flags, tmp_path / "apart", tiny / "clients.yaml", **{**common, "fed_method": "local"}
    )
    a, b = (load(tmp_path / "apart/clients" / name) for name in "ab")
    assert same(load(tmp_path / "one"), {n: (a[n] + b[n]) / 2 for n in a}, atol=1e-6)
    assert apart[0]["clients"]["a"]["samples"] != apart[0]["clients"]["b"]["samples"]


def test_a_turn_gets_what_the_server_has_and_what_the_client_kept(
    flags, tiny, tmp_path, monkeypatch
):
    begin, got = ClientSteps.__init__, []

    def seen(self, rule, parameters, sent, kept):
        got.append((sent, kept))
        begin(self, rule, parameters, sent, kept)

    monkeypatch.setattr(ClientSteps, "__init__", seen)
    common = {**PLAIN, "fed_method": "scaffold", "fed_one_pass": False, "fed_lr_schedule": "round"}
    run(flags, tmp_path / "one", tiny / "clients.yaml", fed_rounds=1, **common)
    assert got == [({}, {})] * 2
    got.clear()
    run(flags, tmp_path / "two", tiny / "clients.yaml", fed_rounds=2, **common)
    now = RoundState.load(tmp_path / "one/fed")  # after the first of the two
    for (sent, kept), name in zip(got[2:], "ab", strict=True):
        assert same(sent, for_clients(now.memory), rtol=0, atol=0)
        assert same(kept, now.kept[name], rtol=0, atol=0)


def test_scaffold_with_a_part_of_the_clients(flags, tiny, tmp_path):
    common = {**PLAIN, "fed_method": "scaffold", "fed_clients_per_round": 1, "seed": 22}
    names, kept, memories = [], [], []
    for rounds in range(1, 5):
        folder = tmp_path / str(rounds)
        # The rounds differ in length, so that each run is its own; what is asserted holds in each.
        records = run(flags, folder, tiny / "clients.yaml", fed_rounds=rounds, fed_one_pass=False,
                      fed_lr_schedule="round", **common)  # fmt: skip
        now = RoundState.load(folder / "fed")
        names = [next(iter(record["clients"])) for record in records]
        kept.append(now.kept)
        memories.append(for_clients(now.memory))
    assert names == ["a", "a", "b", "a"]  # so the seed has it: b joins late, and is absent then
    for i in range(1, 4):
        other = "b" if names[i] == "a" else "a"
        assert kept[i].get(other, {}).keys() == kept[i - 1].get(other, {}).keys()
        if other in kept[i]:  # the absent client keeps its own, to the bit
            assert all(torch.equal(t, kept[i - 1][other][n]) for n, t in kept[i][other].items())
    assert set(kept[0]) == {names[0]}
    for states, memory in zip(kept, memories, strict=True):
        mean = {n: sum(own[n] for own in states.values()) / 2 for n in memory}
        assert same(mean, memory, atol=1e-6)


def test_a_client_without_a_sample_is_absent_and_joins_late(flags, tiny, tmp_path):
    records = json.loads((tiny / "a.json").read_text())
    (tmp_path / "single.json").write_text(json.dumps(records[:1]))
    names = {"a": tiny / "a.json", "single": tmp_path / "single.json"}
    clients = [
        {"name": name, "data_path": str(path), "image_folder": str(tiny / "images")}
        for name, path in names.items()
    ]
    (tmp_path / "c.yaml").write_text(json.dumps({"clients": clients}))
    common = {**PLAIN, "fed_method": "scaffold", "fed_rounds": 3}
    records = run(flags, tmp_path / "x", tmp_path / "c.yaml", **common)
    assert [record["facts"]["share"] for record in records] == pytest.approx([0.5, 0.5, 1])
    now = RoundState.load(tmp_path / "x/fed")
    mean = {n: (now.kept["a"][n] + t) / 2 for n, t in now.kept["single"].items()}
    assert same(mean, for_clients(now.memory), atol=1e-6)


def test_only_what_is_for_clients_is_sent_to_them():
    assert for_clients({**one(1.0), "w.m": torch.ones(1)}) == {}
    assert for_clients({"w.m": torch.ones(1), "w" + FOR_CLIENTS: torch.zeros(1)}) == one(0.0)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("extras", lambda bias: bias.fill_(math.nan), "0.bias has .*NaN"),
        ("kept", lambda bias: bias.fill_(math.inf), "0.bias has .*NaN or inf"),
        ("extras", None, "tensor .* is missing"),
        ("kept", None, "tensor .* is missing"),
    ],
)
def test_bad_tensors_beside_a_state_stop_the_run_by_name_and_are_not_kept(
    flags, tiny, tmp_path, monkeypatch, part, change, said
):
    finish = ClientSteps.finish

    def broken(self, update):
        finish(self, update)
        if change is None:
            setattr(update, part, {})
        else:
            change(getattr(update, part)["model.mm_projector.0.bias"])

    common = {"fed_clients": tiny / "clients.yaml", "fed_method": "scaffold", "fed_rounds": 2}
    monkeypatch.setattr(ClientSteps, "finish", broken)
    where = {"extras": "beside its state", "kept": "in what it keeps"}[part]
    with pytest.raises(StateError, match=f"client a, {where}: .*{said}"):
        train(flags(**common, output_dir=tmp_path / "x"))
    monkeypatch.setattr(ClientSteps, "finish", finish)
    for name in "xy":
        train(flags(**common, output_dir=tmp_path / name))
    assert result(tmp_path / "x") == result(tmp_path / "y")


class StopError(Exception):
    """Stands for a kill, where what matters is what is on the disk then."""


@pytest.mark.parametrize(
    ("method", "options"), [("scaffold", ["server_lr=0.7"]), ("fedprox", ["mu=3"])]
)
@pytest.mark.parametrize("step", [1, 3, 4, 8, 11])  # 3, 8 and 11 come after a checkpoint
def test_a_turn_cut_short_goes_on_with_what_was_summed(
    flags, tiny, tmp_path, monkeypatch, method, options, step
):
    changes = {"save_strategy": "steps", "save_steps": 2, "fed_rounds": 2}
    cut_short(flags, tiny, tmp_path, monkeypatch, method, options, step, every=2, **changes)


def test_a_turn_cut_short_in_its_second_epoch(flags, tiny, tmp_path, monkeypatch):
    changes = {"save_strategy": "epoch", "num_train_epochs": 2, "fed_rounds": 1}
    cut_short(flags, tiny, tmp_path, monkeypatch, "scaffold", [], 9, every=6, **changes)


def cut_short(flags, tiny, tmp_path, monkeypatch, method, options, step, every, **changes):
    """Stop before a step, go on; that must begin at a multiple of `every` and end in the bits."""
    from llava.train.llava_trainer import LLaVATrainer

    common = {
        **PLAIN,
        "fed_clients": tiny / "clients.yaml",
        "fed_method": method,
        "fed_options": options or None,
        "save_total_limit": 1,
        **changes,
    }
    one_step, begun, stops = LLaVATrainer.training_step, [], [step]

    def counted(self, *args, **kwargs):
        begun.append(self.state.global_step)
        if [len(begun)] == stops:
            raise StopError
        return one_step(self, *args, **kwargs)

    monkeypatch.setattr(LLaVATrainer, "training_step", counted)
    with pytest.raises(StopError):
        train(flags(**common, output_dir=tmp_path / "x"))
    left = begun[-1]
    begun.clear()
    stops.clear()
    train(flags(**common, output_dir=tmp_path / "x"))
    assert begun[0] == left - left % every  # it went on from the checkpoint, not from the beginning
    train(flags(**common, output_dir=tmp_path / "y"))
    assert result(tmp_path / "x") == result(tmp_path / "y")
    x, y = (RoundState.load(tmp_path / name / "fed") for name in "xy")
    for name, own in y.kept.items():
        assert all(torch.equal(t, x.kept[name][n]) for n, t in own.items())
    assert all(torch.equal(t, x.memory[n]) for n, t in y.memory.items())
    assert bool(y.kept) == (method == "scaffold")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fed_method": "fedprox", "fed_options": ["mu=-1"]}, "mu: expected 0 or more, found -1"),
        ({"fed_method": "fedprox", "fed_options": ["mu=inf"]}, "mu: expected 0 or more, found inf"),
        ({"fed_method": "scaffold", "fed_options": ["server_lr=0"]}, "server_lr"),
        ({"fed_method": "scaffold", "fed_options": ["mu=1"]}, "scaffold has no option 'mu'"),
        ({"fed_method": "scaffold", "fed_options": ["total=1"]}, "no option 'total'"),
        (
            {"fed_method": "scaffold", "fed_driver": "script"},
            "scaffold changes .*--fed_driver",
        ),
        ({"fed_method": "fedprox", "fed_pool": True}, "fedprox has no place with --fed_pool"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    flags, tiny, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr("fed.drivers.resident.load_session", None)
    with pytest.raises(InputError, match=message):
        train(flags(fed_clients=tiny / "clients.yaml", **changes))


@pytest.mark.parametrize("flag", ["deepspeed", "fsdp"])
def test_gradients_that_are_elsewhere_are_refused(flags, tiny, flag):
    for method in ("fedprox", "fedavg"):
        argv = flags(fed_clients=tiny / "clients.yaml", fed_method=method)
        arguments = validation.parse_arguments(argv)
        setattr(arguments[2], flag, "zero2.json")  # on the command line it would start DeepSpeed
        if method == "fedavg":
            validation.check_flags(arguments)
            continue
        with pytest.raises(InputError, match=f"--fed_method fedprox .*--{flag} keeps them"):
            validation.check_flags(arguments)


def test_a_run_is_not_continued_with_another_mu(flags, tiny, tmp_path):
    common = {"fed_clients": tiny / "clients.yaml", "output_dir": tmp_path, "fed_method": "fedprox"}
    train(flags(**common, fed_options=["mu=1"]))
    with pytest.raises(InputError, match="mu of --fed_options = '1.0', now it is '2.0'"):
        train(flags(**common, fed_options=["mu=2"]))
