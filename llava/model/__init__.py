"""The model: graft, connectors, vision towers, and every way in and out of the disk."""


def __getattr__(name: str):
    if name == "LlavaLlamaForCausalLM":
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module 'llava.model' has no attribute {name!r}")
