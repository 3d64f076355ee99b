"""What a new user has: an installation without any extra trains, merges and answers."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

# What pyproject.toml has in extras alone, by the names that are imported.
MISSING = (
    "deepspeed wandb flash_attn bitsandbytes gguf gradio starlette uvicorn ijson sklearn scipy "
    "nvflare cryptography Crypto opacus openai playwright"
).split()
RUN = """
import runpy, sys
from importlib.machinery import PathFinder

found = PathFinder.find_spec.__func__
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {missing} else found(cls, name, path, target)
PathFinder.find_spec = classmethod(find_spec)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def without_extras(*words) -> str:
    command = [sys.executable, "-c", RUN.format(missing=set(MISSING)), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_run_and_a_merge_need_no_extra(flags, tiny, tmp_path):
    common = {"fed_clients": tiny / "clients.yaml", "learning_rate": 1e-2}
    for name, method in (("a", "fedcmp"), ("b", "fedavg")):
        argv = flags(**common, fed_method=method, output_dir=tmp_path / name)
        said = without_extras("fed.train", *argv)
        assert f"wrote {tmp_path / name / 'mm_projector.bin'}" in said
    experts = [tmp_path / name for name in "ab"]
    without_extras("fed.merge", "--experts", *experts, "--output", tmp_path / "merged",
                   "--method", "linear")  # fmt: skip
    assert (tmp_path / "merged" / "mm_projector.bin").is_file()
