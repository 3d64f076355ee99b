"""EfficientNet-Lite0 against the published network, and as a tower that trains."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from llava.errors import InputError
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.train.train import train
from tests.conftest import ROOT, install

PACKAGE = ROOT / "playground/real/efficientnet_lite"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`efficientnet_lite`, installed as its pyproject.toml says."""
    _, _, after = (PACKAGE / "pyproject.toml").read_text().partition('"llava.vision_towers"]\n')
    entry = after.splitlines()[0].replace('"', "")
    install(tmp_path / "site", monkeypatch, entry, package="efficientnet_lite_tower")
    monkeypatch.syspath_prepend(str(PACKAGE))
    from efficientnet_lite import convert, network

    return convert, network


def published(network) -> dict[str, torch.Tensor]:
    """Tensors of the published names and shapes, the same on every machine."""
    rng = np.random.RandomState(0)
    state = {}

    def add(name, *shape, low=-1.0, high=1.0):
        state[name] = torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))

    for name, module in network.EfficientNetLite().named_modules():
        if not isinstance(module, torch.nn.Conv2d):
            continue
        place, _, kind = name.rpartition(".")
        number = {"_conv_stem": 0, "_expand_conv": 0, "_project_conv": 2}.get(kind, 1)
        norm, width = f"{place}._bn{number}".lstrip("."), module.out_channels
        bound = (6 / module.weight[0].numel()) ** 0.5
        add(f"{name}.weight", *module.weight.shape, low=-bound, high=bound)
        add(f"{norm}.weight", width, low=0.5, high=1.5)
        add(f"{norm}.bias", width, low=-0.5, high=0.5)
        add(f"{norm}.running_mean", width, low=-0.5, high=0.5)
        add(f"{norm}.running_var", width, low=0.5, high=1.5)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    add("_fc.weight", 1000, 1280)
    add("_fc.bias", 1000)
    return state


@pytest.fixture
def weights(package, tmp_path):
    """A file of such weights, and its SHA-256."""
    file = tmp_path / "weights.pth"
    torch.save(published(package[1]), file)
    return str(file), hashlib.sha256(file.read_bytes()).hexdigest()


def pixels() -> torch.Tensor:
    rng = np.random.RandomState(1)
    return torch.from_numpy(rng.uniform(-1, 1, (1, 3, 224, 224)).astype(np.float32))


def test_the_last_map_is_that_of_the_published_network(package):
    """Recorded: `extract_features` of efficientnet-lite-pytorch 0.1.0 with these tensors."""
    convert, network = package
    net = network.EfficientNetLite().eval()
    net.load_state_dict(convert.fold(published(network), "these"))
    with torch.inference_mode():
        found = net(pixels())[0]
    expected = json.loads((ROOT / "tests/golden/efficientnet_lite.json").read_text())
    assert list(found.shape) == expected["shape"]
    values = found[:: expected["step"]].flatten()
    assert (values - torch.tensor(expected["values"])).abs().max() < 2e-3
    assert float(found.double().mean()) == pytest.approx(expected["mean"], abs=1e-4)


def test_a_converted_folder_is_a_tower_that_trains(weights, package, flags, tiny, tmp_path):
    convert, _ = package
    source, digest = weights
    (tmp_path / "few").mkdir()
    images = [shutil.copy(tiny / f"images/a-{i}.png", tmp_path / "few") for i in range(3)]
    convert.main([source, str(tmp_path / "tower"), "--sha256", digest,
                  "--standardise", str(tmp_path / "few")])  # fmt: skip
    tower = build_vision_tower(_named(tmp_path / "tower"))
    read = functools.partial(tower.image_processor.preprocess, return_tensors="pt")
    seen = torch.cat([tower(read(Image.open(file))["pixel_values"]) for file in images])
    assert seen.shape == (3, 16, 1280)
    assert seen.mean((0, 1)).abs().max() < 1e-3
    spread = seen.flatten(0, 1).std(0)
    assert spread.max() < 1.01
    assert spread.median() > 0.9
    data = {"data_path": tiny / "a.json", "max_steps": 2, "feature_cache": "off"}
    train(argv=flags(vision_tower=tmp_path / "tower", **data))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["mm_vision_tower_type"], config["mm_hidden_size"]) == ("efficientnet_lite", 1280)
    assert "Apache License" in (tmp_path / "tower/LICENSE").read_text()


def test_features_are_the_map_in_squares(weights, package, tmp_path):
    convert, _ = package
    convert.convert(weights[0], str(tmp_path / "tower"), sha256=weights[1])
    tower = build_vision_tower(_named(tmp_path / "tower"))
    maps = tower.vision_tower(pixels())
    assert maps.shape == (1, 1280, 7, 7)
    corner = maps[0, :, :2, 5:].mean((1, 2))  # the fourth of the first four squares
    assert torch.allclose(tower(pixels())[0, 3], corner, atol=1e-4)
    assert functional.relu6(maps).equal(maps)


def test_other_weights_are_refused(weights, package, tmp_path):
    convert, network = package
    with pytest.raises(InputError, match=f"has SHA-256 {weights[1]}, expected 5793"):
        convert.convert(weights[0], str(tmp_path / "tower"))
    assert not (tmp_path / "tower").exists()
    state = published(network)
    del state["_blocks.3._bn2.bias"]
    with pytest.raises(InputError, match="not EfficientNet-Lite0's weights .*_blocks.3._bn2.bias"):
        convert.fold(state, "these")


def _named(folder):
    return SimpleNamespace(mm_vision_tower=str(folder))
