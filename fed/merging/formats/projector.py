"""Scope projector: all of the projectors at once.

Out comes a projector in a folder of its own; or, of full models, the first one's folder with the
merged projector in it, every other tensor bit for bit.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from fed.merging.formats.format import Format, Put, bytes_of, check_names
from fed.merging.formats.rewrite import copy_model, model_bytes
from fed.merging.sources import Source
from fed.state import State, fingerprint, save
from llava.json_files import read_json
from llava.model.checkpoint_names import NEWLINE, PROJECTOR_FILE, ROWS
from llava.model.hf_layout import KEPT

_FINGERPRINTS = "A fingerprint is the SHA-256 of the projector's names, types, shapes and values."


class ProjectorFormat(Format):
    """The projector in a folder of its own, with the config that the experts have, if any."""

    fingerprints = _FINGERPRINTS

    def __init__(self, experts: Sequence[Source], base: Source | None, config: Path | None):
        self.sources, self.config = experts, config
        self.experts = self._states = states = [dict(source.projector) for source in experts]
        self.base = self._base = None if base is None else dict(base.projector)
        # Upstream saves no newline token, and a full model no rows; what not all have is left out.
        for name in (NEWLINE, ROWS):
            if any(name not in state for state in states):
                for state in states:
                    state.pop(name, None)
        check_names(experts, states)
        self.groups = [list(states[0])]
        self.notes = [
            f"{source.label}: its adapter is left out; --scope all merges adapters, too."
            for source in experts
            if source.kind == "lora"
        ]
        self.size = bytes_of(states[0])
        self.name = "projector"
        self.written = (
            "This folder holds a projector, to be loaded with its language model as the base "
            "(`load_pretrained_model(FOLDER, LLM, ...)`), or with --pretrain_mm_mlp_adapter."
            if config
            else f"This folder holds {PROJECTOR_FILE} alone, for --pretrain_mm_mlp_adapter: none "
            "of the projector files had a config.json beside it."
        )

    def prints(self) -> tuple[list[str], str | None]:
        base = None if self._base is None else fingerprint(self._base)
        return [fingerprint(state) for state in self._states], base

    @contextlib.contextmanager
    def writer(self, folder: Path) -> Iterator[Put]:
        merged: State = {}
        yield merged.update
        save(merged, folder / PROJECTOR_FILE)
        if self.config:
            _write_config(self.config, folder)


class ProjectorInModelFormat(ProjectorFormat):
    """The projector within a copy of the first expert's folder."""

    def __init__(self, experts: Sequence[Source], base: Source | None):
        super().__init__(experts, base, None)
        self.name = experts[0].kind
        self.size = model_bytes(experts[0])
        self.written = (
            "This folder is a full model: the merged projector around the language model "
            f"{'and vision tower ' if experts[0].kind == 'transformers' else ''}of the first "
            "expert, bit for bit."
        )

    @contextlib.contextmanager
    def writer(self, folder: Path) -> Iterator[Put]:
        merged: State = {}
        yield merged.update
        copy_model(self.sources[0], folder, merged)


def _write_config(config: Path, folder: Path) -> None:
    """Copy it; one of transformers' layout becomes upstream's, which a projector alone needs."""
    raw = read_json(config)
    if "text_config" not in raw:
        shutil.copyfile(config, folder / "config.json")
        return
    from llava.model.checkpoint import read_config, write_config

    values = read_config(config.parent)
    if KEPT in raw:  # of the language model itself, whose vocabulary is smaller
        values.vocab_size = raw[KEPT]["vocab_size"]
        values.pad_token_id = raw[KEPT]["pad_token_id"]
    write_config(values, folder, full=False)
