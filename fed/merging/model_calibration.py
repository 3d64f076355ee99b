"""The `fed.methods.Calibration` of a merge, measured on a frozen LLaVA.

Batches are made once, and pictures are the tower's features where those were cached: a call puts a
projector in, and costs what its own passes through the model cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fed.clients.measures import Explained, explained_share
from fed.numerics.layers import LARGE, layers
from fed.state import State
from llava.errors import InputError
from llava.model.checkpoint import load_projector, projector_parameters
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset

PREFIX = "model.mm_projector"


class _Items(list[dict]):
    """The samples of a data set, made once."""

    def __init__(self, dataset: LazySupervisedDataset):
        super().__init__(dataset[i] for i in range(len(dataset)))
        self.paths = dataset.paths


class ModelCalibration:
    """One data file on a model that other calibrations may share. `fed.methods.Calibration`.

    Args:
        dataset: the samples; pictures stay where they are and are not copied.
        source: the file, for messages.

    Raises:
        InputError: no record has an answer. Every call raises StateError for a state that does not
            fit into the model.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: LazySupervisedDataset,
        collate: DataCollatorForSupervisedDataset,
        batch_size: int,
        source: str,
    ):
        self.model: Any = model  # its class is made by `llava_class`
        self.source = source
        self._items, self._collate, self._batch_size = _Items(dataset), collate, batch_size
        items = self._items
        starts = range(0, len(items), batch_size)
        self._batches = [self._batch(items[start : start + batch_size]) for start in starts]
        self.samples, self.tokens = len(items), sum(len(b["targets"]) for b in self._batches)
        if self.tokens == 0:
            raise InputError(f"{source}: no record has an answer, so there is no loss to measure")

    def loss(self, state: State) -> float:
        """The caption loss, nats a labelled token: that of `fed.clients.measures`."""
        self._put(state)
        with torch.no_grad():
            nats = sum(float(self._nats(batch).double().sum()) for batch in self._batches)
        return nats / self.tokens

    def explained(self, state: State) -> Explained:
        """Captions with their own pictures and with those of others, by `fed.clients.measures`."""
        self._put(state)
        found = explained_share(
            self.model, self._items, self._collate, self._batch_size, self.model.device
        )
        if not found.samples:
            raise InputError(
                f"{self.source}: no record could be shown with another one's picture, as what "
                "pictures explain is measured; records with different pictures are expected"
            )
        return found

    def gram(self, state: State) -> dict[str, Tensor]:
        """The mean of x x^T over the picture tokens that enter each layer of the projector.

        (in, in), or (in + 1, in + 1) with a constant 1 where the layer has a bias; float64. Up to
        an `in` of 1024 it is summed in float64, above that in float32 within a batch. The language
        model takes no part.
        """
        self._put(state)
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def adder(name: str, bias: bool):
            def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach().flatten(0, -2)
                x = x.double() if x.shape[1] <= LARGE else x.float()
                x = functional.pad(x, (0, 1), value=1.0) if bias else x
                product = (x.T @ x).double()
                sums[name] = sums[name].add_(product) if name in sums else product
                counts[name] = counts.get(name, 0) + len(x)

            return add

        hooks = [
            module.register_forward_pre_hook(adder(name, module.bias is not None))
            for name, module in self._linear(state)
        ]
        try:
            with torch.no_grad():
                for batch in self._batches:
                    if "images" in batch:
                        self.model.picture_tokens(batch["images"], batch.get("image_sizes"))
        finally:
            for hook in hooks:
                hook.remove()
        if hooks and not sums:
            raise InputError(f"{self.source}: no record has a picture, so nothing enters a layer")
        return {name: (total / counts[name]).cpu() for name, total in sums.items()}

    @torch.enable_grad()  # methods are called without
    def fisher(self, state: State) -> State:
        """The mean over samples of the squared gradient of log p(caption); float32.

        A caption's log-likelihood is the sum over its tokens. Sample by sample: as many passes as
        there are samples.
        """
        self._put(state)
        parameters = projector_parameters(self.model)
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for item in self._items:
            nats = self._nats(self._batch([item])).sum()
            if not nats.requires_grad:
                continue  # text alone says nothing of the projector: its gradient is 0
            found = torch.autograd.grad(nats, list(parameters.values()), allow_unused=True)
            for sums, gradient in zip(total.values(), found, strict=True):
                if gradient is not None:
                    sums.addcmul_(gradient.float(), gradient.float())
        return {name: (sums / self.samples).cpu() for name, sums in total.items()}

    def _put(self, state: State) -> None:
        load_projector(self.model, state, f"calibration on {self.source}")

    def _batch(self, items: Sequence[dict]) -> dict[str, Any]:
        """A batch on the model's device; pictures are those of the items, in a list."""
        batch = self._collate(items)
        batch["targets"] = batch["labels"].flatten()[batch["label_positions"] + 1]
        batch = {k: v.to(self.model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        if "images" in batch:
            batch["images"] = [image for item in items for image in item.get("images", ())]
        return batch

    def _nats(self, batch: dict[str, Any]) -> Tensor:
        """The loss of every labelled token, (n,)."""
        targets = batch["targets"]
        if not len(targets):
            return torch.zeros(0)
        inputs = {k: v for k, v in batch.items() if k != "targets"}
        logits = self.model(**inputs, use_cache=False).logits[0].float()
        return functional.cross_entropy(logits, targets, reduction="none")

    def _linear(self, state: State) -> Iterator[tuple[str, nn.Module]]:
        """The projector's layers by the names that `fed.numerics.layers` gives them."""
        projector = self.model.get_model().mm_projector
        own, _ = layers({n: t for n, t in state.items() if n.startswith(PREFIX)})
        for layer in own:
            module = projector.get_submodule(layer.name.removeprefix(PREFIX).removeprefix("."))
            if not isinstance(module, nn.Linear):
                kind = type(module).__name__
                raise InputError(f"{layer.name} is a {kind}; only a Linear has a Gram matrix")
            yield layer.name, module
