"""The curves of a run: what reports them may fail, the run goes on."""

from __future__ import annotations

import logging

from transformers.trainer_callback import TrainerCallback

from fed.server.tracking import RunLogger
from llava.train.arguments import TrainingArguments


class Noting(TrainerCallback):
    """A reporter that notes what it is told, and fails at the third time."""

    def __init__(self):
        self.told = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if len(self.told) == 2:
            raise ConnectionError("no route to the tracker")
        self.told.append((state.global_step, logs))


def test_a_reporter_that_fails_is_told_nothing_more(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    reporter = Noting()
    logger = RunLogger(TrainingArguments(output_dir=str(tmp_path)), [reporter])
    logger.start()
    logger.of_client("a")(1, {"loss": 2.0})
    for round in (1, 2, 3):
        logger.of_round({"loss": 1.0}, round)
    logger.close()
    assert reporter.told == [(1, {"clients/a/loss": 2.0}), (1, {"loss": 1.0})]
    assert caplog.text.count("--report_to: no route to the tracker; nothing more is reported") == 1
