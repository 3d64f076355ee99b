"""Functions of upstream's `llava.train.train`, for programs that call them with its arguments.

Both take `llava.conversation.default_conversation`, to which such programs assign a template. The
training here has its own: `llava.train.preprocess`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from llava.conversation import default_template, get_template
from llava.train import preprocess as own

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = list[dict[str, Any]]  # a record's `conversations`


def preprocess_multimodal(sources: Sequence[Turns], data_args: Any) -> Sequence[Turns]:
    """Put each turn's picture on a line of its own at its front, in the very turns given.

    `is_multimodal` and `mm_use_im_start_end` are read of `data_args`.
    """
    if data_args.is_multimodal:
        template, marked = get_template(default_template()), data_args.mm_use_im_start_end
        for turns in sources:
            placed = own.preprocess_multimodal([turn["value"] for turn in turns], template, marked)
            for turn, text in zip(turns, placed, strict=True):
                turn["value"] = text
    return sources


def preprocess(
    sources: Sequence[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool = False
) -> dict[str, list[torch.Tensor]]:
    """`input_ids` and `labels`, 1-D long, of each conversation; a picture is one -200.

    Raises:
        InputError: turns that are none. `has_image` decides nothing here: what the text says does.
    """
    template = get_template(default_template())
    rows = [own.tokenize(own.render(own.read_turns(s), template), tokenizer) for s in sources]
    return {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}


def rank0_print(*words: object) -> None:
    """Print in the first process of a launcher's alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words)
