"""scripts/merge/cc12m.sh on small shards: what it cuts and merges, and what it calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from llava.state import load, save

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "playground/data/emoji"
SHARDS = {"food": 12, "animals": 12, "travel": 12}

# In place of training: its flags are written down, and a projector of that name is put there.
DEEPSPEED = """\
printf '%s\\n' "$*" >> calls.txt
declare -A flag
for word; do case $word in --*) name=${word#--} ;; *) flag[$name]=$word ;; esac; done
out=${flag[output_dir]}
[ "${out##*/}" != "${BREAK-}" ] || exit 3
mkdir -p "$out"
cp trained/"${out##*/}".bin "$out/mm_projector.bin"
cp out/start-fresh/config.json "$out"
"""
PYTHON = """\
case "$*" in *llava.eval*) printf '%s\\n' "$*" >> calls.txt ;; *) exec {} "$@" ;; esac
"""


def write_shards(folder: Path) -> None:
    """Playground pictures as img2dataset writes CC12M; one shard a topic, captions in .txt."""
    folder.mkdir()
    rows = json.loads((PICTURES / "heldout_dev.json").read_text())
    for number, (topic, count) in enumerate(SHARDS.items()):
        own = [row for row in rows if row["topic"] == topic][:count]
        assert len(own) == count
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i, row in enumerate(own):
                key = folder / f"{number:05d}{i:04d}"
                shutil.copyfile(PICTURES / "images" / row["image"], f"{key}.webp")
                Path(f"{key}.txt").write_text(row["conversations"][1]["value"])
                for suffix in (".webp", ".txt"):
                    tar.add(f"{key}{suffix}", f"{key.name}{suffix}")


class Place:
    """A copy of scripts/ with its own playground, deepspeed and python."""

    def __init__(self, root: Path, tiny: Path):
        self.root, self.tiny = root, tiny
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "scripts", root / "scripts", ignore=ignore)
        # Nothing is installed: the interpreter of this test has it all.
        (root / "scripts/setup.sh").write_text('[ "$EXTRAS" = data,deepspeed ]\n')
        (root / "bin").mkdir()
        for name, text in (("deepspeed", DEEPSPEED), ("python", PYTHON.format(sys.executable))):
            (root / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (root / "bin" / name).chmod(0o755)
        write_shards(root / "cc12m")

    def run(self, *flags: str, **settings: str) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "CC12M": "cc12m",
            "OUT": "out",
            "LLM": str(self.tiny / "llm"),
            "TOWER": str(self.tiny / "vision_tower"),
            "DEVICE": "cpu",
            "K": "2",
            "COMMON": "6",
            "EVALS": "pope",
            **settings,
        }
        command = ["bash", self.root / "scripts/merge/cc12m.sh", *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def calls(self) -> list[str]:
        """What was trained and evaluated since this was last asked."""
        file = self.root / "calls.txt"
        found = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return found

    def projector(self, folder: str) -> dict[str, torch.Tensor]:
        return load(self.root / folder / "mm_projector.bin")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny) -> Place:
    return Place(tmp_path_factory.mktemp("cc12m"), tiny)
