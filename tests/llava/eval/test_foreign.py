"""Programs of others: they import upstream's names and drive the model in their own ways.

Written after how the evaluation harnesses lmms-eval and VLMEvalKit, and scripts of research forks,
use LLaVA.
"""

from __future__ import annotations

import abc
import argparse
import copy

import pytest
import torch
from PIL import Image

from llava.eval.answer import Answerer, generation_options

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


@pytest.fixture(scope="module")
def reference(llava_folder):
    """`reference(prompt, images)`: what our own programs answer, one prompt at a time."""
    args = argparse.Namespace(model_path=str(llava_folder), model_base=None, device="cpu",
                              load_8bit=False, load_4bit=False, conv_mode=None)  # fmt: skip
    answerer = Answerer.load(args)

    def answer(prompt: str, *images: Image.Image) -> str:
        pictures = [answerer.picture(image) for image in images]
        return answerer.answer([prompt], [pictures], "</s>", generation_options(0, 6))[0]

    return answer


@pytest.fixture(scope="module")
def images(pictures):
    return [Image.open(pictures / f"{i}.png").convert("RGB") for i in range(3)]


class Harness:
    """In the manner of lmms-eval's adapter: batches, padding, half precision pictures."""

    def __init__(self, pretrained: str, device: str = "cpu"):
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        self.tokenizer, self.model, self.processor, self.max_length = load_pretrained_model(
            pretrained, None, get_model_name_from_path(pretrained), device_map=device,
            use_flash_attention_2=False,
        )  # fmt: skip
        self.model.eval()
        self.model.tie_weights()
        self.model.to(torch.device(device))
        self.config = self.model.config

    def pictures(self, visuals):
        from llava.mm_utils import process_images

        if not visuals:
            return None
        pixels = process_images(visuals, self.processor, self.config)
        if type(pixels) is list:
            return [one.to(dtype=torch.float16) for one in pixels]
        return pixels.to(dtype=torch.float16)

    def ids(self, prompt):
        from llava.constants import IMAGE_TOKEN_INDEX
        from llava.mm_utils import tokenizer_image_token

        return tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

    def conversation(self, context, answer=None):
        from llava.conversation import conv_templates

        conv = conv_templates["vicuna_v1"].copy()
        conv.append_message(conv.roles[0], context)
        conv.append_message(conv.roles[1], answer)
        return conv.get_prompt()

    def generate_until(self, contexts, visuals):
        rows = [self.ids(self.conversation(context)) for context in contexts]
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        left = self.tokenizer.padding_side == "left"
        rows = [row.flip(0) if left else row for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        ids = ids.flip(1) if left else ids
        out = self.model.generate(
            ids,
            attention_mask=ids.ne(pad),
            pad_token_id=pad,
            images=self.pictures(visuals),
            image_sizes=[visual.size for visual in visuals],
            do_sample=False,
            temperature=0,
            top_p=None,
            num_beams=1,
            max_new_tokens=6,
            use_cache=True,
        )
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)

    def loglikelihood(self, context, answer, visuals):
        asked = self.ids(self.conversation(context)).unsqueeze(0)
        ids = self.ids(self.conversation(context, answer)).unsqueeze(0)
        labels = ids.clone()
        labels[0, : asked.shape[1]] = -100
        with torch.inference_mode():
            outputs = self.model(
                input_ids=ids, labels=labels, images=self.pictures(visuals), use_cache=True,
                image_sizes=[visual.size for visual in visuals],
            )  # fmt: skip
        return ids, labels, outputs["loss"], outputs["logits"]


@pytest.fixture(scope="module")
def harness(llava_folder):
    return Harness(str(llava_folder))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_harness_generates_in_padded_batches(harness, reference, images, side):
    harness.tokenizer.padding_side = side
    contexts = ["<image>\nWhat?", "<image>\nName it in one or two words, please.", "<image>\nWhy?"]
    answers = harness.generate_until(contexts, images)
    prompts = [harness.conversation(context) for context in contexts]
    halves = [reference(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    assert [answer.strip() for answer in answers] == halves
    assert len(set(answers)) > 1


def test_a_harness_asks_without_pictures(harness, reference):
    contexts = ["What?", "Why is the sky blue?"]
    answers = harness.generate_until(contexts, [])
    expected = [reference(harness.conversation(context)) for context in contexts]
    assert [answer.strip() for answer in answers] == expected


def test_rows_may_have_any_number_of_pictures(harness, reference, images):
    contexts = ["<image>\n<image>\nDo they differ?", "What is a cat?"]
    answers = harness.generate_until(contexts, images[:2])
    expected = [reference(harness.conversation(contexts[0]), *images[:2]),
                reference(harness.conversation(contexts[1]))]  # fmt: skip
    assert [answer.strip() for answer in answers] == expected


def test_a_harness_reads_loss_and_logits(harness, images):
    ids, labels, loss, logits = harness.loglikelihood("<image>\nWhat?", "red", images[:1])
    patches = harness.model.get_vision_tower().num_patches
    assert logits.shape[:2] == (1, ids.shape[1] - 1 + patches)  # one id stands for a picture
    answer = labels[0, labels[0] != -100]
    said = logits[0, -len(answer) - 1 : -1].log_softmax(-1)
    expected = -said.gather(1, answer.unsqueeze(1)).mean()
    torch.testing.assert_close(loss, expected)


def test_in_the_manner_of_vlmevalkit(llava_folder, reference, pictures, images):
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import (
        KeywordsStoppingCriteria,
        get_model_name_from_path,
        process_images,
        tokenizer_image_token,
    )
    from llava.model.builder import load_pretrained_model

    path = str(llava_folder)
    tokenizer, model, processor, _ = load_pretrained_model(
        model_path=path, model_base=None, model_name=get_model_name_from_path(path),
        device="cpu", device_map="cpu",
    )  # fmt: skip
    args = abc.abstractproperty()
    args.image_aspect_ratio = "pad"
    opened = [Image.open(pictures / name).convert("RGB") for name in ("0.png", "1.png")]
    pixels = process_images(opened, processor, args).to("cpu", dtype=torch.float16)
    prompt = SYSTEM + "USER:  <image>  <image> What differs? ASSISTANT: "
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    ids = ids.unsqueeze(0)
    stopping = KeywordsStoppingCriteria(["</s>"], tokenizer, ids)
    with torch.inference_mode():
        out = model.generate(
            ids, images=pixels, stopping_criteria=[stopping], do_sample=False, temperature=0,
            max_new_tokens=6, top_p=None, num_beams=1, use_cache=True,
        )  # fmt: skip
    answer = tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()
    assert answer == reference(prompt, *images[:2])


def test_in_the_manner_of_a_forks_evaluation_script(llava_folder, reference, images):
    from llava.constants import (
        DEFAULT_IM_END_TOKEN,
        DEFAULT_IM_START_TOKEN,
        DEFAULT_IMAGE_TOKEN,
        IMAGE_TOKEN_INDEX,
    )
    from llava.conversation import SeparatorStyle, conv_templates
    from llava.mm_utils import KeywordsStoppingCriteria, tokenizer_image_token
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.utils import disable_torch_init

    disable_torch_init()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llava_folder, use_fast=False)
    config = LlavaConfig.from_pretrained(llava_folder)
    model = LlavaLlamaForCausalLM.from_pretrained(llava_folder, config=config)
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    tower.to(device="cpu", dtype=torch.float32)
    question = DEFAULT_IMAGE_TOKEN + "\nWhat?"
    if model.config.mm_use_im_start_end:
        question = question.replace(
            DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        )
    conv = copy.deepcopy(conv_templates["llava_v1"])
    conv.append_message(conv.roles[0], question)
    conv.append_message(conv.roles[1], None)
    stop = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
    ids = tokenizer_image_token(
        conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"
    ).unsqueeze(0)
    from llava.mm_utils import process_images

    pixels = process_images(images[:1], tower.image_processor, model.config)[0]
    out = model.generate(
        inputs=ids, images=pixels.unsqueeze(0), image_sizes=[images[0].size], do_sample=False,
        stopping_criteria=[KeywordsStoppingCriteria([stop], tokenizer, ids)], max_new_tokens=6,
    )  # fmt: skip
    answer = tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()
    assert answer == reference(conv.get_prompt(), images[0])
