"""A loaded LLaVA that answers: templates, prompts with pictures, batched generation."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from llava.conversation import Conversation, get_template
from llava.errors import InputError
from llava.model.attention_impl import KINDS, choose_attention

if TYPE_CHECKING:
    import torch
    from PIL import Image

Picture = tuple["torch.Tensor", tuple[int, int]]
"""A picture as the tower wants it, and its (width, height) before."""


class TooLongError(InputError):
    """A prompt that leaves no room for an answer."""


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model answers, and where it computes."""
    parser.add_argument("--model-path", default="facebook/opt-350m")
    parser.add_argument("--model-base", default=None)
    parser.add_argument("--device", default="cuda", help="cuda where there is one, else the CPU")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--attn_implementation", choices=KINDS, help="else sdpa")


@dataclasses.dataclass
class Answerer:
    """A model with its tokenizer, its image processor (None: text alone) and its name.

    `context_length` is how many tokens it reads and writes at most.
    """

    tokenizer: Any
    model: Any
    image_processor: Any
    name: str
    context_length: int = 2048

    @classmethod
    def load(cls, args: argparse.Namespace) -> Answerer:
        """The model that `add_model_flags` asks for."""
        if args.conv_mode:
            get_template(args.conv_mode)  # a misspelt one is said before the model loads
        check_device(args.device)
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        path = os.path.expanduser(args.model_path)
        name = get_model_name_from_path(path)
        attention = choose_attention(getattr(args, "attn_implementation", None), args.device)
        tokenizer, model, image_processor, _ = load_pretrained_model(
            path, args.model_base, name, args.load_8bit, args.load_4bit, device=args.device,
            attn_implementation=attention,
        )  # fmt: skip
        positions = getattr(model.config, "max_position_embeddings", None) or 2048
        return cls(tokenizer, model, image_processor, name, positions)

    def template(
        self, asked: str | None, default: str | None = None, mmtag: bool = False
    ) -> Conversation:
        """The template asked for, else the config's `conversation_template`, else `default`.

        Without a default it is the one that upstream takes for a model of this name. `mmtag` is
        upstream's rule for models that only were pre-trained. Says on stderr which it is.
        """
        configured = getattr(self.model.config, "conversation_template", None)
        if asked:
            mode, why = asked, "--conv-mode"
        elif configured:
            mode, why, mmtag = configured, "conversation_template in the model's config", False
        elif default:
            mode, why = default, "the default"
        else:
            mode, why = conv_mode_of(self.name), f"by the model's name, {self.name}"
        plain = "plain" in self.name and "finetune" not in self.name.lower()
        if mmtag and plain and "mmtag" not in mode:
            mode, why = f"{mode}_mmtag", f"{why}, with pictures tagged for {self.name}"
        print(f"conversation template: {mode} ({why})", file=sys.stderr, flush=True)
        return get_template(mode)

    def with_pictures(self, text: str, pictures: int) -> str:
        """A user's text with one image token a picture: at its placeholders, else in front."""
        token = DEFAULT_IMAGE_TOKEN
        if getattr(self.model.config, "mm_use_im_start_end", False):
            token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
        if pictures and IMAGE_PLACEHOLDER in text:
            text = text.replace(IMAGE_PLACEHOLDER, token)
        else:
            text = f"{token}\n" * pictures + text
        if (found := text.count(DEFAULT_IMAGE_TOKEN)) != pictures:
            raise InputError(f"{pictures} pictures were given, the text has {found} image tokens")
        return text

    def picture(self, image: Image.Image) -> Picture:
        """Prepare one picture; several threads may do so at once."""
        from llava.mm_utils import process_images

        self._check_sees()
        return process_images([image], self.image_processor, self.model.config)[0], image.size

    def _check_sees(self) -> None:
        if self.image_processor is None:
            raise InputError(f"{self.name}: a language model without pictures")

    def placed(self, pictures: Sequence[Picture]) -> tuple[Any, list[tuple[int, int]]]:
        """Pixels of pictures as the model takes them, where it computes, and their sizes."""
        from llava.mm_utils import stack_same

        pixels = [p.to(self.model.device, self.model.dtype) for p, _ in pictures]
        return stack_same(pixels), [size for _, size in pictures]

    def answer(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Sequence[Picture]],
        stop: str,
        generation: dict[str, Any],
        streamer: Any = None,
    ) -> list[str]:
        """Answer a batch of prompts at once.

        Args:
            pictures: those of each prompt, in the order of its image tokens.
            stop: the mark that ends an answer; it is cut off.
            generation: what `generation_options` gives.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from llava.mm_utils import KeywordsStoppingCriteria

        model, tokenizer = self.model, self.tokenizer
        rows, rooms = [], []
        for prompt, own in zip(prompts, pictures, strict=True):
            row, room = self.tokens(prompt, [size for _, size in own])
            rows.append(row)
            rooms.append(room)
        limit = min(generation["max_new_tokens"], *rooms)

        def pad(rows, value):
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")

        pad_id = tokenizer.pad_token_id
        pad_id = tokenizer.eos_token_id if pad_id is None else pad_id
        ids = pad(rows, pad_id or 0).to(model.device)
        mask = pad([torch.ones_like(row) for row in rows], 0).to(model.device)
        together = [picture for own in pictures for picture in own]
        if together:
            images, sizes = self.placed(together)
            inputs = {"inputs": ids, "images": images, "image_sizes": sizes}
        else:  # from embeddings, so that the new ids alone come back here too
            inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                attention_mask=mask,
                pad_token_id=pad_id,
                stopping_criteria=[KeywordsStoppingCriteria([stop], tokenizer, ids)],
                streamer=streamer,
                use_cache=True,
                **generation | {"max_new_tokens": limit},
            )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        texts = [text.split(stop)[0].strip() for text in texts]
        for i, ids in enumerate(output.tolist()):
            # The longest prompt leaves least room; who was cut for it is asked again, alone.
            wanted = min(generation["max_new_tokens"], rooms[i])
            if len(ids) == limit < wanted and not self._ended(ids, stop):
                texts[i] = self.answer([prompts[i]], [pictures[i]], stop, generation)[0]
        return texts

    def _ended(self, ids: list[int], stop: str) -> bool:
        """Whether an answer came to its end by itself."""
        return not self.ends.isdisjoint(ids) or stop in self.tokenizer.decode(ids)

    @property
    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        configured = self.model.generation_config.eos_token_id
        found = configured if isinstance(configured, list) else [configured]
        return {token for token in [*found, self.tokenizer.eos_token_id] if token is not None}

    def tokens(self, prompt: str, sizes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, int]:
        """A prompt's ids (n,), an image token for each picture, and the room left for an answer.

        Args:
            sizes: (width, height) in pixels of the prompt's pictures.

        Returns:
            the ids, and how many tokens the answer may have: at least 1.

        Raises:
            TooLongError: there is no room for an answer.
            InputError: another number of image tokens, or half a character.
        """
        import torch

        from llava.mm_utils import tokenizer_image_token

        most = self.context_length
        if len(prompt) > 32 * most:  # not even worth a count
            raise self._too_long(f"{len(prompt):,} characters")
        ids = torch.tensor(tokenizer_image_token(prompt, self.tokenizer), dtype=torch.long)
        if (found := prompt.count(DEFAULT_IMAGE_TOKEN)) != len(sizes):
            raise InputError(f"{len(sizes)} pictures were given, the text has {found} image tokens")
        length = len(ids) - found + sum(self.model.picture_length(size) for size in sizes)
        if length >= most:
            raise self._too_long(f"{length:,} tokens, pictures included")
        return ids, most - length

    def at_most(self, prompt: str, pictures: int) -> int:
        """An upper bound of a prompt's tokens, pictures included; nothing is tokenised."""
        if pictures:
            self._check_sees()
        most = self.model.most_picture_length if pictures else 0
        # A token is at least a byte of text, but for what a tokenizer puts before each piece.
        return len(prompt.encode(errors="replace")) + 2 * (1 + pictures) + pictures * most

    def _too_long(self, found: str) -> TooLongError:
        most = self.context_length
        return TooLongError(
            f"the prompt has {found}; this model reads {most} tokens, answer included"
        )


def check_device(name: str) -> None:
    """`InputError` unless torch knows such a device and this machine has it."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: cuda, cuda:0, cpu or the like is expected") from None
    if device.type == "cuda" and device.index is not None:
        found = torch.cuda.device_count()
        if device.index >= found:
            raise InputError(f"--device {name}: this machine has {found} GPUs that torch can use")


def end_mark(conversation: Conversation) -> str:
    """The mark at the end of an assistant's turn."""
    return conversation.sep2 or conversation.sep


def single_turn(template: Conversation, text: str) -> str:
    """The prompt of one question, open for the answer."""
    conversation = template.copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def generation_options(
    temperature: float, max_new_tokens: int, top_p: float | None = None, num_beams: int = 1
) -> dict[str, Any]:
    """Keyword arguments of `generate`: sampling for a temperature over 0, else greedy or beams.

    What is not asked for is switched off here, so that no `generation_config.json` turns it on.
    """
    for flag, value in ("max_new_tokens", max_new_tokens), ("num_beams", num_beams):
        if value < 1:
            raise InputError(f"--{flag} {value}: at least 1 is expected")
    if not 0 <= temperature < math.inf:
        raise InputError(f"--temperature {temperature}: a number from 0 on is expected")
    options: dict[str, Any] = {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
    }
    if temperature > 0:
        top_p = 1.0 if top_p is None else top_p
        if not 0 < top_p <= 1:
            raise InputError(f"--top_p {top_p}: over 0 and at most 1 is expected")
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    return options


def filled(args: Any, defaults: argparse.Namespace) -> argparse.Namespace:
    """`args`, any object with attributes, with `defaults` for those that it lacks."""
    values = {name: getattr(args, name, value) for name, value in vars(defaults).items()}
    return argparse.Namespace(**values)


def conv_mode_of(model_name: str) -> str:
    """The template that upstream takes for a model of this name when none is given."""
    name = model_name.lower()
    for part, mode in (
        ("llama-2", "llava_llama_2"),
        ("mistral", "mistral_instruct"),
        ("v1.6-34b", "chatml_direct"),
        ("v1", "llava_v1"),
        ("mpt", "mpt"),
    ):
        if part in name:
            return mode
    return "llava_v0"
