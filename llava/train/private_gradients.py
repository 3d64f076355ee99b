"""The sum over samples of clipped gradients, of the layers of a model that train.

    sum_i g_i min(1, C / |g_i|),    g_i the gradient of sample i's own loss, all tensors jointly

The gradient of a linear layer's weight is a product of what enters the layer and of the loss's
gradient of what leaves it. Both are taken at the layer (forward and tensor hooks), their rows are
sorted by sample, and Opacus' own function for the layer makes the samples' gradients. These are
kept until all are measured where they take less memory than the rows, as those of LoRA do. Else the
rows are kept, and used twice: to measure, and, each sample's scaled by its factor, to sum; memory
then holds the samples' gradients of one layer, and never those of all. What autograd sums by itself
is thrown away.

Opacus' GradSampleModule is not used: it takes the first axis of what enters every layer for the
samples, which here are pictures in a connector, samples in the language model, and in its last
layer one row of the labelled positions of all; it holds every sample's gradients of all layers at
once, and brings an optimizer of its own in place of the trainer's.

What is not finite in a sample's gradient counts as zero, as the whole gradient then does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llava.errors import InputError
from llava.train.private_model import check_model, connector_of, layers_that_train
from llava.train.private_rows import Flat, Rows, by_sample

# Between the samples' gradients summed and what autograd sums, by what computes in 16 bits or 32.
_SAME = {True: 0.03, False: 1e-3}


class PerSampleGradients:
    """The layers of a model that train, and the sum of their samples' clipped gradients.

    Args:
        model: a LLaVA, with LoRA or without.
        clip: C.

    Attributes:
        sums: by parameter's name, float32; over all batches since `clear`.
        sees_pictures: whether layers of the connector train.

    Raises:
        InputError: what `check_model` refuses.
    """

    def __init__(self, model: nn.Module, clip: float):
        check_model(model)
        self.clip = clip
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.layers = layers_that_train(model)
        connector = connector_of(model)
        self._pictures = set() if connector is None else set(map(id, connector.modules()))
        self.sees_pictures = any(id(layer) in self._pictures for layer in self.layers.values())
        self._each: dict[str, dict[str, Tensor]] = {}
        self._rows: dict[str, list[Flat]] = {}
        self.sums: dict[str, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Begin a new sum."""
        self.sums = {
            name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()
        }
        self.forget()

    def forget(self) -> None:
        """Drop what layers have seen, and what autograd has summed."""
        self._each, self._rows = {}, {}
        for parameter in self.parameters.values():
            parameter.grad = None

    @contextlib.contextmanager
    def recording(self, rows: Rows) -> Iterator[None]:
        """Inside, a forward pass and its backward pass are seen."""

        def watch(name: str) -> Callable:
            def hook(layer: nn.Module, args: tuple, out: Tensor) -> None:
                if out.requires_grad:  # else the pass is run again for its gradients
                    entered = args[0].detach()
                    out.register_hook(lambda left: self._see(name, entered, left.detach(), rows))

            return hook

        handles = [layer.register_forward_hook(watch(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, rows: Rows) -> Tensor:
        """Add the batch that was seen; the lengths of its samples' gradients, before clipping."""
        with _whole_products():
            squares = torch.zeros(rows.samples, dtype=torch.float64, device=rows.labelled.device)
            for layer in self._seen:
                for gradients in self._samples(layer, rows).values():
                    squares += gradients.flatten(1).double().square().sum(1)
            lengths = squares.sqrt()
            factors = (self.clip / lengths.clamp(min=self.clip)).float()
            for layer in self._seen:
                for name, total in self._clipped(layer, factors, lengths.isfinite()).items():
                    self.sums[name] += total
        self.forget()
        return lengths

    def check_grouping(self, rows: Rows, sample: int) -> None:
        """After a backward pass of the loss of one sample alone: no other may have a gradient.

        Raises:
            InputError: the tensor by name, in whose layer samples of a batch are mixed.
        """
        others = [i for i in range(rows.samples) if i != sample]
        with _whole_products():
            for layer in self._seen:
                for name, gradients in self._samples(layer, rows).items():
                    if bool((gradients[others].abs() > 0).any()):
                        raise InputError(
                            f"{name}: the loss of a sample depends on other samples of its batch; "
                            "private training cannot bound what one of them does"
                        )

    def check_sum(self, rows: Rows, in_16_bits: bool) -> None:
        """After a backward pass of all samples' losses: autograd must have summed the same.

        Raises:
            InputError: a tensor by name that is used elsewhere than in its layer's own product.
        """
        unseen = set(self.parameters)
        with _whole_products():
            for layer in self._seen:
                for name, gradients in self._samples(layer, rows).items():
                    unseen.discard(name)
                    self._compare(name, gradients, in_16_bits)
        for name in sorted(unseen):
            gradient = self.parameters[name].grad
            if gradient is not None and bool(gradient.any()):
                raise InputError(f"{name}: it has a gradient without a call of its layer; {_WHY}")

    def _compare(self, name: str, gradients: Tensor, in_16_bits: bool) -> None:
        expected = self.parameters[name].grad
        assert expected is not None, "a layer that was seen has gradients"
        scale = gradients.flatten(1).norm(dim=1).sum()
        apart = (gradients.sum(0) - expected.float()).norm()
        if bool(apart > _SAME[in_16_bits] * scale):
            raise InputError(
                f"{name}: its gradient is not the sum of its samples' ones ({float(apart):.3g} "
                f"apart at lengths of {float(scale):.3g}); {_WHY}"
            )

    @property
    def _seen(self) -> list[str]:
        return sorted({*self._each, *self._rows})

    def _see(self, name: str, entered: Tensor, left: Tensor, rows: Rows) -> None:
        """A call of a layer: its samples' gradients or its rows are kept, whichever is less."""
        owners = rows.entering(entered.shape, id(self.layers[name]) in self._pictures, name)
        if owners is None:
            return
        flat = Flat(entered.flatten(0, -2).float(), left.flatten(0, -2).float(), owners)
        layer, ends = self.layers[name], entered.shape[-1] + left.shape[-1]
        numbers = rows.samples * sum(p.numel() for p in layer.parameters() if p.requires_grad)
        if numbers > len(owners) * ends:
            self._rows.setdefault(name, []).append(flat)
            return
        each = self._each.setdefault(name, {})
        with _whole_products():
            for parameter, gradients in self._of_layer(name, *by_sample(flat, rows)).items():
                each[parameter] = each.get(parameter, 0) + gradients

    def _samples(self, layer: str, rows: Rows) -> dict[str, Tensor]:
        """By parameter of a layer, the gradient of each sample, (samples, …)."""
        found = dict(self._each.get(layer, {}))
        if layer in self._rows:
            flat = Flat(*map(torch.cat, zip(*self._rows[layer], strict=True)))
            for name, gradients in self._of_layer(layer, *by_sample(flat, rows)).items():
                found[name] = found.get(name, 0) + gradients
        return found

    def _clipped(self, layer: str, factors: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """By parameter of a layer, the sum of its samples' gradients by their factors."""
        found: dict[str, Tensor] = {}
        for name, gradients in self._each.get(layer, {}).items():
            finite = torch.where(kept.view(-1, *[1] * (gradients.ndim - 1)), gradients, 0)
            found[name] = torch.tensordot(factors.where(kept, 0), finite, 1)
        for entered, left, owners in self._rows.get(layer, ()):
            mine = kept[owners, None]
            scaled = torch.where(mine, left * factors[owners, None], 0)
            whole = self._of_layer(layer, torch.where(mine, entered, 0)[None], scaled[None])
            for name, total in whole.items():
                found[name] = found.get(name, 0) + total[0]
        return found

    def _of_layer(self, name: str, entered: Tensor, left: Tensor) -> dict[str, Tensor]:
        """By parameter's name, the gradients (n, …) of a layer by (n, rows, …) at both its ends."""
        layer = self.layers[name]
        names = {id(p): f"{name}.{short}" for short, p in layer.named_parameters(recurse=False)}
        found = _sampler(layer)(layer, [entered], left)
        return {names[id(p)]: gradients for p, gradients in found.items()}


_WHY = "private training needs every path to a tensor to lead through its layer"


def _sampler(layer: nn.Module) -> Callable:
    """Opacus' function for a layer: (layer, [what entered], what left) → gradients by sample."""
    from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
    from opacus.grad_sample.linear import compute_linear_grad_sample

    linear = isinstance(layer, nn.Linear)
    return compute_linear_grad_sample if linear else compute_layer_norm_grad_sample


@contextlib.contextmanager
def _whole_products() -> Iterator[None]:
    """Inside, products of float32 have all of their bits, and nothing is recorded for gradients."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.no_grad():
            yield
    finally:
        matmul.allow_tf32 = before
