"""The manifest of a merge: merge.json, and the facts that it holds."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from fed import methods
from fed.merging.config import MergeConfig, option_text
from fed.merging.formats.format import Format
from fed.merging.sources import Source


def facts_of(
    config: MergeConfig,
    options: dict[str, Any],
    form: Format,
    experts: list[Source],
    base: Source | None,
    prints: list[str | None],
) -> dict[str, Any]:
    """The facts that are known before anything is merged."""
    full = {**methods.get(config.method).defaults, **options}
    licence, note = inherited([license_of(expert) for expert in experts])

    def about(source: Source, fingerprint: str | None) -> dict[str, Any]:
        return {"path": source.given, "kind": source.kind, "fingerprint": fingerprint}

    def dtype(tensors: Mapping[str, Tensor] | None) -> str:
        assert tensors is not None  # where there is a base, the format has its tensors
        return str(next(iter(tensors.values())).dtype).removeprefix("torch.")

    return {
        "method": config.method,
        "options": {name: option_text(value) for name, value in full.items()},
        "scope": config.scope,
        "experts": [
            about(e, p) | {"weight": w, "dtype": dtype(t)}
            for e, p, w, t in zip(experts, prints[:-1], config.shares, form.experts, strict=True)
        ],
        "base": base and about(base, prints[-1]) | {"dtype": dtype(form.base)},
        "form": form.name,
        "written": form.written,
        "fingerprints": form.fingerprints,
        "license": licence,
        "licence_note": note,
        "command": config.command(full),
        "versions": versions(),
    }


def write(folder: Path, facts: dict[str, Any]) -> None:
    """merge.json in `folder`."""
    text = json.dumps(facts, indent=2, allow_nan=False)
    (folder / "merge.json").write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Facts as JSON has them: what is no finite number becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def versions() -> dict[str, str]:
    """Of Python and of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("fedllava", "torch", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def license_of(source: Source) -> str | None:
    """The `license` in the front matter of a model's README.md, None where it says none."""
    import yaml

    try:
        text = (source.folder / "README.md").read_text(encoding="utf-8")
        front = re.match(r"---\n(.*?)\n---\s*\n", text + "\n", re.DOTALL)
        values = yaml.safe_load(front[1]) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    found = values.get("license") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def inherited(licenses: Sequence[str | None]) -> tuple[str | None, str]:
    """The licence that all experts have, None where there is no such, and a sentence on it."""
    stated = [one for one in licenses if one is not None]
    if missing := len(licenses) - len(stated):
        return None, (
            f"{missing} of {len(licenses)} experts state no licence in a README.md of theirs, so "
            "none is stated here: see where the experts come from."
        )
    if len(set(stated)) > 1:
        names = ", ".join(sorted(set(stated)))
        return None, f"The experts have different licences ({names}): all of them have to be met."
    return stated[0], f"All experts have the licence {stated[0]}."
