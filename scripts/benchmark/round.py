"""What a round costs the server beside training: memory, seconds and bytes by number of clients.

    python scripts/benchmark/round.py                                # LLaVA-1.5-7B's projector
    python scripts/benchmark/round.py --geometry lora --clients 8    # 320 million values of LoRA
    python scripts/benchmark/round.py --geometry lora-r8 --method pilot --clients 16 64
    python scripts/benchmark/round.py --sampled                      # 50 of 1,000 clients a round

The round loop of `fed.train` runs two rounds in a process of its own, with a driver that only draws
numbers; the second round counts. Memory is the peak of the process's anonymous memory (RssAnon) in
it, less what it was before the run, in units of one float32 state: neither mapped files nor the
start state. `writing` is what is left of the round's seconds without those of drawing numbers, of
the method, and of comparing updates; `cp` copies the same number of bytes file by file with cp and
sync, in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aggregate import ROOT, SHAPES, Peak

RANK = {"lora": 128, "lora-r8": 8}
LINEAR = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
          "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}  # fmt: skip


def shapes_of(geometry: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if rank := RANK.get(geometry):  # on all linear layers of Llama-7B
        for layer in range(32):
            for name, (out, width) in LINEAR.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}_proj"
                shapes[f"{prefix}.lora_A.weight"] = (rank, width)
                shapes[f"{prefix}.lora_B.weight"] = (out, rank)
        return shapes
    if geometry == "tiny":  # a Pilot client's two parts
        return {
            "model.mm_projector.0.weight": (16, 16),
            "base_model.model.q.lora_A.weight": (4, 16),
        }
    for place, (out, width) in zip((0, 2), SHAPES[geometry], strict=True):
        shapes[f"model.mm_projector.{place}.weight"] = (out, width)
        shapes[f"model.mm_projector.{place}.bias"] = (out,)
    return shapes


@dataclass
class Client:
    name: str

    def samples(self, round: int) -> int:
        return 100


class Numbers:
    """As much of a driver as the loop needs: an update is its start and noise."""

    clients_keep = writes_updates = False

    def __init__(self, clients: int, rule: bool):
        self.clients, self.rule = [Client(f"c{k:04d}") for k in range(clients)], rule

    def drawn_from(self, round: int) -> list[Client]:
        return self.clients

    def run(self, tasks: list, go_on: object) -> Iterator[tuple]:
        import torch

        from fed.clients.update import Update

        for task in tasks:
            began = time.perf_counter()
            draw = torch.Generator().manual_seed(int(task.name[1:]) * 1000 + task.round)
            state = {}
            for name, tensor in task.state.items():  # in place: the memory is the loop's to use
                noise = torch.empty(tensor.shape).normal_(0, 1e-3, generator=draw)
                state[name] = noise.add_(tensor)
            beside = {n: t - 0.5 * task.state[n] for n, t in state.items()} if self.rule else {}
            update = Update(state, 100, {"loss": 1.0}, extras=beside, kept=beside)
            update.metrics["seconds"] = time.perf_counter() - began
            del state, beside
            yield task, update
            del update


def measure(geometry: str, method: str, clients: int, sampled: int, folder: Path) -> dict:
    """Two rounds, in this process."""
    import torch

    from fed import methods
    from fed.server.loop import RoundLoop

    chosen = methods.get(method)
    torch.manual_seed(0)
    initial = {n: 0.02 * torch.randn(s) for n, s in shapes_of(geometry).items()}
    size = sum(t.nbytes for t in initial.values())
    driver = Numbers(clients, chosen.client_rule is not None)
    tasks = {client.name: f"task{k % 3}" for k, client in enumerate(driver.clients)}
    loop = RoundLoop(driver, chosen, {}, folder / "run", {}, rounds=1, seed=0,
                     clients_per_round=sampled, task_of=tasks)  # fmt: skip
    loop.run(initial)
    loop.rounds = 2
    before = {path: path.stat().st_mtime_ns for path in (folder / "run/fed").rglob("*.safetensors")}
    with Peak() as peak:
        loop.run(initial)
    written = [path for path in (folder / "run/fed").rglob("*.safetensors")
               if before.get(path) != path.stat().st_mtime_ns]  # fmt: skip
    seconds = json.loads((folder / "run/rounds.jsonl").read_text().splitlines()[1])["seconds"]
    taking = sampled or clients
    bytes_of_round = size * taking * (3 if driver.rule else 1) + sum(
        path.stat().st_size for path in written
    )
    row = {"clients": clients, "memory": peak.grown / size, "writing": seconds["other"],
           "aggregation": seconds["aggregation"], "comparison": seconds["comparison"],
           "client files": sum(p.parent.name in ("personal", "kept") for p in written),
           "megabytes": bytes_of_round / 1e6}  # fmt: skip
    row["cp"] = copying(folder / "run/fed/state.safetensors", math.ceil(bytes_of_round / size))
    return row


def copying(file: Path, times: int) -> float:
    """Seconds of cp and sync of so many files of a state's size."""
    folder = file.parent / "copies"
    folder.mkdir()
    began = time.perf_counter()
    for i in range(times):
        subprocess.run(["cp", file, folder / str(i)], check=True)
        subprocess.run(["sync", folder / str(i)], check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def in_a_process(geometry: str, method: str, clients: int, sampled: int, where: Path) -> dict:
    folder = tempfile.mkdtemp(dir=where)
    command = [sys.executable, __file__, "--one", folder, "--geometry", geometry,
               "--method", method, "--clients", str(clients), "--of", str(sampled)]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=[*SHAPES, *RANK, "tiny"], default="llava-1.5-7b")
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 48, 128])
    parser.add_argument("--method", default="fedavg")
    parser.add_argument("--sampled", action="store_true", help="50 of 1,000 clients a round")
    parser.add_argument("--folder", type=Path, help="where the run's files are written")
    parser.add_argument("--of", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        row = measure(args.geometry, args.method, args.clients[0], args.of, args.one)
        print("\n" + json.dumps(row))
        return
    cases = [(args.geometry, args.method, clients, 0) for clients in args.clients]
    if args.sampled:
        cases = [("tiny", method, 1000, 50) for method in ("fedavg", "scaffold", "pilot")]
    print(f"{platform.machine()}, two rounds a line, the second counts\n")
    print("| method | clients | MB | memory, in states | writing, s | cp and sync, s | × cp "
          "| aggregation, s | comparison, s | client files |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for geometry, method, clients, sampled in cases:
        row = in_a_process(geometry, method, clients, sampled, args.folder)
        of = f"{sampled} of {clients:,}" if sampled else f"{clients}"
        print(f"| {method} | {of} | {row['megabytes']:,.1f} | {row['memory']:.2f} "
              f"| {row['writing']:.2f} | {row['cp']:.2f} | {row['writing'] / row['cp']:.2f} "
              f"| {row['aggregation']:.2f} | {row['comparison']:.2f} | {row['client files']} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
