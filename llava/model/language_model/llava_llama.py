"""LLaVA on Llama, where upstream has it."""

from __future__ import annotations

from transformers import LlamaConfig as LlavaConfig
from transformers import LlamaForCausalLM

from llava.model.llava_arch import llava_class

LlavaLlamaForCausalLM = llava_class(LlamaForCausalLM)
__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM"]
