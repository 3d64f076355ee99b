"""What do the instruct parts answer before and after tuning, per task? Print how often exactly.

    python -m playground.tools.unpack_data
    python -m playground.tools.check_instruct [--learning_rate 2e-3] [--rounds 3]

Aligns a fresh mlp2x_gelu projector on `public.json` by LLaVA's first stage, and measures it on the
held-out pictures for development; then tunes projector and LoRA on all nine clients' data in one
place, by the entry that a federated run takes, and measures again. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from playground.tools.captioner import (
    ROOT,
    chat_row,
    features,
    losses,
    name_of,
    new_projector,
    pictures,
    records,
)
from playground.tools.check_backbones import load
from playground.tools.unpack_data import TASKS

PARTS = ROOT / "playground/backbones/instruct"
MODEL = [
    *("--model_name_or_path", PARTS / "llm", "--vision_tower", PARTS / "vision_tower"),
    *("--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", -2),
    *("--mm_use_im_start_end", False, "--mm_use_im_patch_token", False),
    *("--image_folder", TASKS / "images", "--model_max_length", 256, "--save_strategy", "no"),
    *("--weight_decay", 0, "--warmup_ratio", 0.03, "--lr_scheduler_type", "cosine"),
    *("--per_device_train_batch_size", 16, "--per_device_eval_batch_size", 64),
    *("--logging_steps", 50, "--report_to", "none"),
]


def run(module: str, *flags: object) -> None:
    """`python -m module` with LLaVA's flags for these parts; its output goes to stderr."""
    command = [sys.executable, "-m", module, *map(str, [*MODEL, *flags])]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def align(out: Path, seed: int) -> Path:
    """Stage one: a fresh projector learns plain captions of public emoji, in two passes."""
    run(
        "llava.train.train",
        *("--data_path", TASKS / "public.json", "--version", "plain", "--seed", seed),
        *("--tune_mm_mlp_adapter", True, "--num_train_epochs", 2, "--learning_rate", 2e-3),
        *("--output_dir", out),
    )
    return out / "mm_projector.bin"


@torch.no_grad()
def before(projector_file: Path, scenario: str) -> dict[str, float]:
    """Share of held-out questions of each domain that the aligned parts answer exactly."""
    tower, llm = (
        load(CLIPVisionModel, "instruct/vision_tower"),
        load(LlamaForCausalLM, "instruct/llm"),
    )
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "llm")
    weights = torch.load(projector_file, map_location="cpu", weights_only=True)
    projector = new_projector(tower.config.hidden_size, llm.config.hidden_size)
    projector.load_state_dict({k.split("mm_projector.")[-1]: v.float() for k, v in weights.items()})
    by_domain: dict[str, list[dict]] = {}
    for record in records(f"heldout_dev_{scenario}", folder=TASKS):
        by_domain.setdefault(record["domain"], []).append(record)
    found = {}
    for domain, rows in by_domain.items():
        tokens = projector(features(tower, pictures(rows, TASKS)))
        asked = [
            chat_row(tokenizer, r["conversations"][0]["value"].split("\n", 1)[1], name_of(r))
            for r in rows
        ]
        found[domain] = losses(llm, asked, tokens)[1].float().mean().item()
    return found


def after(projector_file: Path, scenario: str, out: Path, args: argparse.Namespace) -> dict:
    """The same after tuning on all clients' data in one place."""
    run(
        "fed.train",
        *("--fed_clients", ROOT / f"playground/fed/pilot-{scenario}.yaml", "--fed_pool", True),
        *("--fed_rounds", args.rounds, "--fed_one_pass", False, "--fed_eval_every", args.rounds),
        *("--fed_eval_data_path", TASKS / f"heldout_dev_{scenario}.json"),
        *("--pretrain_mm_mlp_adapter", projector_file, "--version", "v1", "--seed", args.seed),
        *("--lora_enable", True, "--lora_r", 8, "--lora_alpha", 16),
        *("--learning_rate", args.learning_rate, "--mm_projector_lr", args.learning_rate),
        *("--output_dir", out),
    )
    last = json.loads((out / "rounds.jsonl").read_text().splitlines()[-1])
    (measures,) = last["heldout"]["global"].values()
    return {domain: found["exact"] for domain, found in measures["domains"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--rounds", type=int, default=3, help="passes over the clients' data")
    parser.add_argument("--scenarios", nargs="+", default=["a", "b"], choices=["a", "b"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/check_instruct")
    args = parser.parse_args()
    disable_progress_bar()
    start = align(args.out / f"start-{args.seed}", args.seed)
    print(f"{'scenario':10}{'questions':14}{'before':>8}{'after':>8}")
    for scenario in args.scenarios:
        lr = f"{args.learning_rate:g}-{args.rounds}-{args.seed}"
        tuned = after(start, scenario, args.out / f"{scenario}-{lr}", args)
        for domain, exact in before(start, scenario).items():
            print(f"{scenario:10}{domain:14}{exact:8.1%}{tuned[domain]:8.1%}", flush=True)


if __name__ == "__main__":
    main()
