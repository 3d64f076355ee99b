"""The resident driver: one backbone stays in memory and clients take turns on its projector.

K clients × R rounds cost one model load. Each turn is LLaVA's own trainer with the client's own
arguments, on the slice of its shard that the round sees.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import extract_model_from_parallel
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import TrainerCallback

from fed.clients import seed_of
from fed.round_state import Update
from fed.state import State
from llava.model.checkpoint import load_projector, projector_state
from llava.train.arguments import TrainingArguments
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.llava_trainer import LLaVATrainer, last_checkpoint
from llava.train.train import Session, make_trainer


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
        """How many optimizer steps round `round` takes; as the Trainer counts them."""
        if not self.samples(round):
            return 0
        if self.args.max_steps > 0:
            return self.args.max_steps
        batch = self.args.train_batch_size * self.args.world_size
        batches = math.ceil(self.samples(round) / batch)
        per_epoch = max(math.ceil(batches / self.args.gradient_accumulation_steps), 1)
        return math.ceil(per_epoch * self.args.num_train_epochs)


class ResidentDriver:
    """Runs clients' turns on one `Session`; `fit` is the driver contract."""

    def __init__(
        self, session: Session, collator: DataCollatorForSupervisedDataset, schedule: str = "run"
    ):
        self.session = session
        self.collator = collator
        self.schedule = schedule
        extract_model_from_parallel(session.model)  # imports what the first turn would import
        # Each turn's trainer collects garbage; what lives as long as the run need not be searched.
        gc.collect()
        gc.freeze()

    def fit(
        self,
        client: Client,
        state: State,
        round: int,
        *,
        work_dir: Path,
        log: Callable[[int, dict[str, float]], None] = lambda step, logs: None,
    ) -> Update:
        """Train `client` from `state` on its slice of `round`.

        Args:
            work_dir: where the trainer's own checkpoints go (with --save_strategy); a turn that was
                cut short continues from them.
            log: called with the client's step, counted over all its rounds, and the trainer's logs.

        Returns:
            The update; `metrics` has `loss` (mean over the steps), `steps`, and `seconds` between
            the first and the last step.
        """
        load_projector(self.session.model, state, f"the state sent to client {client.name}")
        samples = client.samples(round)
        if samples == 0:
            return Update(state, 0, {"loss": None, "steps": 0, "seconds": 0.0})
        steps = [client.steps(r) for r in range(1, len(client.slices) + 1)]
        before = sum(steps[: round - 1])
        args = dataclasses.replace(
            client.args,
            output_dir=str(work_dir),
            seed=seed_of(client.args.seed, client.name, round),
            report_to=[],
        )
        args.tune_mm_mlp_adapter = client.args.tune_mm_mlp_adapter
        watch = _Watch(f"round {round} client {client.name}", before, log)
        trainer = make_trainer(
            self.session,
            args,
            kind=ClientTrainer,
            train_dataset=client.dataset.select(client.slices[round - 1]),
            data_collator=self.collator,
            callbacks=[watch],
            progress=False,
        )
        if self.schedule == "run":
            trainer.steps_before, trainer.steps_of_run = before, sum(steps)
        checkpoint = last_checkpoint(args.output_dir)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        loss = result.training_loss
        if checkpoint:  # that was the mean since then; the log goes back to the turn's beginning
            losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
            loss = sum(losses) / len(losses) if losses else loss
        update = {name: t.float() for name, t in projector_state(self.session.model).items()}
        trainer.release()
        metrics = {
            "loss": loss,
            "steps": result.global_step,
            "seconds": watch.seconds,
        }
        return Update(update, samples, metrics)


class ClientTrainer(LLaVATrainer):
    """LLaVA's trainer, with a learning-rate schedule that spans the client's rounds."""

    steps_before = 0
    steps_of_run = 0

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and self.steps_of_run:
            whole = super().create_scheduler(self.steps_of_run, optimizer)
            shifted = [lambda s, f=f: f(s + self.steps_before) for f in whole.lr_lambdas]
            for group in whole.optimizer.param_groups:
                group["lr"] = group.pop("initial_lr")
            self.lr_scheduler = LambdaLR(whole.optimizer, shifted)
        return super().create_scheduler(num_training_steps, optimizer)

    def release(self) -> None:
        """Let go of optimizer and engine, so that the next client finds the model as it was."""
        engine = getattr(self, "deepspeed", None)
        if engine is not None:
            engine.destroy()
        self.optimizer = self.lr_scheduler = self.model_wrapped = self.deepspeed = None


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
