"""README and docs/: the reference is generated, and what they name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "".join(page.read_text() for page in PAGES)


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
