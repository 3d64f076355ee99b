"""A run has its --output_dir to itself, whatever entry or driver it is of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from fed.train import train as fed_train
from llava import folder_lock
from llava.errors import InputError
from llava.folder_lock import Lock, is_held, sole_run
from llava.processes import name_of
from llava.train.settings import fingerprint
from llava.train.train import train as llava_train

# A holder's children may outlive it for a moment.
HOLDER = """
import os, sys, time
from pathlib import Path
from llava.folder_lock import Lock

lock = Lock(Path(sys.argv[1]), "")
if os.fork() == 0:
    time.sleep(float(sys.argv[2]))
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def refused():
    return pytest.raises(InputError, match=f"another run is at work there .{name_of()}, as HOST")


def test_a_second_run_is_refused(flags, tiny, tmp_path):
    (tmp_path / "clients.yaml").write_text(f"clients:\n  - {{name: a, data_path: {tiny}/a.json}}\n")
    federated = {"fed_clients": tmp_path / "clients.yaml", "fed_rounds": 1}
    output = tmp_path / "out"
    output.mkdir()
    with sole_run(output):
        with refused():
            llava_train(argv=flags(data_path=tiny / "a.json", max_steps=1, output_dir=output))
        with refused():
            fed_train(flags(**federated, output_dir=output))
        script = {"fed_driver": "script", "fed_client_command": "true"}
        with refused():
            fed_train(flags(**federated, **script, output_dir=output))
        with refused():
            fed_train(flags(fed_clients=_site(tmp_path), fed_driver="remote", output_dir=output))
        assert [path.name for path in output.iterdir()] == [".lock"]
    assert list(output.iterdir()) == []
    llava_train(argv=flags(data_path=tiny / "a.json", max_steps=1, output_dir=output))


def test_who_has_released_it_may_take_it_again_though_a_child_is_left(tmp_path):
    child = 0
    try:
        with sole_run(tmp_path):
            if (child := os.fork()) == 0:  # as a loader's process that an exception keeps alive
                time.sleep(60)
                os._exit(0)
        with sole_run(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_holder_on_another_host_is_waited_for(tmp_path, monkeypatch):
    """A file server drops a crashed host's locks by and by."""
    monkeypatch.setattr(folder_lock, "_ELSEWHERE", 0.3)
    with sole_run(tmp_path):
        (tmp_path / ".lock").write_text("other-host.1.1")
        began = time.monotonic()
        with pytest.raises(InputError, match=r"busy \(other-host\.1\.1"):
            Lock(tmp_path, "busy")
        assert time.monotonic() - began > 0.3


def test_another_users_lock_can_be_taken(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("theirs")
    usual = os.open

    def opened(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return usual(path, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    with sole_run(tmp_path):
        assert is_held(tmp_path)


def test_takers_and_givers_in_a_row_never_hold_it_together(tmp_path):
    """The file is removed and made anew all the time: none may hold one that is gone."""
    taker = """
import sys
from pathlib import Path
from llava.errors import InputError
from llava.folder_lock import Lock

folder, taken = Path(sys.argv[1]), 0
while taken < 300:
    try:
        lock = Lock(folder, "busy")
    except InputError:
        continue
    (folder / "inside").mkdir()  # an error where another one is inside
    (folder / "inside").rmdir()
    lock.release()
    taken += 1
"""
    argv = [sys.executable, "-c", taker, str(tmp_path)]
    takers = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in takers]
    assert [process.returncode for process in takers] == [0, 0, 0], said


def test_it_is_no_content_of_a_folder(tmp_path):
    (tmp_path / "adapter.bin").write_bytes(b"x")
    before = fingerprint(tmp_path)
    with sole_run(tmp_path):
        assert fingerprint(tmp_path) == before


def _site(folder):
    (folder / "sites.yaml").write_text("clients:\n  - {name: a}\n")
    return folder / "sites.yaml"


def test_of_those_that_run_together_one_holds_it(tmp_path):
    with sole_run(tmp_path), sole_run(tmp_path, main=False):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


@pytest.mark.parametrize("outlives", [0, 2])
def test_a_killed_holder_gives_it_back_with_its_last_child(tmp_path, monkeypatch, outlives):
    monkeypatch.setattr(folder_lock, "_CHILDREN", 600.0)  # however slow this machine is
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), str(outlives)], stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=rf"busy \([\w-]+\.{holder.pid}\."):
        Lock(tmp_path, "busy")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    Lock(tmp_path, "busy").release()
