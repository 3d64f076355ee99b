"""What a merge tells of itself: merge.json, and the same in words as the model card README.md."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fed.merging.sources import Source

LIBRARIES = {"transformers": "transformers", "lora": "peft"}
MANY = 32  # layers; above it the card's table is of kinds of layers


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
        front = yaml.safe_load(re.match(r"---\n(.*?)\n---\s*\n", text + "\n", re.DOTALL)[1])
        found = front.get("license")
    except (OSError, UnicodeDecodeError, TypeError, AttributeError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def inherited(licenses: Sequence[str | None]) -> tuple[str | None, str]:
    """The licence that all experts have, None where there is no such, and a sentence on it."""
    if None in licenses:
        missing = sum(one is None for one in licenses)
        return None, (
            f"{missing} of {len(licenses)} experts state no licence in a README.md of theirs, so "
            "none is stated here: see where the experts come from."
        )
    if len(set(licenses)) > 1:
        names = ", ".join(sorted(set(licenses)))
        return None, f"The experts have different licences ({names}): all of them have to be met."
    return licenses[0], f"All experts have the licence {licenses[0]}."


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Write both files."""
    text = json.dumps(facts, indent=2, allow_nan=False)
    (folder / "merge.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(render(facts), encoding="utf-8")


def render(facts: dict[str, Any]) -> str:
    """The card in Markdown of what merge.json holds."""
    experts, base = facts["experts"], facts["base"]
    names = [_code(expert["path"]) for expert in experts]
    parts = [_front(facts), f"# {len(experts)} models merged with {facts['method']}"]
    for sentence in facts["forced"]:
        parts.append(f"> [!WARNING]\n> {sentence}")
    parts += [f"> [!NOTE]\n> {sentence}" for sentence in facts["warnings"]]
    parts.append(facts["written"])
    rows = [
        (name, f"{e['weight']:g}", e["kind"], e["dtype"], f"`{e['fingerprint'][:16]}`")
        for name, e in zip(names, experts, strict=True)
    ]
    if base:
        rows.append((f"{_code(base['path'])} (base)", "", base["kind"], base["dtype"],
                     f"`{base['fingerprint'][:16]}`"))  # fmt: skip
    parts.append("## Experts\n\n" + _table(["", "weight", "form", "type", "fingerprint"], rows))
    parts.append(facts["fingerprints"])
    if not base:
        parts.append("No base was given: the weighted mean of the experts stood in for it.")
    parts.append(facts["licence_note"])
    listed = [(f"`{name}`", f"`{value}`") for name, value in facts["options"].items()]
    parts.append(f"## Method\n\n`{facts['method']}`, scope `{facts['scope']}`.")
    if listed:
        parts.append(_table(["option", "value"], listed))
    parts.append(f"The same again:\n\n```bash\n{facts['command']}\n```")
    parts.append("## Layers\n\n" + _layers(facts))
    parts.append("Versions: " + ", ".join(f"{n} {v}" for n, v in facts["versions"].items()) + ".")
    return "\n\n".join(parts) + "\n"


def _front(facts: dict[str, Any]) -> str:
    import yaml

    values: dict[str, Any] = {
        "base_model": [expert["path"] for expert in facts["experts"]],
        "base_model_relation": "merge",
        "library_name": LIBRARIES.get(facts["form"], "llava"),
        "pipeline_tag": "image-text-to-text",
        "tags": ["merge", "llava"],
    }
    if facts["license"]:
        values["license"] = facts["license"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _layers(facts: dict[str, Any]) -> str:
    what = (
        "T_k is what expert k learnt, its difference from the base; the cosines are between these, "
        "and kappa is the share of them that is common (1 where all agree)."
    )
    layers = facts["layers"] if len(facts["layers"]) <= MANY else facts["kinds"]
    rows = []
    for name, of in {**layers, "all": facts["all"]}.items():
        cosines = [c for j, row in enumerate(of["cosines"]) for c in row[:j] if c is not None]
        spread = f"{min(cosines):.3f} to {max(cosines):.3f}" if cosines else ""
        norms = " ".join(f"{norm:.4g}" for norm in of["norms"])
        kappa = "" if of["kappa"] is None else f"{of['kappa']:.3f}"
        rows.append((f"`{name}`", f"{of['base']:.4g}", norms, spread, kappa))
    text = _table(["layer", "base", "T_k", "cosines", "kappa"], rows)
    more = " What the method says of each layer is in `merge.json`."
    return f"{what}{more if facts['method_facts'] else ''}\n\n{text}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    """A path as code in a table's cell."""
    return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"
