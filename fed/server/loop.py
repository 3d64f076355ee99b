"""The round loop: choose, send down, collect, aggregate, write the state, go on.

A run may be killed at any instruction. Started again with the same command it ends in the same
bits: whatever is drawn (who takes part, which samples, in which order) depends on the seed and the
round alone, what is kept lies in files that are whole or absent, and a round that was cut short is
finished from the updates that were there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fed import state as states
from fed.clients import reliability
from fed.clients.slices import seed_of
from fed.clients.task import (
    ClientError,
    ClientTask,
    failures,
    keep_failure,
    may_fail,
)
from fed.clients.update import Update, load_update, save_update
from fed.drivers.driver import Driver, Participant
from fed.drivers.run_name import run_name
from fed.methods import Method, Outcome
from fed.methods.interface.checks import check_not_zero
from fed.methods.interface.client_rule import for_clients
from fed.methods.interface.each import Each
from fed.methods.interface.sums import Round
from fed.numerics.shrinkage import drawn_shares
from fed.server.client_states import ClientStates
from fed.server.free_memory import give_back
from fed.server.records import Records
from fed.server.reliability import gathered_sums, weighed
from fed.server.round_metrics import (
    Stopwatch,
    curves,
    line_of_task,
    lines_of_measures,
    round_record,
    suspicions,
)
from fed.server.round_state import STATE_FILE, RoundState
from fed.state import State
from llava.atomic import remove_leftovers
from llava.errors import InputError
from llava.train.settings import check_same


@dataclass(frozen=True)
class Secure:
    """The flags of secure sums: --fed_secure_min and --fed_secure_norm."""

    least: int
    norm: float


@dataclass
class RoundLoop:
    """One federated run.

    Args:
        driver: the clients, and what runs their tasks.
        method, options: the aggregation method.
        output_dir: gets `rounds.jsonl`, and `fed/` with what resuming needs.
        settings: those that must be the same when a run is continued.
        rounds: the number of times that clients send something back.
        min_clients: with how many clients a round goes on when others have failed; 0: with all.
        explains: whether clients are asked what their pictures explain, and weigh by it.
        secure: the flags of secure sums, where the server gets nothing else.
        task_of: the task of each client, where clients have tasks.
        evaluate: `evaluate(client, state, extras, round) -> dict` of the state that a client is
            sent after a round, or None; the client is "global" where all have one state.
        log: `log(values, round)`: scalars for TensorBoard and its like.
        main: whether this process writes; in a distributed run just one does.
        follows: whether this process only trains, and goes on with the state that the main one has
            written of a round.
        barrier: waits for all processes of a distributed run.
    """

    driver: Driver
    method: Method
    options: Mapping[str, Any]
    output_dir: Path
    settings: Mapping[str, Any]
    rounds: int
    seed: int
    clients_per_round: int = 0
    min_clients: int = 0
    explains: bool = False
    secure: Secure | None = None
    task_of: Mapping[str, str] = field(default_factory=dict)
    evaluate: Callable[[str, State, State, int], dict] | None = None
    evaluate_every: int = 1
    log: Callable[[dict[str, float], int], None] = lambda values, round: None
    main: bool = True
    follows: bool = False
    barrier: Callable[[], None] = lambda: None
    state: RoundState | None = field(default=None, init=False)  # of the last round that is whole

    @property
    def _folder(self) -> Path:
        return self.output_dir / "fed"

    def _round_folder(self, round: int) -> Path:
        """The folder of a round's finished updates until it is over."""
        return self._folder / f"round-{round:04d}"

    def run(self, initial: State) -> RoundState:
        """Run all rounds that are left, from `initial` if none was; returns the last state."""
        self.state = self._resume(initial)
        self.barrier()
        self._watch = Stopwatch()
        while self.state.round < self.rounds:
            self.state = self._round(self.state)
        return self.state

    def _resume(self, initial: State) -> RoundState:
        self._records = Records(self.output_dir)
        if self.main:
            for folder in (self.output_dir, self._folder):
                remove_leftovers(folder)
        begun = self._begun()
        if self.main and not begun:
            # Written before anything trains: a round that is cut short belongs to these settings.
            first = RoundState.first(self._folder, initial, self.settings, self._records.mark)
            first.save(self._folder)
        self.barrier()
        state = RoundState.load(self._folder)
        check_same(state.settings, self.settings, f"--output_dir {self.output_dir}")
        self._records.resume(state.records, write=self.main)
        if begun and state.round < self.rounds:
            self._say(f"continuing after round {state.round} of {self.rounds}")
        elif begun:
            self._say(f"{self.output_dir}: round {state.round} is done, nothing is left to train")
        if self.main:
            self._clean(state, range(1, state.round + 1))
        return state

    def _begun(self) -> bool:
        """Whether a state lies there.

        Raises:
            InputError: there are rounds, and no state that they are of.
        """
        try:
            there = os.listdir(self._folder)
        except FileNotFoundError:
            return False
        if STATE_FILE in there:
            return True
        if rounds := sorted(name for name in there if name.startswith("round-")):
            raise InputError(
                f"{self._folder}: {rounds[0]} of an earlier run lies there, and its {STATE_FILE} "
                "does not; remove the folder, or name another --output_dir"
            )
        return False

    def _clean(self, state: RoundState, rounds: Iterable[int]) -> None:
        """Remove what finished rounds do not need any more."""
        for round in rounds:
            shutil.rmtree(self._round_folder(round), ignore_errors=True)
        state.personal.remove_others()
        state.kept.remove_others()

    def chosen(self, round: int) -> list[Participant]:
        """The clients of a round: all, or as many as asked for of those that may be drawn.

        These are drawn anew each round; fewer, or nobody, where there are no more.
        """
        if not self.clients_per_round or self.clients_per_round >= len(self.driver.clients):
            return list(self.driver.clients)
        able = self.driver.drawn_from(round)
        if self.clients_per_round >= len(able):
            return able
        draw = random.Random(seed_of(self.seed, "clients of round", round))
        picked = set(draw.sample(range(len(able)), self.clients_per_round))
        return [client for i, client in enumerate(able) if i in picked]

    def _round(self, state: RoundState) -> RoundState:
        round = state.round + 1
        tasks = [self._task(state, client, round) for client in self.chosen(round)]
        updates, failed = self._collect(tasks)
        if self.follows:
            self.barrier()  # the round's states are made
            self.barrier()  # and written
            return RoundState.load(self._folder, check=False)
        with self._watch.part("aggregation"):
            # In the clients' order, whoever was first to finish; read again, and checked, for hours
            # may have passed.
            updates = {t.name: load_update(t.update_file) for t in tasks if t.name in updates}
            next_state, facts = self._aggregate(state, tasks, updates, failed)
        self.barrier()
        with self._watch.part("evaluation"):
            heldout = self._measure(next_state)
        with self._watch.part("comparison"):
            record = round_record(
                round, tasks, updates, failed, self.secure is not None, method=self.method.name
            )
        record |= {"heldout": heldout, "facts": facts}
        if self.explains and self.secure is None:
            record["reliability"] = drawn_shares(next_state.explained, next_state.explained)
        record["seconds"] = self._watch.lap()  # the writing of this round's state is of the next
        self._records.add(record, write=self.main)
        next_state.records = self._records.mark
        if self.main:
            next_state.save(self._folder)
            self.state = next_state
            self._clean(next_state, [round])
        self.log(curves(record), round)
        self._report(record)
        self.barrier()
        return RoundState.load(self._folder, check=False)  # mapped, where it was in memory

    def _task(self, state: RoundState, client: Participant, round: int) -> ClientTask:
        start, extras = self.sent(state, client.name)
        kept = state.kept.get(client.name, {})
        last = state.last.get(client.name, 0)
        return ClientTask(client, start, round, self._round_folder(round), extras, kept, last)

    def _report(self, record: dict) -> None:
        """A round's lines on the screen."""
        where = f"round {record['round']}/{self.rounds}"
        if "skipped" in record["facts"]:
            self._say(f"{where}  skipped: {record['facts']['skipped']}")
        for doubt in suspicions(record):
            self._say(f"{where}  warning: {doubt}")
        for line in lines_of_measures(record, self.rounds):
            self._say(line)

    def sent(self, state: RoundState, client: str) -> tuple[State, State]:
        """The state that a client starts from, and the tensors that are sent beside it."""
        if self.method.send is None:
            return state.personal.get(client, state.shared), for_clients(state.memory)
        task = self.task_of.get(client, "")
        return self.method.send(client, task, state.personal, state.shared, state.memory)

    def _collect(self, tasks: Sequence[ClientTask]) -> tuple[dict[str, Update], dict[str, str]]:
        """Every task's update, or the reason of its failure; those on the disk are kept."""
        updates = self._finished(tasks)
        failed = failures(tasks)
        limit = may_fail(tasks, self.min_clients)
        if len(failed) > limit:  # the run stopped for that, and is to try again
            for task in tasks:
                task.failure_file.unlink(missing_ok=True)
            failed = {}
        self.barrier()
        waiting = [t for t in tasks if t.name not in updates and t.name not in failed]
        began, seconds = time.perf_counter(), 0.0
        with contextlib.closing(self.driver.run(waiting, lambda: len(failed) <= limit)) as results:
            for task, result in results:
                if isinstance(result, ClientError):
                    failed[task.name] = str(result)
                    keep_failure(task, str(result))
                    if len(failed) <= limit:
                        self._say(f"round {task.round}/{self.rounds}  goes on without {task.name}")
                    continue
                self._keep(task, result)
                # Mapped: a round needs no memory for its clients' updates.
                updates[task.name] = result = load_update(task.update_file, check=False)
                seconds += result.metrics.get("seconds", 0.0)
                self._say(line_of_task(task, self.rounds, result, self.secure is not None))
                del result
                give_back()
        # Clients that are at work at once have more seconds than the clock.
        self._watch.add("training", min(seconds, time.perf_counter() - began))
        if len(failed) > limit:
            raise ClientError(_why_stopped(failed, self.min_clients))
        return updates, failed

    def _finished(self, tasks: Sequence[ClientTask]) -> dict[str, Update]:
        """The updates that an earlier start of this round has kept."""
        updates = {}
        for task in tasks:
            if not task.update_file.exists():
                continue
            try:
                updates[task.name] = update = load_update(task.update_file)
                self._check(task, update)
            except InputError as error:
                updates.pop(task.name, None)
                self._say(f"round {task.round}/{self.rounds}  {task.name} trains again: {error}")
                task.update_file.unlink(missing_ok=True)
        return updates

    def _keep(self, task: ClientTask, update: Update) -> None:
        """Check an update, and write it if its driver has not; what is refused is not kept."""
        try:
            self._check(task, update)
        except InputError:
            task.update_file.unlink(missing_ok=True)
            raise
        if self.main and not task.update_file.exists():
            save_update(update, task.update_file)
        if self.main:  # its checkpoints, which may be large
            shutil.rmtree(task.work_dir, ignore_errors=True)
        if not self.driver.writes_updates:
            self.barrier()

    def _check(self, task: ClientTask, update: Update) -> None:
        """Refuse, by the client's name, what no method should see."""
        who = f"client {task.name}"
        if self.secure is not None and self.driver.clients_keep:
            states.check(update.state | update.extras | update.kept, like={}, who=who)
            return
        states.check(update.state, like=task.state, who=who)
        check_not_zero(update.state, task.state, who)
        reliability.read(update.metrics.get("explained"), f"{who}, ")
        rule = self.method.client_rule
        if rule is not None and update.num_samples:
            sent = task.state if rule.sends else {}
            kept = task.state if rule.keeps and not self.driver.clients_keep else {}
            states.check(update.extras, like=sent, who=f"{who}, beside its state")
            states.check(update.kept, like=kept, who=f"{who}, in what it keeps")

    def _aggregate(
        self,
        state: RoundState,
        tasks: Sequence[ClientTask],
        updates: Mapping[str, Update],
        failed: dict[str, str],
    ) -> tuple[RoundState, dict]:
        """The next round's state, without the record, and the method's facts.

        Who leaves a secure sum joins `failed`.
        """
        next_state = dataclasses.replace(state, round=state.round + 1)
        trained = {name: update for name, update in updates.items() if update.num_samples > 0}
        if not trained:
            return next_state, {"skipped": "no client had a sample in this round"}
        weights = [float(update.num_samples) for update in trained.values()]
        told = {n: reliability.read(u.metrics.get("explained")) for n, u in trained.items()}
        next_state.explained = gathered_sums(state.explained, told)
        if self.secure is not None:
            there = [task for task in tasks if task.name in trained]
            outcome = self._summed(state, there, next_state.explained, failed)
        else:
            if self.explains:
                weights = weighed(weights, list(self._reliabilities(next_state, trained).values()))
            outcome = self.method(
                [update.state for update in trained.values()],
                weights=weights,
                base=state.shared,
                memory=state.memory or None,
                clients=list(trained),
                extras=[update.extras for update in trained.values()],
                total=len(self.driver.clients),
                tasks=[self.task_of.get(name, "") for name in trained],
                **self.options,
            )
        round = next_state.round
        keep = {name: update.kept for name, update in trained.items() if update.kept}
        next_state.kept = self._write(state.kept.after(round, keep), keep, list(keep.values()))
        if isinstance(outcome.state, dict):
            next_state.shared = outcome.state
        else:
            next_state.personal = self._write(
                state.personal.after(round, trained), trained, outcome.state
            )
        next_state.last = {**state.last, **dict.fromkeys(trained, round)}
        next_state.memory = outcome.memory or {}
        return next_state, outcome.facts

    def _summed(
        self,
        state: RoundState,
        tasks: Sequence[ClientTask],
        explained: Mapping[str, Sequence[float]],
        failed: dict[str, str],
    ) -> Outcome:
        """The method's outcome from secure sums over the clients of `tasks`."""
        from fed.clients.sum_client import Agreed, sums_of
        from fed.server.secure_sums import SecureSums

        assert self.secure is not None
        round = tasks[0].round
        heaviest = max(task.client.samples(round) for task in tasks)
        name = run_name(self._folder)
        agreed = Agreed(
            name,
            round,
            float(heaviest),
            self.secure.norm,
            self.secure.least,
            settings=self.driver.common_settings,
        )
        sums = sums_of(self.method, self.options, self.explains)
        clients = self.driver.summing(self._folder / "sums", tasks, sums, agreed, explained)
        secure = SecureSums(self._round_folder(round), agreed, clients.keys, clients.ask)
        names = [task.name for task in tasks]
        of_task = [self.task_of.get(name, "") for name in names]
        total = len(self.driver.clients)
        sent = for_clients(state.memory) if self.method.send is None else {}
        known = Round(state.shared, state.memory, len(tasks), total, names, of_task, sent)
        try:
            return secure.outcome(sums, known)
        finally:
            for name, why in secure.gone.items():
                failed[name] = why
                self._say(f"round {round}/{self.rounds}  the sums go on without {name}: {why}")

    @staticmethod
    def _reliabilities(state: RoundState, updates: Mapping[str, Update]) -> dict[str, float]:
        """Those of the clients that had samples in the round that `state` is of."""
        names = [name for name, update in updates.items() if update.num_samples > 0]
        return drawn_shares(state.explained, names)

    def _measure(self, state: RoundState) -> dict:
        due = self.evaluate_every and (
            state.round % self.evaluate_every == 0 or state.round == self.rounds
        )
        if self.evaluate is None or not due:
            return {}
        if state.personal:
            return {
                name: self.evaluate(name, *self.sent(state, name), state.round)
                for name in state.personal
            }
        return {"global": self.evaluate("global", state.shared, {}, state.round)}

    def _write(
        self, states: ClientStates, names: Iterable[str], changed: Each | Sequence[State]
    ) -> ClientStates:
        """Write the clients' new states; each is made only now, and only where it is written."""
        for k, name in enumerate(names if self.main else ()):
            states.write(name, changed[k])
            give_back()
        return states

    def _say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)


def _why_stopped(failed: Mapping[str, str], at_least: int) -> str:
    first, *more = failed.values()
    others = f", and {len(more)} more failed" if more else ""
    few = f"; with that fewer than --fed_min_clients {at_least} are left" if at_least else ""
    return f"{first}{others}{few}; the same command tries again and keeps what is finished"
