"""Other libraries' merges of small fixed states, into tests/golden, to compare ours with.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
    /tmp/mergekit/bin/python scripts/benchmark/merge_oracles.py --library mergekit

Each library in an environment of its own, as none is a dependency. mergekit is run by its command
`mergekit-pytorch` on float32 files, one process a case, so that what is compared is what people
use. The states are drawn by numpy and rounded, so that any library gets the same; see `draw`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden"
SHAPES = {
    "model.mm_projector.0.weight": (12, 8),
    "model.mm_projector.0.bias": (12,),
    "model.mm_projector.2.weight": (10, 12),
    "model.mm_projector.2.bias": (10,),
}
EXPERTS = 4
# How far experts are from the base, whose values have a deviation of 1.
SPREADS = {"near": 0.01, "usual": 0.1, "far": 1.0}
UNEQUAL = [3.0, 1.0, 4.0, 2.0]
SAME = [1.0] * EXPERTS

# Method, its parameters, how far the experts are, their weights, and mergekit's seed.
CASES = [
    ("linear", {}, "usual", SAME, 0),
    ("linear", {}, "usual", UNEQUAL, 0),
    ("slerp", {"t": 0.3}, "far", SAME[:2], 0),
    ("slerp", {"t": 0.5}, "usual", SAME[:2], 0),
    ("slerp", {"t": 0.8}, "near", SAME[:2], 0),
    ("task_arithmetic", {"lambda": 0.4}, "usual", SAME, 0),
    ("task_arithmetic", {"lambda": 0.4}, "usual", UNEQUAL, 0),
    ("ties", {"density": 0.2}, "usual", SAME, 0),
    ("ties", {"density": 0.5, "lambda": 0.7}, "usual", UNEQUAL, 0),
    ("ties", {"density": 1.0}, "far", SAME[:3], 0),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.1, "lambda": 0.3}, "usual", SAME, 0),
    ("breadcrumbs", {"density": 0.95, "gamma": 0.1}, "usual", UNEQUAL, 0),
    ("model_stock", {}, "usual", SAME, 0),
    ("model_stock", {}, "far", SAME[:2], 0),
    # Nothing is dropped, so nothing is random. Unless told, mergekit sums where TIES averages.
    ("dare_linear", {"density": 1.0, "lambda": 0.4}, "usual", SAME, 0),
    ("dare_ties", {"density": 1.0, "normalize": True}, "usual", UNEQUAL, 0),
    # One expert alone, whose dropped and kept values can be told apart.
    ("dare_linear", {"density": 0.3}, "far", SAME[:1], 1),
    ("dare_linear", {"density": 0.3}, "far", SAME[:1], 2),
    ("dare_linear", {"density": 0.3, "rescale": False}, "far", SAME[:1], 3),
]


def draw(spread: float, seed: int = 0) -> tuple[dict, list[dict]]:
    """A base, and experts that moved from it together and each for itself; float32.

    What all share is as large as what each has alone: task vectors are at about 60 degrees. Numbers
    have six digits after the point, so that they are the same in JSON and in any library.
    """
    random = np.random.default_rng(seed)

    def normal() -> dict[str, np.ndarray]:
        return {name: random.normal(size=shape) for name, shape in SHAPES.items()}

    base, common = normal(), normal()
    own = [normal() for _ in range(EXPERTS)]
    experts = [{n: base[n] + spread * (common[n] + o[n]) for n in SHAPES} for o in own]
    return short(base), [short(expert) for expert in experts]


def short(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.round(values, 6).astype(np.float32) for name, values in state.items()}


def lists(state: dict[str, np.ndarray]) -> dict[str, list]:
    """For JSON: the fewest digits that give each float32 back."""
    return {n: np.array([float(str(v)) for v in t.flat]).reshape(t.shape).tolist()
            for n, t in state.items()}  # fmt: skip


def mergekit(method: str, parameters: dict, spread: str, weights: list, seed: int) -> dict:
    """The merge by `mergekit-pytorch` of a spread's first experts, as many as there are weights.

    The base is that of `draw`, but for linear, which has none, and slerp, whose base is the first
    of the two that are merged.
    """
    from safetensors.numpy import load_file, save_file

    base, experts = draw(SPREADS[spread])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, state in {"base": base, **{str(k): e for k, e in enumerate(experts)}}.items():
            save_file(state, folder / f"{name}.safetensors")
        models = [{"model": str(folder / f"{k}.safetensors"), "parameters": {"weight": weight}}
                  for k, weight in enumerate(weights)]  # fmt: skip
        config = {"merge_method": method, "models": models, "dtype": "float32"}
        if method in ("slerp", "model_stock"):
            for model in models:
                del model["parameters"]
        if method != "linear":
            start = "0" if method == "slerp" else "base"
            config["base_model"] = str(folder / f"{start}.safetensors")
        if parameters:
            config["parameters"] = parameters
        (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
        command = Path(sys.executable).with_name("mergekit-pytorch")
        options = ["--quiet", "--random-seed", str(seed)]
        subprocess.run([command, folder / "config.yml", folder / "out", *options], check=True)
        return load_file(folder / "out/model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", choices=["mergekit"], required=True)
    args = parser.parse_args()
    drawn = {name: draw(spread) for name, spread in SPREADS.items()}
    cases = []
    for method, parameters, spread, weights, seed in CASES:
        result = mergekit(method, parameters, spread, weights, seed)
        cases.append({"method": method, "parameters": parameters, "spread": spread,
                      "weights": weights, "seed": seed, "result": lists(result)})  # fmt: skip
        print(f"{method} {parameters} {spread}", flush=True)
    found = {
        "about": "mergekit's merges of the states below",
        "versions": {name: version(name) for name in (args.library, "torch", "numpy")},
        "repeat": f"scripts/benchmark/merge_oracles.py --library {args.library}",
        "states": {
            spread: {"base": lists(base), "experts": [lists(expert) for expert in experts]}
            for spread, (base, experts) in drawn.items()
        },
        "cases": cases,
    }
    file = GOLDEN / f"{args.library}.json"
    file.write_text(json.dumps(found) + "\n")
    print(f"{file}: {file.stat().st_size} bytes, {len(cases)} cases")


if __name__ == "__main__":
    main()
