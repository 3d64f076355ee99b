"""SigLIP's tower: every patch counts, and a model on it trains and answers."""

from __future__ import annotations

import pytest
import torch
import transformers

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import from_pretrained
from llava.model.checkpoint import read_config

PATCHES = 4


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(3)
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_siglip_has_no_class_token_to_drop(siglip, tiny):
    config = read_config(tiny / "llm")
    config.mm_hidden_size, config.mm_projector_type = 32, "linear"
    config.mm_vision_tower, config.mm_vision_select_layer = str(siglip), -2
    model = from_pretrained(str(tiny / "llm"), config, dtype=torch.float32).eval()
    tower = model.load_vision_tower(torch.float32, "cpu")
    pixels = torch.randn(2, 3, 16, 16)
    reference = transformers.SiglipVisionModel.from_pretrained(siglip).eval()
    with torch.no_grad():
        states = reference(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels), states[-2], rtol=1e-5, atol=1e-5)
    assert tower.num_patches == PATCHES
    assert tower.image_processor.size["height"] == 16
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 30]])
    assert model(ids, images=pixels[:1]).logits.shape[1] == 2 + PATCHES


def test_siglip_trains_and_answers(siglip, tiny, flags, tmp_path, capsys):
    from llava.eval.run_llava import arguments, eval_model
    from llava.train.train import train

    train(
        argv=flags(
            data_path=tiny / "a.json", vision_tower=siglip, image_aspect_ratio="pad", max_steps=2
        )
    )
    ask = ["--model-path", str(tmp_path / "out"), "--model-base", str(tiny / "llm"),
           "--image-file", str(tiny / "images/a-0.png"), "--query", "What?", "--conv-mode", "v1",
           "--temperature", "0", "--max_new_tokens", "3"]  # fmt: skip
    eval_model(arguments(ask))
