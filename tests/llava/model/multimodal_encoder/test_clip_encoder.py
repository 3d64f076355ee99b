"""CLIP's tower: it runs no layer in vain, and no code of its folder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from llava.errors import InputError
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, vision_config


@pytest.mark.parametrize("layer", [-3, -2, -1, 0, 1, 2])
def test_a_tower_runs_only_the_layers_that_are_read(tiny, layer):
    name = str(tiny / "vision_tower")
    tower = CLIPVisionTower(name, SimpleNamespace(mm_vision_select_layer=layer))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        states = tower.vision_tower(pixels, output_hidden_states=True).hidden_states
    for _ in range(2):
        torch.testing.assert_close(tower(pixels), states[layer][:, 1:], rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # and a program that asks the encoder itself gets what it always got
        again = tower.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(again) == 3
    torch.testing.assert_close(again[layer], states[layer], rtol=1e-5, atol=1e-5)
    run = []
    for module in tower.vision_tower.encoder.layers:
        module.register_forward_hook(lambda *_: run.append(1))
    tower(pixels)
    assert len(run) == (layer if layer >= 0 else 3 + layer)


def test_code_in_a_towers_folder_is_neither_run_nor_asked_about(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(InputError, match="no readable model there"):
        vision_config(str(tmp_path))
    assert not (tmp_path / "ran").exists()
