"""Our methods against what mergekit made (scripts/benchmark/merge_oracles.py)."""

import json
from pathlib import Path

import pytest
import torch

from fed import methods

MERGEKIT = json.loads((Path(__file__).parents[1] / "golden" / "mergekit.json").read_text())
# Of one expert with a share dropped at random: compared by its statistics.
RANDOM = [case for case in MERGEKIT["cases"] if case["parameters"].get("density") == 0.3
          and case["method"].startswith("dare")]  # fmt: skip
CERTAIN = [case for case in MERGEKIT["cases"] if case not in RANDOM]


def tensors(state):
    return {name: torch.tensor(values) for name, values in state.items()}


def drawn(case):
    states = MERGEKIT["states"][case["spread"]]
    experts = states["experts"][: len(case["weights"])]
    return tensors(states["base"]), [tensors(expert) for expert in experts]


def options(case):
    """mergekit's parameters under our names; its sums are of w_k T_k, ours of K p_k T_k."""
    given = dict(case["parameters"])
    given.pop("normalize", None)
    if case["method"] not in ("linear", "slerp", "model_stock"):
        given["scale"] = given.pop("lambda", 1.0)
    if case["method"] in ("task_arithmetic", "dare_linear", "breadcrumbs"):
        given["scale"] *= sum(case["weights"]) / len(case["weights"])
    return given


@pytest.mark.parametrize("case", CERTAIN, ids=lambda case: f"{case['method']}-{case['spread']}")
def test_certain_methods_end_as_mergekits(case):
    base, experts = drawn(case)
    found = methods.get(case["method"])(
        experts, weights=case["weights"], base=base, **options(case)
    ).state
    for name, expected in tensors(case["result"]).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


def test_every_method_is_compared_and_every_case_is_another():
    shared = {"linear", "slerp", "task_arithmetic", "ties", "breadcrumbs", "model_stock",
              "dare_linear", "dare_ties"}  # fmt: skip
    assert {case["method"] for case in CERTAIN} == shared
    results = [json.dumps(case["result"]) for case in MERGEKIT["cases"]]
    # With nothing dropped, dare_linear is task arithmetic.
    assert len(set(results)) == len(results) - 1
    assert MERGEKIT["versions"]["mergekit"] == "0.1.5"


def moved(state, base):
    return torch.cat([(state[n].double() - base[n].double()).flatten() for n in base])


@pytest.mark.parametrize("case", RANDOM, ids=lambda case: f"seed-{case['seed']}")
def test_what_mergekit_drops_and_by_how_much_it_rescales(case):
    """The known difference: not by 1 / density, but to the sum of |T| that was before."""
    base, (expert,) = drawn(case)
    for name, result in tensors(case["result"]).items():
        task = moved({name: expert[name]}, {name: base[name]})
        after = moved({name: result}, {name: base[name]})
        kept = after.abs() > 1e-9
        factor = 1.0
        if case["parameters"].get("rescale", True):
            factor = float(task.abs().sum() / task[kept].abs().sum())
            assert abs(factor - 1 / 0.3) > 1e-3
        torch.testing.assert_close(after[kept], factor * task[kept], rtol=1e-5, atol=1e-6)
    everything = torch.cat(
        [moved({n: t}, {n: base[n]}) for n, t in tensors(case["result"]).items()]
    )
    share = float((everything.abs() > 1e-9).double().mean())
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / len(everything)) ** 0.5


def test_ours_drops_as_many_and_rescales_by_the_density():
    base, (expert,) = drawn(RANDOM[0])
    task, shares = moved(expert, base), []
    for seed in range(200):
        result = methods.get("dare_linear")(
            [expert], weights=[1], base=base, density=0.3, scale=1.0, seed=seed
        ).state
        after = moved(result, base)
        kept = after.abs() > 1e-9
        torch.testing.assert_close(after[kept], task[kept] / 0.3, rtol=1e-5, atol=1e-6)
        shares.append(float(kept.double().mean()))
    n = len(task) * len(shares)
    assert abs(sum(shares) / len(shares) - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5


def test_the_mean_over_many_seeds_is_task_arithmetic():
    base, experts = drawn({"spread": "usual", "weights": [1] * 4})
    seeds, total = 400, 0
    for seed in range(seeds):
        result = methods.get("dare_linear")(
            experts, weights=[3, 1, 4, 2], base=base, density=0.5, scale=0.4, seed=seed
        ).state
        total = total + moved(result, base)
    whole = methods.get("task_arithmetic")(experts, weights=[3, 1, 4, 2], base=base, scale=0.4)
    expected = moved(whole.state, base)
    # A value's deviation is sqrt(1 / density - 1) of the root of the sum of squares.
    parts = torch.stack([0.4 * 4 * p * moved(e, base) for p, e in
                         zip([0.3, 0.1, 0.4, 0.2], experts, strict=True)])  # fmt: skip
    deviation = parts.square().sum(0).sqrt() / seeds**0.5
    assert ((total / seeds - expected).abs() / deviation).max() < 5


def test_where_the_experts_oppose_each_other_model_stock_stays_at_the_base():
    """mergekit's formula would go on: t is -18 at a cosine of -0.9 between two."""
    base = {"a": torch.zeros(2)}
    experts = [{"a": torch.tensor([1.0, 0])}, {"a": torch.tensor([-0.9, 0.19**0.5])}]
    outcome = methods.get("model_stock")(experts, weights=[1, 1], base=base)
    assert outcome.state["a"].tolist() == pytest.approx([0, 0])
    assert outcome.facts["t"] == pytest.approx({"a": 0})
