"""The merging study: what it trains and merges, what it chooses, that its page is of its rows."""

from __future__ import annotations

import json

import pytest
import torch

from fed import methods
from fed.clients.clients_yaml import load_clients
from llava.errors import InputError
from playground import ROOT
from playground.studies import pivotmerge, pivotmerge_report
from playground.studies.pivotmerge_report import BEST, PivotMergeResults
from playground.studies.plan import Job
from playground.studies.registry import read_plan
from playground.studies.rows import read_rows


@pytest.fixture(scope="module")
def plan():
    return read_plan(ROOT / "playground/studies/pivotmerge.yaml")


def test_every_setting_is_one_that_the_method_takes(plan):
    start = {"0.weight": torch.eye(3), "0.bias": torch.ones(3)}
    states = [{n: t + k * t for n, t in start.items()} for k in (1, 2)]

    def check(method, setting):
        if method.needs_calibration:
            method.parse(setting)
        else:
            method(states, weights=[1, 1], base=start, **setting)

    for title, entry in plan.methods.items():
        assert 1 <= len(entry["settings"]) <= 4, title
        method = methods.get(entry["method"])
        assert not method.needs_calibration or entry["calibration"] == "own"
        for setting in entry["settings"]:
            check(method, setting)
    for options in plan.variants.values():
        check(methods.get(plan.methods[plan.ours]["method"]), options)
    counted = plan.document["counts"]["methods"]
    for title in [plan.ours, plan.reference, *plan.not_compared, *counted]:
        assert title in plan.methods


def test_development_and_report_share_neither_seeds_nor_pictures(plan):
    development, report = plan.document["development"], plan.document["report"]
    assert not set(development["seeds"]) & set(report["seeds"])
    assert len(report["seeds"]) >= 5
    assert development["part"] != report["part"]
    assert set(report["cells"]) - set(development["cells"])  # a scenario that settings never saw
    for scenario in plan.document["scenarios"].values():
        assert (ROOT / f"playground/fed/{scenario['clients']}.yaml").is_file()


def test_data_to_calibrate_on_are_the_experts_own_or_nobodys(plan):
    job = Job("report", "PivotMerge with data", "{}", "caption fresh", 41)
    names = ["name", "kind"]
    assert [file.name for file in plan.files(job, "own", names)] == ["name.json", "kind.json"]
    held_out = pivotmerge.EMOJI / "heldout_dev_caption.json"
    assert plan.files(job, "held out", names) == [held_out, held_out]
    assert plan.heldout(job) == "heldout_test_caption"


def test_experts_data_are_where_their_clients_have_them(plan):
    for part, place in ((p, place) for p in ("development", "report") for place in plan.places(p)):
        clients = ROOT / f"playground/fed/{plan.data(place[0])['clients']}.yaml"
        names = [spec.name for spec in load_clients(clients, [])]
        files = plan.files(Job(part, "RegMean", "{}", *place), "own", names)
        assert len(set(files)) == len(names)
        assert all(file.is_relative_to(pivotmerge.EMOJI / "clients") for file in files)
        assert [file for file in files if not file.is_file()] == []


def test_all_of_a_cell_begin_with_one_start(plan):
    fresh = plan.runs("topic fresh", 3)
    assert list(fresh) == ["start-fresh-3", "topic-fresh-3", "joint-topic-fresh-3"]
    brief = plan.runs("style brief", 3)
    assert list(brief) == ["start-fresh-3", "start-brief-3", "style-brief-3", "joint-topic-brief-3"]
    assert brief["start-brief-3"]["from"] == "start-fresh-3"
    assert brief["style-brief-3"]["from"] == brief["joint-topic-brief-3"]["from"] == "start-brief-3"
    assert all(flags["seed"] == 3 for flags in brief.values())
    flags = pivotmerge.training_flags()
    assert "fed_eval_data_path" not in flags
    assert "fed_eval_image_folder" in flags


def row(plan, job: Job, loss: float, **domains: float) -> dict:
    measures = {name: {"loss": loss, "exact": exact} for name, exact in domains.items()}
    measured = {"loss": loss, "exact": 0.5, "domains": measures, "of": list(domains)}
    return {"job": plan.described(job), **measured}


def test_the_setting_of_least_loss_over_the_mean_is_chosen(plan):
    small = pivotmerge.PivotMergePlan(
        {
            **plan.document,
            "reference": "mean",
            "development": {"seeds": [1], "cells": ["a fresh", "b fresh"]},
            "methods": {
                "mean": {"settings": [{}]},
                "ties": {"settings": [{"density": 0.2}, {"density": 0.5}]},
                "late": {"settings": [{}]},
            },
        }
    )
    losses = {("mean", "{}"): (1.0, 100.0)}
    losses["ties", '{"density": 0.2}'] = (0.5, 120.0)  # 0.85 of the mean's on average
    losses["ties", '{"density": 0.5}'] = (0.9, 90.0)  # 0.90, though less in sum
    rows = [
        row(plan, Job("development", title, setting, f"{scenario} fresh", 1), value)
        for (title, setting), values in losses.items()
        for scenario, value in zip("ab", values, strict=True)
    ]
    rows.append(row(plan, Job("development", "late", "{}", "a fresh", 1), 0.1))
    assert small.chosen(rows) == {"mean": "{}", "ties": '{"density": 0.2}'}


def test_a_job_and_its_row_are_of_one_another(plan):
    job = Job("report", "TIES", '{"density": 0.5}', "topic brief", 31, experts=3)
    assert plan.job_of(json.loads(json.dumps(row(plan, job, 1.0)))) == job
    cell = {"scenario": "topic", "start": "brief", "seed": 31}
    setting = {"title": "TIES", "setting": '{"density": 0.5}', "experts": 3}
    assert plan.described(job) == {"part": "report", "cell": cell, **setting}


def test_what_is_kept_of_each_expert(plan):
    place = "topic fresh", 31
    results = PivotMergeResults.__new__(PivotMergeResults)
    results.plan, results.chosen = plan, dict.fromkeys(plan.methods, "{}")
    rows = [
        row(plan, Job("report", "linear (mean)", "{}", *place), 1.0, a=0.2, b=0.3),
        row(plan, Job("report", "expert a", "{}", *place), 2.0, a=0.4, b=0.0),
        row(plan, Job("report", "expert b", "{}", *place), 1.5, a=0.1, b=0.6),
    ]
    results.by_job = plan.by_job(rows)
    assert results.kept(rows[0]) == pytest.approx(50)
    best = results.row(BEST, *place)
    assert best["loss"] == pytest.approx(1.5)
    assert results.kept(best) == pytest.approx((25 + 100) / 2)


def test_what_is_kept_is_told_where_experts_have_domains(plan):
    results = PivotMergeResults.__new__(PivotMergeResults)
    results.plan, results.chosen = plan, dict.fromkeys(plan.methods, "{}")
    fresh, brief = (("topic fresh", 31), ("topic brief", 31))
    merged = [
        row(plan, Job("report", plan.reference, "{}", *p), 1.0, a=0.2) for p in (fresh, brief)
    ]
    merged[1]["of"] = ["client-01"]
    results.by_job, results.places = plan.by_job(merged), [fresh, brief]
    assert results.has_domains("topic fresh")
    assert not results.has_domains("topic brief")


def test_without_rows_there_is_no_page(plan):
    with pytest.raises(InputError, match="no seed of any scenario"):
        PivotMergeResults(plan, [])


def test_the_page_in_the_repository_is_of_the_rows_beside_it(plan):
    file = ROOT / "playground/results/pivotmerge.jsonl"
    page = pivotmerge_report.page(PivotMergeResults(plan, read_rows(file)), file.stem)
    assert page == file.with_suffix(".md").read_text()


def test_some_experts_are_drawn_by_the_seed(plan, monkeypatch, tmp_path):
    for name in "abcd":
        (tmp_path / "topic-fresh-5/clients" / name).mkdir(parents=True)
    monkeypatch.setattr(plan, "work", tmp_path)
    two, again = (list(plan.expert_files("topic fresh", 5, 2)) for _ in range(2))
    assert two == again == sorted(two)
    assert len(two) == 2
    assert list(plan.expert_files("topic fresh", 5)) == ["a", "b", "c", "d"]


def test_every_place_waits_for_its_start_and_is_trained_once(plan, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "work", tmp_path)
    (tmp_path / "topic-fresh-1").mkdir()
    tasks = {task.name: task for task in plan.preparation()}
    assert "topic-fresh-1" not in tasks
    assert len(tasks) == len(set(tasks))
    assert tasks["start-fresh-1"].needs is None
    assert tasks["topic-brief-1"].needs == tmp_path / "start-brief-1"
    assert tasks["start-brief-1"].needs == tmp_path / "start-fresh-1"
