"""scripts/setup.sh: the Python that it takes, and the extras that are named anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def chosen(tmp_path):
    """`chosen(name="3.14", …)`: what setup.sh does where these interpreters are installed."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "dirname").symlink_to(shutil.which("dirname"))
    text = (SCRIPTS / "setup.sh").read_text().partition("\nbase_python=")[0]  # before it installs
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.sh").write_text(f"{text}\nfind_python\n")

    def run(**interpreters: str) -> subprocess.CompletedProcess:
        for name, version in interpreters.items():
            program = commands / name.replace("_", ".")
            program.write_text(
                f"#!{sys.executable}\nimport sys\n"
                f"sys.version_info = {tuple(map(int, version.split('.')))}\n"
                f"exec(sys.argv[2] if sys.argv[1] == '-c' else 'print(\"Python {version}\")')\n"
            )
            program.chmod(0o755)
        return subprocess.run(
            [shutil.which("bash"), tmp_path / "scripts" / "setup.sh"],
            env={"PATH": str(commands)}, capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("version", [f"3.{minor}" for minor in range(9, 17)])
def test_setup_takes_the_versions_that_the_project_asks_for(chosen, version):
    asked = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    done = chosen(python3=version)
    if SpecifierSet(asked).contains(version):
        assert (done.returncode, done.stdout) == (0, "python3\n")
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(
            "error: Python 3.10 to 3.14 is needed; found Python " + version
        )


def test_setup_takes_a_version_that_was_run_before_others(chosen):
    assert chosen(python3_14="3.14").stdout == "python3.14\n"
    assert chosen(python3_13="3.13", python3="3.9").stdout == "python3.13\n"
    assert chosen(python3_11="3.11").stdout == "python3.11\n"


def test_every_extra_that_is_named_is_there():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"train", "flash"} <= extras.keys()  # upstream's, and what its guide adds
    files = [ROOT / "README.md", ROOT / "pyproject.toml"]
    files += [f for kind in ("*.sh", "*.py", "*.md") for f in SCRIPTS.rglob(kind)]
    files += [*(ROOT / "llava").rglob("*.py"), *(ROOT / "fed").rglob("*.py")]
    words = {
        word
        for file in files
        for found in re.findall(r"fedllava\[([\w,]+)\]|EXTRAS=([\w,]+)", file.read_text())
        for word in "".join(found).split(",")
    }
    assert {"deepspeed", "serve"} < words <= extras.keys()
