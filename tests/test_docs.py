"""README and docs/: the reference is generated, and what they name exists."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = sorted(
    {
        line.strip()
        for block in BLOCKS
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
        if line.strip() and not line.startswith("#")
    }
)
# In a bash script: what it hands its flags to, a module or a file.
STARTS = re.compile(
    r"-m(?:odule)? (playground\.studies|(?:fed|llava)\.[\w.]+)|(llava/\S+\.py)|in_chunks \S+ (\w+)"
)


def generator():
    spec = importlib.util.spec_from_file_location("docs", ROOT / "scripts/generate_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["methods", "flags"])
def test_generating_the_reference_again_changes_nothing(name):
    made = getattr(generator(), f"{name}_page")()
    assert made == (ROOT / f"docs/{name}.md").read_text(), "run python scripts/generate_docs.py"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("path", sorted(set(re.findall(r"scripts/[\w./]+\.(?:sh|json|py)", TEXT))))
def test_scripts(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, target


def test_flags_that_are_named_exist():
    known = set(re.findall(r"^\| `--([\w-]+)`", (ROOT / "docs/flags.md").read_text(), re.MULTILINE))
    named = set(re.findall(r"--((?:fed|pilot)_\w+)", TEXT))
    assert named
    assert named <= known


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda p: p.name)
def test_every_training_script_takes_more_flags_at_its_end(path):
    text = path.read_text()
    assert path.name == "setup.sh" or '"$@"' in text


@functools.cache
def help_of(program: str, *command: str) -> str:
    """What a module or a file prints for --help."""
    start = runpy.run_path if program.endswith(".py") else runpy.run_module
    with (
        mock.patch.object(sys, "argv", [program, *command, "--help"]),
        contextlib.redirect_stdout(io.StringIO()) as said,
        pytest.raises(SystemExit) as ended,
    ):
        start(str(ROOT / program) if program.endswith(".py") else program, run_name="__main__")
    assert not ended.value.code, program
    return said.getvalue()


def started_by(words: list[str]) -> tuple[str, ...]:
    """The program of a command, with its sub-command, of a bash script the one that it starts."""
    if words[0] == "bash":
        found = STARTS.search((ROOT / words[1]).read_text())
        assert found, words[1]
        module, file, evaluation = found.groups()
        return (module or file or f"llava.eval.{evaluation}",)
    assert words[0] == "python", words
    program, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    return (program, rest[0]) if program == "fed.data" else (program,)


def test_every_kind_of_command_is_found():
    assert len(COMMANDS) > 30
    assert {command.split()[0] for command in COMMANDS} >= {"bash", "python"}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_programs_and_flags_that_exist(command):
    words = [word for word in shlex.split(command, comments=True) if not re.match("[A-Z_]+=", word)]
    if words[0] == "pip":
        extras = re.findall(r"\[(\w+)\]", command)
        project = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
        return
    if words[0] == "torchrun":  # torchrun --nproc_per_node N -m PROGRAM …
        words = ["python", *words[3:]]
    flags = {word for word in words if word.startswith("--")}
    assert words[0] in ("bash", "python")
    assert words[1] == "-m" or (ROOT / words[1]).is_file()
    if flags or words[1] == "-m":
        known = set(re.findall(r"--[\w-]+", help_of(*started_by(words))))
        assert flags <= known
