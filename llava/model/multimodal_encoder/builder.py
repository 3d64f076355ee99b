"""From a name in the config to a vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, vision_config
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower

TOWERS = {"clip_vision_model": CLIPVisionTower, "siglip_vision_model": SigLipVisionTower}


def build_vision_tower(
    vision_tower_cfg: Any, delay_load: bool = False, config: Any = None
) -> CLIPVisionTower:
    """The tower that `mm_vision_tower` (or the training flag `vision_tower`) names.

    The kind is read from the model that lies there (or from `config`), not from its name.
    """
    cfg = vision_tower_cfg
    name = getattr(cfg, "mm_vision_tower", None) or getattr(cfg, "vision_tower", None)
    if not name:
        raise InputError("no vision tower is named: neither mm_vision_tower nor --vision_tower")
    if getattr(cfg, "s2", False):
        raise InputError("s2 (features of several scales) is not supported")
    name = str(Path(name).expanduser()) if str(name).startswith("~") else str(name)
    config = config or vision_config(name)
    if config.model_type not in TOWERS:
        raise InputError(
            f"vision tower {name}: a CLIP or SigLIP vision model is expected, "
            f"found model_type {config.model_type!r}"
        )
    return TOWERS[config.model_type](name, args=cfg, delay_load=delay_load, config=config)
