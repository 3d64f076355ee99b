"""Small things that programs written for upstream import from here."""

from __future__ import annotations


def disable_torch_init() -> None:
    """Do nothing, at upstream's name.

    Upstream skips torch's initialisation of layers whose weights are loaded a moment later.
    transformers skips it by itself.
    """
