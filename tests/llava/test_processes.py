"""What a process has left or begun is told from what others are at work on, by its name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llava.atomic import atomic_write, left_of, new_folder, own_name, remove_leftovers
from llava.errors import InputError
from llava.processes import group_of, host, is_gone, name_of

WAIT = "import sys; print(1, flush=True); sys.stdin.read()"


@pytest.fixture
def alive():
    """A process of its own group that lives until the test is over."""
    with subprocess.Popen([sys.executable, "-c", WAIT], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, start_new_session=True) as process:  # fmt: skip
        process.stdout.readline()
        yield process
        assert process.poll() is None  # nobody has ended it
        process.stdin.close()


@pytest.fixture
def dead() -> str:
    """The name of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", WAIT], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        process.stdout.readline()
        name = name_of(process.pid)
        process.stdin.close()
    return name


def elsewhere(name: str) -> str:
    """The same numbers on another host."""
    return name.replace(host(), "another-host-123abc")


def recycled(name: str) -> str:
    """A process of this host that has ended, and whose number is now another one's."""
    where, pid, began = name.split(".")
    return f"{where}.{pid}.{int(began) - 1}"


def test_who_is_gone(alive, dead):
    name = name_of(alive.pid)
    assert is_gone(dead)
    assert not is_gone(elsewhere(dead))
    assert not is_gone(name)
    assert not is_gone(elsewhere(name))
    assert not is_gone(name_of())
    assert is_gone(recycled(name))


def test_whose_group_may_be_signalled(alive, dead):
    name = name_of(alive.pid)
    assert group_of(name) == alive.pid
    assert group_of(elsewhere(name)) is None
    assert group_of(recycled(name)) is None
    assert group_of(str(alive.pid)) is None
    assert group_of("") is None
    assert group_of(dead) == int(dead.split(".")[1])  # its group may live on


def test_only_what_the_dead_of_this_host_left_is_removed(tmp_path, alive, dead):
    names = {"dead": dead, "alive": name_of(alive.pid), "elsewhere": elsewhere(dead),
             "recycled": recycled(name_of(alive.pid))}  # fmt: skip
    for who, name in names.items():
        (tmp_path / f".{who}.json.{name}.tmp").write_text("half")
    (tmp_path / ".notes.tmp").write_text("a user's own")
    remove_leftovers(tmp_path)
    left = {path.name.split(".")[1] for path in tmp_path.iterdir()}
    assert left == {"alive", "elsewhere", "notes"}


def test_what_was_left_of_a_path_is_of_that_path_alone(tmp_path, dead):
    for name in (f".out.{dead}.tmp", f".out.{dead}.old", f".out.x.{dead}.tmp", f".outer.{dead}.tmp",
                 f".out.{name_of()}.tmp", f".out.{elsewhere(dead)}.old"):  # fmt: skip
        (tmp_path / name).mkdir()
    assert [path.name for path in left_of(tmp_path / "out")] == [f".out.{dead}.old",
                                                                f".out.{dead}.tmp"]  # fmt: skip
    assert left_of(tmp_path / "none" / "out") == []


def test_a_killed_writer_leaves_its_name_and_it_is_known_for_dead(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from llava.atomic import atomic_write\n"
        "with atomic_write(Path(sys.argv[1]) / 'x') as file:\n"
        "    file.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=os.getcwd())
    (half,) = tmp_path.iterdir()
    assert half.name.startswith(f".x.{host()}.")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_and_two_hosts_never_write_to_one_name(tmp_path, monkeypatch):
    path = tmp_path / "x"
    mine = own_name(path)
    with atomic_write(path), new_folder(tmp_path / "y"):
        assert mine.exists()
        assert own_name(tmp_path / "y").is_dir()
    monkeypatch.setattr("llava.processes.host", lambda: "another-host-123abc")
    assert own_name(path) != mine


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(InputError, match="out: is there already"), new_folder(out):
        pass
    with pytest.raises(ZeroDivisionError), new_folder(out, replace=True):
        raise ZeroDivisionError
    assert [path.name for path in out.iterdir()] == ["old"]
    with new_folder(out, replace=True) as folder:
        (folder / "new").touch()
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_written_in_pieces_is_what_was_given(tmp_path):
    large = bytes(range(256)) * 10_000  # of more than two pieces
    with atomic_write(tmp_path / "x") as file:
        file.write(b"head")
        assert file.write(memoryview(large)) == len(large)
        file.write(b"tail")
        file.seek(0)
        file.write(b"HEAD")
    assert (tmp_path / "x").read_bytes() == b"HEAD" + large + b"tail"
