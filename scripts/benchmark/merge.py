"""The cost of a merge as a whole command, start-up included: wall time and peak memory.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
    python scripts/benchmark/merge.py --mergekit /tmp/mergekit/bin/mergekit-pytorch
    python scripts/benchmark/merge.py --parts lora full --folder /somewhere/with/60GB

Parts: `shared`, the methods that mergekit has too, on four projectors; `ours`, all methods without
data; `lora`, four adapters; `full`, two checkpoints. Each runs `python -m fed.merge`, or mergekit
with the same options, three times, `lora` and `full` and what takes more than a minute once; the
median counts. The files were just written, so they lie in the system's cache as far as they fit.

Peak memory is the kernel's for the process (ru_maxrss of wait4), pages of mapped input files among
them. Writes playground/results/merge-cost.md from all that merge-cost.jsonl beside it holds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "playground/results/merge-cost.jsonl"
# Method, options of ours, mergekit's parameters; slerp merges two, all others four.
SHARED = {
    "linear": ({}, {}),
    "slerp": ({"t": 0.5}, {"t": 0.5}),
    "task_arithmetic": ({"scale": 0.4}, {"lambda": 0.4}),
    "ties": ({"density": 0.2}, {"density": 0.2}),
    "dare_linear": ({"density": 0.8, "scale": 0.4}, {"density": 0.8, "lambda": 0.4}),
    "dare_ties": ({"density": 0.8}, {"density": 0.8, "normalize": True}),
    "breadcrumbs": (
        {"density": 0.143, "gamma": 0.007, "scale": 0.3},
        {"density": 0.143, "gamma": 0.007, "lambda": 0.3},
    ),
    "model_stock": ({}, {}),
}
OTHERS = ("pivotmerge", "fedcmp", "iso_c", "wudi", "tsv_m", "knots")
STREAMED = ("linear", "ties")
LONG = 60.0  # seconds, beyond which once is enough


def ours(method: str, options: dict, experts: list[Path], out: Path, *more: str) -> list[str]:
    given = [f"{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "fed.merge", "--method", method, "--output", str(out)]
    command += ["--experts", *map(str, experts), *(["--options", *given] if given else [])]
    return [*command, *more]


def mergekit(program: str, method: str, parameters: dict, folder: Path, out: Path) -> list[str]:
    models = [{"model": str(path)} for path in projectors(folder, method)]
    if method not in ("slerp", "model_stock"):
        models = [{**model, "parameters": {"weight": 1.0}} for model in models]
    config = {"merge_method": method, "models": models, "parameters": parameters}
    if method != "linear":
        first = folder / ("0.safetensors" if method == "slerp" else "base.safetensors")
        config["base_model"] = str(first)
    file = folder / f"{method}.yml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return [program, str(file), str(out), "--quiet"]


def projectors(folder: Path, method: str) -> list[Path]:
    return [folder / f"{k}.safetensors" for k in range(2 if method == "slerp" else 4)]


def once(command: list[str], out: Path) -> tuple[float, float, int]:
    """Seconds by the clock and of the processor, and peak bytes of a command.

    This process is small and imports no torch: a child's peak begins with its parent's.
    """
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{said.read().decode()}")
    shutil.rmtree(out)
    return seconds, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def measure(part: str, tool: str, method: str, command: list[str], out: Path, runs: int) -> dict:
    found, load = [], os.getloadavg()[0]
    while len(found) < runs and not (found and found[0][0] > LONG):
        found.append(once(command, out))
    seconds, processor, peak = map(statistics.median, zip(*found, strict=True))
    row = {
        "part": part,
        "method": method,
        "tool": tool,
        "seconds": round(seconds, 2),
        "processor": round(processor, 2),
        "bytes": round(peak),
        "runs": len(found),
        "load": round(load, 1),  # of the machine before the first run
        "threads": int(os.environ["OMP_NUM_THREADS"]),
    }
    print(json.dumps(row), flush=True)
    return row


def run(part: str, folder: Path, program: str | None) -> Iterator[dict]:
    """The measurements of a part, one by one; its models are written where there are none."""
    kind = part if part in ("lora", "full") else "projectors"
    inputs, out = folder / kind, folder / "out"
    if not inputs.exists():
        inputs.mkdir(parents=True)
        writer = Path(__file__).with_name("merge_inputs.py")
        subprocess.run([sys.executable, str(writer), kind, str(inputs)], check=True)
    base = ("--base", str(inputs / "base.safetensors"))
    if part == "shared":
        version = subprocess.run(
            [Path(program).with_name("python"), "-c",
             "import importlib.metadata as m; print(m.version('mergekit'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        for method, (options, parameters) in SHARED.items():
            mine = ours(method, options, projectors(inputs, method), out, *base)
            theirs = mergekit(program, method, parameters, inputs, out)
            yield measure(part, "fed.merge", method, mine, out, 3)
            yield measure(part, f"mergekit {version}", method, theirs, out, 3)
    elif part == "ours":
        for method in OTHERS:
            mine = ours(method, {}, projectors(inputs, method), out, *base)
            yield measure(part, "fed.merge", method, mine, out, 3)
    else:
        experts = sorted(inputs.glob(f"{part}-?"))
        for method in STREAMED:
            mine = ours(method, {}, experts, out, "--scope", "all")
            yield measure(part, "fed.merge", method, mine, out, 1)


def report(rows: list[dict]) -> str:
    """The page, from the rows of all parts."""
    torch = importlib.metadata.version("torch")
    lines = [
        "# What a merge costs",
        "",
        "Whole commands, start-up included, as `scripts/benchmark/merge.py` ran them: wall time,",
        "seconds of the processor (which other work on the machine disturbs less), and the",
        "kernel's peak memory of the process, in which pages of mapped input files count.",
        f"{os.cpu_count()} CPU cores, torch {torch}. Random weights in bfloat16, `.safetensors`;",
        "ours writes a projector as `.bin`. `load` is the load average of the machine when a line",
        "began: what else it had to do, 0 is nothing.",
    ]
    lines += _shared([row for row in rows if row["part"] == "shared"])
    titles = {
        "ours": "Four projectors of LLaVA-1.5-7B, the other methods without data",
        "lora": "Four LoRA sets on LLaVA-1.5-7B, rank 128, 320 million values each, `--scope all`",
        "full": "Two full checkpoints of LLaVA-1.5-7B, 6.8 billion values each, `--scope all`",
    }
    for part, title in titles.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            lines += [
                *("", f"## {title}", ""),
                "| method | seconds | processor, s | MB | runs | load | threads |",
                "|---|---:|---:|---:|---:|---:|---:|",
            ]
            lines += [
                f"| `{r['method']}` | {r['seconds']:.1f} | {r['processor']:.1f} | "
                f"{r['bytes'] / 1e6:.0f} | {r['runs']} | {r['load']} | {r['threads']} |"
                for r in own
            ]
    return "\n".join(lines) + "\n"


def line_of(row: dict) -> tuple[str, str, str]:
    """The key of a row; a new measurement with the same key replaces it."""
    return row["part"], row["method"], row["tool"].split()[0]


def _shared(rows: list[dict]) -> list[str]:
    pairs = {m: sorted((r for r in rows if r["method"] == m), key=line_of) for m in SHARED}
    pairs = {method: pair for method, pair in pairs.items() if len(pair) == 2}
    if not pairs:
        return []
    other = next(iter(pairs.values()))[1]["tool"]
    lines = [
        "",
        f"## Four projectors of LLaVA-1.5-7B, beside {other} (slerp: two)",
        "",
        "mergekit computes in the files' bfloat16, its default; ours in float64, block by block.",
        "",
        "| method | s, ours | s, mergekit | times | processor, s, ours | mergekit | times "
        "| MB, ours | MB, mergekit | load |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method, (mine, theirs) in pairs.items():
        cells = []
        for key in ("seconds", "processor"):
            cells += [f"{r[key]:.1f}" for r in (mine, theirs)]
            cells.append(f"{theirs[key] / mine[key]:.1f}")
        cells += [f"{r['bytes'] / 1e6:.0f}" for r in (mine, theirs)]
        lines.append(f"| `{method}` | {' | '.join(cells)} | {mine['load']} |")
    threads = {row["threads"] for row in rows}
    return [*lines, "", f"OMP_NUM_THREADS was {', '.join(map(str, sorted(threads)))}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ["shared", "ours", "lora", "full"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:3])
    parser.add_argument("--mergekit", help="the program mergekit-pytorch, for the part shared")
    parser.add_argument("--folder", type=Path, help="where the models are written and kept")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both tools")
    args = parser.parse_args()
    if "shared" in args.parts and not args.mergekit:
        parser.error("--mergekit: the part shared needs the program mergekit-pytorch")
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    kept = (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)).absolute()
        for part in args.parts:
            for row in run(part, folder, args.mergekit):
                kept = [old for old in kept if line_of(old) != line_of(row)] + [row]
                RESULTS.write_text("".join(json.dumps(row) + "\n" for row in kept))
                RESULTS.with_suffix(".md").write_text(report(kept))


if __name__ == "__main__":
    main()
