"""A language model in 4 or 8 bits; what it is to learn, or learnt, stays as it is."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from llava.errors import InputError

# Whole prefixes: a last part alone would not be found by transformers 5, and the projector would
# be quantised as well, into a shape that no checkpoint fits.
KEPT = ["model.mm_projector", "model.vision_tower", "lm_head"]
QUANT_TYPES = ("nf4", "fp4")


def quantization(
    bits: int,
    dtype: torch.dtype,
    device_map: str | dict[str, Any],
    quant_type: str = "nf4",
    double_quant: bool = True,
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that load in `bits` (16: none of them).

    Args:
        dtype: in which 4-bit layers compute.
        device_map: where the model goes; a quantised one cannot be moved later.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if bits == 16:
        return {}
    check_bitsandbytes(bits)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=list(KEPT),
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
    )
    return {"quantization_config": config, "device_map": device_map}


def keep_trainable(model: torch.nn.Module) -> None:
    """Keep 4-bit layers in the form that gradients pass through.

    On CPUs with AVX512-BF16 bitsandbytes repacks a layer when it is run in eval mode, for good, and
    the repacked one hands back no gradient: training would go on after an evaluation and learn
    nothing, without a word.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False


def check_4bit_on_cpu(model: torch.nn.Module) -> None:
    """`InputError` for a layer that the CPU's 4-bit kernels of inference do not take."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and module.out_features % 32:
            raise InputError(
                f"4 bits on the CPU need widths that 32 divides, {name} has {module.out_features}; "
                "8 bits have no such limit"
            )


def check_bitsandbytes(bits: int) -> None:
    """`InputError` where there is no bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{bits} bits need bitsandbytes: pip install 'fedllava[quant]'")
