"""From a config to its connector: upstream's names, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from llava.errors import InputError
from llava.model.multimodal_projector.builder import build_vision_projector


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", {"weight", "bias"}),
        ("mlp1x_gelu", {"0.weight", "0.bias"}),
        ("mlp3x_gelu", {f"{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")}),
    ],
)
def test_connectors_have_upstreams_names(kind, names):
    projector = build_vision_projector(
        LlamaConfig(hidden_size=32, mm_hidden_size=6, mm_projector_type=kind)
    )
    assert set(projector.state_dict()) == names == set(projector.groups()["shared"])
    assert projector(torch.zeros(2, 5, 6)).shape == (2, projector.num_tokens(5), 32)


def test_unknown_and_unfitting_connectors_are_refused():
    with pytest.raises(InputError, match="mlp_gelu"):
        build_vision_projector(LlamaConfig(mm_hidden_size=6, mm_projector_type="mlp_gelu"))
    with pytest.raises(InputError, match="tower 6, language model 32"):
        build_vision_projector(
            LlamaConfig(hidden_size=32, mm_hidden_size=6, mm_projector_type="identity")
        )
