"""The name that upstream users import for LLaVA on Llama."""

from __future__ import annotations

from transformers import LlamaForCausalLM

from llava.model.llava_arch import llava_class

LlavaLlamaForCausalLM = llava_class(LlamaForCausalLM)
