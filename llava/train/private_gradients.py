"""The sum over samples of clipped gradients, of the layers of a model that train.

    sum_i g_i min(1, C / |g_i|),    g_i the gradient of sample i's own loss, all tensors jointly

The gradient of a linear layer's weight is a product of what enters the layer and of the loss's
gradient of what leaves it. Both are taken at the layer (forward and tensor hooks), their rows are
sorted by sample, and Opacus' own function for the layer makes the samples' gradients. That is done
twice: to measure them, a layer at a time, and, with each sample's rows scaled by its factor, to sum
them. So memory holds the samples' gradients of one layer, and never those of all. What autograd
sums by itself is thrown away.

Opacus' GradSampleModule is not used: it takes the first axis of what enters every layer for the
samples, which here are pictures in a connector, samples in the language model, and in its last
layer one row of the labelled positions of all; it holds every sample's gradients of all layers at
once, and brings an optimizer of its own in place of the trainer's.

What is not finite in a sample's gradient counts as zero, as the whole gradient then does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava.errors import InputError
from llava.model.checkpoint import grafted
from llava.model.multimodal_projector.connector import Connector

# Between the samples' gradients summed and what autograd sums, by what computes in 16 bits or 32.
_SAME = {True: 0.03, False: 1e-3}


@dataclass(frozen=True)
class Rows:
    """The sample of each row of what enters a layer, for a batch of `samples`.

    `pictures` are those of the rows that enter the connector, which has a row for each picture, or
    for each tile of one; `labelled` those of the positions that the loss reads.
    """

    samples: int
    pictures: Tensor
    labelled: Tensor

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any]) -> Rows:
        """Of a batch of `DataCollatorForSupervisedDataset`; samples have one picture, or none."""
        count, length = batch["labels"].shape
        labelled = batch["label_positions"] // length
        images = batch.get("images")
        if images is None:
            return cls(count, labelled.new_zeros(0), labelled)
        owners = (batch["image_positions"] // length).unique_consecutive()
        if len(owners) != len(images):
            raise InputError(
                f"a batch has {len(images)} pictures in {len(owners)} samples, private training "
                "takes one a sample"
            )
        tiles = [len(image) if image.ndim == 4 else 1 for image in images]
        repeats = torch.tensor(tiles, device=owners.device)
        return cls(count, owners.repeat_interleave(repeats), labelled)

    def entering(self, shape: torch.Size, in_connector: bool, name: str) -> Tensor | None:
        """The sample of each row, all axes of `shape` but the last as one.

        None for the zeros that a batch without pictures sends through the connector.
        """
        first, rows = shape[0], shape[:-1].numel()
        if in_connector:
            if not len(self.pictures):
                return None
            if first != len(self.pictures):
                raise InputError(
                    f"{name}: {first} rows enter it for {len(self.pictures)} pictures; private "
                    "training needs a row for each"
                )
            return self.pictures.repeat_interleave(rows // first)
        if first == self.samples:
            samples = torch.arange(self.samples, device=self.labelled.device)
            return samples.repeat_interleave(rows // first)
        if first == 1 and rows == len(self.labelled):
            return self.labelled
        raise InputError(
            f"{name}: what enters it, {tuple(shape)}, has no row for each of {self.samples} "
            "samples; private training cannot tell them apart there"
        )


class _Flat(NamedTuple):
    """A layer's rows, float32: what entered (R, in), the loss's gradient of what left (R, out), and
    whose they are (R,)."""

    entered: Tensor
    left: Tensor
    owners: Tensor


@dataclass
class _Seen:
    """What entered a layer, and the loss's gradient of what left it, in each of its calls."""

    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)


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
        self.clip = clip
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.layers = _layers(model)
        check_model(model)
        parts: Any = grafted(model).get_model() if hasattr(model, "get_model") else None
        connector = getattr(parts, "mm_projector", None)
        self._pictures = set() if connector is None else set(map(id, connector.modules()))
        self.sees_pictures = any(id(layer) in self._pictures for layer in self.layers.values())
        self._seen: dict[str, _Seen] = {}
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
        self._seen = {}
        for parameter in self.parameters.values():
            parameter.grad = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, a forward pass and its backward pass are seen."""

        def watch(name: str) -> Callable:
            def hook(layer: nn.Module, args: tuple, out: Tensor) -> None:
                if not out.requires_grad:  # of a pass that is run again for its gradients
                    return
                entered = args[0].detach()

                def keep(gradient: Tensor) -> None:
                    seen = self._seen.setdefault(name, _Seen())
                    seen.entered.append(entered)
                    seen.left.append(gradient.detach())

                out.register_hook(keep)

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
            sorted_rows = {name: self._rows(name, rows) for name in sorted(self._seen)}
            squares = torch.zeros(rows.samples, dtype=torch.float64, device=rows.labelled.device)
            for name, seen in sorted_rows.items():
                for gradients in self._of_layer(name, *_by_sample(seen, rows.samples)).values():
                    squares += gradients.flatten(1).double().square().sum(1)
            lengths = squares.sqrt()
            factors = (self.clip / lengths.clamp(min=self.clip)).float()
            for name, (entered, left, owners) in sorted_rows.items():
                kept = lengths.isfinite()[owners, None]
                scaled = torch.where(kept, left * factors[owners, None], 0)
                entered = torch.where(kept, entered, 0)
                found = self._of_layer(name, entered[None], scaled[None])
                for parameter, gradients in found.items():
                    self.sums[parameter] += gradients[0]
        self.forget()
        return lengths

    def check_grouping(self, rows: Rows, sample: int) -> None:
        """After a backward pass of the loss of one sample alone: no other's rows may have moved.

        Raises:
            InputError: the layer by name, in which samples of a batch are mixed.
        """
        for name in self._seen:
            _, left, owners = self._rows(name, rows)
            if bool((left[owners != sample].abs() > 0).any()):
                raise InputError(
                    f"{name}: the loss of a sample depends on other samples of its batch; private "
                    "training cannot bound what one of them does"
                )

    def check_sum(self, rows: Rows, in_16_bits: bool) -> None:
        """After a backward pass of all samples' losses: autograd must have summed the same.

        Raises:
            InputError: a tensor by name that is used elsewhere than in its layer's own product.
        """
        names = {id(p): name for name, p in self.parameters.items()}
        with _whole_products():
            for layer in self._seen:
                each = self._of_layer(layer, *_by_sample(self._rows(layer, rows), rows.samples))
                for name, gradients in each.items():
                    names.pop(id(self.parameters[name]), None)
                    self._compare(name, gradients, in_16_bits)
        for name in names.values():
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

    def _of_layer(self, name: str, entered: Tensor, left: Tensor) -> dict[str, Tensor]:
        """By parameter's name, the gradients (n, …) of a layer by (n, rows, …) at both its ends."""
        layer = self.layers[name]
        names = {id(p): f"{name}.{short}" for short, p in layer.named_parameters(recurse=False)}
        found = _sampler(layer)(layer, [entered], left)
        return {names[id(p)]: gradients for p, gradients in found.items()}

    def _rows(self, name: str, rows: Rows) -> _Flat:
        """The rows of all calls of a layer."""
        seen, inside = self._seen[name], id(self.layers[name]) in self._pictures
        first = [part[0].flatten(0, -2)[:0].float() for part in (seen.entered, seen.left)]
        calls = [_Flat(first[0], first[1], rows.labelled[:0])]
        for entered, left in zip(seen.entered, seen.left, strict=True):
            owners = rows.entering(entered.shape, inside, name)
            if owners is not None:
                flat = entered.flatten(0, -2).float(), left.flatten(0, -2).float()
                calls.append(_Flat(*flat, owners))
        return _Flat(*map(torch.cat, zip(*calls, strict=True)))


_WHY = "private training needs every path to a tensor to lead through its layer"


def _by_sample(flat: _Flat, samples: int) -> tuple[Tensor, Tensor]:
    """Rows as (samples, most rows, …), filled up with zeros, which add nothing to a gradient."""
    order = flat.owners.argsort(stable=True)
    owners = flat.owners[order]
    counts = owners.bincount(minlength=samples)
    within = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
    most = int(counts.max())
    entered, left = (
        part.new_zeros(samples * most, part.shape[-1])
        .index_copy(0, owners * most + within, part[order])
        .view(samples, most, part.shape[-1])
        for part in flat[:2]
    )
    return entered, left


def _sampler(layer: nn.Module) -> Callable:
    """Opacus' function for a layer: (layer, [what entered], what left) → gradients by sample."""
    from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
    from opacus.grad_sample.linear import compute_linear_grad_sample

    linear = isinstance(layer, nn.Linear)
    return compute_linear_grad_sample if linear else compute_layer_norm_grad_sample


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a parameter that trains."""
    layers: dict[str, nn.Module] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            full = f"{name}.{short}" if name else short
            if not isinstance(module, nn.Linear) and type(module) is not nn.LayerNorm:
                raise InputError(
                    f"{full} trains in a {type(module).__name__}; private training knows the "
                    "gradients of samples in Linear and LayerNorm"
                )
            if id(parameter) in owners:
                raise InputError(
                    f"{full} is {owners[id(parameter)]}, too; private training takes a tensor of "
                    "one layer alone"
                )
            owners[id(parameter)] = full
            layers[name] = module
    return layers


def check_model(model: nn.Module) -> None:
    """Refuse a model in which a sample's gradient depends on more than the sample.

    Raises:
        InputError: a tensor trains in a layer that is not known, by its name; a loss over all
            samples of a batch; or dropout, whose draws follow from --seed, which others know, and
            from the lengths of all samples before.
    """
    _layers(model)
    parts: Any = grafted(model).get_model() if hasattr(model, "get_model") else None
    connector = getattr(parts, "mm_projector", None)
    if connector is not None and type(connector).aux_loss is not Connector.aux_loss:
        raise InputError(
            f"{type(connector).__name__} adds a loss over the pictures of a batch, in which no "
            "sample's part can be told; private training takes a connector without one"
        )
    if getattr(model.config, "output_router_logits", False):
        raise InputError(
            "config.json has output_router_logits true: the routers' loss is one over all samples "
            "of a batch, and has no place in private training"
        )
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, _ATTENTION, 0)
        if isinstance(rate, float) and rate > 0:
            raise InputError(
                f"{name} drops {rate:g} of its values, drawn by a seed that others know; private "
                "training takes a model without dropout"
            )


_ATTENTION = "attention_dropout"


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
