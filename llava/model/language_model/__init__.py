"""Language models with the graft, and their configs, under the names that people import.

`LlavaLlamaForCausalLM` is `llava_class(LlamaForCausalLM)`; so for the others. A model that is not
named here works as well, when a config asks for it.
"""

from __future__ import annotations

_BASES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma")
NAMES = {f"Llava{base}ForCausalLM": f"{base}ForCausalLM" for base in _BASES}
# A graft has its base's config, with the mm_* keys in it. Upstream calls Llama's just LlavaConfig.
CONFIGS = {f"Llava{base}Config": f"{base}Config" for base in _BASES}
CONFIGS["LlavaConfig"] = "LlamaConfig"


def __getattr__(name: str) -> type:
    if name not in NAMES and name not in CONFIGS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import transformers

    if name in CONFIGS:
        return getattr(transformers, CONFIGS[name])
    from llava.model.llava_arch import llava_class

    return llava_class(getattr(transformers, NAMES[name]))
