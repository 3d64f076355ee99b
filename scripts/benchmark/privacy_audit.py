"""An audit of private training: canaries that are in or out, told apart by their loss.

    python scripts/benchmark/privacy_audit.py                      # the playground's parts, any CPU
    python scripts/benchmark/privacy_audit.py --model_name_or_path LLM --vision_tower TOWER

Each canary is a picture of noise with a caption of random words. Of a run's canaries each is in
with probability 1/2; one that is out keeps its place in its batch and gives nothing, as the
guarantee's neighbours have it. After training the quarter whose loss has fallen most is guessed in,
the quarter whose loss has fallen least out. From the number of right guesses follows, with 95 %
confidence, an epsilon that training must have at least (Steinke, Nasr, Jagielski 2023, arXiv
2305.08846; the seeds' guesses are pooled, for each canary is in one run's data alone).

The bound must lie below what private training states. Without it the same training must be seen to
reveal more, or the audit would show nothing. Lower bounds grow with the number of guesses: r right
ones of r cannot show more than about ln(r / 3).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import binom

from llava.constants import IGNORE_INDEX
from llava.train.arguments import parse
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.private_accounting import Guarantee, guarantee
from llava.train.private_arguments import PrivacyArguments, samples_of_step
from llava.train.private_noise import NoiseSecret
from llava.train.private_run import passes
from llava.train.private_trainer import PrivateSteps, PrivateTrainer, sample_losses
from llava.train.session import load_session
from llava.train.train import make_trainer

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "red green blue round square old new big small cat dog tree house sea moon sun two three"
).split()


@dataclass(frozen=True)
class Guesses:
    """How many of `made` guesses on `canaries` were right; `accuracy` is of all, the middle too."""

    made: int
    right: int
    canaries: int
    accuracy: float


class Zeroed:
    """A data set in which some samples teach nothing, in their places."""

    def __init__(self, dataset: LazySupervisedDataset, out: set[int]):
        self.dataset, self.out = dataset, out

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        item = self.dataset[index]
        if index in self.out:
            item["labels"] = torch.full_like(item["labels"], IGNORE_INDEX)
        return item


def canaries(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Records with pictures of noise below `folder`, whose captions follow from nothing."""
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    records = []
    for i in range(count):
        pixels = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{seed}-{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"},
                 {"from": "gpt", "value": " ".join(draw.choices(WORDS, k=6))}]  # fmt: skip
        records.append({"id": str(i), "image": f"{seed}-{i}.png", "conversations": turns})
    return records


@torch.no_grad()
def losses(model: Any, dataset: LazySupervisedDataset, collate: Any) -> torch.Tensor:
    """The loss of each sample, (samples,)."""
    model.eval()
    found = []
    for start in range(0, len(dataset), 32):
        places = range(start, min(start + 32, len(dataset)))
        batch = collate([dataset[i] for i in places])
        logits = model(**batch).logits
        found.append(sample_losses(logits, batch["labels"], batch["label_positions"]))
    return torch.cat(found)


def audit_run(
    flags: Sequence[str], count: int, privacy: PrivacyArguments | None, folder: Path, seed: int
) -> tuple[Guesses, Guarantee | None]:
    """One training with `count` canaries, of which a half is in, and the guesses on it."""
    folder.mkdir(parents=True)
    argv = [*flags, "--output_dir", str(folder), "--image_folder", str(folder), "--seed", str(seed)]
    args = parse(argv)
    session = load_session(*args)
    dataset = LazySupervisedDataset(
        canaries(folder, count, seed), session.tokenizer, args[1],
        feature_cache=session.feature_cache, sample_format=session.sample_format,
    )  # fmt: skip
    if session.feature_cache is not None:
        session.feature_cache.prefetch(dataset.pictures())
    coins = random.Random(f"coins {seed}")
    inside = [coins.random() < 0.5 for _ in range(count)]
    collate = DataCollatorForSupervisedDataset(session.tokenizer)
    before = losses(session.model, dataset, collate)
    how: dict[str, Any] = {}
    stated = None
    if privacy is not None:
        stated = guarantee(
            privacy, entries=passes(args[2], count), records=count,
            step=samples_of_step(args[2]), who="the audit",
        )  # fmt: skip
        steps = PrivateSteps(stated.clip, stated.noise, NoiseSecret(folder / "noise.json"), "audit")
        how = {"kind": PrivateTrainer, "private": steps}
    trainer = make_trainer(
        session, args[2], progress=False, data_collator=collate,
        train_dataset=Zeroed(dataset, {i for i in range(count) if not inside[i]}), **how,
    )  # fmt: skip
    trainer.train()
    fallen = (before - losses(session.model, dataset, collate)).tolist()
    order = sorted(range(count), key=lambda i: fallen[i])
    quarter, half = count // 4, count // 2
    right = sum(not inside[i] for i in order[:quarter]) + sum(inside[i] for i in order[-quarter:])
    all_right = sum(not inside[i] for i in order[:half]) + sum(inside[i] for i in order[half:])
    return Guesses(2 * quarter, right, count, all_right / count), stated


def lower_bound(guesses: Sequence[Guesses], delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that the guesses refute, 0 if none; see above."""
    made, right = sum(g.made for g in guesses), sum(g.right for g in guesses)
    total = sum(g.canaries for g in guesses)

    def likelihood(epsilon: float) -> float:
        """An upper bound of the probability of so many right guesses under (epsilon, delta)."""
        chance = 1 / (1 + np.exp(-epsilon))
        fewer = np.arange(1, right + 1)
        within = np.cumsum(binom.pmf(right - fewer, made, chance))
        worst = max(within / fewer, default=0.0)
        return float(binom.sf(right - 1, made, chance) + 2 * total * delta * worst)

    low, high = 0.0, 30.0
    if likelihood(low) > 1 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if likelihood(middle) <= 1 - confidence else (low, middle)
    return low


def audit(
    flags: Sequence[str], count: int, privacy: PrivacyArguments, folder: Path, seeds: Sequence[int]
) -> dict[str, Any]:
    """Lower bounds with and without private training, and what it states."""
    found: dict[str, Any] = {"seeds": list(seeds), "canaries": count}
    for title, flags_of in (("open", None), ("private", privacy)):
        runs = [
            audit_run(flags, count, flags_of, folder / f"{title}-{seed}", seed) for seed in seeds
        ]
        guesses = [run for run, _ in runs]
        found[title] = {
            "accuracy": round(statistics.mean(g.accuracy for g in guesses), 4),
            "right": sum(g.right for g in guesses),
            "guesses": sum(g.made for g in guesses),
            "epsilon at least": round(lower_bound(guesses, privacy.fed_dp_delta or 0.0), 3),
        }
        if runs[0][1] is not None:
            found[title] |= runs[0][1].as_json()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ROOT / "playground/backbones"
    parser.add_argument("--model_name_or_path", default=str(parts / "llm"))
    parser.add_argument("--vision_tower", default=str(parts / "vision_tower"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--canaries", type=int, default=64, help="in each run")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--clip", type=float, default=0.5)
    args = parser.parse_args(argv)
    flags = {
        "model_name_or_path": args.model_name_or_path, "vision_tower": args.vision_tower,
        "version": "plain", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False, "tune_mm_mlp_adapter": True, "report_to": "none",
        "save_strategy": "no", "num_train_epochs": args.epochs, "per_device_train_batch_size": 16,
        "learning_rate": args.learning_rate, "lr_scheduler_type": "constant",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    privacy = PrivacyArguments(
        fed_dp_epsilon=args.epsilon, fed_dp_delta=args.delta, fed_dp_clip=args.clip
    )
    with tempfile.TemporaryDirectory() as folder:
        found = audit(words, args.canaries, privacy, Path(folder), range(args.seeds))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
