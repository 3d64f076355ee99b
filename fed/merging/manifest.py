"""The facts of a merge, as merge.json holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fed import methods
from fed.merging import card
from fed.merging.config import Settings, text
from fed.merging.formats import Format
from fed.merging.sources import Source


def facts_of(
    settings: Settings,
    options: dict[str, Any],
    form: Format,
    experts: list[Source],
    base: Source | None,
    prints: list[str | None],
) -> dict[str, Any]:
    """What is known before anything is merged."""
    full = {**methods.get(settings.method).defaults, **options}
    licence, note = card.inherited([card.license_of(expert) for expert in experts])

    def about(source: Source, fingerprint: str | None) -> dict[str, Any]:
        return {"path": source.given, "kind": source.kind, "fingerprint": fingerprint}

    def dtype(tensors: Mapping) -> str:
        return str(next(iter(tensors.values())).dtype).removeprefix("torch.")

    return {
        "method": settings.method,
        "options": {name: text(value) for name, value in full.items()},
        "scope": settings.scope,
        "experts": [
            about(e, p) | {"weight": w, "dtype": dtype(t)}
            for e, p, w, t in zip(experts, prints[:-1], settings.shares, form.experts, strict=True)
        ],
        "base": base and about(base, prints[-1]) | {"dtype": dtype(form.base)},
        "form": form.name,
        "written": form.written,
        "fingerprints": form.fingerprints,
        "license": licence,
        "licence_note": note,
        "command": settings.command(full),
        "versions": card.versions(),
    }


def plain(value: Any) -> Any:
    """Facts as JSON has them: what is no finite number becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
