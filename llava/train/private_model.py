"""What a model must be for private training: samples' gradients that depend on the sample alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from llava.errors import InputError
from llava.model.checkpoint import grafted
from llava.model.multimodal_projector.connector import Connector

_ATTENTION = "attention_dropout"


def connector_of(model: nn.Module) -> Connector | None:
    """The connector of a LLaVA; None of a plain language model."""
    parts: Any = grafted(model).get_model() if hasattr(model, "get_model") else None
    return getattr(parts, "mm_projector", None)


def layers_that_train(model: nn.Module) -> dict[str, nn.Module]:
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
    layers_that_train(model)
    connector = connector_of(model)
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
