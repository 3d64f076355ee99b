"""Which attention a model computes with."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")


def choose_attention(requested: str | None, device: str) -> str:
    """`requested`, except that flash_attention_2 becomes sdpa where it cannot run, with a word."""
    if requested != "flash_attention_2":
        return requested or "sdpa"
    import torch
    from transformers.utils import is_flash_attn_2_available

    found = device.startswith("cuda") and torch.cuda.is_available() and is_flash_attn_2_available()
    if os.environ.get("RANK", "0") == "0":
        why = "" if found else " (flash_attention_2 needs a GPU and the flash-attn package)"
        print(f"attention: {requested if found else 'sdpa'}{why}", file=sys.stderr, flush=True)
    return requested if found else "sdpa"


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` computes the eager attention, the one kind that has weights to show.

    Afterwards each of its parts (the language model, a tower that trains) has its own kind again.
    """
    from transformers import PreTrainedModel

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [part.config._attn_implementation for part in parts]  # outer ones come first
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for part, kind in zip(parts, before, strict=True):
            if part.config._attn_implementation != kind:
                part.set_attn_implementation(kind)
