from __future__ import annotations

from pathlib import Path

import pytest

from fed.clients import load_clients, seed_of, slices
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


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("name: 1", r"client 2 has name 1; .* \(YAML reads a number there: .* name: \"1\"\)"),
        ("name: 1.5", r"client 2 has name 1.5; .*a number .* name: \"1.5\"\)"),
        ("name: yes", r"client 2 has name True; .*yes or no there: put it in quotes"),
        ("name: 2024-05-01", r"a date there: put it in quotes, name: \"2024-05-01\""),
        ("name: null", r"client 2 has name None; letters, digits, '.', '_' and '-' are expected$"),
        ("name: b, image_folder: 5", r"client b: image_folder is 5, .* image_folder: \"5\"\)"),
        ("name: b, image_folder: yes", "client b: image_folder is True, .*yes or no"),
        ("name: b, data_path: 7", r"client b: data_path is 7, a text .* data_path: \"7\"\)"),
        ("name: b, task: 1", r"client b has task 1; .* task: \"1\"\)"),
        ("name: b, seed: null", "client b: seed is None, a value is expected; leave seed out"),
        ("name: b, seed: ''", "client b: seed is '', a value is expected"),
        ("name: b, seed: [1, 2]", r"client b: seed is \[1, 2\], a value is expected"),
        ("name: b, seed: 2024-05-01", r"client b: seed is datetime.date.*a date there"),
        ("name: b, cwd: 5", r"client b: cwd is 5, a text .* cwd: \"5\"\)"),
        ("name: b, env: {A: yes}", "client b: env A is True, a text .*yes or no there"),
        ("name: b, env: {A: 2024-05-01}", r"client b: env A is .*A: \"2024-05-01\"\)"),
        ("name: b, command: 5", "client b: command is 5, one text with a program"),
        ("name: b, from_round: 1.5", "client b has from_round 1.5; a round's number"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_was_meant_is_asked_for_in_quotes(
    tmp_path, entry, message
):
    (tmp_path / "a.json").write_text("[]")
    data = "" if "data_path" in entry else ", data_path: a.json"
    text = f"clients:\n  - {{name: a, data_path: a.json}}\n  - {{{entry}{data}}}\n"
    (tmp_path / "clients.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_clients(tmp_path / "clients.yaml", ["seed"], processes=True)


def test_flags_in_all_of_yamls_ways_are_the_command_lines_text(tmp_path):
    (client,) = load(tmp_path, "name: '1', seed: 1e-3")
    assert (client.name, client.overrides) == ("1", {"seed": "1e-3"})
    for written, value in (("yes", "True"), ("0.5", "0.5"), ("0", "0"), ("{a: 2}", '{"a": 2}')):
        (client,) = load(tmp_path, f"name: a, seed: {written}")
        assert client.overrides == {"seed": value}
