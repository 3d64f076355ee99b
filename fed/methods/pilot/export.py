"""What a Pilot run leaves: a personal model for each client, and what the tasks share.

OUTPUT/clients/NAME/ is the client's whole model, its own parts included, as one folder that
`load_pretrained_model` reads. OUTPUT/tasks/TASK/ is the adapter of a task, a plain mlp2x_gelu
projector.
"""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from fed import state as states
from fed.methods.pilot.private_parameters import OwnParts
from fed.server.loop import Loop
from fed.server.round_state import RoundState
from llava.model.checkpoint import PROJECTOR_FILE, PROJECTOR_PREFIX, write_config
from llava.model.trainable_part import trainable_part
from llava.train.llava_trainer import save_part


def export(
    final: RoundState, model: nn.Module, own: OwnParts, loop: Loop, output_dir: Path
) -> None:
    """Write both; a client that has not taken part has no model. Every rank calls it."""
    form = trainable_part(model)
    for client in final.personal:
        state, beside = loop.sent(final, client)
        own.put(client, beside, after=final.round)
        form.into_model(model, state, f"the state of client {client}")
        config = copy.deepcopy(model.config)
        config.mm_pilot |= {"tasks": own.order(client), "stage": own.connector.settings.stage}
        save_part(model, own.folder(client), write=own.main)
        if own.main:
            write_config(config, own.folder(client), full=False)
            print(f"wrote {own.folder(client)}", flush=True)
    if own.main:
        _write_tasks(final, model.config, own, output_dir / "tasks")


def _write_tasks(final: RoundState, config, own: OwnParts, root: Path) -> None:
    plain = copy.deepcopy(config)
    plain.mm_projector_type = "mlp2x_gelu"
    del plain.mm_pilot
    for task in own.tasks:
        adapter = {
            PROJECTOR_PREFIX + name.split(PROJECTOR_PREFIX, 1)[1]: tensor
            for name, tensor in final.memory.items()
            if name.startswith(f"{task}/{PROJECTOR_PREFIX}")
        }
        if adapter:
            states.save(adapter, root / task / PROJECTOR_FILE)
            write_config(plain, root / task, full=False)
            print(f"wrote {root / task / PROJECTOR_FILE}", flush=True)
