"""FusionBench's merges of small fixed states, into tests/golden/fusion_bench.json.

    python -m venv /tmp/fusion && /tmp/fusion/bin/pip install fusion-bench==0.2.33
    /tmp/fusion/bin/python scripts/benchmark/merge_oracles_fusion.py

In an environment of its own, as FusionBench is no dependency. Methods run whole, on modules, as a
user runs them; RegMean and Fisher by the functions that merge given statistics, TIES by tensor, and
KnOTS, of which FusionBench has the alignment alone, by that and its TIES. All in float32.
"""

from __future__ import annotations

import json
from importlib.metadata import version

import numpy as np
import torch
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging import ISO_C_Merge
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.wudi import WUDIMerging
from fusion_bench.modelpool import BaseModelPool
from merge_oracles import GOLDEN, lists, short

SHAPES = {
    "model.mm_projector.0.weight": (6, 5),
    "model.mm_projector.0.bias": (6,),
    "model.mm_projector.2.weight": (4, 6),
    "model.mm_projector.2.bias": (4,),
}
LAYERS = ("model.mm_projector.0", "model.mm_projector.2")
EXPERTS = 4
SPREADS = {"near": 0.003, "usual": 0.1}

# Method, its parameters, how far the experts are, how many.
CASES = [
    *(("task_arithmetic", {"scaling_factor": 0.4}, "usual", k) for k in (2, 4)),
    *(("ties", {"threshold": 0.3}, "usual", k) for k in (2, 3, 4)),
    *(("tsv_m", {"alpha": alpha}, "usual", k) for alpha, k in ((1.0, 2), (0.7, 3), (1.0, 4))),
    *(("iso_c", {"scaling_factor": s}, "usual", k) for s, k in ((1.0, 2), (0.5, 3), (1.0, 4))),
    *(("knots", {"threshold": 0.2}, "usual", k) for k in (2, 3, 4)),
    *(("wudi", {"iter_num": 300}, spread, k) for spread in SPREADS for k in (2, 3, 4)),
    *(("regmean", {"reduce_non_diagonal_ratio": r}, "usual", k)
      for r, k in ((0.9, 2), (1.0, 3), (0.6, 4))),
    *(("fisher", {"normalize_fisher_weight": n, "coefficients": c}, "usual", len(c))
      for n in (False, True) for c in ([0.5, 0.5], [0.5, 0.2, 0.3])),
]  # fmt: skip


def draw(spread: float) -> tuple[dict, list[dict], list[dict], list[dict]]:
    """A base, experts, and each expert's Gram matrices, by layer, and Fisher values."""
    random = np.random.default_rng(1)

    def normal() -> dict[str, np.ndarray]:
        return {name: random.normal(size=shape) for name, shape in SHAPES.items()}

    base, common = normal(), normal()
    experts, grams, fishers = [], [], []
    for _ in range(EXPERTS):
        own = normal()
        experts.append(short({n: base[n] + spread * (common[n] + own[n]) for n in SHAPES}))
        inputs = {n: random.normal(size=(20, SHAPES[f"{n}.weight"][1])) for n in LAYERS}
        grams.append(short({n: x.T @ x / len(x) for n, x in inputs.items()}))
        fishers.append(short({n: 0.05 + random.random(size=s) for n, s in SHAPES.items()}))
    return short(base), experts, grams, fishers


class Named(torch.nn.Module):
    """A module whose state dict has the names of a LLaVA's projector."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        projector = torch.nn.Sequential(
            torch.nn.Linear(5, 6), torch.nn.GELU(), torch.nn.Linear(6, 4)
        )
        self.model = torch.nn.Module()
        self.model.mm_projector = projector
        self.load_state_dict(state)


def tensors(state: dict) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values.copy()) for name, values in state.items()}


def merge(method: str, parameters: dict, spread: str, k: int) -> dict[str, torch.Tensor]:
    base, experts, grams, fishers = draw(SPREADS[spread])
    base, experts = tensors(base), [tensors(expert) for expert in experts[:k]]
    columns = {name: [expert[name] for expert in experts] for name in SHAPES}
    if method == "regmean":
        return merging_with_regmean_weights(columns, [tensors(g) for g in grams[:k]], **parameters)
    if method == "fisher":
        weights = torch.tensor(parameters["coefficients"])
        found = [tensors(fisher) for fisher in fishers[:k]]
        normalize = parameters["normalize_fisher_weight"]
        return merging_with_fisher_weights(columns, found, weights, normalize)
    moves = {name: [t - base[name] for t in columns[name]] for name in SHAPES}
    if method == "ties":
        return {name: base[name] + _ties(moves[name], parameters).view(SHAPES[name])
                for name in SHAPES if name.endswith("weight")}  # fmt: skip
    if method == "knots":
        return _knots(base, moves, parameters)
    algorithm = {
        "task_arithmetic": TaskArithmeticAlgorithm,
        "tsv_m": TaskSingularVectorMerging,
        "iso_c": ISO_C_Merge,
        "wudi": WUDIMerging,
    }[method](**parameters)
    models = {"_pretrained_": Named(base)} | {str(i): Named(e) for i, e in enumerate(experts)}
    return algorithm.run(BaseModelPool(models)).state_dict()


def _ties(moves: list[torch.Tensor], parameters: dict) -> torch.Tensor:
    flat = torch.stack([move.flatten() for move in moves])
    return ties_merging(flat, reset_thresh=parameters["threshold"], merge_func="mean")


def _knots(base: dict, moves: dict, parameters: dict) -> dict[str, torch.Tensor]:
    merged = {}
    for layer in LAYERS:
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        joined = [torch.cat([w, b[:, None]], dim=1)
                  for w, b in zip(moves[weight], moves[bias], strict=True)]  # fmt: skip
        u, s, parts = subspace_alignment(joined)
        rows = [s[:, None] * part for part in parts]
        move = u @ _ties(rows, parameters).view_as(rows[0])
        merged[weight], merged[bias] = base[weight] + move[:, :-1], base[bias] + move[:, -1]
    return merged


def main() -> None:
    drawn = {name: draw(spread) for name, spread in SPREADS.items()}
    cases = []
    for method, parameters, spread, k in CASES:
        result = merge(method, parameters, spread, k)
        plain = {name: tensor.detach().numpy() for name, tensor in result.items()}
        cases.append({"method": method, "parameters": parameters, "spread": spread,
                      "experts": k, "result": lists(plain)})  # fmt: skip
        print(f"{method} {parameters} {spread} {k}", flush=True)
    names = ("base", "experts", "grams", "fishers")
    found = {
        "about": "FusionBench's merges of the states below",
        "versions": {name: version(name) for name in ("fusion-bench", "torch", "numpy")},
        "repeat": "scripts/benchmark/merge_oracles_fusion.py",
        "states": {
            spread: {
                name: lists(part) if name == "base" else [lists(each) for each in part]
                for name, part in zip(names, parts, strict=True)
            }
            for spread, parts in drawn.items()
        },
        "cases": cases,
    }
    file = GOLDEN / "fusion_bench.json"
    file.write_text(json.dumps(found) + "\n")
    print(f"{file}: {file.stat().st_size} bytes, {len(cases)} cases")


if __name__ == "__main__":
    main()
