"""From a name in the config to a vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.json_files import read_json
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, vision_config
from llava.model.multimodal_encoder.plugins import GROUP, installed, plugged_in
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
from llava.model.multimodal_encoder.tower import VisionTower

TOWERS = {"clip_vision_model": CLIPVisionTower, "siglip_vision_model": SigLipVisionTower}


def build_vision_tower(vision_tower_cfg: Any, delay_load: bool = False) -> VisionTower:
    """The tower that `mm_vision_tower` (or the training flag `vision_tower`) names.

    The kind is read from the model that lies there, not from its name: CLIP, SigLIP, or what an
    installed package declares (`plugins.py`).

    Raises:
        InputError: no such tower, or not the one that the projector of the config was trained on.
    """
    cfg = vision_tower_cfg
    name = getattr(cfg, "mm_vision_tower", None) or getattr(cfg, "vision_tower", None)
    if not name:
        raise InputError("no vision tower is named: neither mm_vision_tower nor --vision_tower")
    if getattr(cfg, "s2", False):
        raise InputError("s2 (features of several scales) is not supported")
    name = str(Path(name).expanduser()) if str(name).startswith("~") else str(name)
    model_type = plug_in_type(name)
    if model_type is None:
        config = vision_config(name)
        kind: Any = TOWERS.get(config.model_type) or _refuse(name, config.model_type)
    else:
        config, kind = None, plugged_in(model_type) or _refuse(name, model_type)
    tower = kind(name, args=cfg, delay_load=True, config=config)
    tower.kind = model_type
    check_projector(tower, cfg)
    if not delay_load:
        tower.load_model()
    return tower


def plug_in_type(name: str) -> str | None:
    """The `model_type` under a name that is neither CLIP's nor SigLIP's, nor else transformers' own
    for which no package declares a tower."""
    from transformers import CONFIG_MAPPING
    from transformers.utils import cached_file

    file: str | None = str(Path(name) / "config.json")
    if not Path(name).is_dir():
        try:
            file = cached_file(name, "config.json")
        except (OSError, ValueError):
            return None  # `vision_config` says so
    try:
        values = read_json(str(file))
    except InputError:
        return None
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type in TOWERS or "vision_config" in values:
        return None
    return model_type if model_type in installed() or model_type not in CONFIG_MAPPING else None


def _refuse(name: str, model_type: str) -> Any:
    raise InputError(
        f"vision tower {name}: its config.json has model_type {model_type!r}; there are "
        f"{', '.join([*TOWERS, *installed()])}; for another, install a package with an entry point "
        f"of that name in the group {GROUP} (docs/towers.md)"
    )


def check_projector(tower: VisionTower, config: Any, who: str = "the projector") -> None:
    """`InputError` if a config's projector, if it has one, was made for another tower.

    Args:
        who: opens what is said of the projector.
    """
    width = getattr(config, "mm_hidden_size", None)
    if not width:
        return
    expected, found = getattr(config, "mm_vision_tower_type", None), tower.kind
    if expected != found:
        raise InputError(
            f"vision tower {tower.vision_tower_name} is {_called(found)}, "
            f"{who} was trained on {_called(expected)}"
        )
    if tower.hidden_size != width:
        raise InputError(
            f"vision tower {tower.vision_tower_name} gives {tower.hidden_size} features, "
            f"{who} expects mm_hidden_size {width}"
        )


def _called(kind: str | None) -> str:
    return f"a {kind!r}" if kind else "CLIP or SigLIP"
