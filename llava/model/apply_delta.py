"""`python -m llava.model.apply_delta`: a base and the difference to it → the model.

    python -m llava.model.apply_delta --base-model-path LLAMA --target-model-path OUT \
        --delta-path DELTA

The first LLaVA was given out so, as what must be added to Llama's weights.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava.errors import InputError, one_clear_error

if TYPE_CHECKING:
    import torch

# What a LLaVA has beside its language model; a difference has it whole.
ADDED = re.compile(r"model\.(mm_projector|vision_tower|image_newline)\b.*")
# These may have more rows than the base's, for added tokens.
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def add_base(path: str, base_path: str, output: str, sign: int) -> None:
    """Write `path` + `sign` × `base_path` to `output`, in float16, tensor by tensor.

    Raises:
        InputError: a tensor that the base does not have, or has in another shape.
    """
    from llava.atomic import new_folder
    from llava.model.shards import Shards, copy_small_files, local_folder, write_shards

    folder = local_folder(path)
    own, base = Shards(folder), Shards(local_folder(base_path))

    def sums() -> Iterator[tuple[str, torch.Tensor]]:
        for name in own:
            if name.endswith("rotary_emb.inv_freq"):
                continue
            tensor = own[name].half().clone()
            if name in base:
                other = base[name].half()
                fits = tensor.shape == other.shape
                if name in VOCABULARY:
                    fits = tensor.shape[1] == other.shape[1] and len(tensor) >= len(other)
                if not fits:
                    raise InputError(
                        f"{path}: tensor {name} is {tuple(tensor.shape)}, "
                        f"that of {base_path} is {tuple(other.shape)}"
                    )
                tensor[: len(other)] += sign * other
            elif not ADDED.fullmatch(name):
                raise InputError(f"{base_path}: has no tensor {name}, as {path} has")
            yield name, tensor

    with new_folder(output) as out:
        write_shards(out, sums())
        copy_small_files(folder, out, dtype="float16")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Add a difference to its base model.")
    parser.add_argument("--base-model-path", required=True)
    parser.add_argument("--target-model-path", required=True, help="a folder that is new or empty")
    parser.add_argument("--delta-path", required=True)
    args = parser.parse_args(argv)
    add_base(args.delta_path, args.base_model_path, args.target_model_path, sign=1)


if __name__ == "__main__":
    with one_clear_error():
        main()
