"""The example of CONTRIBUTING.md is a method: its test passes, and so do those of all methods."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLE = dict(re.findall(r"`(\S+\.py)`:\n\n```python\n(.*?)```", TEXT, re.DOTALL))
METHOD, TEST = "fed/methods/majority_vote.py", "tests/fed/methods/test_majority_vote.py"


def run(folder, *files):
    """pytest on files, with a folder whose files are taken for more of `fed.methods`."""
    (folder / "more_methods.py").write_text(
        f"import fed.methods\nfed.methods.__path__.append({str(folder / 'methods')!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "more_methods", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [*command, "-q", "-k", "majority_vote", *map(str, files)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def write(folder):
    assert set(EXAMPLE) == {METHOD, TEST}
    (folder / "methods").mkdir()
    (folder / "methods/majority_vote.py").write_text(EXAMPLE[METHOD])
    (folder / "test_majority_vote.py").write_text(EXAMPLE[TEST])


def test_the_example_passes_its_own_test_and_the_contract(tmp_path):
    write(tmp_path)
    done = run(
        tmp_path, tmp_path / "test_majority_vote.py", "tests/fed/methods/test_all_methods.py"
    )
    assert done.returncode == 0, done.stdout
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 20  # two of its own, the others of all methods


def test_a_wrong_example_fails(tmp_path):
    write(tmp_path)
    method = tmp_path / "methods/majority_vote.py"
    method.write_text(method.read_text().replace("block.base + step", "block.base - step"))
    done = run(tmp_path, tmp_path / "test_majority_vote.py")
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout


def test_what_the_text_names_is_there():
    named = set(re.findall(r"\b(?:scripts|fed|tests|llava)/[\w./]*\w", TEXT)) - set(EXAMPLE)
    assert len(named) > 4
    assert all((ROOT / name).exists() for name in named)
