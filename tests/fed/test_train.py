"""`fed.train` end to end, in this process, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fed import state, validation
from fed.clients import reliability
from fed.clients.measures import Explained
from fed.numerics.shrinkage import drawn_shares
from fed.server.reliability import gathered_sums
from fed.server.round_state import RoundState
from fed.train import train
from llava.errors import InputError
from llava.train.arguments import parse


def run(flags, output_dir, clients, **changes) -> list[dict]:
    """One run; the records of its rounds."""
    changes = {"fed_clients": clients, "output_dir": output_dir, **changes}
    train(flags(**changes))
    return [json.loads(line) for line in (output_dir / "rounds.jsonl").read_text().splitlines()]


def clients_yaml(path: Path, tiny: Path, *entries: str) -> Path:
    """clients.yaml of entries such as `{name: a, data_path: a.json}`, with the tiny pictures."""
    lines = [entry.replace("DIR", str(tiny)) for entry in entries]
    path.write_text("clients:\n" + "".join(f"  - {line}\n" for line in lines))
    return path


def test_a_run_leaves_a_checkpoint_and_its_record(flags, tiny, tmp_path):
    out = tmp_path / "run"
    records = run(
        flags,
        out,
        tiny / "clients.yaml",
        fed_rounds=3,
        fed_eval_data_path=[tiny / "heldout.json"],
        report_to="tensorboard",
    )
    assert [record["round"] for record in records] == [1, 2, 3]
    assert all(record["method"] == "fedavg" for record in records)
    # One pass: every sample is in exactly one round.
    assert sum(record["clients"]["a"]["samples"] for record in records) == 12
    assert sum(record["clients"]["b"]["samples"] for record in records) == 9
    measures = [record["heldout"]["global"]["heldout"] for record in records]
    assert measures[-1]["loss"] < measures[0]["loss"]
    assert set(measures[-1]["domains"]) == {"red", "green", "blue"}
    assert set(records[0]["seconds"]) == {
        "training",
        "aggregation",
        "comparison",
        "evaluation",
        "other",
    }
    assert records[0]["cosines"][0][0] == pytest.approx(1)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert set(state.load(out / "mm_projector.bin")) == {
        f"model.mm_projector.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    }
    assert list(out.glob("runs/*/events.out.tfevents.*"))


def test_same_command_same_bits_and_another_seed_others(flags, tiny, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run(flags, tmp_path / name, tiny / "clients.yaml", fed_rounds=2, seed=seed)
    a, b, c = ((tmp_path / name / "mm_projector.bin").read_bytes() for name in "abc")
    assert a == b != c


def test_the_backbone_is_loaded_once(flags, tiny, tmp_path, monkeypatch):
    from transformers import CLIPVisionModel, LlamaForCausalLM

    loaded = []
    for kind in (CLIPVisionModel, LlamaForCausalLM):

        def counted(cls, *args, load=kind.from_pretrained.__func__, **kwargs):
            loaded.append(cls.__name__)
            return load(cls, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(counted))
    run(flags, tmp_path / "x", tiny / "clients.yaml", fed_rounds=3)
    assert sorted(loaded) == ["CLIPVisionModel", "LlavaLlamaForCausalLM"]


def test_one_client_in_one_round_is_llavas_own_training(flags, tiny, tmp_path):
    """The same order of samples, so sampled batches of one epoch: equal to the bit."""
    from fed.clients.slices import seed_of, slices
    from llava.train.train import train as plain_train

    one = clients_yaml(
        tmp_path / "one.yaml", tiny, "{name: a, data_path: DIR/a.json, image_folder: DIR/images}"
    )
    cache = {"feature_cache": tmp_path / "features"}  # or the tower's batches would differ
    run(flags, tmp_path / "fed", one, **cache)
    records = json.loads((tiny / "a.json").read_text())
    (order,) = slices(len(records), 1, seed_of(7, "slices", "a"))
    (tmp_path / "a.json").write_text(json.dumps([records[i] for i in order]))
    state.save(initial_projector(flags, tmp_path), tmp_path / "start.bin")
    plain_train(
        argv=flags(
            data_path=tmp_path / "a.json",
            output_dir=tmp_path / "plain",
            seed=seed_of(7, "a", 1),
            pretrain_mm_mlp_adapter=tmp_path / "start.bin",
            **cache,
        )
    )
    a = state.load(tmp_path / "fed" / "mm_projector.bin")
    b = state.load(tmp_path / "plain" / "mm_projector.bin")
    assert all(torch.equal(a[name], b[name]) for name in a)


def initial_projector(flags, tmp_path) -> state.State:
    """What a run with these flags starts from."""
    from llava.model.checkpoint import projector_state
    from llava.train.train import load_session

    session = load_session(*parse(flags(output_dir=tmp_path / "unused")))
    return projector_state(session.model)


def test_clients_measure_what_their_pictures_explain(flags, tiny, tmp_path, capsys):
    clients = tiny / "clients.yaml"
    records = run(flags, tmp_path / "run", clients, fed_rounds=2, fed_method="fedcmp")
    sums: dict = {}
    for record in records:
        told = {n: Explained(**c["explained"]) for n, c in record["clients"].items()}
        samples = {n: c["samples"] for n, c in record["clients"].items()}
        assert all(e.samples == reliability.LEAST for e in told.values())
        assert all(e.own > 0 < e.spread for e in told.values())
        sums = gathered_sums(sums, told)
        assert record["reliability"] == drawn_shares(sums, samples)
    assert RoundState.load(tmp_path / "run" / "fed").explained == sums
    assert "explained" in capsys.readouterr().out
    pooled = run(flags, tmp_path / "pool", clients, fed_pool=True, fed_weighting="explained")
    assert "reliability" not in pooled[0]  # one client weighs all


def test_clients_weigh_what_their_pictures_explain(flags, tiny, tmp_path, monkeypatch):
    def share(model, data, *args):
        return Explained(1.0 if len(data) == 12 else 9.0, 10.0, 0.0, 5, 5)

    monkeypatch.setattr("fed.drivers.resident.explained_share", share)
    runs = {
        "method": {"fed_method": "fedcmp"},
        "both": {"fed_method": "fedcmp", "fed_weighting": "explained"},
        "run": {
            "fed_method": "fedcmp",
            "fed_options": ["reliability=none"],
            "fed_weighting": "explained",
        },
        "neither": {"fed_method": "fedcmp", "fed_options": ["reliability=none"]},
        "mean": {"fed_weighting": "explained"},
    }
    for name, changes in runs.items():
        found = run(flags, tmp_path / name, tiny / "clients.yaml", learning_rate=5e-2, **changes)
        expected = None if name == "neither" else pytest.approx({"a": 0.9, "b": 0.1})
        assert found[0].get("reliability") == expected
    ends = {name: state.load(tmp_path / name / "mm_projector.bin") for name in runs}
    for name, tensor in ends["method"].items():
        for same in ("both", "run"):
            torch.testing.assert_close(ends[same][name], tensor, rtol=1e-4, atol=1e-5)
    apart = [float((ends["neither"][n] - t).abs().max()) for n, t in ends["method"].items()]
    assert max(apart) > 1e-3
    alone = {}
    for name in "ab":
        entry = f"{{name: {name}, data_path: DIR/{name}.json, image_folder: DIR/images}}"
        one = clients_yaml(tmp_path / "one.yaml", tiny, entry)
        run(flags, tmp_path / name, one, learning_rate=5e-2)
        alone[name] = state.load(tmp_path / name / "mm_projector.bin")
    shares = {"a": 12 * 0.9 / (12 * 0.9 + 9 * 0.1), "b": 9 * 0.1 / (12 * 0.9 + 9 * 0.1)}
    for name, tensor in ends["mean"].items():
        mean = sum(shares[client] * alone[client][name].float() for client in "ab")
        torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-5)


def test_the_schedule_spans_the_run_or_starts_anew(flags, tiny, tmp_path, monkeypatch):
    from fed.server.tracking import RunLogger

    rates: dict[str, list[float]] = {}

    def capture(self, name):
        return lambda step, logs: rates.setdefault(name, []).append(logs["learning_rate"])

    monkeypatch.setattr(RunLogger, "of_client", capture)
    run(flags, tmp_path / "run", tiny / "clients.yaml", fed_rounds=3)
    spanning, rates = rates["a"], {}
    assert len(spanning) == 6
    assert spanning[0] == pytest.approx(1e-2)
    assert all(later < earlier for earlier, later in zip(spanning, spanning[1:], strict=False))
    run(flags, tmp_path / "round", tiny / "clients.yaml", fed_rounds=3, fed_lr_schedule="round")
    assert rates["a"][0::2] == pytest.approx([1e-2] * 3)


def test_local_keeps_clients_apart_and_pool_puts_them_together(flags, tiny, tmp_path):
    heldout = {"fed_eval_data_path": [tiny / "heldout.json"]}
    local = run(flags, tmp_path / "l", tiny / "clients.yaml", fed_method="local", **heldout)
    assert set(local[-1]["heldout"]) == {"a", "b"}
    a, b = (state.load(tmp_path / "l/clients" / n / "mm_projector.bin") for n in "ab")
    assert not torch.equal(a["model.mm_projector.0.weight"], b["model.mm_projector.0.weight"])
    pool = run(flags, tmp_path / "p", tiny / "clients.yaml", fed_pool=True)
    assert pool[-1]["clients"]["pool"]["samples"] == 21


def test_a_part_of_the_clients_each_round(flags, tiny, tmp_path):
    records = run(
        flags, tmp_path / "x", tiny / "clients.yaml", fed_rounds=6, fed_clients_per_round=1
    )
    names = [list(record["clients"]) for record in records]
    assert all(len(name) == 1 for name in names)
    assert len({n[0] for n in names}) == 2


def test_one_sample_and_empty_slices(flags, tiny, tmp_path):
    records = json.loads((tiny / "a.json").read_text())
    (tmp_path / "single.json").write_text(json.dumps(records[:1]))
    clients = clients_yaml(
        tmp_path / "c.yaml",
        tiny,
        "{name: a, data_path: DIR/a.json, image_folder: DIR/images}",
        f"{{name: single, data_path: {tmp_path}/single.json, image_folder: DIR/images}}",
    )
    rounds = run(flags, tmp_path / "x", clients, fed_rounds=3)
    assert [r["clients"]["single"]["samples"] for r in rounds] == [0, 0, 1]
    assert rounds[0]["facts"]["clients"] == ["a"]


def test_one_clients_changed_data_or_flag_is_named(flags, tiny, tmp_path):
    b = json.loads((tiny / "b.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(b))

    kept = ", lr_scheduler_kwargs: {num_cycles: 0.4}"

    def go(own: str = kept, rate: str = "1e-3"):
        clients = clients_yaml(
            tmp_path / "c.yaml",
            tiny,
            f"{{name: a, data_path: DIR/a.json, image_folder: DIR/images, learning_rate: {rate}}}",
            f"{{name: b, data_path: {tmp_path}/b.json, image_folder: DIR/images{own}}}",
        )
        return run(flags, tmp_path / "x", clients)

    go()
    with pytest.raises(InputError, match="with learning_rate of client a = '1e-3', now it is '1'"):
        go(rate="1")
    with pytest.raises(InputError, match="with max_steps of client b = None, now it is '3'"):
        go(f"{kept}, max_steps: 3")
    go(f"{kept}, logging_steps: 5")  # decides nothing
    b[2]["conversations"][1]["value"] = "a picture of another colour"
    (tmp_path / "b.json").write_text(json.dumps(b))
    with pytest.raises(InputError, match=r"with data of client b = '\w{16}', now it is '\w{16}'"):
        go()


def test_a_client_may_have_its_own_flags(flags, tiny, tmp_path):
    clients = clients_yaml(
        tmp_path / "c.yaml",
        tiny,
        "{name: a, data_path: DIR/a.json, image_folder: DIR/images, learning_rate: 1e-9}",
        "{name: b, data_path: DIR/b.json, image_folder: DIR/images,"
        " per_device_train_batch_size: 3}",
    )
    rounds = run(flags, tmp_path / "x", clients, fed_method="local")
    assert rounds[0]["clients"]["a"]["steps"] == 6
    assert rounds[0]["clients"]["b"]["steps"] == 3
    start = initial_projector(flags, tmp_path)
    moved = [
        float((state.load(tmp_path / "x/clients" / n / "mm_projector.bin")[k] - start[k]).norm())
        for n in "ab"
        for k in ("model.mm_projector.0.weight",)
    ]
    assert 0 < moved[0] < 1e-5 < moved[1]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["{name: a, data_path: DIR/a.json, learning_rat: 1}"], "learning_rat.*learning_rate"),
        (["{name: a, data_path: DIR/a.json, output_dir: x}"], "client a has unknown key 'output_"),
        (["{name: a, data_path: DIR/none.json}"], "client a: data_path .*none.json does not exist"),
        (["{name: a, data_path: DIR/a.json, image_folder: DIR/no}"], "image_folder .*no does not"),
        (["{name: a, data_path: DIR/a.json}", "{name: A, data_path: DIR/b.json}"], "two clients"),
        (["{name: ../a, data_path: DIR/a.json}"], "name '../a'"),
        (["{name: a}"], "client a has no data_path"),
        (["just text"], "client 1 is str"),
        (["{name: a, data_path: DIR/a.json, learning_rate: fast}"], "client a: .*learning_rate"),
    ],
)
def test_bad_clients(flags, tiny, tmp_path, entries, message):
    clients = clients_yaml(tmp_path / "c.yaml", tiny, *entries)
    with pytest.raises(InputError, match=message):
        run(flags, tmp_path / "x", clients)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("clients: {", "not YAML"), ("[1]", "a list under the key"), ("other: 1", "a list under"),
     ("clients: []", "a list under"), ("clients: [{name: a}]\nserver: 1", "unknown key 'server'")],
)  # fmt: skip
def test_bad_clients_file(flags, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        run(flags, tmp_path / "x", tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fed_method": "fedavgg"}, "fedavgg.*fedavg"),
        ({"fed_method": "fedcmp", "fed_options": ["tua=1"]}, "tua.*tau"),
        ({"fed_method": "fedcmp", "fed_options": ["tau=high"]}, "tau: expected a number"),
        ({"fed_rounds": 13}, "no client has more than 12 samples"),
        ({"fed_rounds": 0}, "--fed_rounds is 0"),
        ({"fed_roundz": 3}, "unknown flag --fed_roundz.*--fed_rounds"),
        ({"fed_driver": "carrier-pigeon"}, "--fed_driver"),
        ({"fed_clients": None}, "--fed_clients is missing"),
        ({"tune_mm_mlp_adapter": False}, "--tune_mm_mlp_adapter"),
        ({"mm_projector_type": "mlp2x"}, "unknown mm_projector_type 'mlp2x'"),
        ({"version": "plane"}, "plane.*plain"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"vision_tower": "no/such/tower"}, "vision tower no/such/tower"),
    ],
)
def test_bad_flags(flags, tiny, tmp_path, changes, message):
    changes = {"fed_clients": tiny / "clients.yaml", **changes}
    with pytest.raises(InputError, match=message):
        train(flags(**changes, output_dir=tmp_path / "x"))
    assert not (tmp_path / "x" / "rounds.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model.mm_projector.0.bias"].fill_(torch.nan), "0.bias.*NaN"),
        (lambda s: s.update({"model.mm_projector.0.bias": torch.zeros(3)}), r"shape \(3,\)"),
        (lambda s: s.pop("model.mm_projector.2.bias"), "2.bias is missing"),
        (
            lambda s: s.update({"model.mm_projector.0.bias": torch.zeros(48, dtype=torch.int8)}),
            "torch.int8",
        ),
    ],
)
def test_bad_start(flags, tiny, tmp_path, change, message):
    start = initial_projector(flags, tmp_path)
    change(start)
    state.save(start, tmp_path / "start.bin")
    with pytest.raises(InputError, match=message):
        run(
            flags,
            tmp_path / "x",
            tiny / "clients.yaml",
            pretrain_mm_mlp_adapter=tmp_path / "start.bin",
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.json"),
        ('{"a": 1}', "a list"),
        ('[{"id": "x7"}]', "x7.*conversations"),
        (None, "no such file|cannot be read"),
    ],
)
def test_bad_data(flags, tiny, tmp_path, content, message):
    bad_client(flags, tiny, tmp_path, content, message)


def bad_client(flags, tiny, tmp_path, content, message):
    records = json.loads((tiny / "a.json").read_text())
    if content is None:
        records[3]["image"] = "missing.png"
        content = json.dumps(records)
    (tmp_path / "a.json").write_text(content)
    clients = clients_yaml(
        tmp_path / "c.yaml",
        tiny,
        "{name: b, data_path: DIR/b.json, image_folder: DIR/images}",
        f"{{name: bad, data_path: {tmp_path}/a.json, image_folder: DIR/images}}",
    )
    with pytest.raises(InputError, match=f"client bad: .*({message})"):
        run(flags, tmp_path / "x", clients)


def answered(file: Path, *answers: str) -> list[dict]:
    """The records of a file, the first ones with these answers."""
    records = json.loads(file.read_text())
    for record, text in zip(records, answers, strict=False):
        record["conversations"][1]["value"] = text
    return records


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([""] * 12, "a.json: there is nothing to learn in it: of 12 records, 12 have an empty"),
        (["red", "red \ud83c"], r"a.json: record 1 \(id 'a-1'\) has half a character"),
    ],
)
def test_answers_that_cannot_be_learnt(flags, tiny, tmp_path, answers, message):
    content = json.dumps(answered(tiny / "a.json", *answers))
    bad_client(flags, tiny, tmp_path, content, message)


def test_samples_that_teach_nothing_do_not_count_in_the_average(flags, tiny, tmp_path, capfd):
    records = answered(tiny / "a.json", "", " ", "")
    results = []
    for name, given in (("some", records), ("less", records[3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
        clients = clients_yaml(
            tmp_path / f"{name}.yaml",
            tiny,
            "{name: b, data_path: DIR/b.json, image_folder: DIR/images}",
            f"{{name: a, data_path: {tmp_path}/{name}.json, image_folder: DIR/images}}",
        )
        run(flags, tmp_path / name, clients, feature_cache=tmp_path / "features")
        results.append((tmp_path / name / "mm_projector.bin").read_bytes())
        line = json.loads((tmp_path / name / "rounds.jsonl").read_text().splitlines()[0])
        assert line["clients"]["a"]["samples"] == 9
    assert results[0] == results[1]
    assert "client a: 9 samples, 3 left out: their answers are empty" in capfd.readouterr().out


def test_held_out_samples_without_an_answer_are_left_out(flags, tiny, tmp_path, capfd):
    (tmp_path / "held.json").write_text(json.dumps(answered(tiny / "heldout.json", "", "")))
    run(flags, tmp_path / "x", tiny / "clients.yaml", fed_eval_data_path=tmp_path / "held.json")
    line = json.loads((tmp_path / "x" / "rounds.jsonl").read_text().splitlines()[-1])
    assert "4 samples, 2 left out" in capfd.readouterr().out
    assert line["heldout"]["global"]["held"]["samples"] == 4
    (tmp_path / "held.json").write_text(json.dumps(answered(tiny / "heldout.json", *[""] * 6)))
    with pytest.raises(InputError, match="held.json: there is nothing to learn in it"):
        run(flags, tmp_path / "y", tiny / "clients.yaml", fed_eval_data_path=tmp_path / "held.json")


def test_truncated_pictures_are_named_or_skipped_and_counted(flags, tiny, tmp_path, capfd):
    import shutil

    images = tmp_path / "images"
    shutil.copytree(tiny / "images", images)
    whole = (images / "a-4.png").read_bytes()
    (images / "a-4.png").write_bytes(whole[: len(whole) // 2])
    clients = clients_yaml(
        tmp_path / "c.yaml", tiny, f"{{name: a, data_path: DIR/a.json, image_folder: {images}}}"
    )
    with pytest.raises(InputError, match=r"client a: .*a-4.*a-4\.png"):
        run(flags, tmp_path / "x", clients)
    records = run(flags, tmp_path / "y", clients, skip_bad_images=True)
    assert records[0]["clients"]["a"]["samples"] == 11
    assert "11 samples, 1 skipped for a bad picture" in capfd.readouterr().out


def test_captions_longer_than_the_model_takes(flags, tiny, tmp_path, capfd):
    clients = tiny / "clients.yaml"
    with pytest.raises(InputError, match="client a: .*a-0"):
        run(flags, tmp_path / "x", clients, model_max_length=3)  # a picture has 4 tokens
    run(flags, tmp_path / "y", clients, model_max_length=6)  # and bos, and a word
    assert "client a: 12 samples, 12 longer than --model_max_length" in capfd.readouterr().out


def test_another_run_in_the_same_folder_is_refused(flags, tiny, tmp_path, capsys):
    run(flags, tmp_path / "x", tiny / "clients.yaml")
    before = (tmp_path / "x" / "mm_projector.bin").read_bytes()
    with pytest.raises(InputError, match="--learning_rate = '0.01', now it is '0.001'"):
        run(flags, tmp_path / "x", tiny / "clients.yaml", learning_rate=1e-3)
    capsys.readouterr()
    run(flags, tmp_path / "x", tiny / "clients.yaml")  # finished: nothing to do, nothing changed
    assert "round 1 is done, nothing is left to train" in capsys.readouterr().out
    assert (tmp_path / "x" / "mm_projector.bin").read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["model.mm_projector.2.bias"][0].fill_(torch.inf), "2.bias .*NaN|infinit"),
        (lambda s: [tensor.zero_() for tensor in s.values()], "all 4 tensors are zero"),
    ],
    ids=["infinite", "zero"],
)
def test_a_client_that_diverges_stops_the_run_by_name_and_it_goes_on_later(
    flags, tiny, tmp_path, monkeypatch, spoil, message
):
    from fed.drivers.resident import ResidentDriver

    fit = ResidentDriver.fit

    def diverge(self, task):
        update = fit(self, task)
        if task.name == "b" and task.round == 2:
            spoil(update.state)
        return update

    monkeypatch.setattr(ResidentDriver, "fit", diverge)
    with pytest.raises(InputError, match=f"client b: .*{message}"):
        run(flags, tmp_path / "x", tiny / "clients.yaml", fed_rounds=3)
    assert RoundState.load(tmp_path / "x/fed").round == 1
    monkeypatch.setattr(ResidentDriver, "fit", fit)
    run(flags, tmp_path / "x", tiny / "clients.yaml", fed_rounds=3)
    run(flags, tmp_path / "y", tiny / "clients.yaml", fed_rounds=3)
    names = ("x", "y")
    x, y = ((tmp_path / name / "mm_projector.bin").read_bytes() for name in names)
    assert x == y


class StopError(Exception):
    """Stands for a kill, where what matters is what is on the disk then."""


def stop_after(monkeypatch, turns: int) -> None:
    from fed.drivers.resident import ResidentDriver

    fit, done = ResidentDriver.fit, []

    def counted(self, task):
        if len(done) == turns:
            raise StopError
        done.append(task.name)
        return fit(self, task)

    monkeypatch.setattr(ResidentDriver, "fit", counted)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"max_grad_norm": 0.1},
        {"data_seed": 3},
        {"image_aspect_ratio": "pad"},
        {"fed_options": ["rescale=2"]},
        {"fed_clients": "reordered.yaml"},
        {"pretrain_mm_mlp_adapter": "other.bin"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_cut_short_is_continued_by_no_other_run(
    flags, tiny, tmp_path, monkeypatch, turns, change
):
    common = {"fed_method": "fedcmp", "fed_rounds": 2}
    with monkeypatch.context() as patch:
        stop_after(patch, turns)
        with pytest.raises(StopError):
            run(flags, tmp_path / "x", tiny / "clients.yaml", **common)
    entries = (tiny / "clients.yaml").read_text().replace("a.json", "DIR/a.json")
    entries = entries.replace("b.json", "DIR/b.json").replace("images", "DIR/images")
    _, a, b = entries.split("\n")[:3]
    clients_yaml(tmp_path / "reordered.yaml", tiny, b.strip(" -"), a.strip(" -"))
    other = {name: t + 1 for name, t in initial_projector(flags, tmp_path).items()}
    state.save(other, tmp_path / "other.bin")
    change = {
        key: tmp_path / value if str(value).endswith((".yaml", ".bin")) else value
        for key, value in change.items()
    }
    clients = change.pop("fed_clients", tiny / "clients.yaml")
    with pytest.raises(InputError, match="holds a run with"):
        run(flags, tmp_path / "x", clients, **common, **change)
    run(flags, tmp_path / "x", tiny / "clients.yaml", **common)
    run(flags, tmp_path / "y", tiny / "clients.yaml", **common)
    x, y = ((tmp_path / name / "mm_projector.bin").read_bytes() for name in "xy")
    assert x == y


def test_the_pool_goes_by_the_command_line_not_by_the_first_client(flags, tiny, tmp_path):
    clients = clients_yaml(
        tmp_path / "c.yaml",
        tiny,
        "{name: a, data_path: DIR/a.json, image_folder: DIR/images, learning_rate: 1e-9}",
        "{name: b, data_path: DIR/b.json, image_folder: DIR/images}",
    )
    run(flags, tmp_path / "x", clients, fed_pool=True)
    start = initial_projector(flags, tmp_path)["model.mm_projector.0.weight"]
    moved = state.load(tmp_path / "x" / "mm_projector.bin")["model.mm_projector.0.weight"] - start
    assert moved.norm() > 1e-2


def test_one_options_file_serves_all_methods(flags, tiny, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        "fedcmp: {reliability: agreement, tau: 0.5, rank: none, rescale: 2}\n"
        "fedavg: {server_lr: 1.5, paper_compat: true}\n"
    )

    def options(method, *more):
        argv = flags(
            fed_clients=tiny / "clients.yaml", fed_method=method, fed_options=[file, *more]
        )
        return validation.check_flags(validation.parse_arguments(argv))[1]

    expected = {"reliability": "agreement", "tau": 0.5, "rank": None, "rescale": 2.0}
    assert options("fedcmp") == expected
    assert options("fedavg", "server_lr=2") == {"server_lr": 2.0, "paper_compat": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fed_method": "fedcmp", "fed_options": ["energy=7"]}, "energy.*7"),
        ({"fed_method": "fedcmp", "fed_options": ["tau=1"]}, "tau is for reliability=agreement"),
        (
            {"fed_weighting": "explain"},
            "--fed_weighting is 'explain'; known are samples, explained",
        ),
        ({"fed_method": "fedcmp", "fed_options": ["rank"]}, "name=value"),
        ({"fed_options": ["server_lr=-1"]}, "server_lr"),
        ({"fed_options": ["none.yaml"]}, "none.yaml: No such file"),
        ({"fed_options": ["a-file.yaml"]}, "a-file.yaml: .*'fedavg' .*there are the keys fedcmp"),
        ({"fed_method": "fedcmp", "fed_options": ["a-file.yaml"]}, "fedcmp has no option 'tua'"),
        ({"fed_method": "krum"}, "krum.*2"),  # a round has two clients: found before they train
        ({"data_path": "x.json"}, "--data_path"),
        ({"report_to": "carrier-pigeon"}, "--report_to"),
        ({"output_dir": "a-file"}, "--output_dir"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({"eval_strategy": "epoch"}, "eval_strategy"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"learning_rate": "nan"}, "--learning_rate"),
        ({"mm_vision_select_layer": -9}, "--mm_vision_select_layer -9"),
        ({"deepspeed": "nope.json"}, "nope.json"),
        ({"fed_clients_per_round": 3}, "has 2 clients"),
        ({"fed_eval_every": -1}, "--fed_eval_every"),
        ({"vision_tower": None}, "name a --vision_tower"),
        ({"feature_cache": "a-file"}, "--feature_cache"),
        ({"fed_eval_data_path": ["x/a.json", "y/a.json"]}, "two files are called a"),
        ({"fed_eval_data_path": ["none.json"]}, "none.json"),
    ],
)
def test_bad_flags_are_found_before_anything_trains(
    flags, tiny, tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("")
    Path("a-file.yaml").write_text("fedcmp: {tua: 1}")
    stop_after(monkeypatch, 0)
    changes = {"fed_clients": tiny / "clients.yaml", "output_dir": "x", **changes}
    with pytest.raises(InputError, match=message):
        train(flags(**changes))
    assert not (tmp_path / "x" / "fed").exists()


def test_cut_captions_cannot_be_measured(flags, tiny, tmp_path):
    with pytest.raises(InputError, match="captions are longer than model_max_length 6"):
        run(
            flags,
            tmp_path / "x",
            tiny / "clients.yaml",
            model_max_length=6,
            fed_eval_data_path=[tiny / "heldout.json"],
        )


def test_an_entry_point_says_it_in_one_line(flags, tiny, tmp_path, monkeypatch, capsys):
    import sys

    from fed.train import main

    clients = tmp_path / "c.yaml"
    clients.write_text("clients:\n\t- {")
    monkeypatch.setattr(sys, "argv", ["fed.train", *flags(fed_clients=clients)])
    with pytest.raises(SystemExit) as exit_:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]


def test_clients_train_on_the_tower_of_a_plug_in(toy, flags, tiny, tmp_path):
    given = {"vision_tower": toy, "fed_rounds": 1, "fed_eval_data_path": [tiny / "heldout.json"]}
    (record,) = run(flags, tmp_path / "run", tiny / "clients.yaml", max_steps=2, **given)
    assert min(record["norms"]) > 0
    assert json.loads((tmp_path / "run/config.json").read_text())["mm_vision_tower_type"] == "toy"
    with pytest.raises(InputError, match="vision_tower is CLIP or SigLIP, the projector .* 'toy'"):
        train(
            flags(
                fed_clients=tiny / "clients.yaml",
                pretrain_mm_mlp_adapter=tmp_path / "run/mm_projector.bin",
            )
        )
