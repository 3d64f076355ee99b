"""The server's cost of aggregation: seconds and memory of each method, side by side in one run.

    python scripts/benchmark/aggregate.py                      # 8 clients, LLaVA-1.5-7B's projector
    python scripts/benchmark/aggregate.py --clients 8 32 128   # how it grows
    python scripts/benchmark/aggregate.py --device cuda

Clients are files in bfloat16 (`.safetensors`, memory-mapped): a common base, and updates with a
part that all share and one of rank 32 of their own. Each method runs in a process of its own, which
maps the files, aggregates once to warm up and then `--repeats` times; the least time counts.
Memory is what the process grew by beyond the mapped files: the peak of its anonymous memory
(RssAnon), sampled, less what it was before; on a GPU, the allocator's peak less the states.

The yardsticks: `numpy mean` reads the files' bits and sums them in float32, nothing else;
`Flower` is its own aggregate function where flwr is installed; `stacked SVD` takes the singular
value decomposition of [X_1 … X_K] of each layer, as a literal reading of Fed-CMP would.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "llava-1.5-7b": ((4096, 1024), (4096, 4096)),
    "llava-1.5-13b": ((5120, 1024), (5120, 5120)),
    "small": ((1152, 256), (1152, 1152)),
}
OURS = {
    "FedAvg": ("fedavg", {}),
    "FedAvgM": ("fedavgm", {}),
    "FedAdam": ("fedadam", {}),
    "FedExP": ("fedexp", {}),
    "Fed-CMP": ("fedcmp", {}),
    "Fed-CMP, momentum": ("fedcmp", {"beta": 0.5}),
    "Fed-CMP, exact": ("fedcmp", {"basis": "exact"}),
    "median": ("median", {}),
    "trimmed mean": ("trimmed_mean", {}),
    "Krum": ("krum", {}),
    "geometric median": ("geometric_median", {}),
    "norm clipping": ("norm_clip", {}),
}
YARDSTICKS = ("numpy mean", "Flower", "stacked SVD")
SLOW = ("Fed-CMP, exact", "stacked SVD")  # once, without warming up


def names_of(geometry: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for place, (out, width) in zip((0, 2), SHAPES[geometry], strict=True):
        shapes[f"model.mm_projector.{place}.weight"] = (out, width)
        shapes[f"model.mm_projector.{place}.bias"] = (out,)
    return shapes


def write_clients(folder: Path, geometry: str, clients: int) -> None:
    """`base.safetensors` and one file a client, those that are not there."""
    import torch
    from safetensors.torch import save_file

    def draw(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    shapes = names_of(geometry)
    source = draw(0)
    base = {n: 0.02 * torch.randn(s, generator=source) for n, s in shapes.items()}
    common = {n: torch.randn(s, generator=source) for n, s in shapes.items()}
    for k in range(-1, clients):
        path = folder / ("base.safetensors" if k < 0 else f"client-{k:03d}.safetensors")
        if path.exists():
            continue
        own, state = draw(1 + k), {}
        for name, shape in shapes.items():
            moved = torch.zeros(shape) if k < 0 else 0.3 * common[name]
            if k >= 0 and len(shape) == 2:
                left = torch.randn(shape[0], 32, generator=own)
                moved = moved + left @ torch.randn(32, shape[1], generator=own) / 6
            elif k >= 0:
                moved = moved + torch.randn(shape, generator=own)
            state[name] = (base[name] + 0.005 * moved).bfloat16()
        save_file(state, path)


def work(name: str, folder: Path, clients: int, device: str) -> Callable[[], object]:
    """One call of a method, as a function without arguments; its files are mapped."""
    files = [folder / f"client-{k:03d}.safetensors" for k in range(clients)]
    weights = [100 + 10 * k for k in range(clients)]
    if name == "numpy mean":
        return lambda: numpy_mean(files, weights)
    import torch

    from fed import methods, state

    states = [state.load(path) for path in files]
    base = state.load(folder / "base.safetensors")
    if device != "cpu":
        states = [{n: t.to(device) for n, t in each.items()} for each in states]
        base = {n: t.to(device) for n, t in base.items()}
    if name == "Flower":
        from flwr.server.strategy.aggregate import aggregate

        # Its arrays are numpy's, which have no bfloat16: float32, made before the clock starts.
        arrays = [([t.float().numpy() for t in s.values()], w)
                  for s, w in zip(states, weights, strict=True)]  # fmt: skip
        return lambda: aggregate(arrays)
    if name == "stacked SVD":
        return lambda: stacked_svd(states, base, weights)
    method, options = OURS[name]
    memory = None
    if options.get("beta"):
        memory = methods.get(method)(states, weights=weights, base=base, **options).memory

    def run() -> object:
        outcome = methods.get(method)(states, weights=weights, base=base, memory=memory, **options)
        if device != "cpu":
            torch.cuda.synchronize()
        return outcome

    return run


def numpy_mean(files: list[Path], weights: list[int]) -> dict:
    """Read every file and take the weighted mean: what nobody can do without."""
    import numpy

    total, means = sum(weights), {}
    for path, weight in zip(files, weights, strict=True):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            body = numpy.memmap(file, mode="r", offset=8 + length)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            bits = body[first:last].view(numpy.uint16).astype(numpy.uint32) << 16
            part = bits.view(numpy.float32) * numpy.float32(weight / total)
            if name in means:
                means[name] += part
            else:
                means[name] = part
    return means


def stacked_svd(states: list, base: dict, weights: list[int]) -> None:
    import torch

    from fed.numerics.layers import Parts, layers

    for layer in layers(base)[0]:
        parts = Parts(states, layer, base)
        stack = torch.cat([m * (w / sum(weights)) ** 0.5 for m, w in zip(parts, weights, strict=True)], 1)  # fmt: skip # noqa: E501
        torch.linalg.svd(stack, full_matrices=False)


class Peak:
    """The most anonymous memory of this process while it is watched, less that at the start."""

    def __enter__(self) -> Peak:
        self.before = self.most = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        with open("/proc/self/status") as file:
            (line,) = [line for line in file if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    @property
    def grown(self) -> int:
        return self.most - self.before


def measure(name: str, folder: Path, clients: int, repeats: int, device: str) -> dict:
    """Seconds and bytes of one method, in this process."""
    import numpy  # noqa: F401  # before memory is looked at
    import torch

    from fed import methods

    methods.names()
    run = work(name, folder, clients, device)
    slow, seconds = name in SLOW, []
    if not slow:
        run()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    with Peak() as peak:
        for _ in range(1 if slow else repeats):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    grown = peak.grown
    if device != "cpu":
        grown = torch.cuda.max_memory_allocated() - held
    return {"method": name, "clients": clients, "seconds": min(seconds), "bytes": grown}


def in_a_process(name: str, folder: Path, clients: int, args: argparse.Namespace) -> dict | None:
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder),
               "--clients", str(clients), "--repeats", str(args.repeats),
               "--device", args.device]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1]
        print(f"| {name} | {clients} | – ({why}) | | | |", flush=True)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=SHAPES, default="llava-1.5-7b")
    parser.add_argument("--clients", type=int, nargs="+", default=[8])
    parser.add_argument("--methods", nargs="+", default=[*YARDSTICKS[:2], *OURS, YARDSTICKS[2]])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where the clients' files are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.one:
        print(
            json.dumps(measure(args.one, args.folder, args.clients[0], args.repeats, args.device))
        )
        return
    values = sum(_size(shape) for shape in names_of(args.geometry).values())
    where = platform.processor() or platform.machine()
    if args.device != "cpu":
        import torch

        where = torch.cuda.get_device_name()
    print(f"{args.geometry}: {values:,} values a client; {where}, {os.cpu_count()} cores\n")
    print(
        "| method | clients | seconds | × numpy mean | × FedAvg | memory, in float32 projectors |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        write_clients(folder, args.geometry, max(args.clients))
        for clients in args.clients:
            base: dict[str, float] = {}
            for name in args.methods:
                found = in_a_process(name, folder, clients, args)
                if found is None:
                    continue
                base[name] = found["seconds"]
                ratios = [
                    f"{found['seconds'] / base[of]:.2f}" if of in base else "–"
                    for of in ("numpy mean", "FedAvg")
                ]
                memory = found["bytes"] / (4 * values)
                print(f"| {name} | {clients} | {found['seconds']:.2f} | {ratios[0]} | {ratios[1]} "
                      f"| {memory:.2f} |", flush=True)  # fmt: skip


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


if __name__ == "__main__":
    main()
