"""Train the playground's frozen parts: a small CLIP vision tower and a small Llama.

    python -m playground.tools.unpack_data
    python -m playground.tools.train_backbones | tee playground/backbones/train.log

First the tower alone learns which concept a picture shows. Then tower, projector (mlp2x_gelu) and
language model learn together to name all pictures but the `unseen` ones and to answer simple
questions about them; the projector is thrown away. The text-only rows also use the names of the
unseen concepts: the language model knows the words. (Without the tower's own start, the captioner
had hardly begun to see after 1,000 joint steps: 2 % named exactly.)
Writes playground/backbones/{vision_tower,llm} in float16, with the key names that every version of
transformers reads. Two CPU cores, fp32, 25 to 40 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import string
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from playground.tools.captioner import (
    BACKBONES,
    MEAN,
    STD,
    SYSTEM,
    Row,
    caption_row,
    chat_row,
    features,
    losses,
    name_of,
    new_projector,
    pictures,
    records,
)

VOCABULARY = 2560
CONCEPT_SHARE = 0.1  # of the tower's own task in the joint loss
CAPTIONS, CHATS, TEXTS = 40, 12, 8  # rows of a step: `plain`, `v1` with a picture, text only
NAME_QUESTIONS = (
    "What is this?",
    "What is in the picture?",
    "What does this picture show?",
    "Describe the picture.",
)
KIND_QUESTION = "What kind of thing is this?"
KINDS = {
    "smileys": "a smiley or an emotion",
    "people": "a person or a part of the body",
    "animals": "an animal or a plant",
    "food": "food or drink",
    "travel": "a place or a vehicle",
    "activities": "an activity",
    "objects": "an object",
    "symbols": "a symbol",
}


def write_tokenizer(folder: Path, names: list[str]) -> None:
    """Train a SentencePiece BPE on the names and the prompts; save it as a LlamaTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [*NAME_QUESTIONS, KIND_QUESTION, "What kind of thing is called", "Does it show"]
    prompts = [f"{SYSTEM} USER: {q} ASSISTANT: yes no" for q in questions]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(names * 3 + (prompts + list(KINDS.values())) * 10),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,  # anything else is spelt in bytes, "\n" always
        normalization_rule_name="identity",  # keeps "\n"
        remove_extra_whitespaces=False,
        split_digits=True,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 2048,
            "padding_side": "right",
        },
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def new_models() -> tuple[CLIPVisionModel, LlamaForCausalLM]:
    tower = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,  # LLaVA reads the last layer but one, so four of these learn
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
        projection_dim=192,
        hidden_act="gelu",
    )
    llm = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        conversation_template="v1",  # what run_llava asks in, if not told otherwise
    )
    return CLIPVisionModel(tower), LlamaForCausalLM(llm)


def save(tower: CLIPVisionModel, llm: LlamaForCausalLM, parent: Path = BACKBONES) -> None:
    """Write both folders; weights as float16 under their classic names."""
    for model, name in ((tower, "vision_tower"), (llm, "llm")):
        folder = parent / name
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
        if model is tower:  # transformers 5 holds them without the prefix that it had on disk
            weights = {
                f"vision_model.{k.removeprefix('vision_model.')}": weights[k] for k in weights
            }
            weights.pop("vision_model.embeddings.position_ids", None)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        config = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
        # both spellings of the type, for transformers 4 and 5
        write_json(folder / "config.json", config | {"dtype": "float16", "torch_dtype": "float16"})
    write_json(
        parent / "llm/generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    write_json(
        parent / "vision_tower/preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": 64},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": 64, "width": 64},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": MEAN,
            "image_std": STD,
        },
    )


def augment(images: torch.Tensor) -> torch.Tensor:
    """Shift by up to 4 px, change brightness and contrast by up to 15 %; no flip: it renames."""
    count, shift = len(images), 4
    padded = nn.functional.pad(images, [shift] * 4, value=255)
    moves = torch.randint(0, 2 * shift + 1, (count, 2)).tolist()
    moved = [p[:, y : y + 64, x : x + 64] for p, (y, x) in zip(padded, moves, strict=True)]
    gain, offset = 0.85 + 0.3 * torch.rand(2, count, 1, 1, 1)
    return ((torch.stack(moved) - 128) * gain + 128 * offset).clamp(0, 255)


def picture_chat(tokenizer: PreTrainedTokenizerBase, record: dict, names: list[str]) -> Row:
    """A question about a picture: its name (half), its kind, or whether it shows something."""
    name, dice = name_of(record), random.random()
    if dice < 0.5:
        return chat_row(tokenizer, random.choice(NAME_QUESTIONS), name)
    if dice < 0.75:
        return chat_row(tokenizer, KIND_QUESTION, KINDS[record["topic"]])
    other = random.choice([name, random.choice(names)])
    return chat_row(tokenizer, f"Does it show {other}?", "yes" if other == name else "no")


def text_row(tokenizer: PreTrainedTokenizerBase, record: dict) -> Row:
    """A name alone, or the question what kind of thing it names."""
    if random.random() < 0.5:
        return caption_row(tokenizer, name_of(record), image=0)
    question = f"What kind of thing is called {name_of(record)}?"
    return chat_row(tokenizer, question, KINDS[record["topic"]], image=0)


class Concepts(nn.Module):
    """Which concept a picture shows, read off the mean of its features: makes the tower see."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, count))

    def forward(self, found: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """Features (N, 16, width) and concept numbers (N,) -> mean cross-entropy."""
        return nn.functional.cross_entropy(self.read(found.mean(1)), concepts)


def batches(count: int, size: int) -> Iterator[list[int]]:
    """Places 0..count-1 in random order, `size` at a time, for ever."""
    while True:
        for chosen in torch.randperm(count).split(size):
            if len(chosen) == size:
                yield chosen.tolist()


class Optimizer:
    """AdamW with decay on matrices only, warm-up, cosine to zero, gradients clipped at 1."""

    def __init__(self, modules: list[nn.Module], lr: float, steps: int) -> None:
        self.parameters = [p for m in modules for p in m.parameters()]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
        warmup = min(200, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw,
            lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / steps)),
        )

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        self.schedule.step()


class Progress:
    """Prints the mean of some measures every 50 steps, and the seconds since it was made."""

    def __init__(self) -> None:
        self.start, self.sums = time.time(), []

    def __call__(self, phase: str, step: int, **measures: torch.Tensor) -> None:
        self.sums.append(torch.stack([m.detach() for m in measures.values()]))
        if step % 50 == 0:
            means = torch.stack(self.sums).mean(0).tolist()
            self.sums.clear()
            shown = "  ".join(f"{k} {v:.3f}" for k, v in zip(measures, means, strict=True))
            print(f"{phase} {step:5}  {shown}  {time.time() - self.start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower_steps", type=int, default=7000)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.set_num_threads(2)

    styles = [f"clients/style/{s}" for s in ("google", "twitter", "openmoji", "fluent")]
    seen = records(*styles, "heldout_dev", "heldout_test")
    by_name = {name_of(r): r for r in seen + records("unseen")}
    names = sorted(by_name)
    write_tokenizer(BACKBONES / "llm", names)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONES / "llm")
    images = pictures(seen)
    number = {name: place for place, name in enumerate(names)}
    labels = torch.tensor([number[name_of(r)] for r in seen])
    tower, llm = new_models()
    projector = new_projector(tower.config.hidden_size, llm.config.hidden_size)
    concepts = Concepts(tower.config.hidden_size, len(names))
    size = [sum(p.numel() for p in m.parameters()) for m in (tower, llm, projector)]
    print(f"torch {torch.__version__}, {vars(args)}, {len(seen)} pictures, {len(names)} names")
    print(f"parameters: tower {size[0]:,}, language model {size[1]:,}, projector {size[2]:,}")

    progress = Progress()
    optimizer = Optimizer([tower, concepts], args.lr, args.tower_steps)
    stream = batches(len(seen), CAPTIONS + CHATS)
    for step in range(1, args.tower_steps + 1):
        chosen = next(stream)
        loss = concepts(features(tower, augment(images[chosen].float())), labels[chosen])
        optimizer.step(loss)
        progress("tower", step, concept_loss=loss)

    optimizer = Optimizer([tower, concepts, projector, llm], args.lr, args.steps)
    for step in range(1, args.steps + 1):
        chosen = next(stream)
        found = features(tower, augment(images[chosen].float()))
        tokens = projector(found)
        plain = [caption_row(tokenizer, name_of(seen[i])) for i in chosen[:CAPTIONS]]
        chats = [picture_chat(tokenizer, seen[i], names) for i in chosen[CAPTIONS:]]
        texts = [text_row(tokenizer, by_name[n]) for n in random.choices(names, k=TEXTS)]
        plain_losses, exact = losses(llm, plain, tokens[:CAPTIONS])
        chat_losses, chat_exact = losses(llm, chats, tokens[CAPTIONS:])
        text_losses, _ = losses(llm, texts, None)
        concept_loss = concepts(found, labels[chosen])
        loss = torch.cat([plain_losses, chat_losses, text_losses]).mean()
        optimizer.step(loss + CONCEPT_SHARE * concept_loss)
        progress(
            "joint",
            step,
            caption_loss=plain_losses.mean(),
            caption_exact=exact.float().mean(),
            chat_loss=chat_losses.mean(),
            chat_exact=chat_exact.float().mean(),
            text_loss=text_losses.mean(),
            concept_loss=concept_loss,
        )
        if step % 500 == 0 or step == args.steps:
            save(tower, llm)


if __name__ == "__main__":
    main()
