"""The merging study: what it trains and merges, what it chooses, that its page is of its rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts/merge"))

import merge_found  # noqa: E402
import merge_report  # noqa: E402
import merge_study  # noqa: E402
import study_experts  # noqa: E402
import study_measure  # noqa: E402
from study_experts import Cell  # noqa: E402
from study_measure import Job  # noqa: E402

from fed import methods  # noqa: E402
from llava.errors import InputError  # noqa: E402


@pytest.fixture(scope="module")
def plan():
    return study_experts.read_plan()


def test_every_setting_is_one_that_the_method_takes(plan):
    for title, of in plan["methods"].items():
        assert 1 <= len(of["settings"]) <= 4, title
        for setting in of["settings"]:
            methods.get(of["method"]).parse(setting)
    for options in plan["ablation"]["variants"].values():
        methods.get(plan["ablation"]["method"]).parse(options)
    for title in [
        plan["ours"],
        plan["reference"],
        *plan["data_driven"],
        *plan["counts"]["methods"],
    ]:
        assert title in plan["methods"]


def test_development_and_report_share_neither_seeds_nor_pictures(plan):
    development, report = plan["development"], plan["report"]
    assert not set(development["seeds"]) & set(report["seeds"]) and len(report["seeds"]) >= 5
    assert development["part"] != report["part"]
    assert set(report["cells"]) - set(development["cells"])  # a scenario that settings never saw
    for scenario in plan["scenarios"].values():
        assert (ROOT / f"playground/fed/{scenario['clients']}.yaml").is_file()


def test_all_of_a_cell_begin_with_one_start(plan):
    fresh = study_experts.runs(plan, Cell("topic", "fresh", 3))
    assert list(fresh) == ["start-fresh-3", "topic-fresh-3", "joint-topic-fresh-3"]
    brief = study_experts.runs(plan, Cell("style", "brief", 3))
    assert list(brief) == ["start-fresh-3", "start-brief-3", "style-brief-3", "joint-topic-brief-3"]
    assert brief["start-brief-3"]["from"] == "start-fresh-3"
    assert brief["style-brief-3"]["from"] == brief["joint-topic-brief-3"]["from"] == "start-brief-3"
    assert all(flags["seed"] == 3 for flags in brief.values())
    words = study_experts.playground_flags()
    assert "--fed_eval_data_path" not in words and "--fed_eval_image_folder" in words


def row(job: Job, loss: float, **domains: float) -> dict:
    measures = {name: {"loss": loss, "exact": exact} for name, exact in domains.items()}
    job_ = {**vars(job), "cell": vars(job.cell)}
    return {"job": job_, "loss": loss, "exact": 0.5, "domains": measures, "of": list(domains)}


def test_the_setting_of_least_loss_over_the_mean_is_chosen(plan):
    small = {
        "reference": "mean",
        "development": {"seeds": [1], "cells": ["a fresh", "b fresh"]},
        "methods": {
            "mean": {"settings": [{}]},
            "ties": {"settings": [{"density": 0.2}, {"density": 0.5}]},
            "late": {"settings": [{}]},
        },
    }
    losses = {("mean", "{}"): (1.0, 100.0)}
    losses["ties", '{"density": 0.2}'] = (0.5, 120.0)  # 0.85 of the mean's on average
    losses["ties", '{"density": 0.5}'] = (0.9, 90.0)  # 0.90, though less in sum
    rows = [
        row(Job("development", Cell(s, "fresh", 1), title, setting, 0), value)
        for (title, setting), values in losses.items()
        for s, value in zip("ab", values, strict=True)
    ]
    rows.append(row(Job("development", Cell("a", "fresh", 1), "late", "{}", 0), 0.1))
    assert merge_study.choose(small, rows) == {"mean": "{}", "ties": '{"density": 0.2}'}


def test_a_job_and_its_row_have_one_key():
    job = Job("report", Cell("topic", "brief", 31), "TIES", '{"density": 0.5}', 3)
    assert Job.of_row(json.loads(json.dumps(row(job, 1.0)))).key == job.key


def test_what_is_kept_of_each_expert(plan):
    cell = Cell("topic", "fresh", 31)
    chosen = dict.fromkeys(plan["methods"], "{}")
    found = merge_found.Found.__new__(merge_found.Found)
    found.plan, found.chosen, found.cells = plan, chosen, [cell]
    rows = [
        row(Job("report", cell, "linear (mean)", "{}", 0), 1.0, a=0.2, b=0.3),
        row(Job("report", cell, "expert a", "{}", 0), 2.0, a=0.4, b=0.0),
        row(Job("report", cell, "expert b", "{}", 0), 1.5, a=0.1, b=0.6),
    ]
    found.rows = {Job.of_row(r).key: r for r in rows}
    assert found.kept("linear (mean)", cell) == pytest.approx(50)
    assert found.row(merge_found.BEST, cell)["loss"] == pytest.approx(1.5)
    assert found.kept(merge_found.BEST, cell) == pytest.approx((25 + 100) / 2)


def test_without_rows_there_is_no_page(plan):
    with pytest.raises(InputError, match="no cell of the report"):
        merge_found.Found(plan, [])


def test_the_page_in_the_repository_is_of_the_rows_beside_it(plan):
    rows = merge_study.read_rows(merge_study.RESULTS)
    page = merge_report.page(merge_found.Found(plan, rows), rows, merge_study.RESULTS.stem)
    assert page == merge_study.RESULTS.with_suffix(".md").read_text()


def test_some_experts_are_drawn_by_the_seed(monkeypatch, tmp_path):
    for name in "abcd":
        (tmp_path / "topic-fresh-5/clients" / name).mkdir(parents=True)
    monkeypatch.setattr(study_experts, "WORK", tmp_path)
    cell = Cell("topic", "fresh", 5)
    two, again = (list(study_measure.chosen_experts(cell, 2)) for _ in range(2))
    assert two == again == sorted(two) and len(two) == 2
    assert list(study_measure.chosen_experts(cell, 0)) == ["a", "b", "c", "d"]
