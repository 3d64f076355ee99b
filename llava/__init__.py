"""LLaVA on today's libraries: a vision tower, a projector and any causal language model.

This package knows nothing of federation; `fed` builds on it.
"""


def __getattr__(name: str):
    # Upstream offers this name here; importing it lazily keeps `import llava` free of torch.
    if name == "LlavaLlamaForCausalLM":
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module 'llava' has no attribute {name!r}")
