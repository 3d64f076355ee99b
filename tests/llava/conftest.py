"""A whole LLaVA whose answers depend on the picture and the question, and pictures to show it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llava_folder(tiny, tmp_path_factory) -> Path:
    """A full checkpoint of the tiny parts, with weights large enough to tell inputs apart."""
    import torch

    from llava.model.builder import from_pretrained, load_tokenizer
    from llava.model.checkpoint import read_config, save_full

    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    torch.manual_seed(0)
    config = read_config(tiny / "llm")
    config.mm_hidden_size, config.mm_projector_type = 32, "mlp2x_gelu"
    config.mm_vision_tower, config.mm_vision_select_layer = str(tiny / "vision_tower"), -2
    config.mm_use_im_patch_token = config.mm_use_im_start_end = False
    config.image_aspect_ratio = "pad"
    model = from_pretrained(str(tiny / "llm"), config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
        for name in ("q_proj", "k_proj"):  # attend to little, so that a picture can matter
            for layer in model.model.layers:
                getattr(layer.self_attn, name).weight.mul_(4)
    save_full(model, load_tokenizer(str(tiny / "llm")), folder)
    return folder


@pytest.fixture(scope="session")
def upstream_tokenizer(tmp_path_factory):
    """`upstream_tokenizer(legacy)` is that of `golden/upstream_tokens.json`; legacy as there."""
    from llava.model.tokenizer import load_tokenizer

    golden = Path(__file__).parents[1] / "golden"
    added = json.loads((golden / "upstream_tokens.json").read_text())["added"]

    def load(legacy: str):
        folder = tmp_path_factory.mktemp("tokenizer")
        shutil.copy(golden / "toy_tokenizer.model", folder / "tokenizer.model")
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        if legacy != "null":
            config["legacy"] = json.loads(legacy)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_tokens(added, special_tokens=True)
        return tokenizer

    return load


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with seven pictures of noise, `0.png` and so on, of different shapes."""
    import numpy as np
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(7):
        noise = rng.integers(0, 256, (4 + i, 9 - i, 3)).astype(np.uint8)
        Image.fromarray(noise).resize((80, 60 + i), Image.NEAREST).save(folder / f"{i}.png")
    return folder
