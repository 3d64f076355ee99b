"""The script driver: a client's round is a process, the user's own training script.

To the command (`--fed_client_command`, or the client's own `command:`) are added, at its end:

    [the client's own flags of clients.yaml] --pretrain_mm_mlp_adapter FILE --data_path FILE
    [--image_folder DIR] --output_dir DIR --seed N

FILE and DIR are absolute: the state that is sent down, this round's slice of the client's records
as LLaVA JSON, and an empty folder in which `mm_projector.bin` is expected. Upstream's own training
code knows these flags. Nothing else of the command line of `fed.train` reaches the client: model,
batch, learning rate and the like are what its script says.

Two things need clients that run `llava.train` of this package. `--fed_lr_schedule run` adds
`--schedule_samples N … --schedule_round R`. With `--lora_enable True` the state is a LoRA folder,
sent as `--lora_weight_path DIR` (which upstream passes over), and expected back in the same files.

Where a method's clients keep private parameters (Pilot), these are in the file or folder that is
sent, and are taken from what comes back, with the flags that say what the client is to do with
them. They lie in OUTPUT/clients/NAME, as with the resident driver.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed.clients.clients_yaml import ClientSpec
from fed.clients.slices import seed_of
from fed.clients.task import ClientError, ClientTask, Result
from fed.clients.update import Update
from fed.clients.wire import carried
from fed.drivers.client_process import PROCESS_KEYS, ProcessSpec, read_process
from fed.drivers.driver import Driver, Run, driver
from fed.drivers.flags import CommandFlags, ParallelFlags, TryFlags
from fed.drivers.process_groups import ProcessGroups, sole_use, unwound_by_signals
from fed.drivers.script_clients import make_clients
from fed.drivers.start import as_one_process, starting_point
from fed.state import State, StateError
from llava.atomic import write_text
from llava.model.checkpoint_names import PROJECTOR_FILE
from llava.model.lora import NON_LORA_FILE
from llava.model.trainable_part import read_result

logger = logging.getLogger(__name__)


@dataclass
class ScriptFlags(CommandFlags, ParallelFlags, TryFlags):
    """The flags of --fed_driver script."""


@driver("script")
class ScriptDriver(Driver):
    """Runs clients' tasks as processes, with logs in `logs/round-NNNN-CLIENT.log`.

    A model of its own is loaded only to draw a state to start from, or to measure.
    """

    keys = PROCESS_KEYS
    may_fail = True
    hands_over = True
    flags = ScriptFlags
    lr_schedule = "round"  # upstream's own training code knows no schedule that spans several runs

    def __init__(self, run: Run):
        fed, flags = run.arguments.fed, run.flags(ScriptFlags)
        self.clients = make_clients(run)
        self.datasets = [client.records for client in self.clients]
        start = starting_point(run)
        self.store, self.part, self.initial = start.store, start.store.part, start.initial
        self.session = start.session if fed.fed_eval_data_path else None
        self.output_dir = run.output_dir
        self.schedule, self.wire = fed.fed_lr_schedule, fed.fed_wire
        self.timeout, self.retries = flags.fed_client_timeout, flags.fed_client_retries
        self.parallel = flags.fed_parallel_clients
        self.log_of = run.log_of
        self._log_mutex = threading.Lock()

    @classmethod
    def command_line(cls, argv: list[str]) -> list[str]:
        """Refuse a launcher; where nothing is measured, the GPUs are left to the clients."""
        return as_one_process(
            argv,
            "--fed_driver script is one process that starts the clients': a launcher and "
            "--deepspeed belong into the client's own command",
        )

    @classmethod
    def read_keys(cls, entry: Mapping[str, Any], folder: Path, where: str) -> ProcessSpec:
        return read_process(entry, folder, where)

    @classmethod
    def settings_of(cls, spec: ClientSpec) -> dict[str, Any]:
        return {"command": spec.driver.command}

    def run(
        self, tasks: Sequence[ClientTask], go_on: Callable[[], bool]
    ) -> Generator[tuple[ClientTask, Result], None, None]:
        """As `Driver.run`. Closing it, Ctrl-C, SIGTERM and SIGHUP end all processes."""
        if not tasks:
            return
        (self.output_dir / "logs").mkdir(parents=True, exist_ok=True)
        with unwound_by_signals():
            yield from self._side_by_side(tasks, go_on)

    def _side_by_side(
        self, tasks: Sequence[ClientTask], go_on: Callable[[], bool]
    ) -> Generator[tuple[ClientTask, Result], None, None]:
        waiting, running = list(tasks), dict[Future, ClientTask]()
        groups = ProcessGroups()
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                while waiting or running:
                    for task in list(waiting) if go_on() else ():
                        if len(running) < self.parallel and not any(
                            task.client.shares_gpu(other.client) for other in running.values()
                        ):
                            waiting.remove(task)
                            running[pool.submit(self._result, task, groups)] = task
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=lambda f: tasks.index(running[f])):
                        yield running.pop(future), future.result()
            finally:
                groups.close()

    def _result(self, task: ClientTask, groups: ProcessGroups) -> Result:
        for left in reversed(range(1 + self.retries)):
            try:
                return self._fit(task, groups)
            except ClientError as error:
                failure = error
            if left:
                logger.info("client %s is tried again", task.name)
        return failure

    def _fit(self, task: ClientTask, groups: ProcessGroups) -> Update:
        """One try of a task."""
        client, samples = task.client, task.client.samples(task.round)
        if samples == 0:
            return Update(task.state, 0, {"loss": None, "steps": 0, "seconds": 0.0})
        output = task.work_dir / "output"
        log = self.output_dir / "logs" / f"round-{task.round:04d}-{client.name}.log"
        task.work_dir.mkdir(parents=True, exist_ok=True)
        with sole_use(task.work_dir) as lock:
            begun_at = _last_step(output)
            if not begun_at:
                shutil.rmtree(output, ignore_errors=True)
            output.mkdir(exist_ok=True)
            for name in self.part.files:
                (output / name).unlink(missing_ok=True)
            beside, flags = self.store.given(task)
            command = self._command(task, output, beside, flags)
            with open(log, "a") as file:
                file.write(f"$ {shlex.join(command)}\n")
            said_before, began = log.stat().st_size, time.perf_counter()
            ended = groups.run(
                command,
                folder=task.work_dir,
                lock=lock,
                log=log,
                env=client.process.environment(os.environ),
                cwd=client.process.cwd,
                timeout=self.timeout,
            )
            seconds = time.perf_counter() - began
            try:
                if ended:
                    raise StateError(ended)
                result = read_result(self.part, output, like=task.state | beside)
            except StateError as error:
                # What cannot be continued, was continued in vain, or led to this, is not kept.
                if not ended or _last_step(output) <= begun_at:
                    shutil.rmtree(output, ignore_errors=True)
                raise self._failure(task, str(error), log, said_before) from None
        history, steps = _history(output)
        losses = [entry["loss"] for entry in history if "loss" in entry]
        loss = sum(losses) / len(losses) if losses else None
        self._report(task, history, steps)
        self.store.take_back(task, {name: result.pop(name) for name in beside})
        update = Update(result, samples, {"loss": loss, "steps": steps, "seconds": seconds})
        return carried(update, task.state, self.wire, f"client {task.name}")

    def _command(
        self, task: ClientTask, output: Path, beside: State, flags: Mapping[str, Any]
    ) -> list[str]:
        """Write what the client is given, and the command that says where it is."""
        client, round = task.client, task.round
        sent, data_file = task.work_dir / "sent", task.work_dir / "data.json"
        self.part.write(task.state | beside, sent)
        records = [client.records[i] for i in client.slices[round - 1]]
        write_text(data_file, json.dumps(records))
        paths = {
            self.part.flag: self.part.sent(sent),
            "data_path": data_file,
            "image_folder": client.image_folder,
            "output_dir": output,
        }
        words = [*client.command]
        for flag, path in paths.items():
            words += [f"--{flag}", os.path.abspath(path)] if path else []
        for flag, value in flags.items():
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        words += ["--seed", str(seed_of(client.seed, client.name, round))]
        if self.schedule == "run":
            sizes = [str(len(cut)) for cut in client.slices]
            words += ["--schedule_samples", *sizes, "--schedule_round", str(round)]
        return words

    def _failure(self, task: ClientTask, how: str, log: Path, said_before: int) -> ClientError:
        """The failure in one sentence; the end of the log goes to the screen at once."""
        lines = [f"  {task.name} | {line}" for line in _tail(log, said_before)]
        command = shlex.join(task.client.command)
        text = f"client {task.name}, round {task.round}: `{command}` {how} (log: {log})"
        logger.warning("%s", "\n".join([text, *lines]))
        return ClientError(text)

    def _report(self, task: ClientTask, history: list[dict], steps: int) -> None:
        """Hand the trainer's logs on, at the client's step counted over its rounds."""
        slices = task.client.slices
        # Earlier rounds took as many steps a sample as this one.
        seen = sum(len(cut) for cut in slices[: task.round - 1])
        before = steps * seen // len(slices[task.round - 1])
        log = self.log_of(task.name)
        with self._log_mutex:
            for entry in history:
                shown = {k: entry[k] for k in ("loss", "learning_rate", "grad_norm") if k in entry}
                if "loss" in shown:
                    log(before + entry.get("step", 0), shown)


def _last_step(output: Path) -> int:
    """The step of the newest checkpoint that training can go on from, 0 if there is none.

    Upstream's projector-only checkpoints lack the optimizer, its LoRA checkpoints the projector.
    """
    steps = [0]
    for folder in output.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        has = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if (
            number.isdigit()
            and "trainer_state.json" in has
            and has & {"optimizer.pt", "latest"}
            and has & {PROJECTOR_FILE, NON_LORA_FILE}
        ):
            steps.append(int(number))
    return max(steps)


def _history(output: Path) -> tuple[list[dict], int]:
    """The trainer's logs and its number of steps, where it has left them."""
    try:
        state = json.loads((output / "trainer_state.json").read_text())
        return [dict(entry) for entry in state["log_history"]], int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return [], 0


def _tail(log: Path, start: int, lines: int = 15) -> list[str]:
    """The last lines of a log from byte `start` on; of a progress bar only how it last looked."""
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - 2**16))
        text = file.read().decode(errors="replace")
    last = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in last if line][-lines:]
