"""LLaVA on today's libraries: a vision tower, a projector and any causal language model.

This package knows nothing of federation; `fed` builds on it.
"""

import logging

# Without a GPU bitsandbytes tells everyone who imports peft of a kernel that they could install.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    # Upstream offers its model here; importing it lazily keeps `import llava` free of torch.
    if name.startswith("Llava"):
        from llava.model import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
