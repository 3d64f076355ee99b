"""A Pilot connector distilled into one projector."""

from __future__ import annotations

import json

import pytest
import torch

from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.distil import distil, main
from llava.train.train import train
from tests.llava.model.multimodal_projector.test_pilot import make, pilot_flags, scattered
from tests.llava.model.multimodal_projector.test_pilot import start as start


def test_what_one_projector_can_say_is_distilled_without_an_error():
    features = torch.randn(20, 5, 6)
    split = make(init="split")  # every expert is the own adapter still
    distilled = distil(split, features, steps=3, learning_rate=0.0)
    assert max(distilled.own, distilled.fitted, distilled.left_out) < 1e-6
    twice = make(init="copy", stage=1)
    distilled = distil(twice, features, steps=3, learning_rate=0.0)
    assert distilled.own == pytest.approx(0.5)  # 2 P against P
    twice.settings.stage = 2  # the connector itself is as it was
    assert twice.training


def test_a_mixture_is_imitated_and_the_error_is_that_of_other_pictures():
    torch.manual_seed(0)
    mixture, features = scattered(), torch.randn(100, 5, 6)
    distilled = distil(mixture, features, steps=400)
    assert distilled.left_out < 0.5 * distilled.own
    with torch.no_grad():
        wanted = mixture.eval()(features[9::10])
        missed = (distilled.projector(features[9::10]) - wanted).norm() / wanted.norm()
    assert distilled.left_out == pytest.approx(float(missed), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_a_folder_is_distilled_into_one_that_upstream_knows(
    flags, tiny, start, tmp_path, capsys, lora
):
    train(argv=pilot_flags(flags, tiny, start, lora=lora))
    words = ["--model-path", str(tmp_path / "out"), "--model-base", str(tiny / "llm"),
             "--data-path", str(tiny / "a.json"), "--image-folder", str(tiny / "images"),
             "--output", str(tmp_path / "mlp"), "--steps", "50", "--device", "cpu"]  # fmt: skip
    main(words)
    assert "relative error of the tokens: 0." in capsys.readouterr().out
    config = json.loads((tmp_path / "mlp/config.json").read_text())
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert "mm_pilot" not in config
    _, model, processor, _ = load_pretrained_model(
        str(tmp_path / "mlp"), str(tiny / "llm"), "x", device="cpu"
    )
    _, whole, _, _ = load_pretrained_model(
        str(tmp_path / "out"), str(tiny / "llm"), "x", device="cpu"
    )
    pixels = torch.randn(1, 3, 16, 16)
    a, b = (m.eval().encode_images(pixels) for m in (model, whole))
    assert 0 < (a - b).norm() < 0.5 * b.norm()
    layer = "model.layers.0.self_attn.q_proj.weight"  # LoRA, merged in
    assert torch.equal(model.state_dict()[layer], whole.state_dict()[layer])
    with pytest.raises(InputError, match="mlp: a folder that is new or empty is expected"):
        main(words)
    words[5] = str(tiny / "b.json")
    with pytest.raises(InputError, match="b.json: 9 pictures, at least 10 are expected"):
        main([*words[:9], str(tmp_path / "again"), *words[10:]])
    words[5] = str(tiny / "a.json")
    words[1], words[9] = str(tmp_path / "mlp"), str(tmp_path / "again")
    with pytest.raises(InputError, match="mm_projector_type is 'mlp2x_gelu', `pilot` is expected"):
        main(words)
    assert not (tmp_path / "again").exists()
