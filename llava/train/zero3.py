"""Helpers that research code imports from upstream's `train.py`, by upstream's names.

`named_params` is `model.named_parameters()`. Under ZeRO-3 every rank must call them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import Trainer

from llava.model.checkpoint import gathered
from llava.state import State

Named = Iterable[tuple[str, nn.Parameter]]


def maybe_zero_3(param: nn.Parameter, ignore_status: bool = False, name: str | None = None):
    """A copy of a parameter on the CPU, whole under ZeRO-3 too."""
    with gathered([param]):
        return param.detach().cpu().clone()


def get_peft_state_maybe_zero_3(named_params: Named, bias: str) -> State:
    """LoRA's tensors, and the biases that `--lora_bias` names."""
    named = dict(named_params)
    layers = {name.partition(".lora_")[0] for name in named if ".lora_" in name}
    of_lora = {f"{layer}{end}" for layer in layers for end in (".bias", ".base_layer.bias")}
    chosen = [
        name
        for name in named
        if "lora_" in name
        or (bias == "all" and "bias" in name)
        or (bias == "lora_only" and name in of_lora)
    ]
    return {name: maybe_zero_3(named[name]) for name in chosen}


def get_peft_state_non_lora_maybe_zero_3(
    named_params: Named, require_grad_only: bool = True
) -> State:
    """Everything that is not LoRA's, by default what of it trains."""
    return {
        name: maybe_zero_3(param)
        for name, param in named_params
        if "lora_" not in name and (param.requires_grad or not require_grad_only)
    }


def get_mm_adapter_state_maybe_zero_3(named_params: Named, keys_to_match: Sequence[str]) -> State:
    """The tensors whose names contain one of `keys_to_match`, as `mm_projector`."""
    return {
        name: maybe_zero_3(param)
        for name, param in named_params
        if any(key in name for key in keys_to_match)
    }


def safe_save_model_for_hf_trainer(trainer: Trainer, output_dir: str) -> None:
    """Save what the run trains into `output_dir`."""
    trainer.save_model(output_dir)
