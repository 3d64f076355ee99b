"""Upstream's connectors, with its state-dict names (`weight`, `bias`, or `0.weight`, …)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava.errors import InputError
from llava.model.multimodal_projector.connector import Connector, connector


class LinearConnector(Connector, nn.Linear):
    def forward(self, input: torch.Tensor, **context: Any) -> torch.Tensor:
        return super().forward(input)


class MLPConnector(Connector, nn.Sequential):
    """Linear, then (GELU, Linear) `depth` − 1 times; the GELU is the exact one, as upstream's."""

    def __init__(self, in_features: int, out_features: int, depth: int):
        layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_features, out_features)]
        super().__init__(*layers)

    def forward(self, input: torch.Tensor, **context: Any) -> torch.Tensor:
        return super().forward(input)


class IdentityConnector(Connector, nn.Identity):
    def forward(self, input: torch.Tensor, **context: Any) -> torch.Tensor:
        return input


@connector("linear")
def _linear(config: Any) -> Connector:
    return LinearConnector(config.mm_hidden_size, config.hidden_size)


@connector(r"mlp([1-9]\d*)x_gelu", title="mlp2x_gelu (any depth)")
def _mlp(config: Any, depth: str) -> Connector:
    return MLPConnector(config.mm_hidden_size, config.hidden_size, int(depth))


@connector("identity")
def _identity(config: Any) -> Connector:
    if config.mm_hidden_size != config.hidden_size:
        raise InputError(
            f"mm_projector_type identity needs a vision tower as wide as the language model: "
            f"tower {config.mm_hidden_size}, language model {config.hidden_size}"
        )
    return IdentityConnector()
