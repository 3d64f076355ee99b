"""The connector registry: `mm_projector_type` → module.

A connector turns picture features (batch, patches, mm_hidden_size) into tokens of the language
model (batch, tokens, hidden_size). Its contract:

- `forward(features, **context) -> tokens`
- `num_tokens(patches) -> int`: how many tokens a picture of `patches` patches becomes
- `groups() -> dict[str, list[str]]`: which of its parameters are `shared` by all clients of a
  federation, belong to a `task`, or stay with the `client`; one list each, names as in `state_dict`
- optionally `aux_loss() -> Tensor | None`: a term added to the loss of the last forward

State-dict names of the three connectors here are upstream's (`weight`, `bias`, or `0.weight`, …).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from llava.errors import InputError

_CONNECTORS: dict[str, Callable[..., nn.Module]] = {}


def connector(pattern: str) -> Callable:
    """Register `factory(config, *groups) -> connector` for names that match `pattern` whole."""

    def register(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if pattern in _CONNECTORS:
            raise ValueError(f"connector {pattern!r} is registered twice")
        _CONNECTORS[pattern] = factory
        return factory

    return register


class Connector:
    """What all connectors share: one token per patch, every parameter shared by the clients."""

    def num_tokens(self, patches: int) -> int:
        return patches

    def groups(self) -> dict[str, list[str]]:
        return {"shared": list(self.state_dict()), "task": [], "client": []}


class LinearConnector(Connector, nn.Linear):
    def forward(self, features: torch.Tensor, **context) -> torch.Tensor:
        return super().forward(features)


class MLPConnector(Connector, nn.Sequential):
    """Linear, then (GELU, Linear) `depth` − 1 times; the GELU is the exact one, as upstream's."""

    def __init__(self, in_features: int, out_features: int, depth: int):
        layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_features, out_features)]
        super().__init__(*layers)

    def forward(self, features: torch.Tensor, **context) -> torch.Tensor:
        return super().forward(features)


class IdentityConnector(Connector, nn.Identity):
    def forward(self, features: torch.Tensor, **context) -> torch.Tensor:
        return features


@connector("linear")
def _linear(config) -> nn.Module:
    return LinearConnector(config.mm_hidden_size, config.hidden_size)


@connector(r"mlp([1-9]\d*)x_gelu")
def _mlp(config, depth: str) -> nn.Module:
    return MLPConnector(config.mm_hidden_size, config.hidden_size, int(depth))


@connector("identity")
def _identity(config) -> nn.Module:
    if config.mm_hidden_size != config.hidden_size:
        raise InputError(
            f"mm_projector_type identity needs a vision tower as wide as the language model: "
            f"tower {config.mm_hidden_size}, language model {config.hidden_size}"
        )
    return IdentityConnector()


def build_vision_projector(config) -> nn.Module:
    """The connector that `config.mm_projector_type` names (default `linear`, as upstream)."""
    name = getattr(config, "mm_projector_type", None) or "linear"
    for pattern, factory in _CONNECTORS.items():
        if match := re.fullmatch(pattern, name):
            return factory(config, *match.groups())
    raise InputError(
        f"unknown mm_projector_type {name!r}; known are linear, mlp2x_gelu (any depth), identity"
    )
