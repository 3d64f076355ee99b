"""The tokens `<im_patch>`, `<im_start>` and `<im_end>`, and their rows in the embedding.

With `mm_use_im_start_end` upstream trains the whole embedding with the projector, saves both, and
reads back the rows of the two new tokens. Here these two rows alone train, so that what was trained
is what is read; they are saved under the embedding's name, which upstream takes as well.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
)
from llava.model.checkpoint import gathered, own_rows
from llava.model.checkpoint_names import ROWS, SEPARATE
from llava.state import State, check


def add_picture_tokens(model, tokenizer, trained: State | None = None, source: str = "") -> None:
    """Add the tokens that the config's `mm_use_im_*` keys ask for, and rows for them.

    Args:
        trained: what was read from `source`; the rows of start and end token if they are there.

    Raises:
        StateError: rows that are not of this embedding; nothing has been copied.
    """
    config = model.config
    new = []
    if getattr(config, "mm_use_im_patch_token", True):
        new.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if uses_start_end(config):
        new += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if new and tokenizer.add_tokens(new, special_tokens=True):
        grow_embeddings(model, len(tokenizer))
    if uses_start_end(config) and trained and trained.get(ROWS) is not None:
        embedding = model.get_input_embeddings()
        rows = own_rows(trained[ROWS], {len(tokenizer), embedding.num_embeddings})
        like = torch.empty(2, embedding.embedding_dim, device="meta")
        check({ROWS: rows}, {ROWS: like}, who=source)
        with gathered([embedding.weight], write=True), torch.no_grad():
            if embedding.weight.numel():  # ZeRO-3: only rank 0 holds what it writes
                embedding.weight[_ids(tokenizer)] = rows.to(embedding.weight)


def grow_embeddings(model, rows: int) -> None:
    """Make room for `rows` tokens; new rows are the mean of the others, the same at every load."""
    known = model.config.vocab_size
    if rows <= known:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        with gathered([layer.weight], write=True), torch.no_grad():
            if layer.weight.numel():  # ZeRO-3: only rank 0 holds what it writes
                layer.weight[known:] = layer.weight[:known].mean(0)


def uses_start_end(config) -> bool:
    """Whether pictures stand between a start and an end token."""
    return bool(getattr(config, "mm_use_im_start_end", False))


def separate_rows(model, tokenizer) -> None:
    """Hold the rows of start and end token as a parameter (2, hidden) of the embedding, float32.

    They are put into its output, so that they can train while the embedding is frozen. One that is
    tied to the head stays as it is, which upstream freezes, too.
    """
    embedding = model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False):
        return
    ids = _ids(tokenizer)
    with gathered([embedding.weight]):
        rows = embedding.weight[ids].detach().float()
    setattr(embedding, SEPARATE, nn.Parameter(rows))
    embedding.register_forward_hook(functools.partial(_put_rows, ids))


def _put_rows(ids: list[int], embedding: nn.Module, args: tuple, out: torch.Tensor):
    for token, row in zip(ids, getattr(embedding, SEPARATE), strict=True):
        out = torch.where((args[0] == token).unsqueeze(-1), row.to(out.dtype), out)
    return out


def _ids(tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN])
