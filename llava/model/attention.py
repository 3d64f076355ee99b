"""Which attention a model computes with."""

from __future__ import annotations

import os
import sys

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
