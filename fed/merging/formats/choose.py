"""The format that a merge takes, by its scope and by what the experts are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fed.merging.config import MergeConfig
from fed.merging.formats.format import Format
from fed.merging.formats.full import FullFormat
from fed.merging.formats.lora import LoraFormat
from fed.merging.formats.projector import ProjectorFormat, ProjectorInModelFormat
from fed.merging.sources import WHOLE, Source
from llava.errors import InputError
from llava.json_files import read_json


def format_of(config: MergeConfig, experts: Sequence[Source], base: Source | None) -> Format:
    """The format for these experts.

    Raises:
        InputError: forms that cannot be merged in this scope, or tensors of other names.
    """
    kinds = {expert.kind for expert in experts}
    if config.scope == "projector":
        return _projector(config, experts, base)
    if kinds == {"lora"}:
        return LoraFormat(config, experts, base)
    if kinds <= set(WHOLE):
        return FullFormat(experts, base)
    odd = next(expert for expert in experts if expert.kind != experts[0].kind or
               expert.kind not in ("lora", *WHOLE))  # fmt: skip
    raise InputError(
        f"--scope all: LoRA folders only or full models only are expected; {odd.label} has the "
        f"form {odd.kind}, {experts[0].label} {experts[0].kind}"
    )


def _projector(
    config: MergeConfig, experts: Sequence[Source], base: Source | None
) -> ProjectorFormat:
    """A full model where all experts are, else a projector with the first config that there is."""
    if all(expert.kind in WHOLE for expert in experts):
        return ProjectorInModelFormat(experts, base)
    file: Path | None
    if config.config:
        file = Path(config.config).expanduser()
        if not read_json(file).get("mm_hidden_size"):
            raise InputError(f"--config {file}: no mm_hidden_size there, so this is no LLaVA's")
    else:
        having = [
            e.folder / "config.json" for e in experts if e.config and e.kind != "transformers"
        ]
        having += [e.folder / "config.json" for e in experts if e.kind == "transformers"]
        file = having[0] if having else None
    return ProjectorFormat(experts, base, file)
