"""The trainer of private training: LLaVA's own, with another gradient in every step.

Of a step's samples, over all its accumulated batches, each one's gradient is that of its own loss,
the mean over its own labelled tokens; it is clipped to C, all tensors jointly. Their sum gets noise
of standard deviation noise * C once, and is divided by the number of samples of a full step,
whatever the number of this one: the last step of an epoch has fewer, and a smaller gradient. What
comes after works on that alone: --max_grad_norm, optimizer, schedule, a method's rule for the
clients' steps.

All tensors that train get noise in every step, also those that no sample of it moved.

The first batch with pictures is rehearsed, before anything steps: the loss of its first sample may
move no row of another one, and the samples' gradients must sum to what autograd sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llava.train.llava_trainer import LLaVATrainer
from llava.train.private_arguments import samples_of_step
from llava.train.private_gradients import PerSampleGradients
from llava.train.private_noise import NoiseSecret
from llava.train.private_rows import Rows


@dataclass(frozen=True)
class PrivateSteps:
    """How steps are made private.

    Attributes:
        clip: the longest gradient of a sample.
        noise: the noise's standard deviation in units of `clip`.
        secret: where the noise comes from.
        task: what of a run is trained, for noise of its own.
    """

    clip: float
    noise: float
    secret: NoiseSecret
    task: str


class PrivateTrainer(LLaVATrainer):
    """`LLaVATrainer` whose gradients are those of `private`."""

    def __init__(self, *args: Any, private: PrivateSteps, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.private = private
        self.gradients = PerSampleGradients(self.model, private.clip)
        self._rehearsed = False

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """A batch's part of the step's sum; with the step's last batch, its gradient."""
        model.train()
        if callable(begin := getattr(self.optimizer, "train", None)):  # of a schedule-free one
            begin()
        inputs = self._prepare_inputs(inputs)
        rows = Rows.of_batch(inputs)
        with self.gradients.recording(rows):
            with self.compute_loss_context_manager():
                logits = model(**inputs).logits
            losses = sample_losses(logits, inputs["labels"], inputs["label_positions"])
            if not self._rehearsed:
                self._rehearse(losses, rows)
            losses.sum().backward()
        if not self._rehearsed:
            in_16_bits = self.args.bf16 or self.model.dtype != torch.float32
            self.gradients.check_sum(rows, in_16_bits)
            self._rehearsed = bool(len(rows.pictures)) or not self.gradients.sees_pictures
        self.gradients.add(rows)
        if self.accelerator.sync_gradients:
            self._give_gradient()
        return losses.detach().mean() / self.current_gradient_accumulation_steps

    def _rehearse(self, losses: Tensor, rows: Rows) -> None:
        losses[0].backward(retain_graph=True)
        self.gradients.check_grouping(rows, 0)
        self.gradients.forget()

    def _give_gradient(self) -> None:
        """Put the step's noised sum, over its number of samples, where the optimizer looks."""
        private, step, parameters = self.private, self.state.global_step, self.gradients.parameters
        sums, scale = self.gradients.sums, private.noise * private.clip
        self.gradients.clear()
        for name, total in private.secret.noised(private.task, step, sums, scale):
            mean = total / samples_of_step(self.args)
            parameters[name].grad = mean.to(parameters[name].dtype)


def sample_losses(logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """The mean loss over each sample's own labelled tokens, (B,); 0 of a sample that has none.

    Args:
        logits: (1, P, vocabulary) of the labelled positions; of a plain language model (B, T, …).
        labels: (B, T).
        positions: (P,), in `labels.flatten()`, of the positions whose next label counts.
    """
    whole = logits.shape[:2] == labels.shape  # T positions are never all labelled
    logits = logits.flatten(0, 1)[positions] if whole else logits[0]
    targets = labels.flatten()[positions + 1]
    loss = functional.cross_entropy(logits.float(), targets, reduction="none")
    owners = positions // labels.shape[1]
    sums = loss.new_zeros(len(labels)).index_add(0, owners, loss)
    return sums / owners.bincount(minlength=len(labels)).clamp(min=1)
