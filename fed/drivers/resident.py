"""The resident driver: one backbone stays in memory and clients take turns on what trains.

K clients × R rounds cost one model load. Each turn is LLaVA's own trainer with the client's own
arguments, on the slice of its shard that the round sees.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.trainer_callback import TrainerCallback

from fed.clients.slices import seed_of
from fed.drivers.client_steps import ClientSteps
from fed.methods import ClientRule
from fed.methods.pilot.private_parameters import OwnParts
from fed.server.client_task import Log, Turn
from fed.server.round_state import Update
from fed.state import State
from llava.model.trainable_part import trainable_part
from llava.train.arguments import TrainingArguments
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.llava_trainer import LLaVATrainer, last_checkpoint, steps_of
from llava.train.session import Session
from llava.train.train import make_trainer


@dataclass
class Client:
    """A client on this machine: name, arguments, data, and which slice of it a round sees."""

    name: str
    args: TrainingArguments
    dataset: LazySupervisedDataset
    slices: list[list[int]]

    def samples(self, round: int) -> int:
        """How many samples round `round` (from 1) trains on."""
        return len(self.slices[round - 1])

    def steps(self, round: int) -> int:
        """How many optimizer steps round `round` takes."""
        return steps_of(self.args, self.samples(round))


class ResidentDriver:
    """Runs clients' turns on one `Session`, one after another.

    Args:
        schedule: `run` lets the learning-rate schedule span the rounds, `round` starts it anew.
        rule: what makes the method's rule for a turn, None where clients step as they are.
        log_of: a client's name → what takes its logs, `log(step, values)`.
        own: where the clients' own parts of the connector are, for Pilot.
        first_rate: the learning rate of the first round, where it has one of its own.
    """

    def __init__(
        self,
        session: Session,
        collator: DataCollatorForSupervisedDataset,
        schedule: str = "run",
        log_of: Callable[[str], Log] = lambda name: lambda step, values: None,
        rule: Callable[[State, State, State], ClientRule] | None = None,
        own: OwnParts | None = None,
        first_rate: float | None = None,
    ):
        self.session = session
        self.form = trainable_part(session.model)
        self.collator = collator
        self.schedule = schedule
        self.log_of = log_of
        self.rule = rule
        self.own = own
        self.first_rate = first_rate
        extract_model_from_parallel(session.model)  # imports what the first turn would import
        # Each turn's trainer collects garbage; what lives as long as the run need not be searched.
        gc.collect()
        gc.freeze()

    def fit_many(
        self, turns: Sequence[Turn], go_on: Callable[[], bool]
    ) -> Iterator[tuple[Turn, Update]]:
        """The driver contract."""
        for turn in turns:
            update = self.fit(
                turn.client,
                turn.state,
                turn.round,
                extras=turn.extras,
                kept=turn.kept,
                work_dir=self.own.work_dir(turn.name, turn.round) if self.own else turn.work_dir,
                log=self.log_of(turn.name),
            )
            yield turn, update

    def fit(
        self,
        client: Client,
        state: State,
        round: int,
        *,
        work_dir: Path,
        extras: State | None = None,
        kept: State | None = None,
        log: Log = lambda step, logs: None,
    ) -> Update:
        """Train `client` from `state` on its slice of `round`.

        Args:
            extras, kept: what was sent beside the state, and what the client has kept, for the
                method's rule; where clients have parts of their own, those know what to do with it.
            work_dir: where the trainer's own checkpoints go (with --save_strategy); a turn that was
                cut short continues from them.
            log: called with the client's step, counted over all its rounds, and the trainer's logs.

        Returns:
            The update; `metrics` has `loss` (mean over the steps), `steps`, `seconds` between the
            first and the last step, and `parameters`: how many numbers were trained, sent to the
            client (`received`) and sent by it.
        """
        if self.own:
            self.own.put(client.name, extras or {}, turn=round)
        self.form.into_model(self.session.model, state, f"the state sent to client {client.name}")
        samples = client.samples(round)
        if samples == 0:
            return Update(state, 0, {"loss": None, "steps": 0, "seconds": 0.0})
        before = sum(client.steps(r) for r in range(1, round))
        args = dataclasses.replace(
            client.args,
            output_dir=str(work_dir),
            seed=seed_of(client.args.seed, client.name, round),
            report_to=[],
            schedule_samples=[len(cut) for cut in client.slices] if self.schedule == "run" else [],
            schedule_round=round,
        )
        args.tune_mm_mlp_adapter = client.args.tune_mm_mlp_adapter
        if round == 1 and self.first_rate is not None:
            args.learning_rate = self.first_rate
        watch = _Watch(f"round {round} client {client.name}", before, log)
        trainer = make_trainer(
            self.session,
            args,
            train_dataset=client.dataset.select(client.slices[round - 1]),
            data_collator=self.collator,
            callbacks=[watch],
            progress=False,
        )
        checkpoint = last_checkpoint(args.output_dir)
        steps = None
        if self.rule is not None:
            parameters = self.form.parameters(self.session.model)
            steps = ClientSteps(self.rule, parameters, extras or {}, kept or {})
            trainer.add_callback(steps)
            if checkpoint:
                steps.go_on_from(checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        loss = result.training_loss
        if checkpoint:  # that was the mean since then; the log goes back to the turn's beginning
            losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
            loss = sum(losses) / len(losses) if losses else loss
        trained = self.form.of_model(self.session.model)
        release(trainer)
        metrics = {"loss": loss, "steps": result.global_step, "seconds": watch.seconds}
        update = Update(trained, samples, metrics)
        if steps is not None:
            steps.finish(update)
        if self.own:
            self.own.keep(client.name, round)
        metrics["parameters"] = {
            "trained": _trained_numbers(self.session.model),
            "received": _numbers(state) + _numbers(extras or {}),
            "sent": _numbers(update.state) + _numbers(update.extras),
        }
        return update


def _trained_numbers(model: nn.Module) -> int:
    """Of all ranks together: ZeRO-3 leaves next to nothing of a parameter on each."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(getattr(p, "ds_numel", p.numel()) for p in trained)


def _numbers(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


def release(trainer: LLaVATrainer) -> None:
    """Let go of optimizer and engine, so that the next client finds the model as it was."""
    engine = getattr(trainer, "deepspeed", None)
    if engine is not None:
        engine.destroy()
        # What it forgets: that would keep it alive, and at work in the next client's steps.
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        for module in trainer.model.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                module.__dict__.pop(name, None)
    trainer.optimizer = trainer.lr_scheduler = trainer.model_wrapped = trainer.deepspeed = None


class _Watch(TrainerCallback):
    """Times the steps, hands logs on, and says every ten seconds how far a long turn is."""

    def __init__(self, title: str, before: int, log):
        self.title, self.before, self.log, self.seconds = title, before, log, 0.0
        self._begun = self._spoken = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun = self._spoken = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self._begun

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        shown = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        self.log(self.before + state.global_step, shown)
        if state.is_world_process_zero and time.perf_counter() - self._spoken > 10:
            self._spoken = time.perf_counter()
            print(
                f"{self.title}: step {state.global_step}/{state.max_steps} loss {logs['loss']:.4f}",
                flush=True,
            )
