"""The models that a Pilot run leaves: a personal one for each client, and the tasks' adapters.

OUTPUT/clients/NAME/ is the client's whole model, its private parameters included, as one folder
that `load_pretrained_model` reads. OUTPUT/tasks/TASK/ is the adapter of a task, a plain mlp2x_gelu
projector.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from fed import state as states
from fed.state import State
from llava.model.checkpoint import write_config
from llava.model.checkpoint_names import PROJECTOR_FILE, PROJECTOR_PREFIX
from llava.train.llava_trainer import save_part

if TYPE_CHECKING:
    from fed.clients.store import FinishedRun, Sent
    from fed.methods.pilot.private_parameters import PrivateParameters

logger = logging.getLogger(__name__)


def export(store: PrivateParameters, final: FinishedRun, sent: Sent, tasks_dir: Path) -> None:
    """Write both; a client that has not taken part has no model. Every rank calls it."""
    for client in final.personal:
        state, extras = sent(client)
        store.visit(client, extras, final.round)
        store.part.into_model(store.model, state, f"the state of client {client}")
        config = copy.deepcopy(store.config)
        tasks, stage = store.order(client), store.connector.settings.stage
        config.mm_pilot |= {"tasks": tasks, "stage": stage}
        save_part(store.model, store.folder(client), write=store.main)
        if store.main:
            write_config(config, store.folder(client), full=False)
            logger.info("wrote %s", store.folder(client))
    if store.main:
        write_tasks(final.memory, store.config, store.tasks, tasks_dir)


def write_tasks(memory: State, config: PreTrainedConfig, tasks: Sequence[str], root: Path) -> None:
    """The adapter of each task that has been trained, as a projector of its own."""
    plain = copy.deepcopy(config)
    plain.mm_projector_type = "mlp2x_gelu"
    del plain.mm_pilot
    for task in tasks:
        adapter = {
            PROJECTOR_PREFIX + name.split(PROJECTOR_PREFIX, 1)[1]: tensor
            for name, tensor in memory.items()
            if name.startswith(f"{task}/{PROJECTOR_PREFIX}")
        }
        if adapter:
            states.save(adapter, root / task / PROJECTOR_FILE)
            write_config(plain, root / task, full=False)
            logger.info("wrote %s", root / task / PROJECTOR_FILE)
