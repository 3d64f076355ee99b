"""A federated run's curves: TensorBoard, wandb, or whatever --report_to names."""

from __future__ import annotations

import logging
from collections.abc import Callable

from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from llava.errors import reason
from llava.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)


class RunLogger:
    """Logs of clients and rounds, through transformers' own callbacks (`reporters`)."""

    def __init__(self, args: TrainingArguments, reporters: list[TrainerCallback]):
        self.args = args
        self.state = TrainerState(is_world_process_zero=args.process_index == 0)
        callbacks = [DefaultFlowCallback(), *reporters]
        self.handler = CallbackHandler(callbacks, None, None, None, None)
        self._broken = False

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.state.global_step = step
        if self._broken:
            return
        try:
            self.handler.on_log(self.args, self.state, TrainerControl(), logs=values)
        except Exception as error:  # of whatever --report_to names; curves are worth no run
            self._broken = True
            logger.warning("--report_to: %s; nothing more is reported", reason(error))

    def start(self) -> None:
        self.handler.on_train_begin(self.args, self.state, TrainerControl())

    def of_client(self, name: str) -> Callable[[int, dict[str, float]], None]:
        """A client's logs, over its own steps."""
        return lambda step, values: self._log(
            step, {f"clients/{name}/{key}": value for key, value in values.items()}
        )

    def of_round(self, values: dict[str, float], round: int) -> None:
        self._log(round, values)

    def close(self) -> None:
        self.handler.on_train_end(self.args, self.state, TrainerControl())
