"""All that is used of transformers and DeepSpeed without being their public interface.

What `LLaVATrainer` overrides of the Trainer is beside this; upstream's own trainer does the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast


def causal_lm_class(config: Any) -> type:
    """The class that AutoModelForCausalLM makes of a config; KeyError if there is none."""
    from transformers import AutoModelForCausalLM

    return cast(type, AutoModelForCausalLM._model_mapping[type(config)])


def vision_model_class(config: Any) -> type:
    """The class that AutoModel makes of a vision tower's config; KeyError if there is none."""
    from transformers import AutoModel

    return cast(type, AutoModel._model_mapping[type(config)])


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Inside the block ZeRO-3 cuts nothing into shards: what is loaded is whole on every rank."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def mark_as_adapted(model: Any) -> None:
    """Let the Trainer take a quantised model without an adapter: its projector trains."""
    model._hf_peft_config_loaded = True


def gpus_without_launcher(args: Any) -> int:
    """The number of GPUs over which transformers would spread a process of these arguments."""
    return args._n_gpu


def release(trainer: Any) -> None:
    """Let go of optimizer and engine, so that the next trainer finds the model as it was."""
    engine = getattr(trainer, "deepspeed", None)
    if engine is not None:
        engine.destroy()
        # What it forgets: that would keep it alive, and at work in the next trainer's steps.
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        for module in trainer.model.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                module.__dict__.pop(name, None)
    trainer.optimizer = trainer.lr_scheduler = trainer.model_wrapped = trainer.deepspeed = None
