"""`python -m llava.model.consolidate`: a full LLaVA of any age → safetensors in float16.

    python -m llava.model.consolidate --src OLD --dst NEW

Pickled shards become safetensors, buffers of old versions are left out, and config.json gets
today's `model_type`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava.errors import one_clear_error

if TYPE_CHECKING:
    import torch


def consolidate(src: str, dst: str) -> None:
    """Write the weights of `src`, its config and its tokenizer to the new folder `dst`."""
    from llava.atomic import new_folder
    from llava.model.checkpoint import read_config, write_config
    from llava.model.shards import Shards, copy_small_files, local_folder, write_shards

    folder = local_folder(src)
    config = read_config(folder)
    config.dtype = "float16"
    weights = Shards(folder)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in weights:
            if not name.endswith("rotary_emb.inv_freq"):
                yield name, weights[name].half()

    with new_folder(dst) as out:
        write_shards(out, tensors())
        copy_small_files(folder, out)
        write_config(config, out, full=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rewrite a full LLaVA as safetensors, float16.")
    parser.add_argument("--src", required=True)
    parser.add_argument("--dst", required=True, help="a folder that is new or empty")
    args = parser.parse_args(argv)
    consolidate(args.src, args.dst)


if __name__ == "__main__":
    with one_clear_error():
        main()
