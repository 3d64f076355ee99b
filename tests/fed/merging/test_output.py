"""OUT is whole or not there: full disks, kills, and what must not be overwritten."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fed.merge import merge
from fed.state import fingerprint, load
from llava.errors import InputError
from llava.model.shards import Shards
from llava.processes import host, name_of

ROOT = Path(__file__).parents[3]
# For each number N that comes in, a merge whose N-th touch of the disk is its last.
KILLED = """
import os, shutil, signal, sys
from fed.merge import main
import fed.merging.run
left = 0
def count(function):
    def counted(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted
for name in ("replace", "fsync", "mkdir"):
    setattr(os, name, count(getattr(os, name)))
for name in ("copyfile", "rmtree", "copytree"):
    setattr(shutil, name, count(getattr(shutil, name)))
for line in sys.stdin:
    left = int(line)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        try:
            main(sys.argv[1:])
            os._exit(0)
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def started(*words: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fed.merge", *words]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, **more
    )


def test_a_folder_that_is_not_empty(expert, tmp_path):
    paths, out = [expert("bin", 1), expert("bin", 2)], tmp_path / "out"
    out.mkdir()
    merge(paths, out, method="linear")  # an empty one is taken
    (out / "notes.txt").write_text("mine")
    before = fingerprint(load(out / "mm_projector.bin"))
    with pytest.raises(InputError, match="--output .*is there and not empty; --overwrite"):
        merge(paths, out, method="median")
    assert (out / "notes.txt").exists()
    assert fingerprint(load(out / "mm_projector.bin")) == before
    merge(paths, out, method="linear", overwrite=True, weights=[1, 5])
    assert not (out / "notes.txt").exists()
    assert fingerprint(load(out / "mm_projector.bin")) != before
    assert not list(tmp_path.glob(".out*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is there and no folder"):
        merge(paths, tmp_path / "file", method="linear", overwrite=True)


@pytest.mark.parametrize("what", ["expert", "base", "parent", "here"])
def test_what_is_needed_is_not_overwritten(what, expert, tmp_path, monkeypatch):
    paths, base = [expert("projector", 1), expert("projector", 2)], expert("projector", 0)
    out = {"expert": paths[1], "base": base, "parent": tmp_path, "here": tmp_path / "here"}[what]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "x").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="--output .*would remove"):
        merge(paths, out, method="linear", base=str(base), overwrite=True)
    assert (paths[1] / "mm_projector.bin").exists()
    assert (base / "mm_projector.bin").exists()


def test_no_room_is_said_before_anything_is_written(expert, tmp_path, monkeypatch):
    paths = [expert("full", 1), expert("full", 2)]
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"--output .*needs 0.001 GB, 0.000 GB are free"):
        merge(paths, tmp_path / "deep" / "out", method="linear")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("form", "scope"), [("bin", "projector"), ("full", "projector"),
                         ("full bin", "projector"), ("full", "all"), ("full bin", "all"),
                         ("lora", "all")])  # fmt: skip
def test_a_disk_that_is_full(form, scope, expert, tmp_path):
    """No file may be longer than 2 KB: the disk's own refusal, in whatever library writes."""
    paths = [str(expert(form, seed)) for seed in (1, 2)]
    out = tmp_path / "results" / "out"

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = started("--method", "linear", "--experts", *paths, "--output", str(out), "--scope",
                   scope, preexec_fn=small)  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("error: --output")
    assert "File too large while writing" in last
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("form", ["projector", "full"])
def test_killed_anywhere_there_is_one_whole_folder(form, expert, tmp_path):
    paths = [str(expert(form, seed)) for seed in (1, 2)]
    out = tmp_path / "results" / "out"
    words = ["--method", "linear", "--experts", *paths, "--output", str(out), "--overwrite"]
    merge(paths, out, method="median", weights=[1, 9])  # for two the plain mean
    (out / "old").write_text("")

    def states() -> list[dict]:
        """What lies in whole folders under OUT's name or as `.old`."""
        folders = [p for p in out.parent.iterdir() if p == out or p.suffix == ".old"]
        for folder in folders:
            assert (folder / "README.md").exists()
            assert (folder / "config.json").exists()
        return [dict(Shards(f)) if form == "full" else load(f / "mm_projector.bin")
                for f in folders]  # fmt: skip

    kills = 0
    driver = subprocess.Popen([sys.executable, "-c", KILLED, *words], cwd=ROOT, env=ENVIRONMENT,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    with driver:
        while True:
            driver.stdin.write(f"{kills}\n")
            driver.stdin.flush()
            if (code := int(driver.stdout.readline())) == 0:
                break
            assert code == -signal.SIGKILL
            assert states()
            kills += 1
        driver.stdin.close()
    assert kills >= 6
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert not (out / "old").exists()


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(expert, tmp_path):
    paths, out = [expert("bin", 1), expert("bin", 2)], tmp_path / "results" / "out"
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        dead = name_of(process.pid)
    mine, alive = (out.parent / f".out.{name}.tmp" for name in (dead, name_of(os.getppid())))
    other, old = out.parent / f".outer.{dead}.tmp", out.parent / f".out.{dead}.old"
    # Of a merge that another host is at work on, with a number that is nobody's here.
    elsewhere = out.parent / f".out.{dead.replace(host(), 'another-host')}.tmp"
    elsewhere.mkdir(parents=True)
    for folder in (mine, alive, other, old):
        folder.mkdir(parents=True)
    (old / "precious").write_text("")
    with pytest.raises(InputError, match="is there and not empty"):  # it is back
        merge(paths, out, method="linear")
    assert (out / "precious").exists()
    assert not mine.exists()
    assert alive.exists()
    assert other.exists()
    assert elsewhere.exists()
    merge(paths, out, method="linear", overwrite=True)
    assert not (out / "precious").exists()
