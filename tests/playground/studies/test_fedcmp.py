"""The study: which runs it asks for, what it chooses, what it says of them, and that it goes on."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from fed.clients.clients_yaml import load_clients
from llava.errors import InputError
from playground import ROOT
from playground.studies import fedcmp_report, tables
from playground.studies.fedcmp_report import LOSS, final_loss
from playground.studies.registry import read_plan
from playground.studies.results import Results
from playground.studies.rows import read_rows
from playground.tools.cut_clients import KINDS, NOISE, noisy_shares


@pytest.fixture(scope="module")
def plan():
    return read_plan(ROOT / "playground/studies/fedcmp.yaml")


@pytest.fixture(scope="module")
def real():
    return read_plan(ROOT / "playground/studies/fedcmp_real.yaml")


@pytest.mark.parametrize("which", ["plan", "real"])
def test_every_method_has_as_many_settings(which, request):
    plan = request.getfixturevalue(which)
    assert len({len(plan.settings(title)) for title in plan.methods}) == 1
    for title in plan.methods:
        assert len(set(plan.settings(title))) == len(plan.settings(title))


@pytest.mark.parametrize("which", ["plan", "real"])
def test_development_and_report_have_nothing_in_common_but_the_private_pictures(which, request):
    plan = request.getfixturevalue(which)
    assert not set(plan.seeds("development")) & set(plan.seeds("report"))
    assert len(plan.seeds("report")) >= 5
    for job in plan.tuning():
        assert plan.heldout(job).startswith("heldout_dev")
    chosen = {title: plan.settings(title)[0] for title in plan.methods}
    reports = list(plan.reporting(chosen))
    places = len(plan.scenarios("report")) * len(plan.seeds("report"))
    assert len(reports) == len(plan.methods) * places
    for job in [*reports, *plan.leaving_out(chosen)]:
        assert plan.heldout(job).startswith(("heldout_test", "unseen"))
        assert "-dev.yaml" not in shlex.join(plan.argv(job))
    for job in [*plan.tuning(), *plan.ablating(chosen)]:
        for cut in ("skew", "noisy", "crawl"):
            assert f"/{cut}.yaml" not in shlex.join(plan.argv(job))


def test_what_is_left_out_is_what_is_wrong(plan):
    chosen = {title: plan.settings(title)[0] for title in plan.methods}
    jobs = list(plan.leaving_out(chosen))
    assert [job.seed for job in jobs] == plan.seeds("report")
    argv = plan.argv(jobs[0])
    assert argv[argv.index("--fed_clients") + 1] == "playground/fed/noisy-sound.yaml"
    left = {spec.name for spec in load_clients(ROOT / "playground/fed/noisy.yaml", ())}
    left -= {spec.name for spec in load_clients(ROOT / "playground/fed/noisy-sound.yaml", ())}
    assert left == {name for name, share in noisy_shares(TOPICS, NOISE[""]).items() if share}


@pytest.mark.parametrize("which", ["plan", "real"])
def test_every_run_has_flags_that_fed_train_knows(which, request):
    plan = request.getfixturevalue(which)
    from fed import validation

    chosen = {title: plan.settings(title)[-1] for title in plan.methods}
    jobs = [*plan.tuning(), *plan.reporting(chosen), *plan.ablating(chosen)]
    seen = set()
    for job in jobs:
        flags = [*plan.argv(job), "--output_dir", "unused"]
        shown = shlex.join(flag for flag in flags)
        if (job.title, job.setting, job.scenario) in seen:
            continue
        seen.add((job.title, job.setting, job.scenario))
        arguments, options = validation.check_flags(validation.parse_arguments(flags))
        setting = json.loads(job.setting)
        assert arguments[2].learning_rate == setting.pop("learning_rate"), shown
        assert arguments[2].optim == setting.pop("optim", arguments[2].optim), shown
        assert ("sgd" in job.setting) == (arguments[2].optim == "sgd")
        assert options == setting
        assert (ROOT / arguments[3].fed_clients).is_file()


def test_runs_in_private_have_the_noise_that_their_names_say():
    from fed import validation

    plan = read_plan(ROOT / "playground/studies/privacy.yaml")
    assert not set(plan.seeds("development")) & set(plan.seeds("report"))
    seen = []
    for job in plan.tuning():
        flags = [*plan.argv(job), "--output_dir", "unused"]
        arguments, _ = validation.check_flags(validation.parse_arguments(flags))
        fed, words = arguments.fed, job.title.replace(",", "").split()
        private = {"epsilon": fed.fed_dp_epsilon} if fed.private else {}
        assert private == ({"epsilon": float(words[3])} if "epsilon" in words else {})
        assert fed.fed_dp_shares == ("shares" in words)
        assert fed.fed_secure == ("shares" in words or job.title == plan.reference)
        seen.append(job.title)
    assert all(seen.count(title) == 4 for title in plan.methods)


def test_a_runs_names_are_ranked_when_the_plan_asks(plan, tiny, flags, tmp_path, monkeypatch):
    from fed.train import train

    values = {
        "model_name_or_path": tiny / "llm",
        "version": "plain",
        "fed_eval_data_path": tiny / "heldout.json",
        "fed_eval_image_folder": tiny / "images",
    }
    monkeypatch.setattr(plan, "values", lambda job: values)
    monkeypatch.setattr(plan, "heldout", lambda job: "heldout")
    train(flags(fed_clients=tiny / "clients.yaml", fed_method="local"))
    found = plan.ranks(next(iter(plan.tuning())), tmp_path / "out")
    assert 0 <= found["first"] <= found["among_five"] == 1  # of three names


TOPICS = sorted(KINDS)


def row(plan, job, losses, exact=0.5):
    rounds = list(range(1, len(losses) + 1))
    return {"job": plan.described(job), "rounds": rounds, "loss": losses,
            "exact": [exact] * len(losses), "drift": [0.9] * len(losses),
            "seconds": 1.0, "flags": ""}  # fmt: skip


def rows_of(plan, offsets):
    """A study in which each method ends at 1 plus its offset, and the second setting is best."""
    rows = []
    for job in plan.tuning():
        place = plan.settings(job.title).index(job.setting)
        loss = 1 + abs(place - 1) / 10
        rows.append(row(plan, job, [loss]))
    for job in plan.reporting(plan.chosen(rows)):
        end = 1 + offsets.get(job.title, 0.3) + job.seed / 1000
        losses = [end + 1, end + 0.05, end + 0.1, end]
        rows.append(row(plan, job, losses))
    return rows


def test_the_setting_with_the_least_development_loss_is_chosen(plan):
    rows = rows_of(plan, {})
    assert plan.chosen(rows) == {title: plan.settings(title)[1] for title in plan.methods}
    first = next(iter(plan.methods))
    assert first not in plan.chosen(rows[1:])  # not tuned through: not chosen


def test_what_pictures_explain_has_tables_where_it_was_measured(plan):
    rows = rows_of(plan, {"Fed-CMP": -0.2, "centralised": -0.5})
    assert "Explained" not in fedcmp_report.page(Results(plan, rows), "fedcmp")
    for of in rows:
        of["explained"] = [0.1 + 0.05 * (of["job"]["title"] == "Fed-CMP")] * len(of["loss"])
    text = fedcmp_report.page(Results(plan, rows), "fedcmp")
    assert "### Explained, %" in text
    assert "15.0 ± 0.0" in text
    assert "5.0 ± 0.0 | 35 of 35" in " ".join(text.split())


def test_real_runs_begin_with_one_projector_and_others_with_a_fresh_one(plan, real, monkeypatch):
    assert not plan.preparation()
    assert "--pretrain_mm_mlp_adapter" not in plan.argv(next(plan.tuning()))
    monkeypatch.setattr(real, "start", ROOT / "nowhere")
    (task,) = real.preparation()
    folder, argv = task.arguments
    assert folder == real.start
    assert argv[argv.index("--data_path") + 1].endswith("common.json")
    for job in [
        next(real.tuning()),
        next(real.reporting({real.ours: real.settings(real.ours)[0]})),
    ]:
        flags = real.argv(job)
        assert flags[flags.index("--pretrain_mm_mlp_adapter") + 1] == "nowhere/mm_projector.bin"


def test_the_report_says_what_was_measured(plan):
    offsets = {"Fed-CMP": -0.2, "FedAvg": 0.0, "FedExP": -0.1, "centralised": -0.5}
    rows = rows_of(plan, offsets)
    results = Results(plan, rows)
    assert results.best_baseline(final_loss) == "FedExP"
    assert results.mean("Fed-CMP", final_loss) == pytest.approx(0.833)
    text = fedcmp_report.page(results, "fedcmp")
    assert "| all " in text
    assert "35 of 35" in text
    losses, exact = [
        line
        for line in text.splitlines()
        if line.partition(" | ")[0].strip("| ") == "Fed-CMP" and "±" in line
    ]
    assert "0.833 ± 0.002" in losses
    assert losses.rstrip(" |").endswith(" 40")  # 0.2 of the 0.5 to all data in one place
    assert exact.rstrip(" |").endswith("50.0")
    losses = tables.paired_table(results, "FedAvg", [LOSS])
    assert "-0.200 ± 0.000" in losses
    dynamics = fedcmp_report.dynamics_table(results)
    assert "0.050" in dynamics  # the loss rose once, by that much
    reached = fedcmp_report.rounds_to_reference(results, "topic", "Fed-CMP")
    assert reached == "2.0"
    assert fedcmp_report.rounds_to_reference(results, "topic", "FedProx") == "never"
    assert " ←" in fedcmp_report.tuned_table(results)


def test_a_whole_variant_of_ours_is_no_baseline(plan):
    rows = rows_of(plan, {"Fed-CMP with momentum": -0.3, "FedExP": -0.1, "centralised": -0.5})
    assert Results(plan, rows).best_baseline(final_loss) == "FedExP"


def test_only_what_is_measured_on_the_way_is_shown_there(plan, tmp_path):
    rows = rows_of(plan, {"centralised": -0.5})
    for one in rows:
        if one["job"]["scenario"] == "style":
            one.update({key: one[key][-1:] for key in ("rounds", "loss", "exact")})
    results = Results(plan, rows)
    assert fedcmp_report.on_the_way(results) == [s for s in results.scenarios if s != "style"]
    assert "style" not in fedcmp_report.dynamics_table(results)
    fedcmp_report.write_report(plan, rows, tmp_path, "found")
    assert (tmp_path / "found-curves.png").stat().st_size > 10_000


def test_only_seeds_that_all_methods_have_count(plan):
    rows = rows_of(plan, {})
    missing = [r for r in rows if r["job"] == {**r["job"], "part": "report", "title": "FedAvg",
                                               "scenario": "skew", "seed": 31}]  # fmt: skip
    assert len(missing) == 1
    results = Results(plan, [r for r in rows if r not in missing])
    assert results.seeds("skew") == [32, 33, 34, 35]
    assert results.seeds("topic")[0] == 31
    with pytest.raises(InputError, match="no seed"):
        Results(plan, [r for r in rows if r["job"]["part"] != "report"])


def test_the_sign_flip_test_by_hand():
    # Three pairs, all of one sign: two of eight sign patterns are as extreme.
    assert tables.sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(0.25)
    assert tables.sign_flip_p([1.0, -1.0]) == pytest.approx(1.0)
    assert tables.sign_flip_p([0.3]) == pytest.approx(1.0)
    many = tables.sign_flip_p([1.0] * 20)
    assert 0 < many < 1e-4  # never nought: the pattern that was seen is one of them


@pytest.mark.slow
def test_a_study_stopped_on_the_way_goes_on_and_makes_no_run_twice(tiny, tmp_path):
    """The real thing on the tiny model: tuning, choosing, reporting, the page and its pictures."""
    flags = {
        "fed_clients": str(tiny / "clients.yaml"),
        "fed_eval_data_path": str(tiny / "heldout.json"),
        "fed_eval_image_folder": str(tiny / "images"),
        "model_name_or_path": str(tiny / "llm"),
        "vision_tower": str(tiny / "vision_tower"),
        "per_device_train_batch_size": 2,
    }
    part = {"part": "test", "scenarios": ["only"], "seeds": [1]}
    document = {
        "study": "fedcmp",
        "work": str(tmp_path / "work"),
        "flags": {"fed_eval_explained": True},
        "scenarios": {
            "only": {
                "clients": "x",
                "rounds": 2,
                "heldout": "heldout",
                "domain": "domain",
                "flags": flags,
            }
        },
        "development": part,
        "report": {**part, "seeds": [2, 3]},
        "ours": "Fed-CMP",
        "reference": "FedAvg",
        "not_compared": [],
        "methods": {
            "FedAvg": {"flags": {"fed_method": "fedavg"},
                       "settings": [{"learning_rate": 0.01}, {"learning_rate": 0.02}]},
            "Fed-CMP": {"flags": {"fed_method": "fedcmp"},
                        "settings": [{"learning_rate": 0.01}, {"learning_rate": 0.02, "rank": 8}]},
        },
        "left_out": {**part, "seeds": [2], "clients": "y"},
        "ablation": {**part, "seeds": [1], "variants": {"no gain": {"rescale": 1.0}}},
    }  # fmt: skip
    file, results = tmp_path / "plan.yaml", tmp_path / "found.jsonl"
    file.write_text(yaml.safe_dump(document))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(hours, workers="2"):
        command = [sys.executable, "-m", "playground.studies", file, "--results", results]
        subprocess.run([*command, "--hours", hours, "--workers", workers], cwd=ROOT,
                       env=environment, check=True, capture_output=True)  # fmt: skip
        return read_rows(results)

    assert run("0") == []
    rows = run("1")
    parts = [r["job"]["part"] for r in rows]
    expected = {"development": 4, "report": 4, "left_out": 1, "ablation": 1}
    assert {part: parts.count(part) for part in parts} == expected
    kept, lost = rows[:3], rows[3:]
    results.write_text("".join(json.dumps(r) + "\n" for r in kept))
    again = run("1", workers="1")
    assert again[:3] == kept
    assert len(again) == len(rows)
    measured = {json.dumps(r["job"]): (r["loss"], r["exact"], r["drift"]) for r in lost}
    for r in again[3:]:  # the same seeds, the same numbers
        assert measured[json.dumps(r["job"])] == (r["loss"], r["exact"], r["drift"])
    for r in rows:
        assert len(r["explained"]) == len(r["loss"])
    page = (tmp_path / "found.md").read_text()
    assert "Fed-CMP against FedAvg" in page
    assert "## What the left-out clients cost" in page
    for picture in ("found-curves.png", "found-gains.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
