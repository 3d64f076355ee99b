"""Pilot's study: which runs it asks for, what it keeps of them, that its page is of its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

from fed import methods, validation
from llava.errors import InputError
from playground import ROOT
from playground.studies import pilot, pilot_report
from playground.studies.pilot_report import of
from playground.studies.plan import Job
from playground.studies.registry import read_plan
from playground.studies.results import Results
from playground.studies.rows import read_rows

PLAN = ROOT / "playground/studies/pilot.yaml"

COLOURS = ("red", "green", "blue")  # the domains of the small model's pictures
TASKS = {"a": ["caption", "vqa", "grounding"], "b": ["category", "text", "caption"]}


@pytest.fixture(scope="module")
def plan():
    return read_plan(PLAN)


def all_jobs(plan):
    chosen = {title: plan.settings(title)[-1] for title in plan.methods}
    return [*plan.tuning(), *plan.reporting(chosen), *plan.ablating(chosen)]


def test_every_method_has_as_many_settings(plan):
    counts = {title: len(set(plan.settings(title))) for title in plan.methods}
    assert counts == {title: len(plan.settings(title)) for title in plan.methods}
    assert len(set(counts.values())) == 1
    assert min(counts.values()) >= 3


def test_development_and_report_share_neither_seeds_nor_samples(plan):
    assert not set(plan.seeds("development")) & set(plan.seeds("report"))
    assert len(plan.seeds("report")) >= 5
    for job in all_jobs(plan):
        kind = "dev" if job.part == "development" else "test"
        assert plan.heldout(job) == f"heldout_{kind}_{job.scenario}"


def test_every_run_has_flags_that_fed_train_knows_and_as_much_training(plan):
    seen = set()
    for job in all_jobs(plan):
        key = (job.part, job.title, job.setting, job.scenario)
        if key in seen:
            continue
        seen.add(key)
        words = plan.argv(job)
        given = validation.parse_arguments([*words, "--output_dir", "unused"])
        (model, _, training, fed), options = validation.check_flags(given)
        exchanges = methods.get(fed.fed_method).exchanges(fed.fed_rounds)
        setting = json.loads(job.setting)
        assert training.learning_rate == setting.pop("learning_rate")
        for name, value in options.items():
            assert setting.pop(name) == value
        for name, value in setting.items():
            assert getattr(fed if name.startswith("fed_") else model, name) == value
        assert exchanges * training.num_train_epochs == 3
        assert not fed.fed_one_pass
        assert training.lora_enable
        assert fed.fed_eval_every > exchanges
        assert (model.mm_projector_type == "pilot") == (fed.fed_method == "pilot")
        assert str(ROOT) not in " ".join(words)  # they stand in the results


def test_variants_differ_from_the_chosen_setting_in_what_they_say(plan):
    chosen = json.loads(plan.settings(plan.ours)[0])
    seen = {}
    for job in plan.ablating({plan.ours: json.dumps(chosen)}):
        options = plan.variants[job.title]
        assert json.loads(job.setting) == {**chosen, **options}
        seen.setdefault(job.title, set()).add((job.scenario, job.seed))
    scenarios = plan.document["ablation"]["scenarios"]
    assert set(scenarios) <= set(plan.scenarios("report"))
    every = {(scenario, seed) for scenario in scenarios for seed in plan.seeds("report")}
    assert list(seen) == list(plan.variants)
    assert all(places == every for places in seen.values())


def sample(exact, loss, samples=10):
    return {"samples": samples, "exact": exact, "loss": loss}


def record(models, **more):
    heldout = {name: {"heldout_test_a": {"domains": domains}} for name, domains in models.items()}
    return {"heldout": heldout, "clients": {}, **more}


def test_what_is_kept_of_a_run_with_a_model_a_client(plan, monkeypatch):
    tasks = {"x": "vqa", "y": "vqa", "z": "caption"}
    monkeypatch.setattr(plan, "tasks", lambda scenario: tasks)
    models = {
        name: {
            "vqa shape": sample(v, 1 - v),
            "vqa colour": sample(v, 2.0, 30),
            "caption": sample(c, c),
        }
        for name, v, c in (("x", 0.5, 0.1), ("y", 0.7, 0.2), ("z", 0.2, 0.8))
    }
    counts = {"trained": 5, "sent": 3, "received": 4}
    last = record(models, clients={n: {"parameters": counts} for n in tasks})
    job = Job("report", "Pilot", "{}", "a", 31)
    row = plan.summary(job, [{"clients": {}, "heldout": {}}, last])
    assert row["parameters"] == [None, counts]
    shape = row["measures"]["vqa"]["vqa shape"]
    assert shape["own"] == pytest.approx({"exact": 0.6, "loss": 0.4})
    assert shape["others"] == pytest.approx({"exact": 0.2, "loss": 0.8})
    assert row["measures"]["caption"]["caption"]["others"]["exact"] == pytest.approx(0.15)
    # By samples over domains: (10 · 0.4 + 30 · 2) / 40.
    assert pilot.measure(row, "vqa", "own", "loss") == pytest.approx(1.6)
    assert pilot.over_tasks(row, "own", "exact") == pytest.approx((0.6 + 0.8) / 2)
    both = (1.4 / 3 + 1.1 / 3) / 2
    assert pilot.over_tasks(row, "all", "exact") == pytest.approx(both, abs=1e-4)
    assert json.loads(json.dumps(row)) == row


def test_one_model_for_all_is_own_and_others(plan):
    domains = {
        "caption": sample(0.5, 1.0),
        "vqa shape": sample(0.25, 2.0),
        "grounding": sample(0, 3),
    }
    job = Job("report", "FedAvg", "{}", "a", 31)
    row = plan.summary(job, [record({"global": domains})])
    for domain in (row["measures"]["vqa"]["vqa shape"], row["measures"]["caption"]["caption"]):
        assert domain["own"] == domain["others"] == domain["all"]
    lessons = {"dancing lessons": sample(0, 1)}
    with pytest.raises(InputError, match="'dancing lessons' is of none of the tasks"):
        plan.summary(job, [record({"global": lessons})])
    with pytest.raises(InputError, match="measured nothing"):
        plan.summary(job, [record({})])


def row(plan, job, own, others, loss=1.0):
    """A run of which each task has one domain of its own name."""
    all_ = (3 * own + 6 * others) / 9
    of_whose = {"own": own, "others": others, "all": all_}
    measures = {
        task: {task: {"samples": 9, **{w: {"exact": e, "loss": loss} for w, e in of_whose.items()}}}
        for task in TASKS[job.scenario]
    }
    counts = {"trained": 5000, "sent": 3000, "received": 4000}
    if job.title == "FedAdam":
        rounds = [None]
    else:
        rounds = [counts, counts | {"trained": 7000}] if job.title == "Pilot" else [counts] * 2
    found = {"job": plan.described(job), "measures": measures, "parameters": rounds}
    return found | {"seconds": 2.0, "flags": ""}


def rows_of(plan):
    """A study in which the third setting is best, and Pilot is first."""
    rows = []
    for job in plan.tuning():
        place = plan.settings(job.title).index(job.setting)
        rows.append(row(plan, job, 0.5, 0.5, loss=1 + abs(place - 2) / 10))
    chosen = plan.chosen(rows)
    for job in [*plan.reporting(chosen), *plan.ablating(chosen)]:
        ends = {"Pilot": (0.6, 0.5), "local only": (0.61, 0.1), "centralised": (0.8, 0.8)}
        own, others = ends.get(job.title, (0.4, 0.4))
        rows.append(row(plan, job, own + job.seed / 10000, others + job.seed / 10000))
    return rows


def test_the_setting_with_the_least_loss_is_chosen(plan):
    rows = rows_of(plan)
    assert plan.chosen(rows) == {title: plan.settings(title)[2] for title in plan.methods}
    by_own = dict(row(plan, Job("development", "FedAvg", "{}", "a", 1), 0, 0))
    by_own["measures"]["vqa"]["vqa"]["own"]["loss"] = 4.0
    assert plan.score(by_own) == pytest.approx(2.0)


def test_the_page_says_what_was_measured(plan):
    rows = rows_of(plan)
    results = Results(plan, rows)
    assert results.variants == list(plan.variants)
    assert results.mean("Pilot", of("own", "exact")) == pytest.approx(60.43)
    assert results.best_baseline(of("all", "loss")) in ("FedAvg", "FedProx", "FedAdam")
    text = pilot_report.page(results, "pilot")
    paired = pilot_report.paired_table(results, ["FedAvg", "local only"])
    fedavg = next(line for line in paired.splitlines() if line.startswith("| FedAvg"))
    assert "20.0 ± 0.0" in fedavg
    assert "10.0 ± 0.0" in fedavg
    assert "10 of 10, 0.002" in fedavg
    local = next(line for line in paired.splitlines() if line.startswith("| local"))
    assert "-1.0 ± 0.0" in local
    assert "0 of 10, 0.002" in local
    assert "5 of 5" in pilot_report.tasks_table(results, ["FedAvg"])
    cost = pilot_report.cost_table(results, ["Pilot", "FedAvg", "FedAdam"])
    assert " 5, 7 |" in cost
    assert "not counted" in cost
    assert text.count(" ←") == len(plan.methods)
    assert "Scenario b: 9 clients of category, text, caption." in text


def test_a_page_of_what_there_is(plan):
    rows = rows_of(plan)
    first = [r for r in rows if r["job"]["part"] != "ablation" and r["job"]["seed"] != 45]
    gone = [r for r in first if r["job"]["title"] == "FedAvg" and r["job"]["part"] == "report"][-1]
    results = Results(plan, [r for r in first if r is not gone])
    assert results.seeds("a") == [41, 42, 43, 44]
    assert results.seeds("b") == [41, 42, 43]
    assert results.variants == []
    assert "Not run yet." in pilot_report.page(results, "pilot")
    b = [r for r in first if r["job"]["part"] == "report" and r["job"]["scenario"] == "b"]
    without = [r for r in first if r not in b]
    assert Results(plan, without).scenarios == ["a"]
    assert "## Scenario b" not in pilot_report.page(Results(plan, without), "pilot")
    with pytest.raises(InputError, match="no seed"):
        Results(plan, [r for r in rows if r["job"]["part"] == "development"])


def test_the_page_in_the_repository_is_of_the_rows_beside_it(plan):
    file = ROOT / "playground/results/pilot.jsonl"
    page = pilot_report.page(Results(plan, read_rows(file)), file.stem)
    assert page == file.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_study_itself_on_a_small_model(tiny, tmp_path):
    """The real thing: a start, tuning, choosing, reporting, a variant, the page and its picture."""
    pictures = {"data_path": str(tiny / "a.json"), "image_folder": str(tiny / "images")}
    clients = [{"name": f"of-{task}", "task": task, **pictures} for task in COLOURS]
    (tmp_path / "clients.yaml").write_text(yaml.safe_dump({"clients": clients}))
    document = yaml.safe_load(PLAN.read_text())
    model = {"model_name_or_path": str(tiny / "llm"), "vision_tower": str(tiny / "vision_tower")}
    document["work"], document["data"] = str(tmp_path / "work"), str(tiny)
    document["flags"] |= model | {"fed_eval_image_folder": str(tiny / "images"), "lora_r": 2}
    document["start"] |= model | pictures
    scenario = {"clients": str(tmp_path / "clients.yaml"), "heldout": "heldout"}
    one = {"scenarios": ["a"], "seeds": [31]}
    document["scenarios"] = {"a": scenario}
    document["development"] |= {"scenarios": ["a"]}
    document["report"] |= one
    document["ablation"] |= one | {"variants": {"mean": {"weighting": "mean", "own": 0}}}
    kept = {title: document["methods"][title] for title in ("FedAvg", "Pilot", "centralised")}
    document["methods"] = {t: m | {"settings": m["settings"][:1]} for t, m in kept.items()}
    file, results = tmp_path / "plan.yaml", tmp_path / "found.jsonl"
    file.write_text(yaml.safe_dump(document))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    common = [file, "--results", results]

    def call(*more):
        command = [sys.executable, "-m", "playground.studies", *common, *more]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return read_rows(results)

    assert call("--hours", "0") == []
    rows = call("--hours", "1", "--workers", "2")
    assert [r["job"]["part"] for r in rows] == ["development"] * 3 + ["report"] * 3 + ["ablation"]
    by_title = {r["job"]["title"]: r for r in rows if r["job"]["part"] == "report"}
    pilot, fedavg = by_title["Pilot"], by_title["FedAvg"]
    assert list(pilot["measures"]) == sorted(COLOURS)
    assert len(pilot["parameters"]) == len(fedavg["parameters"]) == 3
    assert pilot["parameters"][0]["sent"] == fedavg["parameters"][0]["sent"]
    assert pilot["parameters"][2]["received"] > fedavg["parameters"][2]["received"]
    assert call("--hours", "1") == rows
    assert "# Pilot and its baselines" in (tmp_path / "found.md").read_text()
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
