"""What all studies share: plans, rows, tasks, and flags of the playground's runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import yaml

from llava.errors import InputError
from playground import ROOT, flags
from playground.studies.plan import Task
from playground.studies.registry import STUDIES, read_plan
from playground.studies.rows import add_row, read_rows
from playground.studies.runner import Workers


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": "dance"}, "study is 'dance'; fedcmp, pilot, pivotmerge are known"),
        ({"ours": "Fed-XYZ"}, "'Fed-XYZ' is none of the methods"),
        ({"methods": {"FedAvg": {"settings": []}}}, "method 'FedAvg' has no settings"),
        ({"report": None}, "report is missing"),
    ],
)
def test_a_plan_at_fault_is_refused(study, change, message, tmp_path):
    document = yaml.safe_load((ROOT / f"playground/studies/{study}.yaml").read_text()) | change
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
    with pytest.raises(InputError, match=message) as error:
        read_plan(file)
    assert str(file) in str(error.value)


def test_rows_survive_a_process_that_died_while_writing(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    rows = [{"job": 1, "loss": 0.5}, {"job": 2, "note": "±"}]
    for row in rows:
        add_row(file, row)
    whole = file.read_bytes()
    file.write_bytes(whole + json.dumps({"job": 3}).encode()[:5])
    assert read_rows(file) == rows
    add_row(file, {"job": 3})
    assert file.read_bytes().startswith(whole)
    assert read_rows(file) == [*rows, {"job": 3}]
    file.write_bytes(file.read_bytes().removesuffix(b"\n"))  # whole, without its newline
    add_row(file, {"job": 4})
    assert read_rows(file) == [*rows, {"job": 3}, {"job": 4}]
    file.write_text("{}\n{\n{}\n")
    with pytest.raises(InputError, match="not one JSON object a line"):
        read_rows(file)


def test_rows_of_another_study_are_refused():
    plan = read_plan(ROOT / "playground/studies/fedcmp.yaml")
    rows = read_rows(ROOT / "playground/results/pivotmerge.jsonl")
    with pytest.raises(InputError, match="the results are not of a study 'fedcmp'"):
        plan.by_job(rows)


def test_a_task_waits_for_what_it_needs_and_none_begins_too_late(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tasks = [
        Task("second", first.rename, (second,), needs=first),
        Task("first", first.touch, ()),
    ]
    with Workers(2, deadline=time.monotonic() - 1) as workers:
        assert not workers.run(tasks)
    assert list(tmp_path.iterdir()) == []
    with Workers(2, deadline=time.monotonic() + 600) as workers:
        assert workers.run(tasks)
        assert list(tmp_path.iterdir()) == [second]
        assert not workers.run([Task("never", first.touch, (), needs=first)])


@pytest.mark.parametrize("section", flags.sections())
def test_bash_and_python_read_the_same_flags(section):
    words = flags.words(flags.flags(section))
    call = f"{sys.executable} -m playground.flags {section}"
    split = subprocess.run(
        ["bash", "-c", f'words="$({call})"; printf "%s\\n" $words'],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert split.stdout.splitlines() == words
