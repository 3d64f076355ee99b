"""The model: graft, connectors, vision towers, and every way in and out of the disk."""

# Programs written for upstream say `from llava.model import *`.
__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM", "LlavaMistralConfig", "LlavaMistralForCausalLM"]


def __getattr__(name: str):
    """The models and configs of `llava.model.language_model`, loaded when asked for."""
    if name.startswith("Llava"):
        from llava.model import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
