"""scripts/merge/cc12m.sh on small shards: what it cuts and merges, and what it calls."""

from __future__ import annotations

import importlib.util
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

from llava.errors import InputError
from llava.state import load, save

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
PICTURES = ROOT / "playground/data/emoji"
SHARDS = {"food": 12, "animals": 12, "travel": 12}

# In place of training: its flags are written down, and a projector of that name is put there.
DEEPSPEED = """\
printf '%s\\n' "$*" >> calls.txt
declare -A flag; name=program
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


@pytest.fixture(scope="module")
def trained(place) -> dict[str, dict[str, torch.Tensor]]:
    """What each training ends in: the common start, two experts that began there, a model."""
    draw = torch.Generator().manual_seed(5)
    shapes = {"0.weight": (48, 32), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}
    start = {f"model.mm_projector.{n}": torch.randn(s, generator=draw) for n, s in shapes.items()}
    found = {"start-brief": start}
    for name in ("cluster-0", "cluster-1"):
        found[name] = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in start.items()}
    found["llava-linear"] = found["llava-ties"] = start
    for name, state in found.items():
        save(state, place.root / "trained" / f"{name}.bin")
    return found


def test_a_dry_run_prints_every_command_and_makes_nothing(place):
    before = sorted(place.root.rglob("*"))
    done = place.run("--dry-run", "--report_to", "none", K="11", EVALS="pope mmvet")
    assert done.returncode == 0, done.stderr
    commands = [line[2:] for line in done.stdout.splitlines() if line.startswith("$ ")]
    kinds = ["fed.data", "fresh_start.py", *["v1_5/pretrain.sh"] * 12]
    kinds += ["fed.merge", "v1_5/finetune.sh", "eval/pope.sh", "eval/mmvet.sh"]
    assert len(commands) == len(kinds)
    assert all(kind in command for kind, command in zip(kinds, commands, strict=True))
    assert all(("--report_to none" in c) == (".sh" in c and "eval" not in c) for c in commands)
    assert "out/experts-brief/cluster-00 " in commands[3]
    assert "out/experts-brief/cluster-10 " in commands[13]
    assert sorted(place.root.rglob("*")) == before

    fresh = place.run(START="fresh", DRY_RUN="1").stdout
    assert "start-brief" not in fresh
    assert "--base out/start-fresh" in fresh
    wrong = place.run("--dry-run", START="frsh")
    assert wrong.returncode == 2
    assert "START is frsh; brief or fresh" in wrong.stderr


@pytest.fixture(scope="module")
def broken(place, trained) -> subprocess.CompletedProcess:
    """A run whose second expert does not come to its end."""
    assert not place.calls()
    return place.run("--seed", "3", METHOD="linear", ALIGN_FLAGS="--a 1 --b 2", BREAK="cluster-1")


@pytest.fixture(scope="module")
def first(place, broken) -> list[str]:
    return place.calls()


@pytest.fixture(scope="module")
def second(place, first) -> list[str]:
    """The same call once more."""
    done = place.run("--seed", "3", METHOD="linear", ALIGN_FLAGS="--a 1 --b 2")
    assert done.returncode == 0, done.stderr
    return place.calls()


def test_shards_become_clusters_and_a_common_part(place, first):
    folder = place.root / "out/clusters"
    clients = yaml.safe_load((folder / "clients.yaml").read_text())["clients"]
    assert sorted(client["name"] for client in clients) == ["cluster-0", "cluster-1"]
    texts = [folder / client["data_path"] for client in clients] + [folder / "heldout.json"]
    rows = [json.loads(text.read_text()) for text in texts]
    assert sum(map(len, rows)) == sum(SHARDS.values())
    assert len(rows[-1]) == 6
    images = [row["image"] for part in rows for row in part]
    assert len(set(images)) == len(images)
    assert all((folder / "heldout/images" / row["image"]).is_file() for row in rows[-1])


def test_all_experts_begin_with_the_common_start_and_have_their_own_data(broken, first):
    assert broken.returncode == 3
    assert len(first) == 3
    for call, name, start, data in zip(
        first,
        ("start-brief", "experts-brief/cluster-0", "experts-brief/cluster-1"),
        ("start-fresh", "start-brief", "start-brief"),
        ("heldout", "cluster-0", "cluster-1"),
        strict=True,
    ):
        assert call.startswith("llava/train/train_mem.py --deepspeed ./scripts/zero2.json")
        texts = "heldout.json" if data == "heldout" else f"{data}/captions.json"
        assert f"--pretrain_mm_mlp_adapter out/{start}/mm_projector.bin " in call
        assert f"--data_path out/clusters/{texts} " in call
        assert f"--image_folder out/clusters/{data}/images " in call
        assert call.endswith(f"--output_dir out/{name} --a 1 --b 2 --seed 3")


def test_a_killed_run_goes_on_where_it_stopped(place, second):
    kinds = ["--output_dir out/experts-brief/cluster-1 ", "--output_dir out/llava-brief/"]
    kinds += ["llava.eval.model_vqa_loader", "llava.eval.eval_pope"]
    assert len(second) == len(kinds)
    assert all(kind in call for kind, call in zip(kinds, second, strict=True))


def test_the_merge_is_what_is_finetuned_and_evaluated(place, second, trained):
    merged = place.projector("out/merged-brief/linear")
    for name, tensor in merged.items():
        mean = (trained["cluster-0"][name] + trained["cluster-1"][name]) / 2
        torch.testing.assert_close(tensor, mean)
    card = (place.root / "out/merged-brief/linear/README.md").read_text()
    assert "out/start-brief" in card
    assert (place.root / "out/merged-brief/linear/config.json").is_file()
    finetune, ask, score = second[1:]
    assert "--deepspeed ./scripts/zero3.json" in finetune
    assert "--a 1" not in finetune
    assert "--pretrain_mm_mlp_adapter out/merged-brief/linear/mm_projector.bin " in finetune
    assert finetune.endswith("--output_dir out/llava-brief/llava-linear --seed 3")
    answers = "./playground/data/eval/pope/answers/out-brief-linear.jsonl"
    assert "--model-path out/llava-brief/llava-linear " in ask
    assert ask.endswith(answers)
    assert score.endswith(answers)


def test_what_is_done_is_not_done_again_nor_mixed_with_other_settings(place, second):
    def again(*flags, **settings):
        return place.run(*flags, METHOD="linear", ALIGN_FLAGS="--a 1 --b 2", **settings)

    done = again("--seed", "3")
    assert done.returncode == 0
    assert done.stdout.count(" is there") == 8
    assert not place.calls()
    for settings, folder in (({"K": "3"}, "clusters"), ({"LLM": "other"}, "start-fresh")):
        other = again("--seed", "3", **settings)
        assert other.returncode == 2
        assert not place.calls()
        assert f"out/{folder} was made by another command" in other.stderr
    other = again("--seed", "4")
    assert other.returncode == 2
    assert "out/start-brief was made by another" in other.stderr

    ties = place.run("--seed", "3", METHOD="ties", ALIGN_FLAGS="--a 1 --b 2", EVALS="",
                     MERGE_FLAGS="--options density=0.5")  # fmt: skip
    assert ties.returncode == 0, ties.stderr
    (finetune,) = place.calls()
    assert finetune.endswith("--output_dir out/llava-brief/llava-ties --seed 3")
    assert "density" in (place.root / "out/merged-brief/ties/README.md").read_text()


def test_a_fresh_start_is_drawn_from_the_seed_as_torch_draws(tiny, tmp_path):
    spec = importlib.util.spec_from_file_location("start", ROOT / "scripts/merge/fresh_start.py")
    fresh_start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh_start)

    def draw(seed: int, out: str = "start", tower: bool = True) -> dict[str, torch.Tensor]:
        argv = ["--model_name_or_path", str(tiny / "llm"), "--mm_projector_type", "mlp2x_gelu"]
        argv += ["--vision_tower", str(tiny / "vision_tower")] * tower
        fresh_start.main([*argv, "--seed", str(seed), "--output_dir", str(tmp_path / out)])
        return load(tmp_path / out / "mm_projector.bin")

    found = draw(4)
    torch.manual_seed(4)
    for place, layer in ((0, torch.nn.Linear(32, 48)), (2, torch.nn.Linear(48, 48))):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(found.pop(f"model.mm_projector.{place}.{name}"), tensor)
    assert not found
    config = json.loads((tmp_path / "start/config.json").read_text())
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert config["mm_hidden_size"] == 32
    draw(4)  # what a killed run does again
    with pytest.raises(InputError, match="is there and is another one"):
        draw(5)
    with pytest.raises(InputError, match="--vision_tower is missing"):
        draw(5, out="other", tower=False)
    assert not (tmp_path / "other").exists()
