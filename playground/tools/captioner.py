"""What training and checking the playground's backbones share: pictures, prompts and the loss.

Rows of tokens follow LLaVA: -200 stands for one image token, -100 for "no loss here".
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerBase

from llava.pictures import open_image

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "playground/data/emoji"
BACKBONES = ROOT / "playground/backbones"
IMAGE, IGNORE = -200, -100
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's pre-processing
STD = (0.26862954, 0.26130258, 0.27577711)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Row = tuple[list[int], list[int]]  # token ids and labels of one sample


def records(*names: str, folder: Path = DATA) -> list[dict]:
    """Records of the JSON files of these names (without `.json`) in playground/data/emoji."""
    return [r for name in names for r in json.loads((folder / f"{name}.json").read_text())]


def name_of(record: dict) -> str:
    return record["conversations"][1]["value"]


def pictures(rows: list[dict], folder: Path = DATA) -> torch.Tensor:
    """uint8, (N, 3, 64, 64)."""
    return pixels([open_image(folder / "images" / r["image"]) for r in rows])


def pixels(opened: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size -> uint8, (N, 3, height, width)."""
    flat = torch.frombuffer(bytearray(b"".join(p.tobytes() for p in opened)), dtype=torch.uint8)
    width, height = opened[0].size
    return flat.view(len(opened), height, width, 3).permute(0, 3, 1, 2).contiguous()


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Pixels of 0..255 -> what CLIPImageProcessor gives for a picture of the tower's own size."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


def features(tower: CLIPVisionModel, images: torch.Tensor) -> torch.Tensor:
    """(N, 16, width): the last layer but one, without the class token, as LLaVA selects it."""
    states = tower(pixel_values=normalise(images), output_hidden_states=True).hidden_states
    return states[-2][:, 1:]


def new_projector(width: int, hidden: int) -> nn.Sequential:
    """LLaVA's mlp2x_gelu."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))


def caption_row(tokenizer: PreTrainedTokenizerBase, caption: str, image: int = 16) -> Row:
    """LLaVA's `plain` format; loss on the caption and the newline. `image=0`: text only."""
    start = [tokenizer.bos_token_id] + [IMAGE] * image
    text = tokenizer(caption + "\n", add_special_tokens=False).input_ids
    return start + text, [IGNORE] * len(start) + text


def chat_row(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str = "", image: int = 16
) -> Row:
    """LLaVA's `v1` format; loss on the answer and `</s>`. No answer: the prompt to continue."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    start = [tokenizer.bos_token_id]
    if image:
        start += ids(f"{SYSTEM} USER: ") + [IMAGE] * image
        ask = f"\n{question} ASSISTANT:"
    else:
        ask = f"{SYSTEM} USER: {question} ASSISTANT:"
    prompt = ids(ask)
    if not answer:
        return start + prompt, [IGNORE] * len(start + prompt)
    whole = ids(f"{ask} {answer}</s>")
    assert whole[: len(prompt)] == prompt, (ask, answer)
    learnt = whole[len(prompt) :]
    return start + whole, [IGNORE] * len(start + prompt) + learnt


def pad(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (N, longest), padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = [i + [0] * (longest - len(i)) for i, _ in rows]
    labels = [t + [IGNORE] * (longest - len(t)) for _, t in rows]
    return torch.tensor(ids), torch.tensor(labels)


def embed(llm: LlamaForCausalLM, ids: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
    """(N, L, hidden): token embeddings with the projected pictures (N, 16, hidden) in place."""
    embeds = llm.get_input_embeddings()(ids.clamp_min(0))
    if image is None:
        return embeds
    return embeds.masked_scatter((ids == IMAGE).unsqueeze(-1), image.to(embeds))


def losses(
    llm: LlamaForCausalLM, rows: list[Row], image: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every learnt token (T,), and which rows are predicted exactly (N,).

    Exactly: under teacher forcing, the likeliest token is the right one at every learnt place.
    No attention mask is needed: attention is causal and the padding is on the right.
    """
    ids, labels = pad(rows)
    hidden = llm.model(inputs_embeds=embed(llm, ids, image)).last_hidden_state
    return score(llm, hidden, labels)


def score(
    llm: LlamaForCausalLM, hidden: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`losses`, given the last hidden states (N, L, hidden)."""
    hidden, learnt = hidden[:, :-1], labels[:, 1:] != IGNORE
    logits, targets = llm.lm_head(hidden[learnt]), labels[:, 1:][learnt]
    wrong = torch.zeros(learnt.shape, dtype=torch.bool)
    wrong[learnt] = logits.argmax(-1) != targets
    return nn.functional.cross_entropy(logits, targets, reduction="none"), ~wrong.any(1)
