"""Tokenizers in and out of the disk, such that transformers 4 and 5 give the same ids."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from llava.atomic import write_text
from llava.errors import InputError, reason
from llava.model.gguf import find_gguf, gguf_tokenizer
from llava.model.hf_logging import quiet


def load_tokenizer(path: str, **kwargs: Any):
    """The tokenizer of a folder or hub name.

    Raises:
        InputError: there is none that can be read.
    """
    from transformers import AutoTokenizer, PreTrainedConfig
    from transformers.utils import cached_file

    if gguf := find_gguf(path):
        return gguf_tokenizer(gguf, **kwargs)
    try:
        with quiet():
            whole = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
            if whole is None:
                # transformers 5 would choose the tokenizer by config.json's model_type, and lose
                # the first "▁" for `llava` and `mistral`; tokenizer_config.json names the right.
                kwargs["config"] = PreTrainedConfig()
            if _leaves_legacy_open(path):
                kwargs.setdefault("legacy", True)
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no readable tokenizer ({reason(error)})") from None


def _leaves_legacy_open(path: str) -> bool:
    """Whether this is a sentencepiece Llama whose config does not say `legacy` (Vicuna v1.3).

    Then transformers 4 takes True, and transformers 5 False.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import cached_file

    config = get_tokenizer_config(path)
    if config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return False
    file = cached_file(path, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
    return file is not None and config.get("legacy") is None


def write_tokenizer(tokenizer, folder: str | os.PathLike) -> None:
    """Write a tokenizer's files.

    One that came from a sentencepiece `tokenizer.model` goes as that file, with what transformers 4
    needs to read it as it is: transformers 5 writes a `tokenizer.json` alone, which 4 cannot read.
    """
    folder = Path(folder)
    source = getattr(tokenizer, "vocab_file", None)
    # Saving may write to the very folder that the tokenizer came from.
    model = Path(source).read_bytes() if source and Path(source).name == "tokenizer.model" else None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as temporary:
        made = Path(temporary)
        tokenizer.save_pretrained(made)
        if model is not None:
            _as_sentencepiece(tokenizer, model, made)
            (folder / "tokenizer.json").unlink(missing_ok=True)
        for file in [path for path in made.rglob("*") if path.is_file()]:
            place = folder / file.relative_to(made)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)


def _as_sentencepiece(tokenizer, model: bytes, folder: Path) -> None:
    """Put `tokenizer.model` in the place of `tokenizer.json`; the config says what it lacks."""
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").unlink()
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    for key in ("extra_special_tokens", "backend", "is_local", "local_files_only"):
        values.pop(key, None)
    for key in ("legacy", "add_bos_token", "add_eos_token"):
        if (value := getattr(tokenizer, key, None)) is not None:
            values[key] = value
    marks = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    values["added_tokens_decoder"] = {
        str(i): {mark: getattr(token, mark) for mark in marks}
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")
