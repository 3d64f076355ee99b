"""The folder of a merge: filled beside its place, then put there at once."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llava.atomic import left_of, new_folder
from llava.errors import InputError

_SPARE = 2**20  # card, config and the like
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: str, overwrite: bool, inputs: list[Path]) -> Path:
    """Refuse a place that cannot be written, or should not be; return it.

    A merge that was killed between putting the old folder aside and the new one in place left the
    old one whole under another name; it is put back first.
    """
    path = Path(output).expanduser().absolute()
    _recover(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"--output {output}: is there and no folder; a folder is expected")
    if not path.exists() or not any(path.iterdir()):
        return path
    if not overwrite:
        raise InputError(
            f"--output {output}: is there and not empty; --overwrite replaces the whole folder"
        )
    real = path.resolve()
    for other in (*inputs, Path.cwd(), Path.home()):
        if other.resolve().is_relative_to(real):
            raise InputError(f"--output {output}: would remove {other}, which lies in it")
    return path


def check_space(path: Path, size: int) -> None:
    """Refuse to begin where the disk has no room for `size` bytes."""
    existing = next(folder for folder in path.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < size + _SPARE:
        raise InputError(
            f"--output {path}: needs {(size + _SPARE) / 1e9:.3f} GB, {free / 1e9:.3f} GB are free"
        )


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of `path` at the end of the block.

    If the block raises, nothing is left and `path` is as it was. A process that is killed leaves
    its `own_name` beside it, which the next merge from the same host to the same place removes; in
    the instant of the exchange it may leave the old folder, as `.old`, which that merge puts back.

    Raises:
        InputError: the disk is full, whichever library met the error.
    """
    with new_folder(path, replace=True) as temporary, _disk_errors(path):
        yield temporary


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Errors of a full disk as InputError, with the place; torch wraps them in its own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise InputError(
                f"--output {path}: {cause.strerror} while writing; nothing was left there"
            ) from None
        raise


def _recover(path: Path) -> None:
    """Clear away what killed merges to this place left; the old folder first goes back."""
    for leftover in left_of(path):
        if leftover.suffix == ".old" and not path.exists():
            os.replace(leftover, path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
