"""The shipped frozen parts, both pairs: whole, small, and readable as CLIP and Llama."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

BACKBONES = Path(__file__).resolve().parents[2] / "playground/backbones"
TOWER, LLM = BACKBONES / "vision_tower", BACKBONES / "llm"
TOWERS, LLMS = (TOWER, BACKBONES / "instruct/vision_tower"), (LLM, BACKBONES / "instruct/llm")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LLM)


@pytest.mark.parametrize(
    ("kind", "folder"),
    [(CLIPVisionModel, tower) for tower in TOWERS] + [(LlamaForCausalLM, llm) for llm in LLMS],
)
def test_every_tensor_is_found_and_used(kind, folder):
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("folder", "prefixes"),
    [(tower, ("vision_model.",)) for tower in TOWERS]
    + [(llm, ("model.", "lm_head.")) for llm in LLMS],
)
def test_names_on_disk_are_the_classic_ones(folder, prefixes):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(name.startswith(prefixes) for name in file.keys())  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_small_enough_for_a_repository():
    assert sum(p.stat().st_size for p in BACKBONES.rglob("*") if p.is_file()) < 30e6


@pytest.mark.parametrize(("tower", "llm"), zip(TOWERS, LLMS, strict=True))
def test_shapes_that_llava_relies_on(tower, llm):
    tower = json.loads((tower / "config.json").read_text())
    llm = json.loads((llm / "config.json").read_text())
    assert (tower["image_size"], tower["patch_size"]) == (64, 16)
    assert (tower["model_type"], llm["model_type"]) == ("clip_vision_model", "llama")
    assert llm["architectures"] == ["LlamaForCausalLM"]


def test_processor_only_normalises_a_picture_of_the_towers_size():
    processor = CLIPImageProcessorPil.from_pretrained(TOWER)
    pixels = processor(Image.new("RGB", (64, 64), "white"), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 64, 64)
    white = [(1 - m) / s for m, s in zip(processor.image_mean, processor.image_std, strict=True)]
    assert torch.allclose(pixels[0, :, 0, 0].double(), torch.tensor(white).double(), atol=1e-5)


def test_both_pairs_have_the_same_tokenizer():
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (LLMS[1] / name).read_bytes() == (LLM / name).read_bytes()


def test_tokenizer_is_llamas(tokenizer):
    specials = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert type(tokenizer).__name__.startswith("LlamaTokenizer")
    assert specials == (0, 1, 2)
    assert tokenizer("red apple\n").input_ids[0] == 1
    assert tokenizer("red apple\n").input_ids[-1] == 13, "the newline is one byte token, as Llama's"


@pytest.mark.parametrize(
    "text", ["red apple\n", f"{SYSTEM} USER: What is this? ASSISTANT:", "Zoë paid 5 € #~{}\t!"]
)
def test_tokenizer_loses_nothing(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert 0 not in ids
    assert tokenizer.decode(ids).removeprefix(" ") == text


def test_an_answer_is_tokenised_alike_alone_and_after_its_prompt(tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    prompt = "\nWhat is this? ASSISTANT:"
    assert ids(f"{prompt} red apple</s>") == ids(prompt) + ids("red apple") + [2]
