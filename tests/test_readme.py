"""What the README names exists, and what there is to name is in it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from fed import methods
from fed.arguments import FedArguments
from fed.methods.interface.options import ARGUMENTS
from fed.personalise import PersonaliseArguments
from llava.train.arguments import ModelArguments

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_flags():
    named = set(re.findall(r"--((?:fed|pilot)_\w+)", TEXT))
    kinds = (ModelArguments, FedArguments, PersonaliseArguments)
    ours = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert named == {name for name in ours if name.startswith(("fed_", "pilot_"))}


def test_methods_and_their_options():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", TEXT.split("## Methods")[1], re.MULTILINE)
    named = {name: set(re.findall(r"`(\w+)`", options)) for name, options in rows}
    assert set(named) == set(methods.names())
    for name, options in named.items():
        parameters = inspect.signature(inspect.unwrap(methods.get(name))).parameters
        assert options == set(parameters) - set(ARGUMENTS)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"scripts/[\w./]+\.(?:sh|json|py)", TEXT))))
def test_scripts(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda p: p.name)
def test_every_training_script_takes_more_flags_at_its_end(path):
    text = path.read_text()
    assert path.name == "setup.sh" or '"$@"' in text
