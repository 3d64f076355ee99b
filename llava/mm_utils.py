"""Pictures and prompts on their way into the model: pixels, image tokens, stop words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError

# Upstream has these here too.
from llava.pictures import image_size as image_size
from llava.pictures import load_image as load_image
from llava.pictures import load_image_from_base64 as load_image_from_base64
from llava.pictures import load_images as load_images
from llava.pictures import open_image as open_image
from llava.squaring import expand2square as expand2square
from llava.squaring import for_processor
from llava.text_tokens import chunk_ids
from llava.tiling import divide_to_patches as divide_to_patches
from llava.tiling import get_anyres_image_grid_shape as get_anyres_image_grid_shape
from llava.tiling import process_anyres_image
from llava.tiling import resize_and_pad_image as resize_and_pad_image
from llava.tiling import select_best_resolution as select_best_resolution

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase


def check_aspect_ratio(aspect_ratio: str | None) -> None:
    """`InputError` for the tiled kinds that are not upstream's ("anyres_max_9" and the like)."""
    if aspect_ratio and aspect_ratio.startswith("anyres") and aspect_ratio != "anyres":
        raise InputError(
            f"image_aspect_ratio is {aspect_ratio!r}; known are 'pad', 'square' and 'anyres'"
        )


def image_pixels(image: Image.Image, image_processor: Any, model_cfg: Any) -> torch.Tensor:
    """One picture as the tower wants it: (3, H, W), or (1 + tiles, 3, H, W) for "anyres".

    `model_cfg.image_aspect_ratio` "pad" first squares it with the processor's mean colour; "anyres"
    cuts it into tiles by `model_cfg.image_grid_pinpoints`; anything else leaves it to the
    processor, which cuts out the centre.
    """
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    check_aspect_ratio(aspect_ratio)
    if aspect_ratio == "anyres":
        pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
        return process_anyres_image(image, image_processor, pinpoints)
    pad = aspect_ratio == "pad"
    mean = tuple(int(255 * mean) for mean in image_processor.image_mean) if pad else None
    image = for_processor(image, image_processor, mean)
    return image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Pictures for the model: one tensor with a row each, or a list when their shapes differ.

    See `image_pixels` for what `model_cfg` says.
    """
    return stack_same([image_pixels(image, image_processor, model_cfg) for image in images])


def stack_same(tensors: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """One tensor with a new first dimension when all shapes agree, else the list as it is."""
    same = all(tensor.shape == tensors[0].shape for tensor in tensors)
    return torch.stack(tensors) if tensors and same else tensors


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`[bos]` if this tokenizer begins texts with it, else nothing."""
    empty = tokenizer("").input_ids
    return empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Token ids of `prompt`, with `image_token_index` in the place of each `<image>`.

    The pieces between pictures are tokenised each by itself, as `llava.text_tokens` says.
    `return_tensors="pt"` gives a 1-D LongTensor in place of the list.
    """
    ids = bos_prefix(tokenizer)
    for i, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if i:
            ids.append(image_token_index)
        ids += chunk_ids(chunk, tokenizer)
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise InputError(f"return_tensors is {return_tensors!r}; expected 'pt' or None")
    return torch.tensor(ids, dtype=torch.long)


def expand_image_tokens(
    ids: torch.Tensor, labels: torch.Tensor | None, num_tokens: int | Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Repeat each image token of `ids` (1-D) as often as its picture has tokens.

    `num_tokens` is one number for all pictures, or one for each. Labels follow, -100 at pictures.
    """
    is_image = ids == IMAGE_TOKEN_INDEX
    pictures = int(is_image.sum())
    counts = [num_tokens] * pictures if isinstance(num_tokens, int) else list(num_tokens)
    if len(counts) != pictures:
        raise InputError(f"{len(counts)} pictures were given for {pictures} image tokens")
    repeats = torch.ones_like(ids)
    repeats[is_image] = torch.tensor(counts, dtype=ids.dtype, device=ids.device)
    if labels is not None:
        labels = labels.masked_fill(is_image, IGNORE_INDEX).repeat_interleave(repeats)
    return ids.repeat_interleave(repeats), labels


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path or hub name; `PARENT_checkpoint-N` for a checkpoint folder."""
    *parents, name = model_path.strip("/").split("/")
    return f"{parents[-1]}_{name}" if name.startswith("checkpoint-") and parents else name


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop a row once one of `keywords` stands at the end of what it generated.

    `input_ids` (B, T) is the prompt. Generation from embeddings returns new tokens alone, so the
    prompt counts as part of the output only where the output really begins with it.
    """

    def __init__(
        self,
        keywords: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        input_ids: torch.Tensor,
    ) -> None:
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.input_ids = input_ids
        # A token is at least one byte, so this many tokens hold any keyword, however it was split.
        self.tail = max((len(keyword.encode()) for keyword in self.keywords), default=0)

    def __call__(self, output_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B,) booleans: which rows are done."""
        length = self.input_ids.shape[1]
        if torch.equal(output_ids[:, :length], self.input_ids.to(output_ids.device)):
            output_ids = output_ids[:, length:]
        tails = output_ids[:, output_ids.shape[1] - min(self.tail, output_ids.shape[1]) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False)
        done = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(done, device=output_ids.device)
