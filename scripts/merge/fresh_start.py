"""A projector as it is drawn before any training, in a folder: where several alignments begin.

    python scripts/merge/fresh_start.py --model_name_or_path LLM --vision_tower TOWER \\
        --mm_projector_type mlp2x_gelu --seed 42 --output_dir START

Takes the flags of scripts/v1_5/pretrain.sh, of which those that shape the projector and --seed
matter. Of the language model and the tower, the configs alone are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transformers

from llava.errors import InputError, one_clear_error
from llava.model.checkpoint import write_config
from llava.model.checkpoint_names import PROJECTOR_FILE, PROJECTOR_PREFIX
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.state import State, fingerprint, load, save
from llava.train.arguments import parse
from llava.train.session import training_config


def fresh_projector(config, seed: int) -> State:
    """The projector of `config`, float32, as torch's own layers start: as in training, other draws.

    Args:
        config: as `llava.train.session.training_config` makes it.
    """
    transformers.set_seed(seed)
    projector = build_vision_projector(config)
    return {PROJECTOR_PREFIX + name: tensor for name, tensor in projector.state_dict().items()}


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, training_args = parse(argv)
    if not model_args.vision_tower:
        raise InputError("--vision_tower is missing: its width is the projector's input")
    if model_args.mm_patch_merge_type != "flat":
        raise InputError(
            f"--mm_patch_merge_type {model_args.mm_patch_merge_type}: flat is expected, for a "
            "newline token is not drawn here"
        )
    folder = Path(training_args.output_dir)
    file = folder / PROJECTOR_FILE
    config = training_config(model_args, data_args, training_args)
    state = fresh_projector(config, training_args.seed)
    if file.exists() and fingerprint(load(file)) != fingerprint(state):
        raise InputError(f"--output_dir {folder}: {PROJECTOR_FILE} is there and is another one")
    folder.mkdir(parents=True, exist_ok=True)
    save(state, file)
    write_config(config, folder, full=False)
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())
    print(f"{file}: {config.mm_projector_type} drawn from {training_args.seed}")
    print(f"{shapes}\nfingerprint {fingerprint(state)}")


if __name__ == "__main__":
    with one_clear_error():
        main()
