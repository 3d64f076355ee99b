"""Rounds from secure sums, with real masks: the open round's outcome, whoever dies in between."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fed import methods
from fed.clients.sum_client import Agreed, SumClient
from fed.clients.task import ClientError
from fed.methods.interface.sums import Own, Round
from fed.privacy.client_memory import STEPS
from fed.privacy.keys import Ed25519PrivateKey
from fed.report import main as report
from fed.server.secure_sums import SecureSums
from fed.state import load
from fed.train import train
from llava.errors import InputError
from tests.conftest import assert_moved_alike
from tests.fed.methods.interface.test_sums import draw

NAMES = ("north", "south", "st-mary", "west")
WEIGHTS = (300.0, 100.0, 200.0, 700.0)
AGREED = Agreed("0" * 32, 1, weight=1000.0, norm=100.0)


class Killed(Exception):  # noqa: N818
    pass


class Hospitals:
    """Four sites whose requests and answers a test may count, stop and change."""

    def __init__(self, folder, name="fedavg", agreed=AGREED, **options):
        self.folder, self.agreed = folder, agreed
        self.sums = methods.get(name).summed(options)
        self.base, self.states, self.extras = draw(5)
        self.keys = {name: Ed25519PrivateKey.generate() for name in NAMES}
        self.sites = {n: key.public_key().public_bytes_raw() for n, key in self.keys.items()}
        self.gone: set[tuple[str, str]] = set()  # a client, and the step that it does not answer
        self.asked, self.kill_at = 0, None
        self.changed = lambda name, request: request
        self.base_of: dict[str, dict] = {}

    @property
    def round(self) -> Round:
        return Round(self.base, {}, len(NAMES), 6)

    def client(self, name) -> SumClient:
        k = NAMES.index(name)
        extras = self.extras[k] if self.sums.method.sends_extras else {}
        own = Own(self.states[k], self.base_of.get(name, self.base), WEIGHTS[k], extras)
        place = self.folder / "sites" / name
        return SumClient(name, self.keys[name], self.sites, place, self.sums, own, self.agreed)

    def ask(self, requests):
        for name, request in requests.items():
            if (name, request.step) in self.gone:
                yield name, ClientError(f"client {name}: away")
                continue
            answer = self.client(name).answer(self.changed(name, request))
            for after in (False, True):  # before the server has the answer, and after
                if self.asked == self.kill_at:
                    raise Killed
                self.asked += 1
                if not after:
                    yield name, answer

    def server(self) -> SecureSums:
        return SecureSums(self.folder / "round", self.agreed, self.sites, self.ask)

    def outcome(self):
        return self.server().outcome(self.sums, self.round)

    def expected(self, without=()):
        kept = [k for k, name in enumerate(NAMES) if name not in without]
        more = {}
        if self.sums.method.sends_extras:
            more = {"extras": [self.extras[k] for k in kept], "total": 6}
        return self.sums.method(
            [self.states[k] for k in kept],
            weights=[WEIGHTS[k] for k in kept],
            base=self.base,
            **more,
            **{n: v for n, v in self.sums.options.items() if v is not None},
        )


def assert_near(found, expected, base):
    for name, tensor in expected.state.items():
        assert (found.state[name] - tensor).norm() <= 1e-5 * (tensor - base[name]).norm(), name


CASES = [
    ("fedavg", {}),
    ("fedadam", {}),
    ("fedexp", {}),
    ("scaffold", {"weighting": "samples"}),
    ("norm_clip", {"bound": 1.0}),
    ("fedcmp", {}),
    ("fedcmp", {"reliability": "agreement", "tau": 0.5}),
    ("fedcmp", {"basis": "randomised", "rank": 3}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_masked_sums_give_the_open_round(tmp_path, name, options):
    sites = Hospitals(tmp_path, name, **options)
    assert_near(sites.outcome(), sites.expected(), sites.base)


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_vanishes_is_left_out_once_it_has_sent_nothing(tmp_path, step):
    sites = Hospitals(tmp_path, "fedcmp")
    sites.gone = {("west", later) for later in STEPS[STEPS.index(step) :]}
    server = sites.server()
    found = server.outcome(sites.sums, sites.round)
    masked = STEPS.index(step) > STEPS.index("MaskedInputCollection")
    assert_near(found, sites.expected(without=() if masked else ("west",)), sites.base)
    assert server.gone == {"west": "client west: away"}
    assert found.facts["clients"] == [n for n in NAMES if n != "west" or masked]


def test_with_too_few_there_is_no_sum_and_the_next_start_has_fresh_masks(tmp_path):
    sites = Hospitals(tmp_path)
    sites.gone = {("west", STEPS[2]), ("south", STEPS[2])}
    with pytest.raises(InputError, match="3 clients are needed in MaskedInput.*, there are 2"):
        sites.outcome()
    first = {n: json.loads((tmp_path / f"sites/{n}/sum-0001-0.json").read_text()) for n in NAMES}
    sites.gone = set()
    assert_near(sites.outcome(), sites.expected(), sites.base)
    for name in NAMES:
        again = json.loads((tmp_path / f"sites/{name}/sum-0001-0.json").read_text())
        assert again["terms"] != first[name]["terms"]
        assert again["secrets"] == {}


def test_after_unmasking_has_begun_the_same_attempt_goes_on(tmp_path):
    sites = Hospitals(tmp_path)
    sites.gone = {("west", STEPS[4]), ("south", STEPS[4])}
    with pytest.raises(InputError, match="needed in Unmasking, there are 2"):
        sites.outcome()
    sites.gone = set()
    assert_near(sites.outcome(), sites.expected(), sites.base)


@pytest.mark.slow  # many rounds: a sum that was cut anywhere must not be lost, nor masked twice
@pytest.mark.parametrize(("name", "options", "every"), [("fedavg", {}, 1), (*CASES[-2], 7)])
def test_a_server_killed_at_any_answer_ends_in_the_same_bits(tmp_path, name, options, every):
    whole = Hospitals(tmp_path / "whole", name, **options)
    expected = whole.outcome()
    assert whole.asked > 30
    for at in range(0, whole.asked, every):
        sites = Hospitals(tmp_path / str(at), name, **options)
        sites.kill_at = at
        with pytest.raises(Killed):
            sites.outcome()
        sites.asked, sites.kill_at = -1, None
        found = sites.outcome()
        for tensor, wanted in zip(found.state.values(), expected.state.values(), strict=True):
            assert torch.equal(tensor, wanted), at


def test_what_a_finished_exchange_leaves_is_its_sum(tmp_path):
    sites = Hospitals(tmp_path)
    sites.outcome()
    left = [str(p.relative_to(tmp_path / "round")) for p in (tmp_path / "round").rglob("*")]
    assert sorted(left) == ["sum-0", "sum-0/total.safetensors"]


def test_clients_that_are_given_different_tensors_take_part_in_no_sum(tmp_path):
    sites = Hospitals(tmp_path, "fedcmp", basis="randomised", rank=3)

    def zeros(name, request):
        if name == "north":
            return request
        given = {n: torch.zeros_like(t) for n, t in request.given.items()}
        return dataclasses.replace(request, given=given)

    sites.changed = zeros
    with pytest.raises(InputError, match="client south: the terms' exchange is 'e0-"):
        sites.outcome()


def test_clients_that_began_with_different_states_take_part_in_no_sum(tmp_path):
    sites = Hospitals(tmp_path)
    base = {name: tensor.clone() for name, tensor in sites.base.items()}
    next(iter(base.values())).view(-1)[0] += 1e-3
    sites.base_of["south"] = base  # as a server would send it to make the others stand still
    with pytest.raises(InputError, match="client south: the terms' exchange .*began with"):
        sites.outcome()


def test_clients_that_were_sent_different_tensors_beside_it_take_part_in_no_sum(tmp_path):
    sites = Hospitals(tmp_path)
    assert sites.outcome().facts["clients"] == list(NAMES)
    sites = Hospitals(tmp_path / "b")
    known = dataclasses.replace(sites.round, sent={"c": torch.ones(2)})
    with pytest.raises(InputError, match="client north: the terms' exchange .*began with"):
        sites.server().outcome(sites.sums, known)


def test_who_has_no_weight_is_in_no_sum(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "WEIGHTS", (300.0, 0.0, 200.0, 700.0))
    with pytest.raises(InputError, match="client south: its weight is not above 0"):
        Hospitals(tmp_path).outcome()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": "learning_rate 0"}, "client north: the terms' exchange .*run's flags"),
        ({"round": 2}, "client north: the terms' round is 2, expected 1"),
        ({"run": "1" * 32}, "client north: the terms' run is '1"),
        ({"norm": 1e6}, "the vector that the server asks for is not that of fedavg"),
        ({"weight": 1e6}, "the vector that the server asks for is not that of fedavg"),
        ({"least": 2}, "asks for sums of 2 clients or more"),
    ],
)
def test_a_server_that_asks_for_something_else_is_refused(tmp_path, changes, message):
    sites = Hospitals(tmp_path)
    other = dataclasses.replace(AGREED, **changes)
    server = SecureSums(tmp_path / "round", other, sites.sites, sites.ask)
    with pytest.raises(InputError, match=message):
        server.outcome(sites.sums, sites.round)


def test_there_are_no_more_exchanges_than_the_method_has(tmp_path):
    sites = Hospitals(tmp_path)

    def later(name, request):
        return dataclasses.replace(request, exchange=1)

    sites.changed = later
    with pytest.raises(InputError, match="client north: is asked for exchange 1; fedavg has 1"):
        sites.outcome()


def test_what_is_too_long_or_too_heavy_is_refused_before_anything_is_sent(tmp_path):
    sites = Hospitals(tmp_path, agreed=dataclasses.replace(AGREED, norm=1e-3, weight=1000.0))
    with pytest.raises(InputError, match="client north: tensor state/.* beyond"):
        sites.outcome()
    sites = Hospitals(tmp_path / "b", agreed=dataclasses.replace(AGREED, weight=250.0))
    with pytest.raises(InputError, match="client north: its weight is not above 0 and at most 250"):
        sites.outcome()


def test_a_run_of_sums_ends_as_the_open_run(flags, tiny, tmp_path, capsys):
    entries = [
        {"name": name, "data_path": f"{tiny}/{file}.json", "image_folder": f"{tiny}/images"}
        for name, file in (("a", "a"), ("b", "b"), ("c", "a"))
    ]
    clients = tmp_path / "clients.yaml"
    clients.write_text(json.dumps({"clients": entries}))
    common = {"fed_clients": clients, "fed_rounds": 2, "fed_method": "fedcmp"}
    train(flags(**common, output_dir=tmp_path / "open"))
    train(flags(**common, output_dir=tmp_path / "secure", fed_secure=True))
    train(flags(**common, output_dir=tmp_path / "start", learning_rate=0))
    assert_moved_alike(
        *(load(tmp_path / name / "mm_projector.bin") for name in ("secure", "open", "start")), 0.01
    )
    said = capsys.readouterr().out
    assert "kept to itself" in said
    lines = (tmp_path / "secure" / "rounds.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert record["norms"] is record["cosines"] is record["drift"] is None
        assert "reliability" not in record
        for client in record["clients"].values():
            assert client.keys() == {"samples", "steps", "seconds", "parameters"}
    report(["--runs", f"sums={tmp_path / 'secure'}", "--output", str(tmp_path / "report")])
    assert not list((tmp_path / "secure" / "fed").glob("round-*"))


def test_records_may_be_private_in_secure_sums(flags, tiny, tmp_path):
    pytest.importorskip("opacus")
    private = {"fed_dp_epsilon": 8.0, "fed_dp_delta": 1e-2, "fed_dp_clip": 1.0}
    common = {"fed_clients": tiny / "clients.yaml", "fed_secure": True, "fed_secure_min": 2}
    train(flags(**common, **private, output_dir=tmp_path / "run"))
    (record,) = map(json.loads, (tmp_path / "run" / "rounds.jsonl").read_text().splitlines())
    open_ = {"samples", "steps", "parameters"}
    assert all(client.keys() == open_ for client in record["clients"].values())
    assert record["facts"]["clients"] == ["a", "b"]
    stated = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert all(0 < of["epsilon"] <= 8.01 for of in stated["guarantees"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fed_method": "median"}, "--fed_secure True: median looks at single clients"),
        ({"fed_method": "norm_clip"}, "norm_clip needs more than sums"),
        ({"fed_pool": True}, "no place with --fed_pool"),
        ({"fed_wire": "bf16"}, "--fed_wire bf16 has no place with --fed_secure"),
        ({"fed_secure_min": 1}, "--fed_secure_min is 1, 2 or more"),
        ({"fed_secure_min": 3}, "--fed_secure_min is 3, round 1 has 2 clients"),
        ({"fed_secure_norm": 0}, "--fed_secure_norm is 0.0, above 0"),
        ({"fed_secure_norm": float("nan")}, "--fed_secure_norm is nan, above 0"),
    ],
)
def test_what_does_not_go_with_secure_sums(flags, tiny, tmp_path, changes, message):
    values = {"fed_clients": tiny / "clients.yaml", "fed_secure": True, **changes}
    with pytest.raises(InputError, match=message):
        train(flags(**values, output_dir=tmp_path / "run"))
    assert not (tmp_path / "run" / "fed").exists()
