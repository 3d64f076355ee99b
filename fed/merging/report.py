"""What a merge prints: how the experts lie to each other, and what was or would be written."""

from __future__ import annotations

from typing import Any

from fed.merging.config import Settings

MANY = 32  # layers; above it kinds of layers are printed


def lines(facts: dict[str, Any], settings: Settings) -> list[str]:
    """The whole of a dry run, or the end of a merge, as lines of text."""
    layers = facts["layers"] if len(facts["layers"]) <= MANY else facts["kinds"]
    options = " ".join(f"{name}={value}" for name, value in facts["options"].items())
    where = settings.output or "nowhere: no --output is given"
    if not settings.dry_run:
        everything = _layer("all layers", facts["all"], {})
        done = f"merged with {facts['method']} {options}".rstrip()
        return [*everything, done, f"-> {where}", facts["written"]]
    found = [
        f"expert {i}: {e['path']} ({e['kind']}, {e['dtype']}, weight {e['weight']:g})"
        for i, e in enumerate(facts["experts"], 1)
    ]
    base = facts["base"]
    found.append(f"base: {base['path']} ({base['kind']})" if base else "base: the experts' mean")
    for name, of in layers.items():
        found += _layer(name, of, facts.get("directions", {}).get(name, {}))
    found += _layer("all layers", facts["all"], {})
    found += [
        f"would merge {len(facts['layers'])} layers with {facts['method']} {options}".rstrip(),
        f"would write to {where}",
        facts["written"],
    ]
    return found


def _layer(name: str, of: dict[str, Any], directions: dict[str, Any]) -> list[str]:
    found = [f"{name}: |A_0| {of['base']:.4g}"]
    for i, (norm, relative) in enumerate(zip(of["norms"], of["relative"], strict=True)):
        share = "" if relative is None else f" ({100 * relative:.3g} % of |A_0|)"
        cosines = " ".join("    -" if c is None else f"{c:5.2f}" for c in of["cosines"][i])
        found.append(f"  expert {i + 1}: |T| {norm:.4g}{share}, cosines {cosines}")
    if of["kappa"] is not None:
        text = f"  shared: {of['kappa']:.3f} of 1 (unrelated experts: {of['chance']:.3f})"
        if directions:
            text += f"; mean of {directions['count']} joint directions {directions['kappa']:.3f}"
        found.append(text)
    return found
