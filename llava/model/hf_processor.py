"""The files of transformers' `LlavaProcessor`: tokenizer, pictures, chat template.

They give the same ids and pixels as `tokenizer_image_token` and `process_images`, to the bit.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.atomic import write_text
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.errors import InputError
from llava.mm_utils import tokenizer_image_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_TOKEN = "<pad>"


def with_image_token(ours: PreTrainedTokenizerBase, mark: str) -> PreTrainedTokenizerBase:
    """A copy of a fast tokenizer with `<image>` and, if it has no padding of its own, `<pad>`.

    LLaVA tokenises the texts around a picture each by itself, so a tokenizer that marks the start
    of a text with a space (Llama's) marks it after a picture too, whatever the text begins with.
    In one piece it would not: a rule is added that puts the space there.

    Args:
        mark: what stands for a picture; the tokenizer must know the tokens around `<image>`.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if not ours.is_fast:
        raise InputError(f"{ours.name_or_path}: a tokenizer with a fast form is needed")
    for token in mark.split(DEFAULT_IMAGE_TOKEN):
        if token and token not in ours.get_vocab():
            raise InputError(
                f"{ours.name_or_path}: mm_use_im_start_end is set, but the tokenizer has no {token}"
            )
    named = {name: getattr(ours, name) for name in ("bos_token", "eos_token", "unk_token")}
    lacks_pad = ours.pad_token in (None, ours.unk_token, ours.eos_token)
    pad = PAD_TOKEN if lacks_pad else ours.pad_token
    backend = Tokenizer.from_str(ours.backend_tokenizer.to_str())
    backend.add_special_tokens([DEFAULT_IMAGE_TOKEN, pad])
    spec = json.loads(backend.to_str())
    scheme = (spec["pre_tokenizer"] or {}).get("prepend_scheme")
    if scheme == "always":
        # The same, said as transformers 4 says it: Metaspace would skip a text that has a space.
        spec["pre_tokenizer"]["prepend_scheme"] = "never"
        _normalize_first(spec, {"type": "Prepend", "prepend": "▁"})
    elif scheme == "first":
        pattern = {"Regex": rf"{DEFAULT_IMAGE_TOKEN}(?!{DEFAULT_IMAGE_TOKEN}|\z)"}
        content = f"{DEFAULT_IMAGE_TOKEN} "
        _normalize_first(spec, {"type": "Replace", "pattern": pattern, "content": content})
        for token in spec["added_tokens"]:
            if token["content"] == DEFAULT_IMAGE_TOKEN:
                token["normalized"] = True  # so that the rule sees it
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        model_max_length=ours.model_max_length,
        padding_side="left",
        pad_token=pad,
        **named,
    )


def _normalize_first(spec: dict[str, Any], rule: dict[str, Any]) -> None:
    """Put a rule before all others of a tokenizer's normalizer, unless it is there."""
    old = spec["normalizer"]
    if rule not in (old, *(old or {}).get("normalizers", ())):
        spec["normalizer"] = {"type": "Sequence", "normalizers": [rule, old]} if old else rule


def image_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<image>`."""
    found = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    assert isinstance(found, int)  # a list is given for a list
    return found


def check_same_ids(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, template: Conversation
) -> None:
    """`InputError` if the tokenizer with `<image>` reads a prompt differently from LLaVA's way."""
    image = image_id(theirs)
    prompt = template.copy()
    for after in ("\nWhat is it?", "Why?", " Is it?"):
        prompt.append_message(prompt.roles[0], f"{DEFAULT_IMAGE_TOKEN}{after}")
        prompt.append_message(prompt.roles[1], "A cat.")
    text = prompt.get_prompt()
    if theirs(text).input_ids != tokenizer_image_token(text, ours, image):
        raise InputError(
            f"{ours.name_or_path}: this tokenizer reads the text after {DEFAULT_IMAGE_TOKEN} "
            "differently when it does not stand by itself, which transformers cannot express"
        )


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str) -> None:
    """Write `tokenizer.json` with a small config that transformers 4 and 5 read alike."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    specials = ("bos_token", "eos_token", "unk_token", "pad_token")
    config = {
        # The generic class takes tokenizer.json as it is; Llama's own would rebuild it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        **{name: getattr(tokenizer, name) for name in specials if getattr(tokenizer, name)},
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    _write(folder / "tokenizer_config.json", config)


def write_processor(
    folder: Path, pictures: dict[str, Any], hf_config: dict[str, Any], chat_template: str, pad: bool
) -> None:
    """Write the processor's files.

    Args:
        pictures: the tower's preprocessor_config.json.
        hf_config: as `llava.model.hf_layout.hf_config` gives it.
        pad: whether pictures are squared with the mean colour first (`image_aspect_ratio` pad).
    """
    vision = hf_config["vision_config"]
    pictures = {**pictures, "processor_class": "LlavaProcessor"}
    if pad:
        # Said in full: LlavaImageProcessor has other defaults than the tower's own class.
        pictures.setdefault("do_center_crop", False)
        pictures |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    _write(folder / "preprocessor_config.json", pictures)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": DEFAULT_IMAGE_TOKEN,
        "patch_size": vision["patch_size"],
        "num_additional_image_tokens": int(vision["model_type"] == "clip_vision_model"),
        "vision_feature_select_strategy": hf_config["vision_feature_select_strategy"],
    }
    _write(folder / "processor_config.json", processor)
    write_text(folder / "chat_template.jinja", chat_template)
    _write(folder / "chat_template.json", {"chat_template": chat_template})


def chat_template(template: Conversation, image: str = DEFAULT_IMAGE_TOKEN) -> str:
    """The Jinja template that renders what `template` renders, pictures first in each turn.

    Its pieces are cut out of prompts that `template` itself makes, around marks in the places of
    the texts. A first message of role `system` takes the place of the template's own.

    Args:
        image: what stands for a picture, with `mm_use_im_start_end` more than the token.
    """
    first, answer, question = _split(template, 3)[:3]
    after_question = _split(template, 1)[1]
    after_answer = _split(template, 2)[2]
    opening = _split(template, 1, opened=True)[1]
    before_system, after_system = _around_system(template)
    s = json.dumps
    return (
        "{%- set given = messages[0]['role'] == 'system' -%}"
        "{%- set turns = messages[1:] if given else messages -%}"
        "{%- macro text(content) -%}"
        "{%- if content is string -%}{{- content -}}{%- else -%}"
        "{%- for part in content if part['type'] == 'image' -%}{{- " + s(image + "\n") + " -}}"
        "{%- endfor -%}"
        "{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
        "{%- if given -%}{{- " + s(before_system) + " + text(messages[0]['content']) + "
        "" + s(after_system) + " -}}{%- else -%}{{- " + s(first) + " -}}{%- endif -%}"
        "{%- for turn in turns -%}"
        "{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{- raise_exception('user and assistant must take turns, the user first') -}}"
        "{%- endif -%}"
        "{%- if turn['role'] != 'user' -%}{{- " + s(answer) + " -}}"
        "{%- elif not loop.first -%}{{- " + s(question) + " -}}{%- endif -%}"
        "{{- text(turn['content']) -}}"
        "{%- endfor -%}"
        "{%- if turns[-1]['role'] != 'user' -%}{{- " + s(after_answer) + " -}}"
        "{%- elif add_generation_prompt -%}{{- " + s(opening) + " -}}"
        "{%- else -%}{{- " + s(after_question) + " -}}{%- endif -%}"
    )


def picture_mark(llava_config: dict[str, Any]) -> str:
    """The text that stands for a picture in a prompt of this model."""
    if llava_config.get("mm_use_im_start_end"):
        return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    return DEFAULT_IMAGE_TOKEN


def template_of(llava_config: dict[str, Any], conv_mode: str | None) -> Conversation:
    """The conversation template: the one asked for, else the config's, else Vicuna's (v1.5's)."""
    return get_template(conv_mode or llava_config.get("conversation_template") or "vicuna_v1")


def _split(template: Conversation, turns: int, *, opened: bool = False) -> list[str]:
    """The prompt of so many turns, cut at their texts: `turns` + 1 pieces."""
    talk = template.copy()
    for i in range(turns):
        talk.append_message(talk.roles[i % 2], f"\0{i}\0")
    if opened:
        talk.append_message(talk.roles[turns % 2], None)
    return re.split(r"\0\d\0", talk.get_prompt())


def _around_system(template: Conversation) -> tuple[str, str]:
    """The text before and after the system's, up to the first user's."""
    talk = template.copy()
    head = re.match(r"<\|im_start\|>system\n", talk.system)
    talk.system = (head[0] if head else "") + "\0system\0"
    if talk.sep_style is SeparatorStyle.PLAIN:
        return "", ""
    before, after = _split(talk, 1)[0].split("\0system\0")
    return before, after


def _write(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
