"""The model: graft, connectors, vision towers, and every way in and out of the disk.

`llava_arch.py` makes a LLaVA of a language model; `builder.py` loads one, whatever form its folder
has; `checkpoint.py` and `lora.py` write it. The names in upstream's checkpoints are in
`checkpoint_names.py`, those of transformers' own layout in `hf_layout.py`.
"""

# Programs written for upstream say `from llava.model import *`.
__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM", "LlavaMistralConfig", "LlavaMistralForCausalLM"]


def __getattr__(name: str):
    """The models and configs of `llava.model.language_model`, loaded when asked for."""
    if name.startswith("Llava"):
        from llava.model import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
