"""A model to merge, whatever its form on disk: its projector, its config, and what else it holds.

Values are read when they are used. Names are upstream's, whatever the folder's own are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fed.state import SUFFIXES, State, StateError, load
from llava.errors import InputError
from llava.json_files import read_json
from llava.model.builder import has_weights
from llava.model.checkpoint_names import (
    NEWLINE,
    PROJECTOR_FILE,
    PROJECTOR_PREFIX,
    ROWS,
    SEPARATE_ROWS,
    on_disk,
)
from llava.model.hf_layout import rename_to_llava
from llava.model.lora import ADAPTER_CONFIG, ADAPTER_FILE, OLD_ADAPTER_FILE, read_beside
from llava.model.shards import Shards, local_folder

Kind = Literal["file", "projector", "lora", "full", "transformers"]
WHOLE = ("full", "transformers")
RELEASE_AFTER_BYTES = 2**24  # bytes; a mapped file counts as memory as far as it has been read
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # computed, not learnt


@dataclass
class Source:
    """An expert or a base."""

    given: str  # the path as the user wrote it
    role: str  # in messages: expert, base
    kind: Kind
    path: Path  # the file or the folder
    config: dict[str, Any] | None  # config.json as it is, of the folder or beside the file

    @property
    def label(self) -> str:
        return f"{self.role} {self.given}"

    @property
    def folder(self) -> Path:
        return self.path.parent if self.kind == "file" else self.path

    @cached_property
    def weights(self) -> Weights:
        """All weights of a full folder by upstream's names."""
        return model_weights(self.path, self.kind)

    @cached_property
    def projector(self) -> State:
        """The projector's tensors, `model.mm_projector.*`, and what it has beside: the newline
        token; the rows (2, hidden) of start and end token, which a full model has among others.

        Raises:
            StateError: a file that is broken or holds no projector.
        """
        if self.kind in WHOLE:
            found: Mapping[str, Tensor] = self.weights
        elif self.kind == "lora":
            found = read_beside(self.path, mapped=True)
        else:
            found = load(self.projector_file, mapped=True)
        part = {n: found[n] for n in found if n.startswith(PROJECTOR_PREFIX) or n == NEWLINE}
        rows = found.get(SEPARATE_ROWS if self.kind == "lora" else ROWS)
        if rows is not None and self.kind not in WHOLE:
            part[ROWS] = rows[-2:]  # upstream saves the whole table, and reads these two
        if not any(name.startswith(PROJECTOR_PREFIX) for name in part):
            raise StateError(f"{self.label}: has no projector (no {PROJECTOR_PREFIX}* tensors)")
        return part

    @property
    def projector_file(self) -> Path:
        """The file of a projector that lies by itself."""
        return self.path if self.kind == "file" else self.path / PROJECTOR_FILE


class Weights(Mapping[str, Tensor]):
    """Tensors of a folder by upstream's names, read when asked for.

    Attributes:
        own: the folder's own name of each.
    """

    def __init__(self, shards: Shards, own: Mapping[str, str]):
        self.shards, self.own = shards, own
        self._read = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.shards[self.own[name]]
        self._read += tensor.numel() * tensor.element_size()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.own

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)

    def release(self) -> None:
        """Let go of the file that is open, if so much of it was read that it matters."""
        if self._read > RELEASE_AFTER_BYTES:
            self.shards.release()
            self._read = 0


def model_weights(folder: Path, kind: Kind) -> Weights:
    """All weights of a full folder; buffers that are computed are left out."""
    shards, own = Shards(folder), {}
    for name in shards:
        new = rename_to_llava(name) if kind == "transformers" else on_disk(name)
        if new is not None and not name.endswith(_BUFFERS):
            own[new] = name
    return Weights(shards, own)


def adapter_weights(folder: Path) -> Weights:
    """The adapter of a LoRA folder, names as they are."""
    shards = Shards(folder, (ADAPTER_FILE, OLD_ADAPTER_FILE))
    return Weights(shards, {name: name for name in shards})


def open_source(given: str, role: str) -> Source:
    """Look at a path's files; nothing but config.json is read.

    Raises:
        InputError: nothing there, or no form of a LLaVA.
    """
    path = Path(given).expanduser()
    if path.is_file() or path.suffix in SUFFIXES:
        if not path.is_file():
            raise InputError(f"{role} {given}: no such file")
        return Source(given, role, "file", path, _beside(path.parent))
    try:
        folder = local_folder(given)
    except InputError as error:
        raise InputError(f"{role} {error}") from None
    has_config = (folder / "config.json").is_file()
    config = read_json(folder / "config.json") if has_config else None
    if (folder / ADAPTER_CONFIG).is_file():
        kind: Kind = "lora"
    elif has_weights(folder):
        kind = "transformers" if config and "text_config" in config else "full"
    elif (folder / PROJECTOR_FILE).is_file():
        kind = "projector"
    else:
        raise InputError(
            f"{role} {given}: expected {PROJECTOR_FILE}, {ADAPTER_CONFIG} or a model's weights in "
            "the folder, found none"
        )
    if kind in WHOLE and config is None:
        raise InputError(f"{role} {given}: weights without a config.json")
    return Source(given, role, kind, folder, config)


def _beside(folder: Path) -> dict[str, Any] | None:
    """A LLaVA's config.json that lies beside a projector's file, as upstream puts it there."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and config.get("mm_hidden_size") else None
