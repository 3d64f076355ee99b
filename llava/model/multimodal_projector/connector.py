"""The interface of a connector, and the registry of their names: `mm_projector_type` → module.

A connector turns picture features (batch, patches, mm_hidden_size) into tokens of the language
model (batch, tokens, hidden_size). Its contract:

- `forward(features, **context) -> tokens`
- `num_tokens(patches) -> int`: how many tokens a picture of `patches` patches becomes
- `groups() -> dict[str, list[str]]`: who owns its parameters and which of them train; see `GROUPS`
- `aux_loss() -> Tensor | None`: what the last forward in training adds to the loss
- `beyond_base() -> list[str]`: what is not the *base*, the part with upstream's names
- `derive()`: set what is beyond the base from the base

A connector with settings declares them as a dataclass, whose fields have a default and, as
metadata, a `help`. Those of the connector `name` are kept in a config as `mm_name`, and each field
is a flag of training, `--name_FIELD`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava.errors import InputError
from llava.plugins import import_modules

# In a federation: `shared` by all clients, of a `task`, or the `client`'s alone; those three train.
# What is `frozen` was made by others, or has no part in the stage that the connector is in.
GROUPS = ("shared", "task", "client", "frozen")
TRAINED = GROUPS[:3]


class Connector(nn.Module):
    """The base of all connectors: one token per patch, and parameters that all clients share."""

    def num_tokens(self, patches: int) -> int:
        return patches

    def groups(self) -> dict[str, list[str]]:
        """Names as in `state_dict`, each in one of `GROUPS`."""
        return {"shared": list(self.state_dict()), "task": [], "client": [], "frozen": []}

    def aux_loss(self) -> torch.Tensor | None:
        return None

    def beyond_base(self) -> list[str]:
        """The names, as in `state_dict`, of what is not the base."""
        return []

    def derive(self) -> None:
        pass

    def train_groups(self, *names: str) -> None:
        """Let just the parameters of these groups train."""
        groups = self.groups()
        training = {name for group in names for name in groups[group]}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in training)


@dataclass(frozen=True)
class ConnectorType:
    """A registered connector.

    Attributes:
        pattern: of the values of `mm_projector_type` that ask for it, which match it whole.
        factory: `(config, *groups of the pattern) -> connector`, or with `settings`
            `(config, settings) -> connector`.
        title: how a message calls it.
        settings: the dataclass of its settings, for a pattern that is a name.
        base: the `mm_projector_type` of its base, from whose weights it can be derived.
    """

    pattern: str
    factory: Callable[..., Connector]
    title: str
    settings: type | None = None
    base: str | None = None

    @property
    def key(self) -> str:
        """The key of a config that holds the settings."""
        return f"mm_{self.pattern}"

    @functools.cached_property
    def flags(self) -> type | None:
        """The dataclass of the connector's flags: its settings', with its name before each."""
        if self.settings is None:
            return None
        types = typing.get_type_hints(self.settings)
        fields = [
            (
                f"{self.pattern}_{field.name}",
                types[field.name],
                dataclasses.field(
                    default=field.default,
                    default_factory=field.default_factory,
                    metadata=field.metadata,
                ),
            )
            for field in dataclasses.fields(self.settings)
        ]
        return dataclasses.make_dataclass(f"{self.settings.__name__}Flags", fields)

    def settings_of(self, config: Any) -> Any:
        """The settings in a config; `InputError` on a key that is not known."""
        if self.settings is None:
            return None
        values = dict(getattr(config, self.key, None) or {})
        names = {field.name for field in dataclasses.fields(self.settings)}
        if unknown := sorted(values.keys() - names):
            raise InputError(f"config.json: {self.key} has unknown key {unknown[0]!r}")
        return self.settings(**values)

    def configure(self, config: Any, args: Any) -> None:
        """Put the settings that the flags in `args` stand for into a config, checked."""
        if self.settings is None:
            return
        names = [field.name for field in dataclasses.fields(self.settings)]
        flags = {name: f"{self.pattern}_{name}" for name in names}
        given = {name: getattr(args, flag) for name, flag in flags.items() if hasattr(args, flag)}
        setattr(config, self.key, dataclasses.asdict(self.settings(**given)))


_TYPES: dict[str, ConnectorType] = {}


def connector(
    pattern: str, *, title: str = "", settings: type | None = None, base: str | None = None
) -> Callable[[Callable[..., Connector]], Callable[..., Connector]]:
    """Register a factory; see `ConnectorType`."""

    def register(factory: Callable[..., Connector]) -> Callable[..., Connector]:
        if pattern in _TYPES:
            raise ValueError(f"connector {pattern!r} is registered twice")
        if settings is not None and not pattern.isidentifier():
            raise ValueError(f"connector {pattern!r} has settings: a plain name is expected")
        _TYPES[pattern] = ConnectorType(pattern, factory, title or pattern, settings, base)
        return factory

    return register


def connector_types() -> list[ConnectorType]:
    """All connectors."""
    import_modules(__name__.rpartition(".")[0])  # connectors register themselves
    return list(_TYPES.values())


def connector_type(name: str | None) -> tuple[ConnectorType, tuple[str, ...]]:
    """The connector that `mm_projector_type` names, and the groups of its pattern's match.

    No name is `linear`, as upstream has it.
    """
    name = name or "linear"
    for kind in connector_types():
        if match := re.fullmatch(kind.pattern, name):
            return kind, match.groups()
    known = ", ".join(kind.title for kind in connector_types())
    raise InputError(f"unknown mm_projector_type {name!r}; known are {known}")


def connector_flags() -> list[type]:
    """The dataclasses of flags of all connectors that have some."""
    return [kind.flags for kind in connector_types() if kind.flags]
