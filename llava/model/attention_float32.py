"""Attention in float32, for a language model that is trained in bfloat16 on a CPU.

PyTorch's gradient of `sdpa` for bfloat16 on CPUs takes several times as long as the one for float32
where sequences are short (docs/benchmarks.md has the measurement); casting costs less than that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava.model.attention_impl import attention_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sdpa_float32"


def train_in_float32(model: PreTrainedModel) -> bool:
    """Have a model in bfloat16 on a CPU that computes `sdpa` take its attention in float32.

    Returns:
        Whether it does; another kind of attention, type or device is left as it is.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    found = (attention_of(model), model.dtype, model.device.type)
    if found != ("sdpa", torch.bfloat16, "cpu") or not model._can_set_attn_implementation():
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, in float32 as far as `module` trains; shapes and type as given."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not module.training:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    q, k, v = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False):  # it would cast them back
        output, _ = sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)
    return output.to(query.dtype), None
