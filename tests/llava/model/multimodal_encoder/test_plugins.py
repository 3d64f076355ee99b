"""Vision towers of other packages: that of docs/towers.md trains and loads; faults are named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fed.remote.hello import model_fingerprint
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.convert import to_hf
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.train.sample_format import SampleFormat
from llava.train.session import make_feature_cache
from llava.train.train import train
from tests.conftest import ROOT, install

# A network with counters, as batch norms have them, that sees 16 x 24 pixels in 2 rows of 3.
WIDE = """
from torch import nn
from llava.model.multimodal_encoder.tower import VisionTower

class Wide(VisionTower):
    hidden_size, num_patches, grid = 24, 6, (2, 3)
    def build(self):
        return nn.Sequential(nn.Conv2d(3, 24, 8, stride=8), nn.BatchNorm2d(24))
    def features(self, pixels):
        return self.vision_tower(pixels).flatten(2).transpose(1, 2)

class Scattered(Wide):
    grid = None

class Flat(Wide):
    def features(self, pixels):
        return self.vision_tower(pixels).flatten(2)

no_tower = dict
"""


def change(folder, file="config.json", **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def build(folder, **config):
    return build_vision_tower(SimpleNamespace(mm_vision_tower=str(folder), **config))


@pytest.fixture
def wide(toy, tmp_path, monkeypatch):
    """`wide(class)`: the folder of a tower of this class of WIDE."""

    def make(name="Wide"):
        site = tmp_path / "wide_site"
        install(site, monkeypatch, f"wide = wide_tower:{name}", package="wide_tower")
        (site / "wide_tower.py").write_text(WIDE)
        import wide_tower

        change(toy, model_type="wide")
        size = {"height": 16, "width": 24}
        change(toy, "preprocessor_config.json", size=size, do_center_crop=False)
        torch.manual_seed(0)
        save_file(wide_tower.Wide(str(toy), None, True).build().state_dict(),
                  toy / "model.safetensors")  # fmt: skip
        return toy

    return make


def loaded(tmp_path, tiny):
    found = load_pretrained_model(str(tmp_path / "out"), str(tiny / "llm"), "any", device="cpu")
    return found[1], found[2]


@pytest.mark.parametrize("cache", ["memory", "off", "anyres"])
def test_the_example_trains_a_projector_that_loads(toy, flags, tiny, tmp_path, cache):
    given = {"image_aspect_ratio": "anyres"} if cache == "anyres" else {"feature_cache": cache}
    train(argv=flags(data_path=tiny / "a.json", vision_tower=toy, max_steps=2, **given))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["mm_vision_tower_type"], config["mm_hidden_size"]) == ("toy", 24)
    model, processor = loaded(tmp_path, tiny)
    tower = model.get_vision_tower()
    pixels = torch.randn(2, 3, 16, 16)
    assert model.encode_images(pixels).shape == (2, 16, 48)
    weight = load_file(toy / "model.safetensors")["0.weight"]
    corner = (weight * pixels[0, :, 4:8, :4]).sum((1, 2, 3))  # second row, first place
    bias = load_file(toy / "model.safetensors")["0.bias"]
    assert torch.allclose(tower(pixels)[0, 4], (corner + bias).relu(), atol=1e-5)
    assert processor.size["height"] == 16
    assert not tower.training
    assert not any(p.requires_grad for p in tower.parameters())


def test_a_projector_is_refused_on_another_tower(toy, flags, tiny, tmp_path):
    data = {"data_path": tiny / "a.json", "max_steps": 1}
    train(argv=flags(vision_tower=toy, **data))
    file = tmp_path / "out/mm_projector.bin"
    again = {"pretrain_mm_mlp_adapter": file, "output_dir": tmp_path / "again", **data}
    of_clip = rf"vision_tower is CLIP or SigLIP, the projector {file} was trained on a 'toy'"
    with pytest.raises(InputError, match=of_clip):
        train(argv=flags(**again))
    change(tmp_path / "out", mm_vision_tower=str(tiny / "vision_tower"))
    with pytest.raises(InputError, match="CLIP or SigLIP, the projector was trained on a 'toy'"):
        loaded(tmp_path, tiny)
    change(tmp_path / "out", mm_vision_tower=str(toy))
    train(argv=flags(vision_tower=toy, **again))  # on its own tower it goes on

    import toy_tower

    toy_tower.write(tmp_path / "broad", width=20)
    expected = "broad gives 20 features, the projector .*expects mm_hidden_size 24"
    with pytest.raises(InputError, match=expected):
        train(
            argv=flags(vision_tower=tmp_path / "broad", **{**again, "output_dir": tmp_path / "c"})
        )
    change(tmp_path / "out", mm_vision_tower=str(tmp_path / "broad"))
    with pytest.raises(InputError, match=expected):
        loaded(tmp_path, tiny)
    with pytest.raises(InputError, match="is of the type 'toy': transformers' LLaVA-1.5 has"):
        to_hf(str(tmp_path / "out"), str(tmp_path / "hf"), model_base=str(tiny / "llm"))


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [
        ("other = x:Y", "", r"has model_type 'mine'; there are clip_vision_model, siglip_vision"
         r"_model, .*other.*; for another, install a package .* llava.vision_towers"),
        ("mine = mine:Y", "import nothing_of_this_name",
         r"'mine' \(mine:Y of the package mine\): it does not load \(ModuleNotFoundError: No "),
        ("mine = mine:Y", "1 / 0", r"does not load \(ZeroDivisionError"),
        ("mine = mine:Y", "", r"does not load \(AttributeError: .*'Y'"),
        ("mine = mine:no_tower", WIDE, "a subclass of VisionTower is expected, found <class 'd"),
        ("mine = mine:Wide\nmine = mine:Flat", WIDE, "two packages declare it"),
        ("mine = mine:Flat", WIDE, r"Flat.features gives \(1, 24, 4\), expected \(1, 6, 24\)"),
    ],
)  # fmt: skip
def test_a_plug_in_that_is_missing_or_wrong(toy, tmp_path, monkeypatch, entry, code, message):
    site = tmp_path / "mine"
    install(site, monkeypatch, entry, package="mine")
    (site / "mine.py").write_text(code)
    change(toy, model_type="mine")
    if "Flat" in code:
        save_file(
            torch.nn.Sequential(torch.nn.Conv2d(3, 24, 8), torch.nn.BatchNorm2d(24)).state_dict(),
            toy / "model.safetensors",
        )
    with pytest.raises(InputError, match=message):
        build(toy)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").write_text('{"model_type": "toy"}'),
         "config.json: has no width"),
        (lambda f: change(f, width="24"), "width '24', a value of type int is expected"),
        (lambda f: change(f, patch=True), "patch True, a value of type int is expected"),
        (lambda f: change(f, width=20), r"toy: tensor 0.weight has shape \(24, 3, 4, 4\), exp"),
        (lambda f: change(f, image_size=32), r"gives \(1, 16, 24\), expected \(1, 64, 24\)"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights there"),
        (lambda f: (f / "preprocessor_config.json").unlink(),
         r"it does not load \(its picture processor: "),
        (lambda f: change(f, "preprocessor_config.json", size={"shortest_edge": 16}),
         r"makes \(3, 16, 24\) of a wide picture and \(3, 24, 16\) of a high one"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_its_plug_in(toy, spoil, message):
    spoil(toy)
    with pytest.raises(InputError, match=message):
        build(toy)


def test_two_rows_of_three_patches(wide, flags, tiny, tmp_path):
    from llava.eval.answer import Answerer
    from llava.serve.attention_maps import grids

    train(argv=flags(data_path=tiny / "a.json", vision_tower=wide(), max_steps=1))
    tokenizer, model, processor, _ = load_pretrained_model(
        str(tmp_path / "out"), str(tiny / "llm"), "any", device="cpu"
    )
    answerer = Answerer(tokenizer, model, processor, "any", 256)
    given = "USER: <image>\nWhat? ASSISTANT:", "red", [(torch.zeros(3, 16, 24), (16, 24))]
    with torch.inference_mode():
        (found,) = grids(answerer, *given)
    assert torch.tensor(found).shape == (2, 3)
    assert torch.tensor(found).sum() == pytest.approx(1, abs=1e-5)
    type(model.get_vision_tower()).grid = None
    with pytest.raises(InputError, match="6 tokens have no known places"):
        grids(answerer, *given)
    anyres = {"image_aspect_ratio": "anyres", "vision_tower": model.config.mm_vision_tower}
    with pytest.raises(InputError, match="sees 24 x 16 pixels, .*anyres needs a square"):
        train(argv=flags(data_path=tiny / "a.json", output_dir=tmp_path / "b", **anyres))


def test_a_tuned_plug_in_is_loaded_from_its_checkpoint(wide, flags, tiny, tmp_path):
    folder = wide()
    train(argv=flags(
        data_path=tiny / "a.json", vision_tower=folder, max_steps=2, tune_mm_mlp_adapter=False,
        unfreeze_mm_vision_tower=True, version="v1", learning_rate=1e-3,
    ))  # fmt: skip
    saved = load_file(tmp_path / "out/model.safetensors")
    _, model, _, _ = load_pretrained_model(str(tmp_path / "out"), None, "any", device="cpu")
    tower = model.get_vision_tower().vision_tower.state_dict()
    prefix = "model.vision_tower.vision_tower.vision_model."
    assert all(torch.equal(tower[name], saved[prefix + name]) for name in tower)
    assert tower["1.num_batches_tracked"] == 2
    assert not torch.equal(tower["0.weight"], load_file(folder / "model.safetensors")["0.weight"])


def test_what_decides_the_features_names_them(toy, tmp_path, monkeypatch, tiny):
    """Weights, settings and version are in the cache's key, and the version in a site's facts."""
    import toy_tower

    tower = build(toy)
    seen = SampleFormat("plain", image_processor=tower.image_processor)
    picture = str(tiny / "images/a-0.png")

    def known(tower) -> bool:
        return picture in make_feature_cache(tower, seen, str(tmp_path / "cache"))

    make_feature_cache(tower, seen, str(tmp_path / "cache")).prefetch([picture])
    site = model_fingerprint(str(toy), tmp_path / "known.json")
    assert known(build(toy))
    assert site == model_fingerprint(str(toy), tmp_path / "known.json")
    monkeypatch.setattr(toy_tower.ToyTower, "version", "2")
    assert not known(build(toy))
    assert site != model_fingerprint(str(toy), tmp_path / "known.json")
    monkeypatch.undo()
    tower.config.patch = 2  # with the same weights
    assert not known(tower)


def test_the_contract_is_documented():
    text = (ROOT / "docs/towers.md").read_text()
    for name in ("features", "hidden_size", "num_patches", "grid", "read_processor", "version"):
        assert f"`{name}`" in text or f"def {name}" in text
