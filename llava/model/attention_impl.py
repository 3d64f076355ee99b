"""The kind of attention that a model computes with."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

KINDS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")


def choose_attention(requested: str | None, device: str, compute: torch.dtype | None = None) -> str:
    """`requested`, except that flash_attention_2 becomes sdpa where it cannot run, with a
    warning; None as `compute` is one of the types that it has."""
    if requested != "flash_attention_2":
        return requested or "sdpa"
    import torch
    from transformers.utils import is_flash_attn_2_available

    if (
        device.startswith("cuda")
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and compute in (None, torch.bfloat16, torch.float16)
        and is_flash_attn_2_available()
    ):
        return requested
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            "attention: sdpa (flash_attention_2 needs the flash-attn package, a GPU of compute "
            "capability 8.0 and bf16 or fp16)"
        )
    return "sdpa"


def attention_of(model: PreTrainedModel) -> str:
    """The kind of attention that a model computes with, as `set_attn_implementation` takes it."""
    return str(model.config._attn_implementation)


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` computes the eager attention, the one kind that has weights to show.

    Afterwards each of its parts (the language model, a tower that trains) has its own kind again.
    """
    from transformers import PreTrainedModel

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [attention_of(part) for part in parts]  # outer ones come first
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for part, kind in zip(parts, before, strict=True):
            if attention_of(part) != kind:
                part.set_attn_implementation(kind)
