"""scripts/v1_5/eval/*.sh: run with a stand-in for python that notes what it is asked to run."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[4] / "scripts"
EVALUATIONS = sorted(p for p in (SCRIPTS / "v1_5/eval").glob("*.sh") if p.stem != "in_chunks")
STAND_IN = f"""#!{sys.executable}
import json, os, sys
argv, gpus = sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES")
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([gpus, argv]) + "\\n")
if gpus == "broken":
    sys.exit(3)
if "--answers-file" in argv:
    path = argv[len(argv) - argv[::-1].index("--answers-file")]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(gpus + "\\n" if gpus else "cpu\\n")
"""


@pytest.fixture
def run(tmp_path):
    """`run(script, *flags, gpus=None)` → (exit status, calls) in a folder with a copy of scripts/;
    a call is (CUDA_VISIBLE_DEVICES, arguments of python).
    """
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    for folder in ("gqa/data", "MME/eval_tool"):  # where the scripts go
        (tmp_path / "playground/data/eval" / folder).mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STAND_IN)
    (tmp_path / "bin" / "python").chmod(0o755)

    def start(script: Path, *flags: str, gpus: str | None = None):
        env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        env |= {"PATH": f"{tmp_path / 'bin'}:{env['PATH']}", "CALLS": str(tmp_path / "calls")}
        env |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        command = ["bash", str(script.relative_to(SCRIPTS.parent)), *flags]
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return done.returncode, calls

    return start


@pytest.mark.parametrize("script", EVALUATIONS, ids=lambda path: path.stem)
def test_every_line_of_a_script_is_understood(run, script, monkeypatch):
    """The programs' own parsers read the flags; those at the end count more than the script's."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    status, calls = run(script, "--model-path", "mine", "--batch_size", "8")
    assert status == 0
    (_, answering), *others = calls
    assert answering[:2] == ["-m", f"llava.eval.{answering[1].split('.')[-1]}"]
    args = importlib.import_module(answering[1]).arguments(answering[2:])
    assert args.model_path == "mine"
    assert args.batch_size == 8
    assert args.temperature == 0
    assert args.conv_mode == "vicuna_v1"
    assert "llava-v1.5-13b" in args.answers_file
    for _, (what, *flags) in others:
        if what == "-m":
            importlib.import_module(flags[0]).arguments(flags[1:])
        elif what.startswith("scripts/"):
            importlib.import_module(Path(what).stem).arguments(flags)
        else:
            assert what in ("eval/eval.py", "convert_answer_to_mme.py", "calculation.py")


@pytest.mark.parametrize(
    ("gpus", "answers"),
    [("3,5,1", "3\n5\n1\n"), ("2", "2\n"), (None, "0\n"), ("", "cpu\n")],
)
def test_one_process_a_gpu_and_their_answers_in_order(run, tmp_path, gpus, answers):
    status, calls = run(SCRIPTS / "v1_5/eval/seed.sh", gpus=gpus)
    assert status == 0
    folder = tmp_path / "playground/data/eval/seed_bench/answers/llava-v1.5-13b"
    assert (folder / "merge.jsonl").read_text() == answers
    from llava.eval import model_vqa_loader

    chunks = [model_vqa_loader.arguments(argv[2:]) for _, argv in calls if argv[0] == "-m"]
    count = len(answers.splitlines())
    assert sorted(c.chunk_idx for c in chunks) == list(range(count))
    assert {c.num_chunks for c in chunks} == {count}


def test_a_process_that_fails_stops_the_script(run, tmp_path):
    status, calls = run(SCRIPTS / "v1_5/eval/gqa.sh", gpus="0,broken,1")
    assert status != 0
    assert len(calls) == 3  # and nothing is converted or scored
    assert not list(tmp_path.rglob("merge.jsonl"))


def test_what_a_process_has_answered_is_not_asked_again(run, tmp_path):
    script = SCRIPTS / "v1_5/eval/seed.sh"
    folder = tmp_path / "playground/data/eval/seed_bench/answers/llava-v1.5-13b"
    status, calls = run(script, gpus="0,broken,1")
    assert status != 0
    assert len(calls) == 3
    folder.joinpath("3_0.jsonl").write_text("answered\n")
    status, calls = run(script, gpus="0,2,1")  # the same call, on sound devices
    assert status == 0
    assert [gpus for gpus, argv in calls if argv[0] == "-m"] == ["2"]
    assert (folder / "merge.jsonl").read_text() == "answered\n2\n1\n"
    assert not (folder / "merge.jsonl.unfinished").exists()
    status, calls = run(script, gpus="0,2,1")  # it was finished: all anew
    assert len([argv for _, argv in calls if argv[0] == "-m"]) == 3
    assert (folder / "merge.jsonl").read_text() == "0\n2\n1\n"


def test_scienceqa_in_eight_and_gathered(run, tmp_path):
    from llava.eval import eval_science_qa, model_vqa_science

    status, calls = run(SCRIPTS / "sqa_eval_batch.sh", "--batch_size", "4")
    assert status == 0
    assert len(calls) == 8
    args = [model_vqa_science.arguments(argv[2:]) for _, argv in calls]
    assert sorted(a.chunk_idx for a in args) == list(range(8))
    assert args[0].batch_size == 4
    status, [(_, scoring)] = run(SCRIPTS / "sqa_eval_gather.sh")
    assert status == 0
    assert (tmp_path / "test_llava-13b.jsonl").read_text() == "".join(f"{i}\n" for i in range(8))
    assert eval_science_qa.arguments(scoring[2:]).result_file == "./test_llava-13b.jsonl"
