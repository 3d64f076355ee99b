"""A finished LLaVA with what its data needs, to measure it: nothing of it trains."""

from __future__ import annotations

from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.train.sample_format import SampleFormat
from llava.train.session import Session


def finished_session(
    model_path: str, model_base: str | None, version: str, device: str = "cuda"
) -> Session:
    """A checkpoint as a session without a feature cache; samples are as long as in its training.

    Args:
        model_path, model_base, device: as `load_pretrained_model` takes them.
        version: the conversation template.

    Raises:
        InputError: what `load_pretrained_model` refuses, or a language model without pictures.
    """
    tokenizer, model, _, context = load_pretrained_model(model_path, model_base, "", device=device)
    if not hasattr(model, "get_vision_tower"):
        raise InputError(f"{model_path}: a language model without pictures, expected a LLaVA")
    model.requires_grad_(False)
    limit = getattr(model.config, "tokenizer_model_max_length", None) or context
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return Session(model, tokenizer, SampleFormat.of_model(model, version), None)
