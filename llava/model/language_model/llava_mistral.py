"""LLaVA on Mistral, where upstream has it."""

from __future__ import annotations

from transformers import MistralConfig as LlavaMistralConfig
from transformers import MistralForCausalLM

from llava.model.llava_arch import llava_class

LlavaMistralForCausalLM = llava_class(MistralForCausalLM)
__all__ = ["LlavaMistralConfig", "LlavaMistralForCausalLM"]
