"""Flower's own strategies on small fixed states over three rounds, into tests/golden/flower.json.

    python -m venv /tmp/flower && /tmp/flower/bin/pip install flwr==1.41.0 numpy==2.4.6
    /tmp/flower/bin/python scripts/benchmark/flower_oracle.py

In an environment of its own, as Flower is no dependency. Clients have the same states in every
case; a round begins with what the strategy made of the one before. All is float64, so that what is
compared is the algorithm. Nothing is simulated: a strategy gets replies as from its server.
"""

from __future__ import annotations

import json
import logging
import os
from importlib.metadata import version
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import numpy as np  # noqa: E402
from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import strategy as strategies  # noqa: E402

SHAPES = {"a.weight": (2, 3), "a.bias": (2,)}
ROUNDS, CLIENTS = 3, 7
SAMPLES = [3, 1, 4, 1, 5, 9, 2]
ALIKE = [1] * CLIENTS
ADAPTIVE = {"eta": 0.05, "tau": 1e-3}
BETAS = {"beta_1": 0.9, "beta_2": 0.99}

# Strategy, its options, how many clients, their samples.
CASES = [
    ("FedAvg", {}, 7, SAMPLES),
    ("FedProx", {"proximal_mu": 0.1}, 7, SAMPLES),
    ("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.5}, 7, SAMPLES),
    ("FedAdam", ADAPTIVE | BETAS, 7, ALIKE),
    ("FedYogi", ADAPTIVE | BETAS, 7, ALIKE),
    ("FedAdagrad", ADAPTIVE, 7, ALIKE),
    ("FedMedian", {}, 7, SAMPLES),
    ("FedMedian", {}, 6, SAMPLES),
    ("FedTrimmedAvg", {"beta": 0.2}, 7, SAMPLES),
    ("FedTrimmedAvg", {"beta": 0.4}, 6, SAMPLES),
    ("Krum", {"num_malicious_nodes": 2}, 7, SAMPLES),
    ("Krum", {"num_malicious_nodes": 1}, 6, SAMPLES),
    ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 4}, 7, SAMPLES),
]


def draw() -> tuple[dict, list[list[dict]]]:
    """A start, and states by round and client that moved from it together and each for itself."""
    random = np.random.default_rng(0)

    def normal() -> dict[str, np.ndarray]:
        return {name: random.normal(size=shape) for name, shape in SHAPES.items()}

    start, rounds = normal(), []
    for _ in range(ROUNDS):
        common, own = normal(), [normal() for _ in range(CLIENTS)]
        rounds.append([{n: start[n] + 0.1 * (common[n] + o[n]) for n in SHAPES} for o in own])
    short = np.vectorize(lambda value: round(value, 6))
    return (
        {n: short(t) for n, t in start.items()},
        [[{n: short(t) for n, t in s.items()} for s in states] for states in rounds],
    )


def record(state: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor) for name, tensor in state.items()})


def reply(state: dict[str, np.ndarray], samples: int, client: int) -> Message:
    metrics = MetricRecord({"num-examples": samples})
    content = RecordDict({"arrays": record(state), "metrics": metrics})
    return Message(content=content, metadata=Metadata(0, "", client + 1, 0, "", "", 0, 60, "train"))


def run(name: str, options: dict, samples: list[int], start: dict, rounds: list) -> list[dict]:
    """The strategy's state after each round."""
    # A share of 0 sends nothing to clients; the strategy only notes what the round begins with.
    strategy = getattr(strategies, name)(fraction_train=0.0, **options)
    arrays, results = record(start), []
    for number, states in enumerate(rounds, start=1):
        strategy.configure_train(number, arrays, ConfigRecord(), grid=None)
        replies = [reply(states[k], n, k) for k, n in enumerate(samples)]
        arrays, _ = strategy.aggregate_train(number, replies)
        results.append({key: array.numpy() for key, array in arrays.items()})
    return results


def main() -> None:
    logging.disable(logging.WARNING)
    start, rounds = draw()
    cases = [
        {
            "strategy": name,
            "options": options,
            "samples": samples[:clients],
            "results": run(name, options, samples[:clients], start, rounds),
        }
        for name, options, clients, samples in CASES
    ]
    found = {
        "about": __doc__.split("\n")[0],
        "flwr": version("flwr"),
        "numpy": version("numpy"),
        "repeat": "scripts/benchmark/flower_oracle.py",
        "start": start,
        "rounds": rounds,
        "cases": cases,
    }
    file = Path(__file__).resolve().parents[2] / "tests/golden/flower.json"
    file.write_text(json.dumps(found, default=np.ndarray.tolist) + "\n")
    print(f"{file}: {file.stat().st_size} bytes, {len(cases)} cases")


if __name__ == "__main__":
    main()
