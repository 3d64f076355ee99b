"""Can a fresh projector between the shipped frozen parts learn to name pictures? Print how well.

    python -m playground.tools.unpack_data
    python -m playground.tools.check_backbones

Trains an mlp2x_gelu projector for one pass over plain captions: on all private data, and on each
topic client's data alone. Then measures, on pictures that no client holds, the caption loss (mean
over tokens) and the share named exactly, and asks the central model two questions in the v1 format,
which its projector never trained on. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from playground.tools.captioner import (
    BACKBONES,
    DATA,
    Row,
    caption_row,
    chat_row,
    embed,
    features,
    losses,
    name_of,
    new_projector,
    pad,
    pictures,
    records,
)

BATCH = 32


class Examples:
    """Records with what the frozen parts make of them: features (N, 16, width) and token rows."""

    def __init__(
        self, rows: list[dict], tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.records = rows
        with torch.no_grad():
            parts = [features(tower, p) for p in pictures(rows).split(256)]
        self.features = torch.cat(parts)
        self.rows: list[Row] = [caption_row(tokenizer, name_of(r)) for r in rows]


def train(llm: LlamaForCausalLM, data: Examples, lr: float, seed: int) -> nn.Sequential:
    """One pass, AdamW without decay, 3 % warm-up, cosine: LLaVA's pre-training in small."""
    torch.manual_seed(seed)
    projector = new_projector(data.features.shape[-1], llm.config.hidden_size)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.0)
    steps = math.ceil(len(data.rows) / BATCH)
    warmup = math.ceil(0.03 * steps)
    for step, chosen in enumerate(torch.randperm(len(data.rows)).split(BATCH)):
        done = max(0, step - warmup) / (steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done))
        rows = [data.rows[i] for i in chosen]
        losses(llm, rows, projector(data.features[chosen]))[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return projector


@torch.no_grad()
def measure(llm: LlamaForCausalLM, projector: nn.Module, data: Examples) -> tuple[float, float]:
    """Mean loss a token, share of pictures named exactly."""
    token_losses, exact = [], []
    for chosen in torch.arange(len(data.rows)).split(128):
        rows = [data.rows[i] for i in chosen]
        found = losses(llm, rows, projector(data.features[chosen]))
        token_losses.append(found[0])
        exact.append(found[1])
    return torch.cat(token_losses).mean().item(), torch.cat(exact).float().mean().item()


@torch.no_grad()
def answer(
    llm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    projector: nn.Module,
    image: torch.Tensor,
    question: str,
) -> str:
    """Greedy answer to a question about one picture's features (16, width), in the v1 format."""
    ids, _ = pad([chat_row(tokenizer, question)])
    embeds = embed(llm, ids, projector(image[None]))
    mask = torch.ones_like(ids)
    out = llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=16)
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


def load(kind: type, name: str) -> nn.Module:
    """A shipped part in fp32, frozen; every tensor must be found and used."""
    model, info = kind.from_pretrained(
        BACKBONES / name, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: list(value) for key, value in info.items() if value}
    if wrong:
        raise SystemExit(f"{BACKBONES / name}: {wrong}")
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    disable_progress_bar()
    tower, llm = load(CLIPVisionModel, "vision_tower"), load(LlamaForCausalLM, "llm")
    tokenizer = AutoTokenizer.from_pretrained(BACKBONES / "llm")

    topics = sorted(path.stem for path in (DATA / "clients/topic").glob("*.json"))
    everything = records(*(f"clients/topic/{t}" for t in topics))
    dev, unseen = (Examples(records(n), tower, tokenizer) for n in ("heldout_dev", "unseen"))
    print(f"{'trained on':14}{'pictures':>9}  {'held-out loss':>14}{'exact':>7}", end="")
    print(f"  {'unseen loss':>12}{'exact':>7}")

    def report(name: str, size: int, projector: nn.Module) -> None:
        (loss, exact), (far_loss, far_exact) = (
            measure(llm, projector, data) for data in (dev, unseen)
        )
        print(f"{name:14}{size:9}  {loss:14.3f}{exact:7.1%}  {far_loss:12.3f}{far_exact:7.1%}")

    torch.manual_seed(args.seed)
    report("nothing", 0, new_projector(tower.config.hidden_size, llm.config.hidden_size))
    for topic in topics:
        data = Examples(records(f"clients/topic/{topic}"), tower, tokenizer)
        report(topic, len(data.rows), train(llm, data, args.lr, args.seed))
    central = train(llm, Examples(everything, tower, tokenizer), args.lr, args.seed)
    report("all of them", len(everything), central)

    for place in (0, 1, 2):
        record, image = dev.records[place], dev.features[place]
        print(f"\n{record['image']}: {name_of(record)} ({record['topic']})")
        for question in ("What is this?", "What kind of thing is this?"):
            print(f"  {question} -> {answer(llm, tokenizer, central, image, question)}")


if __name__ == "__main__":
    main()
