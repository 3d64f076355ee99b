"""Scope all of full models: every tensor, layer by layer, into files laid out as the first's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fed.merging.compatibility import sample, sampled_fingerprint
from fed.merging.formats.format import Format, Put, by_layer, check_names, stand_in
from fed.merging.formats.rewrite import Streamed, copy_beside, model_bytes
from fed.merging.sources import WHOLE, Source
from llava.errors import InputError


class FullFormat(Format):
    """Every weight of full models. In memory are one layer of each expert and what is written."""

    fingerprints = (
        "A fingerprint is a SHA-256 over names, types, shapes and the first 4 KB of every tensor."
    )
    written = "This folder is a full model, all weights merged."

    def __init__(self, experts: Sequence[Source], base: Source | None):
        self.sources = experts
        self.experts = self._weights = [source.weights for source in experts]
        self._all = list(self._weights)  # the base's, too
        check_names(experts, self._weights)
        notes: list[str] = []
        self.base, self.notes = None, notes
        if base is not None:
            if base.kind not in WHOLE:
                raise InputError(
                    f"--base {base.given}: --scope all of full models needs a full model, this has "
                    f"the form {base.kind}"
                )
            self.base = base.weights
            self._all.append(base.weights)
            if lost := [name for name in self._weights[0] if name not in base.weights]:
                notes.append(stand_in(base, lost))
        self.groups = by_layer(list(self._weights[0]))
        self.size = model_bytes(experts[0])
        self.name = experts[0].kind

    def prints(self) -> tuple[list[str], str | None]:
        prints = []
        for weights in self._all:
            names = [name for name in self._weights[0] if name in weights]
            prints.append(sampled_fingerprint(sample((name, weights[name]) for name in names)))
            weights.shards.release()
        count = len(self._weights)
        return prints[:count], prints[count] if self.base is not None else None

    @contextlib.contextmanager
    def writer(self, folder: Path) -> Iterator[Put]:
        copy_beside(self.sources[0].path, folder)
        streamed = Streamed(self._weights[0], folder)
        yield streamed.put
        streamed.close()

    def release(self) -> None:
        for weights in self._all:
            weights.release()
