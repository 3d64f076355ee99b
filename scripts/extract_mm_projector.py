#!/usr/bin/env python
"""The projector of a full LLaVA (or of a LoRA folder) as a file of its own.

    python scripts/extract_mm_projector.py --model-path LLAVA --output mm_projector.bin

Only the shards that hold it are read. The file is what --pretrain_mm_mlp_adapter takes.
"""

from __future__ import annotations

import argparse

from llava.errors import InputError, one_clear_error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a LLaVA's projector to a file of its own.")
    parser.add_argument("--model-path", required=True, help="a folder or hub name")
    parser.add_argument("--output", required=True, help="a .bin or .safetensors file")
    args = parser.parse_args(argv)

    from llava.model.checkpoint_names import projector_name
    from llava.model.shards import Shards, local_folder
    from llava.state import load, save

    folder = local_folder(args.model_path)
    beside_lora = folder / "non_lora_trainables.bin"
    weights = load(beside_lora) if beside_lora.is_file() else Shards(folder)
    names = {
        name: name.rpartition("mm_projector.")[2] for name in weights if "mm_projector." in name
    }
    projector = {projector_name(short): weights[name] for name, short in names.items()}
    if not projector:
        raise InputError(f"{args.model_path}: has no projector (no mm_projector tensors)")
    save(projector, args.output)


if __name__ == "__main__":
    with one_clear_error():
        main()
