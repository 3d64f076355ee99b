"""`python -m llava.serve.demo`: all of it starts, and all of it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from llava.errors import InputError
from llava.serve.demo import arguments, base_of, named, of_quickstart

ROOT = Path(__file__).parents[3]
pytest.importorskip("gradio")


def start(*flags) -> subprocess.Popen:
    command = [sys.executable, "-m", "llava.serve.demo", *map(str, flags), "--device", "cpu"]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_one_address_is_told_and_an_interrupt_stops_every_part(llava_folder, tmp_path):
    demo = start(f"one={llava_folder}", "--log-dir", tmp_path / "logs")
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if line.startswith("page:"):
            break
    assert lines[-1].startswith("page: http://127.0.0.1:"), lines
    page = httpx.get(lines[-1].split()[1])
    assert page.status_code == 200
    assert "<html" in page.text
    parts = children(demo.pid)
    assert len(parts) == 3
    worker = parts[1]
    os.kill(worker, signal.SIGKILL)
    assert demo.stdout.readline().startswith("one stopped: ")
    demo.send_signal(signal.SIGINT)
    assert demo.wait(300) == 0
    assert not any(Path(f"/proc/{part}").exists() for part in parts)


@pytest.mark.slow
def test_a_model_that_does_not_load_ends_all_of_it_with_its_reason(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    demo = start(broken, "--log-dir", tmp_path / "logs")
    out, _ = demo.communicate(timeout=600)
    assert demo.returncode == 2
    assert "error: broken did not start: error: " in out
    assert "logs/broken.log" in out


def test_without_a_model_it_is_what_the_quickstart_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {})
    args = arguments(["--port", "7990"])
    with pytest.raises(InputError, match="run bash scripts/quickstart.sh first, or name a model"):
        of_quickstart(args)
    (tmp_path / "runs/quickstart/fedcmp").mkdir(parents=True)
    (tmp_path / "runs/quickstart/fedcmp/mm_projector.bin").touch()
    of_quickstart(args)
    assert args.models[0] == "Fed-CMP=runs/quickstart/fedcmp"
    assert len(args.models) == 4
    assert args.run[0] == "runs/quickstart/fedcmp"
    assert args.port == 7990


def test_models_have_names_of_their_own():
    assert named(["a/b", "x=a/b"]) == {"b": "a/b", "x": "a/b"}
    with pytest.raises(InputError, match="two parts are called 'b'; name the model: NAME=c/b"):
        named(["a/b", "c/b"])
    with pytest.raises(InputError, match="two parts are called 'page'"):
        named(["page=a"])
    with pytest.raises(InputError, match="/no/such: no such folder"):
        named(["m=/no/such"])
    with pytest.raises(InputError, match="NAME=MODEL is expected"):
        named(["m="])


def test_a_projectors_base_is_the_one_that_it_was_trained_on(tmp_path, llava_folder):
    (tmp_path / "mm_projector.bin").touch()
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "the/base"}))
    assert base_of(str(tmp_path)) == "the/base"
    assert base_of(str(llava_folder)) is None
