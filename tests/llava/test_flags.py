from __future__ import annotations

import pytest

from fed import gallery, merge
from fed.data import make_clients
from llava.errors import InputError
from llava.flags import FlagParser, pairs


@pytest.mark.parametrize("written", ["--dry-run-it", "--dry_run_it"])
@pytest.mark.parametrize("added", ["--dry-run-it", "--dry_run_it"])
def test_dashes_and_underscores_are_one_flag(written, added, capsys):
    parser = FlagParser(prog="x")
    parser.add_argument(added, type=int)
    assert parser.parse_args([written, "3"]).dry_run_it == 3
    assert parser.parse_args([f"{written}=3"]).dry_run_it == 3
    assert parser.format_help().count("run") == 2  # once in the usage, once in the list
    with pytest.raises(SystemExit):
        parser.parse_args([written, "x"])
    assert f"argument {added}: invalid int value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (merge.parser, ["--dry-run", "--model-base=m", "--calibration-data", "a", "b"]),
        (gallery.parser, ["--models", "a=b", "--model-base", "m", "--data", "d", "--image-folder",
                          "i", "--output", "o"]),
        (make_clients.parser, ["task", "--input", "a", "--output", "o", "--image-folder", "i",
                               "--tasks", "caption", "--clients-per-task", "2", "--skip-bad"]),
    ],
)  # fmt: skip
def test_the_commands_take_both(parse, words):
    other = [word.replace("-", "_").replace("__", "--") for word in words]
    assert other != words
    assert parse().parse_args(words) == parse().parse_args(other)


def test_pairs():
    assert pairs("--x", ["a=1", "b=c=d", "e="]) == {"a": "1", "b": "c=d", "e": ""}
    with pytest.raises(InputError, match="^--x a: expected NAME=FOLDER$"):
        pairs("--x", ["b=1", "a"], "NAME=FOLDER")
    with pytest.raises(InputError, match="^--x: a is given twice$"):
        pairs("--x", ["a=1", "a=2"])
