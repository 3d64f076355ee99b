"""The names in upstream's checkpoints: their files' and their tensors', and ours in memory → those.

In memory a tensor has upstream's name but for two: the vision tower's, which depend on the version
of transformers, and what a connector has beside its base. `lora.py` has the names of a LoRA folder,
`hf_layout.py` those of transformers' own layout.
"""

from __future__ import annotations

import re

from llava.model.multimodal_projector.pilot import EXTRA
from llava.state import State

PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR_PREFIX = "model.mm_projector."
# What a connector has beside its base is called so in mm_projector.bin, where upstream passes over
# all names without "mm_projector" and would refuse ones with it that it does not know.
EXTRA_PREFIX = "model.pilot."
NEWLINE = "model.image_newline"
# The rows of the start and end token of pictures, the last two of what upstream saves; while they
# train they are a parameter of the embedding. See `picture_tokens.py`.
ROWS = "model.embed_tokens.weight"
SEPARATE = "picture_rows"
SEPARATE_ROWS = f"model.embed_tokens.{SEPARATE}"

# A tower's tensors in any layout, and as upstream names them.
_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)")
_TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."


def on_disk(name: str) -> str:
    """A tensor's name in memory → upstream's, which differs in the tower alone."""
    inner = tower_name(name)
    return _TOWER_PREFIX + inner if inner else name


def tower_name(name: str) -> str | None:
    """The name within the vision tower itself, of a tensor's in any layout; None of others."""
    match = _TOWER.fullmatch(name)
    return match[1] if match else None


def projector_name(name: str) -> str:
    """A connector's own name of a parameter → that in `mm_projector.bin`."""
    if name.startswith(EXTRA):
        return EXTRA_PREFIX + name.removeprefix(EXTRA)
    return PROJECTOR_PREFIX + name


def split_tower(tensors: State) -> tuple[State, State]:
    """Tensors of the tower, named as in the tower itself, and the others as they are."""
    inner = {name: tower_name(name) for name in tensors}
    tower = {short: tensors[name] for name, short in inner.items() if short}
    return tower, {name: tensors[name] for name, short in inner.items() if not short}
