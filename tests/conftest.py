"""A LLaVA small enough to be made in a second, and pictures to train it on."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
UPSTREAM = GOLDEN / "upstream"
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def near(expected):
    """Equal but for float64 rounding, which differs by processor and by number of threads."""
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


# Pilot's published router. One that begins at the own adapter gives others next to nothing, and of
# gradients as small as Adam's epsilon a rounding makes steps: two runs would not move alike.
EVEN_ROUTER = {"pilot_router_own": 0.0}


def assert_moved_alike(found, expected, start, share):
    """By tensor, what two runs differ by is at most `share` of the way that they went.

    Lengths, not values: Adam makes a whole step of a gradient that is next to nothing, so that a
    rounding of it, which differs by processor, can move a single value by as much.
    """
    assert found.keys() == expected.keys() == start.keys()
    for name, tensor in expected.items():
        went = (tensor.double() - start[name].double()).norm()
        apart = (tensor.double() - found[name].double()).norm()
        assert went > 0, f"{name} has not moved"
        assert apart <= share * went, f"{name}: {float(apart):.3g} apart, went {float(went):.3g}"


def upstream_copy(name: str, folder: Path) -> Path:
    """A copy of one of upstream's folders, with its tower where it is on this machine."""
    out = Path(shutil.copytree(UPSTREAM / name, folder / name))
    config = json.loads((out / "config.json").read_text())
    config["mm_vision_tower"] = str(UPSTREAM / "tower")
    (out / "config.json").write_text(json.dumps(config))
    return out


def logits_of(path, base=None):
    """Logits of one picture of ones and a question, by the model of a folder."""
    import torch

    from llava.mm_utils import tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(path), base and str(base), "any", device="cpu"
    )
    ids = tokenizer_image_token("USER: <image>\nWhat?", tokenizer, return_tensors="pt")
    side = processor.crop_size["height"]
    with torch.no_grad():
        return model(ids[None], images=torch.ones(1, 3, side, side)).logits


def tool(name: str):
    """`main` of a file of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def make_vision_tower(folder: Path, hidden_size: int = 32) -> None:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)


def make_llm(folder: Path, hidden_size: int = 48) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "toy_tokenizer.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True})
    )
    config = LlamaConfig(
        vocab_size=1200,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= config.vocab_size


def make_data(folder: Path, name: str, samples: int, seed: int = 0) -> Path:
    """Make `folder/name.json` and its pictures, of one colour each, under `folder/images`."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(samples):
        colour = list(COLOURS)[i % len(COLOURS)]
        pixels = np.clip(np.array(COLOURS[colour]) + rng.integers(-25, 25, (20, 20, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{name}-{i}.png")
        records.append(
            {
                "id": f"{name}-{i}",
                "image": f"{name}-{i}.png",
                "domain": colour,
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is this?"},
                    {"from": "gpt", "value": f"a {colour} picture"},
                ],
            }
        )
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard():
    """A process that a script starts in the background ignores SIGINT, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with `vision_tower/`, `llm/`, `a.json`, `b.json`, `heldout.json`, `clients.yaml`."""
    folder = tmp_path_factory.mktemp("tiny")
    make_vision_tower(folder / "vision_tower")
    make_llm(folder / "llm")
    make_data(folder, "a", 12, seed=1)
    make_data(folder, "b", 9, seed=2)
    make_data(folder, "heldout", 6, seed=3)
    (folder / "clients.yaml").write_text(
        "clients:\n"
        "  - {name: a, data_path: a.json, image_folder: images}\n"
        "  - {name: b, data_path: b.json, image_folder: images}\n"
    )
    return folder


@pytest.fixture
def flags(tiny, tmp_path):
    """The flags of a small projector-only run; `flags(name=value, …)` adds to or changes them."""

    def make(**changes) -> list[str]:
        values = {
            "model_name_or_path": tiny / "llm",
            "vision_tower": tiny / "vision_tower",
            "version": "plain",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_use_im_patch_token": False,
            "tune_mm_mlp_adapter": True,
            "image_folder": tiny / "images",
            "output_dir": tmp_path / "out",
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": 7,
        }
        values.update(changes)
        out: list[str] = []
        for name, value in values.items():
            if value is None:
                continue
            values_of = value if isinstance(value, list) else [value]
            out += [f"--{name}", *map(str, values_of)]
        return out

    return make


def install(folder: Path, monkeypatch, *entries: str, package: str = "toy_tower") -> None:
    """Do for the modules in `folder` what pip does for a package of vision towers."""
    info = folder / f"{package}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[llava.vision_towers]", *entries, ""]))
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """The folder of the vision tower of docs/towers.md, whose package is installed."""
    text = (ROOT / "docs/towers.md").read_text()
    project, code = re.findall(r"```(?:toml|python)\n(.*?)```", text, re.DOTALL)
    site = tmp_path / "site"
    entry = re.search(r'entry-points."llava.vision_towers"]\ntoy = "(.*)"', project)
    install(site, monkeypatch, f"toy = {entry[1]}")
    (site / "toy_tower.py").write_text(code)
    import toy_tower

    toy_tower.write(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def upstreams_full(tmp_path) -> Path:
    """A full LLaVA in three pickled shards, as upstream on an old release writes it."""
    return upstream_copy("llava-full", tmp_path)
