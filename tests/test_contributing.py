"""The examples of CONTRIBUTING.md are whole: put where they belong, they pass their tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"`(\S+\.py)`:\n\n```python\n(.*?)```", TEXT, re.DOTALL))
TESTS = [path for path in EXAMPLES if path.startswith("tests/")]
METHODS = "majority_vote", "fedper"

# In each example a mistake, and the test that finds it.
MISTAKES = {
    "fed/methods/majority_vote.py": (
        ("block.base + step", "block.base - step"),
        "test_majority_vote.py::test_by_hand",
    ),
    "fed/methods/fedper/method.py": (
        ("shares(weights)", "shares([1] * len(weights))"),
        "test_fedper.py::test_by_hand",
    ),
    "fed/methods/fedper/store.py": (
        ("<= round", "< 0"),
        "test_fedper.py::test_last_layers_stay_with_the_clients",
    ),
    "fed/drivers/threads.py": (
        ('| {"CUDA_VISIBLE_DEVICES": gpu}', ""),
        "test_threads.py::test_each_client_has_a_gpu_of_its_own",
    ),
    "llava/model/multimodal_projector/pooled.py": (
        ("// self.window) ** 2", "// self.window)"),
        "test_pooled.py::test_it_trains_and_its_flag_is_kept",
    ),
}

# Packages look for more of their modules in these folders.
PLUGIN = """
import fed.drivers, fed.methods, llava.model.multimodal_projector

for package in (fed.drivers, fed.methods, llava.model.multimodal_projector):
    package.__path__.append({root!r} + "/" + package.__name__.replace(".", "/"))
"""


@pytest.fixture
def written(tmp_path):
    """A folder with the examples at their places, and the fixtures of tests/conftest.py."""
    for path, code in EXAMPLES.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
        if file.name == "method.py":
            (file.parent / "__init__.py").touch()
    (tmp_path / "examples.py").write_text(PLUGIN.format(root=str(tmp_path)))
    (tmp_path / "conftest.py").write_text("from tests.conftest import flags, tiny  # noqa: F401\n")
    return tmp_path


def run(folder, *tests):
    """pytest on tests, with the examples in `folder`."""
    options = ["-q", "-p", "examples", "-p", "no:cacheprovider", "--confcutdir=/"]
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, tests)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def test_every_example_has_a_test_and_a_mistake_to_find():
    assert MISTAKES.keys() == EXAMPLES.keys() - set(TESTS)
    names = {Path(path).stem.removeprefix("test_") for path in TESTS}
    assert names == {*METHODS, "threads", "pooled"}


@pytest.mark.slow
def test_the_examples_pass_their_tests(written):
    done = run(written, *(written / path for path in TESTS))
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 2 * len(TESTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_methods_pass_what_all_methods_do(written, name):
    done = run(written, "-k", name, "tests/fed/methods/test_all_methods.py")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 15


@pytest.mark.slow
def test_a_mistake_in_an_example_fails_its_test(written):
    """All mistakes at once: each is found by another test."""
    tests = []
    for path, ((right, wrong), test) in MISTAKES.items():
        file = written / path
        code = file.read_text()
        assert code.count(right) == 1, path
        file.write_text(code.replace(right, wrong))
        name, _, case = test.partition("::")
        tests += [f"{written / path}::{case}" for path in TESTS if path.endswith(f"/{name}")]
    done = run(written, *tests)
    assert re.search(rf"^{len(MISTAKES)} failed(?!, \d+ passed)", done.stdout, re.MULTILINE), (
        done.stdout
    )


def test_paths_in_the_text_exist():
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    named = set(re.findall(r"\b(?:scripts|fed|tests|llava)/[\w./]*\w", prose)) - set(EXAMPLES)
    named -= {str(Path(path).parent) for path in EXAMPLES}
    assert len(named) > 4
    assert [name for name in named if not (ROOT / name).exists()] == []
