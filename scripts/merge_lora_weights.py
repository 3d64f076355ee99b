#!/usr/bin/env python
"""A LoRA and its base → a full LLaVA, which needs no base and no peft.

    python scripts/merge_lora_weights.py --model-path LORA --model-base LLM --save-model-path OUT

The weights are merged on the CPU, in the type in which the base holds them.
"""

from __future__ import annotations

import argparse

from llava.errors import InputError, one_clear_error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Merge a LoRA into its base.")
    parser.add_argument("--model-path", required=True, help="the LoRA's folder")
    parser.add_argument("--model-base", help="its language model, if not the one it names itself")
    parser.add_argument("--save-model-path", required=True, help="a folder that is new or empty")
    args = parser.parse_args(argv)

    from llava.atomic import new_folder
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.model.checkpoint import save_full
    from llava.model.lora import ADAPTER_CONFIG, base_of
    from llava.model.shards import Shards, copy_small_files, local_folder

    adapter = local_folder(args.model_path)
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise InputError(f"{args.model_path}: no {ADAPTER_CONFIG} there, so this is no LoRA")
    base = args.model_base or base_of(adapter)
    if not base:
        raise InputError(f"{args.model_path}: does not name its base; do so with --model-base")
    base_folder = local_folder(base)
    weights = Shards(base_folder)
    with new_folder(args.save_model_path) as out:
        tokenizer, model, _, _ = load_pretrained_model(
            args.model_path,
            base,
            get_model_name_from_path(args.model_path),
            device="cpu",
            dtype=weights["model.embed_tokens.weight"].dtype,
        )
        state = dict(model.state_dict())
        tuned = getattr(model.config, "unfreeze_mm_vision_tower", False)
        if tuned or any("vision_tower." in name for name in weights):
            tower = model.get_vision_tower().vision_tower.state_dict()
            state |= {f"model.vision_tower.vision_tower.{n}": t for n, t in tower.items()}
        copy_small_files(base_folder, out)
        save_full(model, tokenizer, out, state)


if __name__ == "__main__":
    with one_clear_error():
        main()
