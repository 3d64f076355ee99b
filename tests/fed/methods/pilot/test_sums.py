"""Pilot from sums: every task's adapter and the mean LoRA, while no single client is seen."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fed import methods
from fed.clients.sum_client import Agreed, SumClient
from fed.clients.task import ClientError
from fed.methods.interface.explained_sums import ExplainedSums
from fed.methods.interface.sums import COUNT, Group, Groups, Own, Round, Summed
from fed.methods.pilot.send import ADAPTER
from fed.privacy.client_memory import STEPS
from fed.privacy.keys import Ed25519PrivateKey
from fed.server.secure_sums import SecureSums
from fed.train import train
from llava.errors import InputError
from tests.conftest import EVEN_ROUTER, assert_moved_alike

NAMES = ("a", "b", "c", "d", "e", "f")
TASKS = ("ask", "tell", "ask", "tell", "ask", "tell")
WEIGHTS = [3.0, 1.0, 2.0, 7.0, 4.0, 5.0]
MEAN = {"weighting": "mean"}
SHAPES = {f"{ADAPTER}0.weight": (4, 3), f"{ADAPTER}0.bias": (4,), "x.lora_A.weight": (2, 5)}


def draw(seed):
    """A base, the starts of the clients (their task's adapter, a LoRA of their own), and ends."""
    torch.manual_seed(seed)
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    memory = {
        f"{t}/{n}": torch.randn(tensor.shape)
        for t in dict.fromkeys(TASKS)
        for n, tensor in base.items()
        if n.startswith(ADAPTER)
    }
    starts = [
        {n: memory.get(f"{task}/{n}", torch.randn(t.shape)) for n, t in base.items()}
        for task in TASKS
    ]
    ends = [{n: t + 0.1 * torch.randn(t.shape) for n, t in start.items()} for start in starts]
    return base, memory, starts, ends


def opened(base, memory, ends):
    given = {"weights": WEIGHTS, "base": base, "memory": memory, "clients": NAMES, "tasks": TASKS}
    return methods.get("pilot")(ends, **given, **MEAN)


def assert_alike(found, expected):
    assert found.memory.keys() == expected.memory.keys()
    for name, tensor in expected.memory.items():
        torch.testing.assert_close(found.memory[name], tensor, rtol=1e-5, atol=1e-5)
    for one, other in zip(found.state, expected.state, strict=True):
        for name, tensor in other.items():
            torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-5)
    assert found.facts["tasks"] == expected.facts["tasks"]


def known(base, memory):
    return Round(base, memory, len(NAMES), len(NAMES), NAMES, TASKS)


class Sites:
    """Clients in secure sums; `away` names one that vanishes after the keys."""

    def __init__(self, folder, sums, owns, away=None):
        self.folder, self.sums, self.owns, self.away = folder, sums, owns, away
        self.keys = {name: Ed25519PrivateKey.generate() for name in owns}
        self.sites = {n: key.public_key().public_bytes_raw() for n, key in self.keys.items()}
        self.agreed = Agreed("0" * 32, 1, weight=10.0, norm=100.0)
        self.asked: list[set[str]] = []

    def ask(self, requests):
        self.asked.append(set(requests))
        for name, request in requests.items():
            if name == self.away and request.step in STEPS[2:]:
                yield name, ClientError(f"client {name}: away")
                continue
            place = self.folder / name
            client = SumClient(
                name, self.keys[name], self.sites, place, self.sums, self.owns[name], self.agreed
            )
            yield name, client.answer(request)

    def outcome(self, round):
        secure = SecureSums(self.folder / "round", self.agreed, self.sites, self.ask)
        return secure.outcome(self.sums, round)


@pytest.mark.parametrize("explains", [False, True])
def test_sums_are_the_open_round(explains):
    base, memory, starts, ends = draw(1)
    sums = methods.get("pilot").summed(MEAN)
    sums = ExplainedSums(sums) if explains else sums
    told = [9.0, 10.0, 0.5] if explains else None  # alike: weights are samples
    owns = [Own(e, s, w, {}, told) for e, s, w in zip(ends, starts, WEIGHTS, strict=True)]
    server = sums.exchanges(known(base, memory))
    given, exchange, counted = next(server), 0, []
    while True:
        groups, found = isinstance(given, Groups), {}
        for name, group in (given if groups else {"": Group(given, NAMES, {})}).items():
            terms = [sums.terms(exchange, owns[NAMES.index(n)], group.given) for n in group.clients]
            total = {n: sum(of[n].double() for of in terms) for n in terms[0]}
            found[name] = Summed(total, group.clients)
            counted.append(float(total.get(COUNT, torch.zeros(1))))
        try:
            given = server.send(found if groups else found[""].sums)
        except StopIteration as end:
            assert_alike(end.value, opened(base, memory, ends))
            break
        exchange += 1
    assert counted[-3:] == [3, 3, 6]
    assert exchange + 1 == sums.most_exchanges


@pytest.mark.parametrize("explains", [False, True])
def test_adapters_alone(tmp_path, explains):
    """Without LoRA there is one exchange the less."""

    def adapters(state):
        return {name: t for name, t in state.items() if not name.startswith("x.")}

    base, memory, starts, ends = draw(5)
    base, starts, ends = adapters(base), [*map(adapters, starts)], [*map(adapters, ends)]
    sums = methods.get("pilot").summed(MEAN)
    sums = ExplainedSums(sums) if explains else sums
    told = [9.0, 10.0, 0.5] if explains else None
    owns = [Own(e, s, w, {}, told) for e, s, w in zip(ends, starts, WEIGHTS, strict=True)]
    sites = Sites(tmp_path, sums, dict(zip(NAMES, owns, strict=True)))
    assert_alike(sites.outcome(known(base, memory)), opened(base, memory, ends))


def test_each_task_is_masked_by_its_own_clients(tmp_path):
    base, memory, starts, ends = draw(2)
    owns = [Own(e, s, w) for e, s, w in zip(ends, starts, WEIGHTS, strict=True)]
    sums = methods.get("pilot").summed(MEAN)
    sites = Sites(tmp_path, sums, dict(zip(NAMES, owns, strict=True)))
    assert_alike(sites.outcome(known(base, memory)), opened(base, memory, ends))
    assert [len(of) for of in sites.asked] == [3] * 10 + [6] * 5
    few = Round(base, memory, 6, 6, NAMES, ("ask", "tell", "ask", "tell", "tell", "tell"))
    sites = Sites(tmp_path / "few", sums, sites.owns)
    with pytest.raises(InputError, match="the sum of ask: .*3"):
        sites.outcome(few)


def test_who_vanishes_from_its_tasks_sum_is_in_no_fact(tmp_path):
    base, memory, starts, ends = draw(3)
    names, tasks = (*NAMES, "g", "h"), (*TASKS, "ask", "tell")
    starts, ends = [*starts, *starts[:2]], [*ends, *ends[2:4]]
    owns = {name: Own(ends[k], starts[k], 1.0) for k, name in enumerate(names)}
    sites = Sites(tmp_path, methods.get("pilot").summed(MEAN), owns, away="g")
    known = Round(base, memory, len(names), len(names), names, tasks)
    found = sites.outcome(known)
    there = [k for k, name in enumerate(names) if name != "g"]
    given = {key: [of[k] for k in there] for key, of in (("clients", names), ("tasks", tasks))}
    expected = methods.get("pilot")(
        [ends[k] for k in there], weights=[1.0] * 7, base=base, memory=memory, **given, **MEAN
    )
    assert found.facts["tasks"] == expected.facts["tasks"]
    assert found.facts["clients"] == given["clients"]
    for name, tensor in expected.memory.items():
        torch.testing.assert_close(found.memory[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.fixture
def pilot(flags, tiny, tmp_path):
    """`pilot(output, **changes)`: four clients with two tasks."""
    entry = "  - {{name: {}, task: {}, data_path: {}/{}.json, image_folder: {}/images}}\n"
    named = (("a", "colour"), ("b", "colour"), ("c", "shape"), ("d", "shape"))
    lines = [entry.format(n, task, tiny, "ab"[n in "bd"], tiny) for n, task in named]
    (tmp_path / "pilot.yaml").write_text("clients:\n" + "".join(lines))

    def run(output, **changes):
        values = {
            "fed_clients": tmp_path / "pilot.yaml", "fed_method": "pilot", "fed_rounds": 1,
            "mm_projector_type": "pilot", "tune_mm_mlp_adapter": False, "lora_enable": True,
            "lora_r": 2, "fed_options": ["weighting=mean"], "output_dir": output, **EVEN_ROUTER,
            **changes,
        }  # fmt: skip
        train(flags(**values))
        return [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]

    return run


def test_a_run_of_sums_ends_as_the_open_run(pilot, tmp_path):
    pilot(tmp_path / "open")
    records = pilot(tmp_path / "secure", fed_secure=True, fed_secure_min=2)
    pilot(tmp_path / "start", learning_rate=0)
    for record in records:
        assert record["norms"] is None
        assert record["facts"]["tasks"] == {"colour": ["a", "b"], "shape": ["c", "d"]}
        assert "lora" not in record["facts"]
    for file in ("tasks/shape/mm_projector.bin", "tasks/colour/mm_projector.bin"):
        parts = [
            torch.load(tmp_path / name / file, weights_only=True)
            for name in ("secure", "open", "start")
        ]
        assert_moved_alike(*parts, 0.01)
    file = "clients/c/adapter_model.safetensors"
    assert_moved_alike(
        *(load_file(tmp_path / name / file) for name in ("secure", "open", "start")), 0.01
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fed_options": ["weighting=literal"]}, "weighting=literal looks at single clients' LoRA"),
        ({"fed_options": ["weighting=mean", "average=product"]}, "average=product looks at single"),
        ({"fed_secure_min": 3}, "--fed_secure_min is 3: .*, and colour has 2 clients in round 1"),
        ({"fed_clients_per_round": 3}, "--fed_clients_per_round has no place with --fed_secure"),
    ],
)
def test_what_no_sum_says_is_refused(pilot, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        pilot(tmp_path / "run", **{"fed_secure": True, "fed_secure_min": 2, **changes})
    assert not (tmp_path / "run").exists()
