"""What a connector is, and the registry of their names: `mm_projector_type` → module.

A connector turns picture features (batch, patches, mm_hidden_size) into tokens of the language
model (batch, tokens, hidden_size). Its contract:

- `forward(features, **context) -> tokens`
- `num_tokens(patches) -> int`: how many tokens a picture of `patches` patches becomes
- `groups() -> dict[str, list[str]]`: who owns its parameters and which of them train; see `GROUPS`
- `aux_loss() -> Tensor | None`: what the last forward in training adds to the loss
- `derive()`: set what is not the *base* (the part with upstream's names) from the base
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# In a federation: `shared` by all clients, of a `task`, or the `client`'s alone; those three train.
# What is `frozen` was made by others, or has no part in the stage that the connector is in.
GROUPS = ("shared", "task", "client", "frozen")
TRAINED = GROUPS[:3]

CONNECTORS: dict[str, Callable[..., nn.Module]] = {}


def connector(pattern: str) -> Callable:
    """Register `factory(config, *groups) -> connector` for names that match `pattern` whole."""

    def register(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if pattern in CONNECTORS:
            raise ValueError(f"connector {pattern!r} is registered twice")
        CONNECTORS[pattern] = factory
        return factory

    return register


class Connector:
    """What all connectors share: one token per patch, and nothing but a base that all share."""

    def num_tokens(self, patches: int) -> int:
        return patches

    def groups(self) -> dict[str, list[str]]:
        """Names as in `state_dict`, each in one of `GROUPS`."""
        return {"shared": list(self.state_dict()), "task": [], "client": [], "frozen": []}

    def aux_loss(self) -> torch.Tensor | None:
        return None

    def derive(self) -> None:
        pass

    def train_groups(self, *names: str) -> None:
        """Let just the parameters of these groups train."""
        groups = self.groups()
        training = {name for group in names for name in groups[group]}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in training)
