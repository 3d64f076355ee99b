"""What a site says of itself before its first task, and what of it must stay as it is.

The facts are the run's settings: with other data or another model it would be another run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import platform
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from llava.atomic import write_secret, write_text
from llava.errors import InputError
from llava.json_files import read_json
from llava.train.settings import fingerprint

_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")


@dataclass(frozen=True)
class Hello:
    """A site's facts.

    Attributes:
        samples: how many it has, without those that teach nothing or cannot be read.
        data: a fingerprint of its records, of no use but to tell whether they have changed.
        model, tower: fingerprints of the language model's and the vision tower's folders.
        flags: those of its own that decide the result.
        versions: of Python, torch and transformers; they may change.
        signing: its public key, 64 hex digits, where a run has secure sums.
    """

    samples: int
    data: str
    model: str
    tower: str
    flags: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    signing: str = ""

    @property
    def digest(self) -> str:
        """Of what must not change during a run: 64 hex digits."""
        kept = {**dataclasses.asdict(self), "versions": None}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_hello(given: Mapping[str, Any], who: str) -> Hello:
    """A site's facts, checked by the driver; `who` opens the message of an `InputError`."""
    kinds = {"samples": int, "data": str, "model": str, "tower": str, "flags": dict,
             "versions": dict, "signing": str}  # fmt: skip
    for name, kind in kinds.items():
        if type(given.get(name)) is not kind:
            raise InputError(f"{who}: its facts have {name} {given.get(name)!r:.100}")
    for name in ("flags", "versions"):
        if not all(isinstance(word, str) for pair in given[name].items() for word in pair):
            raise InputError(f"{who}: its facts have {name} {given[name]!r:.200}")
    if not re.fullmatch("([0-9a-f]{64})?", given["signing"]):
        raise InputError(f"{who}: its facts have signing {given['signing']!r:.200}")
    if given.keys() != kinds.keys() or given["samples"] < 1:
        raise InputError(f"{who}: its facts are {dict(given)!r:.200}")
    return Hello(**given)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def data_fingerprint(content: str, run: str, file: Path) -> str:
    """`content`, a fingerprint of records, as one that has no meaning outside the run.

    Who guesses the records cannot see whether the guess is right: a secret of the site, which is
    drawn once and kept in `file`, is part of it.
    """
    if not file.exists():
        write_secret(file, secrets.token_hex(32))
    key = file.read_text().encode()
    return hmac.new(key, f"{run}\0{content}".encode(), hashlib.sha256).hexdigest()[:16]


def model_fingerprint(path: str, cache: Path) -> str:
    """16 hex digits over the files of a model that decide what it is, wherever it lies.

    The version of a plug-in decides too, of a vision tower that is one's.

    "" where a folder has no weights.

    Args:
        path: a folder, or a name on a hub whose files have been loaded.
        cache: a JSON file that remembers the fingerprints of files that have not changed since.
    """
    from llava.model.builder import folder_of
    from llava.model.gguf import find_gguf
    from llava.model.multimodal_encoder.builder import plug_in_type
    from llava.model.multimodal_encoder.plugins import plugged_in

    tower = None
    if gguf := find_gguf(path):
        files = [gguf]
    else:
        folder = folder_of(path)
        plug_in = plug_in_type(str(folder))
        tower = plugged_in(plug_in) if plug_in else None
        files = sorted({file for kind in _MODEL_FILES for file in folder.glob(kind)})
        if not any(file.suffix in (".safetensors", ".bin") for file in files):
            return ""
    try:
        known = read_json(cache)
    except InputError:
        known = {}
    version = f"{plug_in} {tower.version}" if tower else ""
    found, digest = dict(known), hashlib.sha256(version.encode())
    for file in files:
        stat = file.stat()
        mark = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        found.setdefault(mark, fingerprint(file))
        digest.update(f"{file.name}\0{found[mark]}\0".encode())
    if found != known:
        write_text(cache, json.dumps(found, indent=1))
    return digest.hexdigest()[:16]
