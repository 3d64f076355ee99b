"""Attention maps: the weights of an answer's attention to the places of each picture.

The measure is ours: the attention weights from the positions that make the answer's tokens to the
picture's tokens, the mean over heads, layers and the answer's tokens, scaled to a sum of one for
each picture. It says where the model read, not why it answered as it did.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.eval.answer import Answerer, Picture
from llava.mm_utils import expand_image_tokens, tokenizer_image_token
from llava.model.attention_impl import eager_attention


def grids(
    answerer: Answerer, prompt: str, answer: str, pictures: Sequence[Picture]
) -> list[list[list[float]]]:
    """A grid of weights for each picture, row by row; a square, but for some towers of plug-ins.

    Of a tiled (`anyres`) picture it is the overview, its first tokens, that is shown.

    Args:
        prompt: up to the answer, with an image token for each picture.
    """
    model, tokenizer = answerer.model, answerer.tokenizer
    head = torch.tensor(tokenizer_image_token(prompt, tokenizer), dtype=torch.long)
    tail = torch.tensor(tokenizer(answer, add_special_tokens=False).input_ids, dtype=torch.long)
    tokens = model.picture_tokens(*answerer.placed(pictures))
    ids, _ = expand_image_tokens(torch.cat([head, tail]), None, [len(t) for t in tokens])
    if len(ids) > answerer.context_length:
        raise InputError(f"{len(ids)} tokens; the model reads {answerer.context_length}")
    places = (ids == IMAGE_TOKEN_INDEX).to(model.device)
    embeds = model.get_input_embeddings()(ids.clamp_min(0).to(model.device))
    embeds[places] = torch.cat(list(tokens)).to(embeds)
    asked = slice(len(ids) - len(tail) - 1, len(ids) - 1)  # a position makes the next token
    with _weights_of(model, asked) as weights:
        model(inputs_embeds=embeds[None], use_cache=False)
    if not weights:
        raise InputError(f"{answerer.name}: its attention cannot be read")
    seen = torch.stack(weights).mean(0)[places]
    tower = model.get_vision_tower()
    found = []
    for own in seen.split([len(t) for t in tokens]):
        if (shape := _shape(len(own), tower.grid)) is None:
            raise InputError(
                f"{answerer.name}: its {len(own)} tokens have no known places in the picture"
            )
        grid = own[: math.prod(shape)].view(shape)
        found.append((grid / grid.sum().clamp_min(1e-12)).tolist())
    return found


def _shape(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of the (first) tokens of a picture; None if its patches are in no grid."""
    if grid is None or tokens >= math.prod(grid):
        return grid
    if grid[0] != grid[1]:
        return None
    side = math.isqrt(tokens)  # a connector makes fewer of a square
    return side, side


@contextlib.contextmanager
def _weights_of(model, asked: slice) -> Iterator[list[torch.Tensor]]:
    """Inside, a run of the model leaves each layer's mean weights (length,) of rows `asked`.

    They are reduced layer by layer, so that never more than one layer's whole are there.
    """
    weights: list[torch.Tensor] = []

    def reduce(module, args, output):
        if isinstance(output, tuple) and len(output) > 1 and torch.is_tensor(output[1]):
            weights.append(output[1][0, :, asked].float().mean((0, 1)))
            return output[0], None, *output[2:]
        return None

    layers = getattr(model.get_model(), "layers", ())
    attentions = [layer.self_attn for layer in layers if hasattr(layer, "self_attn")]
    handles = [attention.register_forward_hook(reduce) for attention in attentions]
    try:
        with eager_attention(model):
            yield weights
    finally:
        for handle in handles:
            handle.remove()
