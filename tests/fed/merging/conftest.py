"""Small experts of every form, made from the folders that upstream itself wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import projector_state
from llava.model.convert import to_hf
from llava.model.shards import Shards, write_shards
from llava.state import load, save
from tests.conftest import UPSTREAM

LLM = UPSTREAM / "llm"
FILES = ("bin", "safetensors", "beside")
DIALECTS = ("hf", "hf memory", "hf 5")
FORMS = (*FILES, "projector", "lora", "full bin", "full", *DIALECTS)


def model_of(folder: Path, base: Path | None = None):
    """The model of a folder, which thereby is seen to load."""
    return load_pretrained_model(str(folder), base and str(base), "any", device="cpu")[1]


def close(found: dict, expected: dict, rtol: float, atol: float = 1e-6) -> None:
    """Equal names, and in float64 values that differ by rounding alone."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), expected[name].double(), rtol, atol), name


def set_config(folder: Path, file: str = "config.json", **changes) -> None:
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(values))


def moved(tensor: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """The tensor after a training of its own; seed 0 is before it."""
    if seed == 0 or not tensor.is_floating_point() or name.endswith("inv_freq"):
        return tensor
    draw = torch.Generator().manual_seed(seed * 1009 + sum(name.encode()))
    step = 0.05 * torch.randn(tensor.shape, generator=draw)
    return (tensor.float() + step).to(tensor.dtype)


@pytest.fixture(scope="session")
def in_hf(tmp_path_factory) -> Path:
    """The full model in transformers' layout."""
    source = tmp_path_factory.mktemp("hf") / "source"
    shutil.copytree(UPSTREAM / "llava-full", source)
    set_config(source, mm_vision_tower=str(UPSTREAM / "tower"))
    to_hf(str(source), str(source.parent / "hf"), shard_bytes=60_000)
    return source.parent / "hf"


@pytest.fixture
def expert(tmp_path, in_hf) -> Callable[..., Path]:
    """`expert(form, seed)`: a model that is the start for seed 0, else trained from it.

    With `deep`, all that is trainable was trained, else the projector.
    """

    def make(form: str, seed: int, deep: bool = False, name: str | None = None) -> Path:
        out = tmp_path / (name or f"{form.replace(' ', '-')}-{seed}{'-deep' * deep}")

        def trained(key: str, tensor: torch.Tensor) -> torch.Tensor:
            own = deep or "mm_projector" in key or "multi_modal_projector" in key
            return moved(tensor, seed, _plain(key)) if own else tensor

        def change(state: dict) -> dict:
            return {key: trained(key, tensor) for key, tensor in state.items()}

        if form in FILES:
            state = change(load(UPSTREAM / "llava-projector" / "mm_projector.bin"))
            out.mkdir()
            file = out / ("p.safetensors" if form == "safetensors" else "mm_projector.bin")
            save(state, file)
            if form == "beside":
                shutil.copy(UPSTREAM / "llava-projector" / "config.json", out)
                set_config(out, mm_vision_tower=str(UPSTREAM / "tower"))
            return file
        if form in DIALECTS:
            shutil.copytree(in_hf, out)
            for file in out.glob("*.safetensors"):
                state = change(load_file(file))
                save_file({dialect(form, k): t for k, t in state.items()}, file)
            index = out / "model.safetensors.index.json"
            places = json.loads(index.read_text())
            places["weight_map"] = {dialect(form, k): v for k, v in places["weight_map"].items()}
            index.write_text(json.dumps(places))
            return out
        kind = "full" if form.startswith("full") else form
        shutil.copytree(UPSTREAM / f"llava-{kind}", out)
        set_config(out, mm_vision_tower=str(UPSTREAM / "tower"))
        if form == "full":
            tensors = change(dict(Shards(out)))
            for file in out.glob("pytorch_model*"):
                file.unlink()
            write_shards(out, tensors.items(), 40_000)
        elif form == "lora":
            file = out / "adapter_model.safetensors"
            save_file(change(load_file(file)), file, metadata={"format": "pt"})
            set_config(out, "adapter_config.json", base_model_name_or_path=str(LLM))
        for file in out.glob("*.bin"):
            torch.save(change(torch.load(file, weights_only=True)), file)
        return out

    return make


def _plain(key: str) -> str:
    """One name for a tensor of the projector in all forms, so that it trains alike."""
    for theirs, ours in (("linear_1", "0"), ("linear_2", "2")):
        key = key.replace(f"multi_modal_projector.{theirs}", f"mm_projector.{ours}")
    return key[key.index("mm_projector") :] if "mm_projector" in key else key


def dialect(form: str, key: str) -> str:
    """A tensor's name of transformers 4 in another dialect of its layout."""
    if form == "hf":
        return key
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("vision_tower.", "model.vision_tower."),
    ):
        if key.startswith(old):
            key = new + key.removeprefix(old)
            break
    return key.replace("vision_tower.vision_model.", "vision_tower.") if form == "hf 5" else key


@pytest.fixture
def loaded() -> Callable[..., dict]:
    """The projector of a folder as `load_pretrained_model` loads it, float32."""

    def load_it(folder: Path, base: Path | None = None) -> dict:
        _, model, processor, _ = load_pretrained_model(
            str(folder), base and str(base), "any", device="cpu"
        )
        assert processor is not None
        return projector_state(model)

    return load_it


@pytest.fixture
def projector_of() -> Callable[[Path], dict]:
    """A projector's tensors as upstream calls them, read without `fed`."""

    def read(path: Path) -> dict:
        if path.is_file():
            found = load(path)
        elif (path / "non_lora_trainables.bin").is_file():
            found = load(path / "non_lora_trainables.bin")
        elif (path / "mm_projector.bin").is_file():
            found = load(path / "mm_projector.bin")
        else:
            found = dict(Shards(path))
        return {
            f"model.{_plain(k)}": t
            for k, t in found.items()
            if "mm_projector" in k or "multi_modal_projector" in k
        }

    return read
