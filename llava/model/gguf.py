"""Language models in GGUF files, de-quantised as they are read.

    python -m llava.model.gguf FOLDER_OR_FILE OUT [--gguf_file NAME] [--dtype float32]

A GGUF is named by its own path, or by its folder when it is the only one there and the folder has
no config.json. Everything that reads a language model then takes its config, tokenizer and weights
out of it, for the architectures that transformers reads. Each reading de-quantises anew; the
command writes an ordinary folder, once.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava.atomic import new_folder
from llava.errors import InputError, one_clear_error, reason
from llava.model.hf_logging import quiet
from llava.transformers_private import without_zero3

SUFFIX = ".gguf"
MAGIC = b"GGUF"


def find_gguf(path: str | os.PathLike) -> Path | None:
    """The GGUF that `path` names; None if that is something else.

    Raises:
        InputError: a folder of several, or a file that is missing or no GGUF.
    """
    place = Path(path).expanduser()
    if place.suffix == SUFFIX and not place.is_dir():
        _check(place)
        return place
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    files = sorted(place.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{place}: holds several GGUF files ({names}); name one, {files[0]}")
    for file in files:
        _check(file)
    return files[0] if files else None


def named(path: str, gguf_file: str | None) -> str:
    """The path of `gguf_file` in the folder `path`; `path` itself if none is named."""
    if not gguf_file:
        return path
    file = Path(path).expanduser() / gguf_file
    if not file.is_file():
        raise InputError(f"--gguf_file {gguf_file}: there is no such file in {path}")
    return str(file)


def _check(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            begins = opened.read(len(MAGIC))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({reason(error)})") from None
    if begins != MAGIC:
        raise InputError(f"{file}: is no GGUF, which begins with {MAGIC!r}; found {begins!r}")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{file}: reading it needs the package gguf: pip install 'fedllava[gguf]' ({error})"
        ) from None


def _read(file: Path, kind: Any, **options: Any) -> Any:
    """`kind.from_pretrained` of a GGUF; whatever is wrong with the file is an `InputError`."""
    try:
        with quiet():
            return kind.from_pretrained(
                str(file.parent), gguf_file=file.name, trust_remote_code=False, **options
            )
    except MemoryError:
        raise
    except Exception as error:  # readers of a damaged file raise whatever its bytes make of them
        raise InputError(
            f"{file}: transformers cannot read this GGUF ({type(error).__name__}: {reason(error)})"
        ) from None


def gguf_config(file: Path) -> Any:
    """The config of the language model in a GGUF, as of an ordinary one."""
    stat = file.stat()
    return copy.deepcopy(_config(file, stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=4)  # its vocabulary is walked through each time, which takes seconds
def _config(file: Path, size: int, time_ns: int) -> Any:
    from transformers import AutoConfig

    return _ordinary(_read(file, AutoConfig))


def _ordinary(config: Any) -> Any:
    for key in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, key):
            delattr(config, key)
    config.architectures = None
    return config


def gguf_tokenizer(file: Path, **options: Any) -> Any:
    """The tokenizer in a GGUF, with its chat template."""
    from transformers import AutoTokenizer

    return _read(file, AutoTokenizer, **options)


def gguf_weights(file: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The weights of the language model in a GGUF, by transformers' names; whole on every rank.

    Raises:
        InputError: one is missing, is not finite, or cannot be read.
    """
    with without_zero3():
        return _model(file, dtype).state_dict()


def _model(file: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = _read(
        file,
        AutoModelForCausalLM,
        config=gguf_config(file),
        dtype=dtype,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        raise InputError(f"{file}: {len(missing)} tensors are missing, as {missing[0]}")
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{file}: {name} holds values that are not finite")
    _ordinary(model.config)
    model.hf_quantizer, model.is_quantized = None, False  # or it would not be saved
    return model


def convert(
    path: str | os.PathLike, output: str | os.PathLike, dtype: torch.dtype = torch.float32
) -> None:
    """Write the language model of a GGUF as an ordinary folder; it appears whole or not at all.

    Raises:
        InputError: there is no GGUF, it cannot be read, or `output` is there and not empty.
    """
    file = find_gguf(path)
    if file is None:
        raise InputError(f"{path}: holds no GGUF file")
    with new_folder(output) as fresh:
        model, tokenizer = _model(file, dtype), gguf_tokenizer(file)
        with quiet():
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.model.gguf", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", help="a GGUF file, or its folder")
    parser.add_argument("output", type=Path, help="the folder that is written")
    parser.add_argument("--gguf_file", help="which of the folder's files")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    with one_clear_error():
        convert(named(args.model, args.gguf_file), args.output, getattr(torch, args.dtype))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
