"""Packages whose files register what is in them: each file is imported, once."""

from __future__ import annotations

import functools
import importlib
import pkgutil


@functools.cache
def import_modules(package: str, without: str = "", main: str = "") -> None:
    """Import every module of `package`, but not `without`.

    Args:
        main: the module of a package within `package` that registers it.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name != without:
            end = f".{main}" if main and module.ispkg else ""
            importlib.import_module(f"{package}.{module.name}{end}")
