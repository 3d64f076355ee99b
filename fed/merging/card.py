"""The facts of a merge in words: the model card README.md, and the lines that are printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fed.markdown import markdown_table
from fed.merging.config import MergeConfig
from fed.server.reliability import doubtful

LIBRARIES = {"transformers": "transformers", "lora": "peft"}
MANY = 32  # layers; above it kinds of layers are listed


def write(folder: Path, facts: dict[str, Any]) -> None:
    """README.md in `folder`."""
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
        name, fingerprint = f"{_code(base['path'])} (base)", f"`{base['fingerprint'][:16]}`"
        rows.append((name, "", base["kind"], base["dtype"], fingerprint))
    parts.append("## Experts\n\n" + _table(["", "weight", "form", "type", "fingerprint"], rows))
    parts.append(facts["fingerprints"])
    parts += explained_lines(facts)
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
    from huggingface_hub import ModelCardData

    values = ModelCardData(
        base_model=[expert["path"] for expert in facts["experts"]],
        base_model_relation="merge",
        library_name=LIBRARIES.get(facts["form"], "llava"),
        license=facts["license"],
        pipeline_tag="image-text-to-text",
        tags=["merge", "llava"],
    )
    return f"---\n{values.to_yaml()}\n---"


def _layers(facts: dict[str, Any]) -> str:
    legend = (
        "T_k is what expert k learnt, its difference from the base; the cosines are between these, "
        "and kappa is the share of them that is common (1 where all agree)."
    )
    layers = facts["layers"] if len(facts["layers"]) <= MANY else facts["kinds"]
    rows = []
    for name, layer in {**layers, "all": facts["all"]}.items():
        cosines = [c for j, row in enumerate(layer["cosines"]) for c in row[:j] if c is not None]
        spread = f"{min(cosines):.3f} to {max(cosines):.3f}" if cosines else ""
        norms = " ".join(f"{norm:.4g}" for norm in layer["norms"])
        kappa = "" if layer["kappa"] is None else f"{layer['kappa']:.3f}"
        rows.append((f"`{name}`", f"{layer['base']:.4g}", norms, spread, kappa))
    text = _table(["layer", "base", "T_k", "cosines", "kappa"], rows)
    more = " What the method says of each layer is in `merge.json`."
    return f"{legend}{more if facts['method_facts'] else ''}\n\n{text}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(head, rows, padded=False).rstrip("\n")


def _code(text: str) -> str:
    """A path as code in a table's cell."""
    return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"


def lines(facts: dict[str, Any], config: MergeConfig) -> list[str]:
    """The whole of a dry run, or the end of a merge, as lines of text."""
    layers = facts["layers"] if len(facts["layers"]) <= MANY else facts["kinds"]
    options = " ".join(f"{name}={value}" for name, value in facts["options"].items())
    where = config.output or "nowhere: no --output is given"
    if not config.dry_run:
        everything = _layer_lines("all layers", facts["all"], {})
        done = f"merged with {facts['method']} {options}".rstrip()
        return [*everything, *explained_lines(facts), done, f"-> {where}", facts["written"]]
    said = [
        f"expert {i}: {e['path']} ({e['kind']}, {e['dtype']}, weight {e['weight']:g})"
        for i, e in enumerate(facts["experts"], 1)
    ]
    base = facts["base"]
    said.append(f"base: {base['path']} ({base['kind']})" if base else "base: the experts' mean")
    for name, layer in layers.items():
        said += _layer_lines(name, layer, facts.get("directions", {}).get(name, {}))
    said += _layer_lines("all layers", facts["all"], {})
    said += [
        f"would merge {len(facts['layers'])} layers with {facts['method']} {options}".rstrip(),
        f"would write to {where}",
        facts["written"],
    ]
    return said


def explained_lines(facts: dict[str, Any]) -> list[str]:
    """What experts' pictures explain, where that was measured, and of whom it is doubtful."""
    told = facts["method_facts"].get("explained") if facts["method_facts"] else None
    if told is None:
        return []
    counted = [str(i) for i, expert in enumerate(facts["experts"], 1) if expert["weight"] > 0]
    shares = dict(zip(counted, told, strict=True))
    listed = ", ".join(f"expert {i} {100 * share:.1f} %" for i, share in shares.items())
    said = [f"Of the calibration captions their pictures explain: {listed}."]
    for name, share, typical in doubtful(shares):
        said.append(
            f"The pictures of expert {name} explain {100 * share:.1f} % of the captions, those of "
            f"the others {100 * typical:.1f} %: was it aligned on captions that belong to them?"
        )
    return said


def _layer_lines(name: str, layer: dict[str, Any], directions: dict[str, Any]) -> list[str]:
    said = [f"{name}: |A_0| {layer['base']:.4g}"]
    for i, (norm, relative) in enumerate(zip(layer["norms"], layer["relative"], strict=True)):
        share = "" if relative is None else f" ({100 * relative:.3g} % of |A_0|)"
        cosines = " ".join("    -" if c is None else f"{c:5.2f}" for c in layer["cosines"][i])
        said.append(f"  expert {i + 1}: |T| {norm:.4g}{share}, cosines {cosines}")
    if layer["kappa"] is not None:
        text = f"  shared: {layer['kappa']:.3f} of 1 (unrelated experts: {layer['chance']:.3f})"
        if directions:
            text += f"; mean of {directions['count']} joint directions {directions['kappa']:.3f}"
        said.append(text)
    return said
