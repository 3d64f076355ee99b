"""`load_pretrained_model`: from files on disk to a model that answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
)
from llava.errors import InputError
from llava.model.checkpoint import (
    PROJECTOR_FILE,
    gathered,
    load_projector,
    model_class,
    read_config,
)
from llava.state import load


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    **kwargs,
):
    """Load a projector-only folder (with its base) or a full one, judged by its files.

    Args:
        model_path: the LLaVA folder.
        model_base: the language model that a projector-only folder belongs to; None for a full one.
        model_name: upstream's argument; what a folder is called decides nothing here.
        device: `cuda`, `cpu`, …; the CPU computes in float32, other devices in float16 unless
            `dtype=` says otherwise.

    Returns:
        (tokenizer, model, image_processor, context_len), as upstream; image_processor is None for
        a language model without pictures.
    """
    if load_8bit or load_4bit:
        raise InputError("--load-8bit and --load-4bit are not supported yet")
    device = device if device != "cuda" or torch.cuda.is_available() else "cpu"
    dtype = kwargs.pop("dtype", None) or (torch.float32 if device == "cpu" else torch.float16)
    kwargs["attn_implementation"] = "flash_attention_2" if use_flash_attn else "sdpa"

    projector_file = Path(model_path) / PROJECTOR_FILE
    has_weights = _has_weights(model_path)
    if projector_file.is_file() and not has_weights and model_base is None:
        raise InputError(
            f"{model_path}: holds only a projector ({PROJECTOR_FILE}); "
            "name its language model with --model-base"
        )
    if (Path(model_path) / "adapter_config.json").is_file():
        raise InputError(f"{model_path}: LoRA checkpoints are not supported yet")

    config = read_config(model_path)
    weights_from = model_path if has_weights else model_base
    if weights_from is None:
        raise InputError(f"{model_path}: neither weights nor {PROJECTOR_FILE} are there")
    tokenizer = load_tokenizer(weights_from)
    model = from_pretrained(weights_from, config, dtype=dtype, **kwargs).to(device)
    model.eval()

    image_processor = None
    if hasattr(model, "get_vision_tower"):
        if not has_weights:
            if not projector_file.is_file():
                raise InputError(f"{model_path}: {PROJECTOR_FILE} is missing")
            load_projector(model, load(projector_file), str(projector_file))
        add_picture_tokens(model, tokenizer)
        image_processor = model.load_vision_tower(dtype=dtype, device=device).image_processor
    context_len = getattr(config, "max_sequence_length", None) or 2048
    return tokenizer, model, image_processor, context_len


def from_pretrained(path: str, config, **kwargs):
    """`from_pretrained` of the class that `config` asks for.

    A projector that the weights do not hold starts as torch's own layers do (as upstream's does),
    from torch's global seed.

    Raises:
        InputError: the files do not load, or lack a tensor of the language model.
    """
    from transformers.utils import logging

    # A projector that is not there yet is no news; what else is missing is an error below.
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = model_class(config).from_pretrained(
            path, config=config, output_loading_info=True, **kwargs
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: the weights do not load ({error})") from None
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(found["missing_keys"])
    if lost := [name for name in missing if "mm_projector" not in name]:
        raise InputError(f"{path}: {len(lost)} tensors are missing from the weights, as {lost[0]}")
    if missing:
        projector = model.get_model().mm_projector
        with gathered(projector.parameters(), write=True):
            for layer in projector.modules():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
    return model


def load_tokenizer(path: str, **kwargs):
    """The tokenizer of a folder or hub name."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no readable tokenizer ({error})") from None


def add_picture_tokens(model, tokenizer) -> None:
    """Add the tokens that the config's `mm_use_im_*` keys ask for, and rows for them."""
    config = model.config
    new = []
    if getattr(config, "mm_use_im_patch_token", True):
        new.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if getattr(config, "mm_use_im_start_end", False):
        new += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if new and tokenizer.add_tokens(new, special_tokens=True):
        model.resize_token_embeddings(max(len(tokenizer), config.vocab_size))


def _has_weights(path: str | os.PathLike) -> bool:
    """Whether a folder holds a language model's weights; a hub name is taken to."""
    folder = Path(path)
    if not folder.is_dir():
        return True
    return any(
        next(folder.glob(pattern), None) is not None
        for pattern in ("model*.safetensors", "pytorch_model*.bin")
    )
