"""The float32 copy that a DeepSpeed optimizer keeps of parameters that have 16 bits.

Such an optimizer steps its copy, and each parameter is the copy's rounding. Rounding once a round
would lose what a round's small steps have added up to, so a client's state is taken from the copy,
and the copy of its next task begins with what it was sent. What has no such copy is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from llava.model.checkpoint import copies
from llava.state import State


def float32_copies(parameters: Mapping[str, nn.Parameter]) -> State:
    """Whole copies on the CPU, float32, while the optimizer is there; every rank must call it."""
    found = {name: _of_optimizer(p) for name, p in parameters.items()}
    others = copies({n: p for n, p in parameters.items() if found[n] is None})
    return {
        name: (others[name] if tensor is None else tensor).detach().cpu().float()
        for name, tensor in found.items()
    }


class StartInFloat32(TrainerCallback):
    """Gives the optimizer's copy the values that training starts from, before their rounding.

    Args:
        start: by parameter, its values; those of a parameter without a copy are passed over.
    """

    def __init__(self, start: Mapping[nn.Parameter, torch.Tensor]):
        self.start = start

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # a checkpoint has been loaded, with its copy
            return
        for parameter, tensor in self.start.items():
            if _has_copy(parameter):
                _give(parameter, tensor)


def _has_copy(parameter: nn.Parameter) -> bool:
    """Whether an optimizer of DeepSpeed steps it. What is frozen may have one of an earlier task's
    that is gone."""
    linked = hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
    return parameter.requires_grad and linked


def _of_optimizer(parameter: nn.Parameter) -> torch.Tensor | None:
    if not _has_copy(parameter):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    return None if whole is None else whole.detach().cpu().clone()


def _give(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    from deepspeed import comm
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    sharded: Any = parameter
    shard = getattr(sharded, "ds_tensor", None)
    if shard is None:
        safe_set_full_fp32_param(parameter, tensor.float())
        return
    # ZeRO-3: each rank has as many values, and the last one's are filled up.
    own, size = tensor.new_zeros(shard.numel(), dtype=torch.float32), shard.numel()
    begin = comm.get_rank(group=sharded.ds_process_group) * size
    values = tensor.float().flatten()[begin : begin + size]
    own[: len(values)] = values
    safe_set_local_fp32_param(parameter, own)
