"""From a config to its connector."""

from __future__ import annotations

import re

from torch import nn

from llava.errors import InputError
from llava.model.multimodal_projector import pilot, plain  # noqa: F401  (they register themselves)
from llava.model.multimodal_projector.connector import CONNECTORS


def build_vision_projector(config) -> nn.Module:
    """The connector that `config.mm_projector_type` names (default `linear`, as upstream)."""
    name = getattr(config, "mm_projector_type", None) or "linear"
    for pattern, factory in CONNECTORS.items():
        if match := re.fullmatch(pattern, name):
            return factory(config, *match.groups())
    raise InputError(
        f"unknown mm_projector_type {name!r}; known are linear, mlp2x_gelu (any depth), identity, "
        "pilot"
    )
