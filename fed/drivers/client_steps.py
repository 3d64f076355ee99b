"""A method's client rule within LLaVA's own trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from fed.clients.update import Update
from fed.methods.interface.client_rule import ClientRule
from fed.state import State, read_tensors, save

SUMS_FILE = "client_rule.safetensors"


class ClientSteps(TrainerCallback):
    """Adds what a rule says to the gradients of every optimizer step, after their clipping.

    The trainer hands gradients over when those of all processes and of all accumulated batches are
    in them. What a rule has running lies in the trainer's own checkpoints, whole before they are:
    `trainer_state.json`, which makes a checkpoint one, is written later.

    Args:
        rule: `(start, sent, kept) -> ClientRule`, its tensors on the parameters' device.
        parameters: by the state's names, as the task begins; those that are frozen stay as they
            are, and have no gradients.
        sent, kept: as `ClientRule` has them.
    """

    def __init__(
        self,
        rule: Callable[[State, State, State], ClientRule],
        parameters: Mapping[str, nn.Parameter],
        sent: State,
        kept: State,
    ):
        self.parameters = {n: p for n, p in parameters.items() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in parameters.items()}
        self.rule = rule(
            start, *({n: t.to(start[n].device) for n, t in part.items()} for part in (sent, kept))
        )

    def go_on_from(self, checkpoint: str) -> None:
        """Put back what the rule had running."""
        if self.rule.running:
            for name, tensor in read_tensors(Path(checkpoint) / SUMS_FILE).items():
                self.rule.running[name].copy_(tensor)

    def finish(self, update: Update) -> None:
        """Put what the task leaves beside its state into its update: float32, on the CPU."""
        for part, tensors in self.rule.end()._asdict().items():
            setattr(update, part, {n: t.float().cpu() for n, t in tensors.items()})

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        if args.fp16 and not all(bool(torch.isfinite(g).all()) for g in gradients.values()):
            return  # the scaler of the loss leaves such a step out
        weights = {name: p.detach() for name, p in self.parameters.items()}
        added = self.rule.step(gradients, weights)
        for name, parameter in self.parameters.items():
            if name not in added:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad += added[name]

    def on_step_end(self, args, state, control, **kwargs):
        """Before the trainer writes a checkpoint, if one is due now."""
        if control.should_save and args.should_save and self.rule.running:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save(self.rule.running, folder / SUMS_FILE)

    on_epoch_end = on_step_end
