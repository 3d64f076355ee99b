"""What a run starts from, in a driver whose clients train in other processes."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from fed import state
from fed.arguments import Arguments
from fed.clients.store import ClientStore
from fed.drivers.driver import Run
from fed.state import State
from llava.errors import InputError
from llava.model.checkpoint_names import PROJECTOR_PREFIX
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.trainable_part import ProjectorPart, trained_part
from llava.train.session import Session, load_session, training_config


@dataclass(frozen=True)
class Start:
    """The state to start from, the store that writes checkpoints, and a model if one is kept.

    A model is loaded only to draw the state, and kept only to measure.
    """

    store: ClientStore
    initial: State
    session: Session | None


def starting_point(run: Run) -> Start:
    """Read the state where a file has all of it, else draw it from a model."""
    args, measured = run.arguments, bool(run.arguments.fed.fed_eval_data_path)
    file = _projector_file(args)
    if file and not measured and run.method.store is None:
        config = training_config(*args[:3])
        store = ClientStore(ProjectorPart(), config, run.main)
        return Start(store, _read_initial(config, file), None)
    session = load_session(*args[:3])
    model = session.model
    part, initial = trained_part(model)
    if run.method.store is None:
        return Start(ClientStore(part, model.config, run.main), initial, session)
    store = run.method.store(model, part, run)
    if store.part is not part:  # the store keeps some of what trains
        initial = store.part.of_model(model)
    return Start(store, initial, session)


def as_one_process(argv: list[str], refusal: str) -> list[str]:
    """The command line without a GPU, unless something is measured; `refusal` for a launcher."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("fed_eval_data_path", "deepspeed"):
        peek.add_argument(f"--{flag}", nargs="?")
    first, _ = peek.parse_known_args(argv)
    if first.deepspeed or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(refusal)
    return argv if first.fed_eval_data_path else [*argv, "--use_cpu", "True"]


def _projector_file(args: Arguments) -> str | None:
    """The file that holds all of the state to start from; None where a model is needed for it."""
    if args.training.lora_enable or "unpad" in args.model.mm_patch_merge_type:
        return None  # with `unpad` goes a newline token
    return args.model.pretrain_mm_mlp_adapter


def _read_initial(config: PreTrainedConfig, file: str) -> State:
    """The projector of a file, float32, checked without a model."""
    with torch.device("meta"):
        like = build_vision_projector(config).state_dict()
    own = {n: t.float() for n, t in state.load(file).items() if n.startswith(PROJECTOR_PREFIX)}
    state.check(own, {PROJECTOR_PREFIX + name: t for name, t in like.items()}, who=file)
    return own
