"""From a record's conversation to token ids and labels.

Upstream tokenises a conversation, tokenises its rounds again one by one, and hopes that the lengths
add up; where they do not, the whole sample is masked ("tokenization mismatch", loss 0). Here the
conversation is a list of pieces, each said by the assistant or not, the text between two pictures
is tokenised once, and each token takes the flag of the piece in which it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, Segment, SeparatorStyle
from llava.errors import InputError
from llava.mm_utils import bos_prefix, expand_image_tokens
from llava.text_tokens import chunk_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEAKERS = ("human", "gpt")


def read_turns(conversations: list[dict[str, Any]]) -> list[str]:
    """The texts of a record's `conversations`: human, gpt, human, … (a leading gpt is dropped).

    `InputError` for anything else than dicts with a known `from`, a text as `value`, taking turns.
    """
    if not all(isinstance(turn, dict) for turn in conversations):
        raise InputError("a turn of `conversations` is not an object with `from` and `value`")
    turns = conversations
    if turns and turns[0].get("from") == SPEAKERS[1]:
        turns = turns[1:]
    for i, turn in enumerate(turns):
        if turn.get("from") != SPEAKERS[i % 2]:
            raise InputError(f"turn {i} is from {turn.get('from')!r}, expected {SPEAKERS[i % 2]!r}")
        if not isinstance(turn.get("value"), str):
            raise InputError(f"turn {i} has no text: `value` is {turn.get('value')!r}")
    if len(turns) < 2:
        raise InputError("`conversations` holds no question with an answer")
    return [turn["value"] for turn in turns]


def says_nothing(record: dict[str, Any]) -> bool:
    """Whether all answers of a record are empty, as far as it has the structure that is trained."""
    turns = [turn for turn in record["conversations"] if isinstance(turn, dict)]
    answers = [turn.get("value") for turn in turns if turn.get("from") == SPEAKERS[1]]
    return bool(answers) and all(isinstance(a, str) and not a.strip() for a in answers)


def preprocess_multimodal(
    turns: Sequence[str], template: Conversation, mm_use_im_start_end: bool = False
) -> list[str]:
    """Put the picture of a turn on a line of its own at the turn's front.

    Several in one turn stay where they stand among the words (upstream makes one of them).
    Templates of the "mmtag" kind see a picture as `<Image><image></Image>`; with
    `mm_use_im_start_end` the start and end tokens surround it.
    """
    shown = DEFAULT_IMAGE_TOKEN
    if mm_use_im_start_end:
        shown = f"{DEFAULT_IM_START_TOKEN}{shown}{DEFAULT_IM_END_TOKEN}"
    if "mmtag" in template.version:
        shown = f"<Image>{shown}</Image>"

    def placed(text: str) -> str:
        pictures = text.count(DEFAULT_IMAGE_TOKEN)
        if pictures == 1:
            return f"{shown}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
        return text.replace(DEFAULT_IMAGE_TOKEN, shown).strip() if pictures else text

    return [placed(text) for text in turns]


def render(turns: Sequence[str], template: Conversation) -> list[Segment]:
    """The conversation as training sees it, in pieces that are to be learnt or not.

    Two styles are trained in another form than they are asked in, as upstream does: PLAIN keeps of
    the question only its pictures, and SINGLE (v0) puts "### " before every turn and learns the
    mark itself, by which the model ends its answer.

    An answer of nothing but white space ends like any other, but it is not learnt, nor is what ends
    it; where there is no other answer, nothing is.
    """
    segments = _rendered(turns, template)
    said = any(text.strip() for text in turns[1::2])
    return segments if said else [(text, False) for text, _ in segments]


def _rendered(turns: Sequence[str], template: Conversation) -> list[Segment]:
    if template.sep_style is SeparatorStyle.PLAIN:
        if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0]:
            raise InputError(
                "the plain template takes one question that shows `<image>` and one caption, "
                f"found {len(turns)} turns that begin with {turns[0][:40]!r}"
            )
        pictures = DEFAULT_IMAGE_TOKEN * turns[0].count(DEFAULT_IMAGE_TOKEN)
        return [(pictures, False), (turns[1] + template.sep, True)]
    if template.sep_style is SeparatorStyle.SINGLE:
        human, assistant = template.roles
        segments = [(f"{template.system}\n\n", False)]
        ends = True
        for i, text in enumerate(turns):
            if i % 2:
                ends = bool(text.strip())
                segments.append((f"{template.sep} {assistant}: {text}\n", ends))
            else:
                segments += [(template.sep, ends), (f" {human}: {text}\n", False)]
        return [*segments, (f"{template.sep} ", ends)]
    conversation = template.copy()
    conversation.messages = [[template.roles[i % 2], text] for i, text in enumerate(turns)]
    return conversation.segments()


def tokenize(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of the pieces' text, both 1-D long; ids as `tokenizer_image_token` gives them.

    Labels are -100 but on tokens that begin within a piece to be learnt. A picture is one -200.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"training needs a tokenizer that tells where its tokens lie in the text (a fast one), "
            f"found {type(tokenizer).__name__}"
        )
    text = "".join(piece for piece, _ in segments)
    learnt = [answer for piece, answer in segments for _ in piece]
    ids = bos_prefix(tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    start = 0
    for i, chunk in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
        if i:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        tokens, begins = chunk_offsets(chunk, tokenizer)
        ids += tokens
        labels += [
            token if learnt[start + begin] else IGNORE_INDEX
            for token, begin in zip(tokens, begins, strict=True)
        ]
        start += len(chunk) + len(DEFAULT_IMAGE_TOKEN)
    return torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long)


def fit(
    ids: torch.Tensor,
    labels: torch.Tensor,
    image_tokens: int | Sequence[int],
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each picture its `image_tokens` places (one number, or one each), cut to `max_length`.

    Text may be cut; `InputError` when a picture would be, since half a picture is none.
    """
    ids, expanded = expand_image_tokens(ids, labels, image_tokens)
    assert expanded is not None, "labels were given"
    max_length = min(max_length, len(ids))
    if (ids[max_length:] == IMAGE_TOKEN_INDEX).any():
        raise InputError(
            f"model_max_length {max_length} cuts off tokens of a picture (it takes {image_tokens}, "
            f"the whole sample {len(ids)})"
        )
    return ids[:max_length], expanded[:max_length]
