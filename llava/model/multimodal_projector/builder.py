"""From a config to its connector."""

from __future__ import annotations

from typing import Any

from llava.model.multimodal_projector.connector import Connector, connector_type


def build_vision_projector(config: Any) -> Connector:
    """The connector that `config.mm_projector_type` names (default `linear`, as upstream)."""
    kind, groups = connector_type(getattr(config, "mm_projector_type", None))
    if kind.settings is not None:
        return kind.factory(config, kind.settings_of(config))
    return kind.factory(config, *groups)
