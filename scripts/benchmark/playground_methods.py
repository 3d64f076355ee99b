"""Methods side by side on the playground, over seeds: mean and spread of the held-out measures.

    python scripts/benchmark/playground_methods.py --scenarios topic style --seeds 11 12 13 14 15 \\
        --data heldout_test --methods "FedAvg=fedavg" "Fed-CMP=fedcmp rescale=4"

One `fed.train` run per scenario, seed and method; flags after `--` go to all of them. A seed
decides the projector's start, the slices and the order of samples. Runs that are there already are
reused. Choose settings on `heldout_dev`, report `heldout_test`. METHOD `pool` is the centralised
reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(scenario: str, seed: int, method: str, data: str, output: Path, flags: list[str]) -> dict:
    """The last round's measures of one run."""
    name, *options = method.split()
    pooled = name == "pool"
    command = [
        "bash", "scripts/fed/pretrain_playground.sh",
        "--fed_clients", f"playground/fed/{scenario}.yaml",
        "--fed_eval_data_path", f"playground/data/emoji/{data}.json",
        "--fed_eval_domain", scenario,
        "--fed_eval_every", "100",  # after the last round alone
        "--fed_method", "fedavg" if pooled else name,
        *(["--fed_pool", "True", "--fed_rounds", "1"] if pooled else []),
        *(["--fed_options", *options] if options else []),
        "--feature_cache", "runs/benchmark/features",
        "--seed", str(seed), "--output_dir", str(output), "--report_to", "none", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    record = json.loads((output / "rounds.jsonl").read_text().splitlines()[-1])
    return record["heldout"]["global"][data]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenarios", nargs="+", default=["topic", "style"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13, 14, 15])
    parser.add_argument("--data", default="heldout_test")
    parser.add_argument(
        "--methods", nargs="+", required=True, metavar="TITLE=METHOD [OPTION=VALUE …]"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/methods"))
    parser.add_argument("flags", nargs="*", help="for fed.train, after --")
    args = parser.parse_args()
    rows = []
    print(f"| scenario | method | loss, {args.data} | exact, {args.data} | seeds |")
    print("|---|---|---:|---:|---|")
    for scenario in args.scenarios:
        for text in args.methods:
            title, method = text.split("=", 1)
            measured = []
            for seed in args.seeds:
                tag = f"{method} {' '.join(args.flags)}".replace("/", "_").replace(" ", ",")
                folder = ROOT / args.output / args.data / scenario / tag / str(seed)
                measured.append(run(scenario, seed, method, args.data, folder, args.flags))
            losses = [m["loss"] for m in measured]
            exact = [100 * m["exact"] for m in measured]
            rows.append(
                {"scenario": scenario, "method": title, "loss": losses, "exact": exact,
                 "seeds": args.seeds}
            )  # fmt: skip
            print(
                f"| {scenario} | {title} | {spread(losses, 3)} | {spread(exact, 1)} % | "
                f"{len(args.seeds)} |",
                flush=True,
            )
    output = ROOT / args.output / f"{args.data}.json"
    output.write_text(json.dumps(rows, indent=1))


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
