"""Pilot's connector side by side with LLaVA's plain projector: forward and backward.

    python scripts/benchmark/connector.py                            # the playground's shapes
    python scripts/benchmark/connector.py --geometry llava-1.5-7b    # 1024 → 4096, 576 patches
    python scripts/benchmark/connector.py --geometry llava-1.5-7b --device cuda --dtype bfloat16

All are given the same features of a frozen tower and the same gradient at their tokens, and take
turns; medians are compared. `loop` is stage 2 as its formula reads: the experts one by one, their
outputs stacked and summed with the gates, and nothing frozen treated otherwise. `multiplications`
counts those of the matrix products that a step needs (per token: forward, gradients of what trains,
gradients on the way there) against the plain projector's. Peak memory is that of a process of its
own: what a step adds to weights and features.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from llava.model.multimodal_projector.pilot import PilotConnector, PilotSettings
from llava.model.multimodal_projector.plain import MLPConnector

SYSTEMS = ("plain", "stage 1", "stage 2", "stage 2, loop")
GEOMETRIES = {"playground": (192, 256, 16), "llava-1.5-7b": (1024, 4096, 576)}  # in, out, patches


class Loop(PilotConnector):
    """Stage 2 to the letter."""

    def _mixed(self, own, features):
        logits = self.pilot["router"](features).float()
        gates = logits.softmax(-1)
        outputs = [own]
        for other, cross in zip(self.pilot["others"], self.pilot["cross"], strict=True):
            outputs.append(other(features) + cross(features))
        stacked = torch.stack(outputs, -2)  # (batch, patches, tasks, out)
        from llava.model.multimodal_projector.pilot_losses import balance_loss, router_z_loss

        self._aux = 0.1 * balance_loss(gates) + 0.01 * router_z_loss(logits)
        return (gates.to(own.dtype).unsqueeze(-1) * stacked).sum(-2)


class ConnectorStepper:
    """A connector that makes steps on one batch."""

    def __init__(self, system: str, args: argparse.Namespace):
        inner, outer, patches = GEOMETRIES[args.geometry]
        torch.manual_seed(0)
        tasks = [f"task-{i}" for i in range(args.tasks)]
        if system == "plain":
            connector: nn.Module = MLPConnector(inner, outer, 2)
        else:
            kind = Loop if system.endswith("loop") else PilotConnector
            stage = 1 if system == "stage 1" else 2
            connector = kind(inner, outer, PilotSettings(tasks, stage, init="copy"))
            connector.derive()
            frozen = () if system.endswith("loop") else connector.groups()["frozen"]
            for name, parameter in connector.named_parameters():
                parameter.requires_grad_(name not in frozen)
        self.connector = connector.to(args.device, args.dtype).train()
        shape = (args.batch, patches)
        self.features = torch.randn(*shape, inner, device=args.device, dtype=args.dtype)
        self.gradient = torch.randn(*shape, outer, device=args.device, dtype=args.dtype)

    def step(self) -> torch.Tensor:
        tokens = self.connector(self.features)
        aux = self.connector.aux_loss()
        outputs = [tokens] if aux is None else [tokens, aux]
        torch.autograd.backward(outputs, [self.gradient, None][: len(outputs)])
        for parameter in self.connector.parameters():
            parameter.grad = None
        if self.features.is_cuda:
            torch.cuda.synchronize()
        return tokens.detach()


def multiplications(system: str, args: argparse.Namespace) -> int:
    """Those of a step's matrix products, for a token."""
    inner, outer, _ = GEOMETRIES[args.geometry]
    first, second = inner * outer, outer * outer
    forward, backward = first + second, first + 2 * second  # features need no gradient
    experts = 2 * args.tasks - 1
    trained = {"plain": 1, "stage 1": 2, "stage 2": args.tasks, "stage 2, loop": experts}[system]
    run = {"plain": 1, "stage 1": 2}.get(system, experts)
    return run * forward + trained * backward


def times(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds a step, of all systems in turn."""
    steppers = {system: ConnectorStepper(system, args) for system in SYSTEMS}
    apart = (steppers["stage 2"].step() - steppers["stage 2, loop"].step()).abs().max()
    scale = steppers["stage 2"].step().abs().max()
    if apart > scale * (1e-4 if args.dtype == torch.float32 else 5e-2):
        raise SystemExit(f"the loop's tokens differ by {apart:.2g}: these are not the same steps")
    seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(args.steps):
        for system, stepper in steppers.items():
            began = time.perf_counter()
            stepper.step()
            seconds[system].append(time.perf_counter() - began)
    return {system: statistics.median(found[2:]) for system, found in seconds.items()}


def peak_of_a_process(system: str, args: argparse.Namespace) -> float:
    """Peak MB that a step adds, measured in a process of its own."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--only", system]
    found = subprocess.run(command, capture_output=True, text=True, env=env)
    if found.returncode:
        raise SystemExit(found.stderr[-3000:])
    return json.loads(found.stdout.splitlines()[-1])


def one_process(args: argparse.Namespace) -> None:
    stepper = ConnectorStepper(args.only, args)
    features, gradient = stepper.features, stepper.gradient
    stepper.features, stepper.gradient = features[:1, :8], gradient[:1, :8]
    stepper.step()  # what a step needs of code and buffers of the libraries is no news then
    stepper.features, stepper.gradient = features, gradient
    if features.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stepper.step()
        print(json.dumps((torch.cuda.max_memory_allocated() - before) / 1e6))
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident("VmRSS")
    stepper.step()
    print(json.dumps((_resident("VmHWM") - before) / 1e3))


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    args = arguments()
    if args.only:
        return one_process(args)
    patches = GEOMETRIES[args.geometry][2]
    cuda = args.device != "cpu"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.geometry}, {args.tasks} tasks, batch {args.batch}, {args.dtype}, {device}, torch "
        f"{torch.__version__}; × is against plain\n"
    )
    print("| connector | s | tokens/s | time × | multiplications × | of the two | peak MB | × |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    seconds = times(args)
    peaks = {system: peak_of_a_process(system, args) for system in SYSTEMS}
    for system in SYSTEMS:
        slower = seconds[system] / seconds["plain"]
        theory = multiplications(system, args) / multiplications("plain", args)
        tokens = args.batch * patches / seconds[system]
        print(
            f"| {system} | {seconds[system]:.4f} | {tokens:.0f} | {slower:.2f} | {theory:.2f} "
            f"| {slower / theory:.2f} | {peaks[system]:.0f} "
            f"| {peaks[system] / peaks['plain']:.2f} |"
        )
    return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="playground")
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--batch", type=int, default=None, help="64 for the playground, 4 for 7B")
    parser.add_argument("--steps", type=int, default=12, help="the first two are not counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no GPU here")
    if args.tasks < 2 or args.steps < 3:
        parser.error("--tasks of at least 2 and --steps of at least 3 are expected")
    args.batch = args.batch or (64 if args.geometry == "playground" else 4)
    args.dtype = getattr(torch, args.dtype)
    return args


if __name__ == "__main__":
    main()
