from __future__ import annotations

from pathlib import Path

import pytest

from fed.clients.clients_yaml import load_clients
from fed.clients.slices import seed_of, slices
from llava.errors import InputError


@pytest.mark.parametrize(("samples", "rounds"), [(0, 3), (1, 5), (5, 5), (7, 3), (100, 7)])
def test_one_pass_sees_each_sample_once_and_slices_are_even(samples, rounds):
    cut = slices(samples, rounds, seed=1)
    assert len(cut) == rounds
    assert sorted(i for part in cut for i in part) == list(range(samples))
    sizes = [len(part) for part in cut]
    assert max(sizes) - min(sizes) <= 1


def test_slices_depend_on_the_seed_and_nothing_else():
    assert slices(50, 3, 1) == slices(50, 3, 1) != slices(50, 3, 2)


def test_seeds_are_fixed_numbers_that_depend_on_every_part():
    assert seed_of(0, "a", 1) == 427958307  # recorded: continued runs need it to stay
    parts = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1", ""), (0, "a", "1", "")]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(i) < 2**31 for i in range(100))


def load(folder: Path, *entries: str):
    (folder / "a.json").write_text("[]")
    lines = "".join(f"  - {{{entry}, data_path: a.json}}\n" for entry in entries)
    (folder / "clients.yaml").write_text(f"clients:\n{lines}")
    return load_clients(folder / "clients.yaml", ["seed"])


def test_clients_may_have_tasks(tmp_path):
    clients = load(tmp_path, "name: a, task: text_in-7", "name: b, task: text_in-7, seed: 3")
    assert [client.task for client in clients] == ["text_in-7"] * 2
    assert clients[1].overrides == {"seed": "3"}
    assert [client.task for client in load(tmp_path, "name: a", "name: b")] == [None, None]


@pytest.mark.parametrize("task", ["a/b", "''", "7", "null", "[x]", "a b", "ü", '"a\\n"'])
def test_bad_tasks(tmp_path, task):
    with pytest.raises(InputError, match=r"client b has task .*letters, digits, '-' and '_'"):
        load(tmp_path, "name: a, task: x", f"name: b, task: {task}")


def test_all_clients_have_a_task_or_none_has(tmp_path):
    with pytest.raises(InputError, match="client b has no task, others have one"):
        load(tmp_path, "name: a, task: x", "name: b")
