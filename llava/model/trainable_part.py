"""The two kinds of trainable part: a projector, or LoRA with what trains beside it.

A part knows how a state is read from a model and put into it, which files it is on disk, and with
which flag a client is told to start from them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import nn

from llava import state as states
from llava.atomic import write_text
from llava.model.checkpoint import copies, copy_in, grafted, projector_parameters
from llava.model.checkpoint_names import (
    NEWLINE,
    PROJECTOR_FILE,
    PROJECTOR_PREFIX,
    ROWS,
    projector_name,
)
from llava.model.lora import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    NON_LORA_FILE,
    PEFT_PREFIX,
    adapter_parameters,
    is_lora,
    load_adapter,
    load_non_lora,
    other_parameters,
    read_non_lora,
    write_adapter_config,
)
from llava.state import State, StateError, read_tensors

if TYPE_CHECKING:
    from peft import PeftModel


class TrainablePart(Protocol):
    """`flag` takes the path that `sent` gives for a folder that `write` wrote."""

    flag: str
    files: tuple[str, ...]

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]: ...
    def of_model(self, model: nn.Module) -> State: ...
    def into_model(self, model: nn.Module, state: State, source: str) -> None: ...
    def write(self, state: State, folder: Path) -> None: ...
    def sent(self, folder: Path) -> Path: ...
    def read(self, folder: Path, like: State) -> State: ...


class ProjectorPart:
    """`mm_projector.bin`."""

    flag = "pretrain_mm_mlp_adapter"
    files: tuple[str, ...] = (PROJECTOR_FILE,)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that clients share, by the state's names."""
        home = set(map(projector_name, _at_home(model)))
        return {n: p for n, p in projector_parameters(model).items() if n not in home}

    def of_model(self, model: nn.Module) -> State:
        """The state in `model`, float32 on the CPU; under ZeRO-3 every rank must call it."""
        return _float(copies(self.parameters(model)))

    def into_model(self, model: nn.Module, state: State, source: str) -> None:
        """Copy a state into `model`; `source` opens the message if it does not fit."""
        copy_in(state, self.parameters(model), source)

    def write(self, state: State, folder: Path) -> None:
        states.save(state, folder / PROJECTOR_FILE)

    def sent(self, folder: Path) -> Path:
        return folder / PROJECTOR_FILE

    def read(self, folder: Path, like: State) -> State:
        """The state in a folder, float32, with the names and shapes of `like`.

        Of an embedding, which upstream may save beside the projector, those rows are taken that
        train; a newline token, which it does not save, is that of `like`, and so are such rows.
        """
        file = folder / PROJECTOR_FILE
        found = states.load(file)
        own = {n: t for n, t in found.items() if n in like or n.startswith(PROJECTOR_PREFIX)}
        for name in {NEWLINE, ROWS} & like.keys():
            own.setdefault(name, like[name])
        if ROWS in own:
            own[ROWS] = own[ROWS][-2:]
        states.check(own, like, who=str(file))
        return _float(own)


class LoraPart:
    """`adapter_model.safetensors` and `non_lora_trainables.bin`, with `adapter_config.json`.

    In a state the adapter's tensors have their names on disk, `base_model.model.…`, and the others
    those of the model itself, `model.mm_projector.…`.
    """

    flag = "lora_weight_path"
    files: tuple[str, ...] = (ADAPTER_FILE, NON_LORA_FILE)

    def __init__(self, model: PeftModel):
        with tempfile.TemporaryDirectory() as folder:
            write_adapter_config(model, folder)
            self.config = (Path(folder) / ADAPTER_CONFIG).read_text()

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        others = {
            n.removeprefix(PEFT_PREFIX): p for n, p in other_parameters(_adapted(model)).items()
        }
        home = {PROJECTOR_PREFIX + name for name in _at_home(model)}
        return adapter_parameters(_adapted(model)) | {
            n: p for n, p in others.items() if n not in home
        }

    def of_model(self, model: nn.Module) -> State:
        return _float(copies(self.parameters(model)))

    def into_model(self, model: nn.Module, state: State, source: str) -> None:
        adapter, others = _halves(state)
        load_adapter(_adapted(model), adapter, source)
        load_non_lora(model, others, source)

    def write(self, state: State, folder: Path) -> None:
        adapter, others = _halves(state)
        states.save(adapter, folder / ADAPTER_FILE)
        states.save({PEFT_PREFIX + n: t for n, t in others.items()}, folder / NON_LORA_FILE)
        write_text(folder / ADAPTER_CONFIG, self.config)

    def sent(self, folder: Path) -> Path:
        return folder

    def read(self, folder: Path, like: State) -> State:
        adapter, others = _halves(like)
        found: State = {}
        for file, tensors, expected in (
            (ADAPTER_FILE, read_tensors(folder / ADAPTER_FILE), adapter),
            (NON_LORA_FILE, read_non_lora(folder), others),
        ):
            states.check(tensors, expected, who=str(folder / file))
            found |= tensors
        return _float(found)


def trainable_part(model: nn.Module) -> TrainablePart:
    """The kind of what trains in a model."""
    return LoraPart(model) if is_lora(model) else ProjectorPart()


def trained_part(model: nn.Module) -> tuple[TrainablePart, State]:
    """The trainable part of a model and its state, checked."""
    part = trainable_part(model)
    state = part.of_model(model)
    states.check(state, state, who="the state to start from")
    return part, state


def read_result(part: TrainablePart, folder: Path, like: State) -> State:
    """The state that a client has left in its --output_dir.

    Raises:
        StateError: a file is missing, not one of tensors, or does not fit; the rest of a sentence.
    """
    for name in part.files:
        if not (folder / name).is_file():
            raise StateError(f"left no {name} in its --output_dir")
    try:
        return part.read(folder, like)
    except StateError as error:
        raise StateError(f"left {error}") from None


def _adapted(model: nn.Module) -> PeftModel:
    assert is_lora(model), "the state of a model with LoRA"
    return model


def _halves(state: State) -> tuple[State, State]:
    """The adapter's tensors, and the others."""
    adapter = {name: t for name, t in state.items() if name.startswith(PEFT_PREFIX)}
    return adapter, {name: t for name, t in state.items() if name not in adapter}


def _at_home(model: nn.Module) -> set[str]:
    """The parameters of a connector, by its own names, that do not travel: the client's own, and
    what it was sent frozen."""
    connector = grafted(model).get_model().mm_projector
    groups = connector.groups()
    return {*groups["client"], *groups["frozen"]}


def _float(state: State) -> State:
    return {name: tensor.float() for name, tensor in state.items()}
