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
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from fed.clients.slices import seed_of
from fed.drivers.client_process import ProcessSpec
from fed.drivers.process_groups import ProcessGroups, locked, sole_use, unwound_by_signals
from fed.server.client_task import ClientFailed, Log, Result, Turn
from fed.server.round_state import Update
from fed.state import StateError
from llava.atomic import write_text
from llava.model.checkpoint import PROJECTOR_FILE
from llava.model.lora import NON_LORA_FILE
from llava.model.trainable_part import TrainablePart, read_result


@dataclass
class ScriptClient:
    """A client that is a process: its command with its own flags, its records, its slices."""

    name: str
    command: list[str]
    records: list[dict]
    slices: list[list[int]]
    seed: int
    image_folder: str | None = None
    process: ProcessSpec = field(default_factory=ProcessSpec)

    def samples(self, round: int) -> int:
        """How many samples round `round` (from 1) trains on."""
        return len(self.slices[round - 1])

    def shares_gpu(self, other: ScriptClient) -> bool:
        return bool({*(self.process.gpus or ())} & {*(other.process.gpus or ())})


class ScriptDriver:
    """Runs clients' turns as processes.

    Args:
        output_dir: gets `logs/round-NNNN-CLIENT.log`.
        form: what passes to and from the clients, a projector or LoRA.
        schedule: `run` lets the learning-rate schedule span the rounds.
        timeout: seconds that a try may take; 0 is without limit.
        retries: how often a turn that failed is tried again.
        parallel: how many clients are at work at once; those that share a GPU never are.
        log_of: a client's name → what takes its logs, `log(step, values)`.
    """

    def __init__(
        self,
        output_dir: Path,
        form: TrainablePart,
        schedule: str = "round",
        timeout: float = 0,
        retries: int = 0,
        parallel: int = 1,
        log_of: Callable[[str], Log] = lambda name: lambda step, values: None,
    ):
        self.output_dir = output_dir
        self.form = form
        self.schedule = schedule
        self.timeout = timeout
        self.retries = retries
        self.parallel = parallel
        self.log_of = log_of
        self._log_mutex = threading.Lock()

    def fit_many(
        self, turns: Sequence[Turn], go_on: Callable[[], bool]
    ) -> Iterator[tuple[Turn, Result]]:
        """The driver contract. Closing it, Ctrl-C, SIGTERM and SIGHUP end all processes."""
        if not turns:
            return
        (self.output_dir / "logs").mkdir(parents=True, exist_ok=True)
        refusal = f"--output_dir {self.output_dir}: another run is at work there"
        with locked(self.output_dir / "logs", refusal), unwound_by_signals():
            yield from self._side_by_side(turns, go_on)

    def _side_by_side(self, turns, go_on) -> Iterator[tuple[Turn, Result]]:
        waiting, running = list(turns), dict[Future, Turn]()
        groups = ProcessGroups()
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                while waiting or running:
                    for turn in list(waiting) if go_on() else ():
                        if len(running) < self.parallel and not any(
                            turn.client.shares_gpu(other.client) for other in running.values()
                        ):
                            waiting.remove(turn)
                            running[pool.submit(self._result, turn, groups)] = turn
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=lambda f: turns.index(running[f])):
                        yield running.pop(future), future.result()
            finally:
                groups.close()

    def _result(self, turn: Turn, groups: ProcessGroups) -> Result:
        for left in reversed(range(1 + self.retries)):
            try:
                return self._fit(turn, groups)
            except ClientFailed as error:
                failure = error
            if left:
                print(f"client {turn.name} is tried again", flush=True)
        return failure

    def _fit(self, turn: Turn, groups: ProcessGroups) -> Update:
        """One try of a turn."""
        client, samples = turn.client, turn.client.samples(turn.round)
        if samples == 0:
            return Update(turn.state, 0, {"loss": None, "steps": 0, "seconds": 0.0})
        output = turn.work_dir / "output"
        log = self.output_dir / "logs" / f"round-{turn.round:04d}-{client.name}.log"
        turn.work_dir.mkdir(parents=True, exist_ok=True)
        with sole_use(turn.work_dir) as lock:
            begun_at = _last_step(output)
            if not begun_at:
                shutil.rmtree(output, ignore_errors=True)
            output.mkdir(exist_ok=True)
            for name in self.form.files:
                (output / name).unlink(missing_ok=True)
            command = self._command(turn, output)
            with open(log, "a") as file:
                file.write(f"$ {shlex.join(command)}\n")
            said_before, began = log.stat().st_size, time.perf_counter()
            ended = groups.run(
                command,
                folder=turn.work_dir,
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
                result = read_result(self.form, output, like=turn.state)
            except StateError as error:
                # What cannot be continued, was continued in vain, or led to this, is not kept.
                if not ended or _last_step(output) <= begun_at:
                    shutil.rmtree(output, ignore_errors=True)
                raise self._failure(turn, str(error), log, said_before) from None
        history, steps = _history(output)
        losses = [entry["loss"] for entry in history if "loss" in entry]
        loss = sum(losses) / len(losses) if losses else None
        self._report(turn, history, steps)
        return Update(result, samples, {"loss": loss, "steps": steps, "seconds": seconds})

    def _command(self, turn: Turn, output: Path) -> list[str]:
        """Write what the client is given, and the command that says where it is."""
        client, round = turn.client, turn.round
        sent, data_file = turn.work_dir / "sent", turn.work_dir / "data.json"
        self.form.write(turn.state, sent)
        records = [client.records[i] for i in client.slices[round - 1]]
        write_text(data_file, json.dumps(records))
        paths = {
            self.form.flag: self.form.sent(sent),
            "data_path": data_file,
            "image_folder": client.image_folder,
            "output_dir": output,
        }
        words = [*client.command]
        for flag, path in paths.items():
            words += [f"--{flag}", os.path.abspath(path)] if path else []
        words += ["--seed", str(seed_of(client.seed, client.name, round))]
        if self.schedule == "run":
            sizes = [str(len(cut)) for cut in client.slices]
            words += ["--schedule_samples", *sizes, "--schedule_round", str(round)]
        return words

    def _failure(self, turn: Turn, how: str, log: Path, said_before: int) -> ClientFailed:
        """The failure in one sentence; the end of the log goes to the screen at once."""
        lines = "".join(f"  {turn.name} | {line}\n" for line in _tail(log, said_before))
        command = shlex.join(turn.client.command)
        text = f"client {turn.name}, round {turn.round}: `{command}` {how} (log: {log})"
        print(f"{text}\n{lines}", end="", file=sys.stderr, flush=True)
        return ClientFailed(text)

    def _report(self, turn: Turn, history: list[dict], steps: int) -> None:
        """Hand the trainer's logs on, at the client's step counted over its rounds."""
        slices = turn.client.slices
        # Earlier rounds took as many steps a sample as this one.
        seen = sum(len(cut) for cut in slices[: turn.round - 1])
        before = steps * seen // len(slices[turn.round - 1])
        log = self.log_of(turn.name)
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
