"""Conversation templates: how turns of talk become the one string that a language model reads.

The strings are upstream's to the letter (checkpoints were trained on them). What is ours:
`segments()`, which says of every piece of that string whether the assistant speaks it. The prompt
is the pieces joined, the training mask is the pieces' flags, so the two cannot disagree.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import io
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Segment = tuple[str, bool]
"""A piece of text, and whether the assistant says it (and so is to be learnt)."""


class SeparatorStyle(Enum):
    """The ways of joining turns."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclasses.dataclass
class Conversation:
    """A template with its turns so far: `messages` holds `[role, text]`, user first, in turn.

    A user's text may be `(text, picture, image_process_mode)`; a text of None is the open turn that
    the model is to fill. A text of "" is a turn that ends like any other; upstream leaves it open,
    and the next role follows at once. The first `offset` messages are examples that belong to the
    template.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def get_prompt(self) -> str:
        """The whole conversation as one string."""
        return "".join(text for text, _ in self.segments())

    def segments(self) -> list[Segment]:
        """The prompt in pieces. An answer's piece holds the space before it and its end mark.

        An answer of nothing but white space is not to be learnt.
        """
        style, end = self.sep_style, self.sep2 or self.sep
        system = self.system
        if style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO, SeparatorStyle.MPT):
            system += self.sep
        segments = [] if style is SeparatorStyle.LLAMA_2 else [(system, False)]
        for i, (role, text) in enumerate(self._turns()):
            answer = i % 2 == 1
            mark, learnt = end if answer else self.sep, answer and bool((text or "").strip())
            if style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO):
                segments.append((f"{role}:", False))
                if text is not None:
                    segments.append((f" {text}{mark}", learnt))
            elif style is SeparatorStyle.MPT:
                segments.append((role, False))
                if text is not None:
                    segments.append((f"{text}{mark}", learnt))
            elif style is SeparatorStyle.PLAIN and text is not None:
                segments.append((f"{text}{mark}", learnt))
            elif style is SeparatorStyle.LLAMA_2 and text is not None and answer:
                segments.append((f" {text} {mark}", learnt))
            elif style is SeparatorStyle.LLAMA_2 and text is not None:
                if i == 0 and self.system:
                    text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{text}"
                segments.append((f"{self.sep if i else ''}[INST] {text} [/INST]", False))
        return segments

    def _turns(self) -> list[tuple[str, str | None]]:
        """Role and bare text of each message; a picture in the first is announced in front."""
        turns = [(role, _text(message)) for role, message in self.messages]
        if self.messages and isinstance(self.messages[0][1], tuple):
            role, text = self.messages[0][0], self.messages[0][1][0]
            text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            if "mmtag" in self.version:
                shown = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"
                turns[:1] = [(self.roles[0], shown), (self.roles[1], "Received."), (role, text)]
            else:
                turns[0] = (role, f"{DEFAULT_IMAGE_TOKEN}\n{text}")
        return turns

    def append_message(self, role: str, message: Any) -> None:
        """Add a turn; None as `message` opens the assistant's."""
        self.messages.append([role, message])

    def get_images(self, return_pil: bool = False) -> list[Image.Image | str]:
        """The users' pictures after the template's own messages: PIL, or PNG in base64."""
        pictures = []
        for _, text in self.messages[self.offset :: 2]:
            if isinstance(text, tuple):
                _, picture, mode = text
                pictures.append(self.process_image(picture, mode, return_pil))
        return pictures

    def process_image(
        self,
        image: Image.Image,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> Image.Image | str:
        """Prepare a picture for the wire, as upstream's demo does.

        `image_process_mode` is Pad (to a square), Resize (336 x 336), Default or Crop (neither).
        Pictures with a side over `max_len` pixels shrink to at most `max_len` x `min_len`.
        """
        if image_process_mode == "Pad":
            from llava.squaring import expand2square, square_of

            grey = (122, 116, 104)
            if max(image.size) > max_len:  # what is below makes of its square
                image = square_of(image, grey, min(max_len, min_len))
            else:
                image = expand2square(image, grey)
        elif image_process_mode == "Resize":
            image = image.resize((336, 336))
        elif image_process_mode not in ("Default", "Crop"):
            raise InputError(
                f"image_process_mode is {image_process_mode!r}, "
                "expected Pad, Resize, Default or Crop"
            )
        if max(image.size) > max_len:
            aspect = max(image.size) / min(image.size)
            short = max(1, int(min(max_len / aspect, min_len, *image.size)))
            long = min(int(short * aspect), max_len)
            wide = image.width >= image.height
            image = image.resize((long, short) if wide else (short, long))
        if return_pil:
            return image
        buffer = io.BytesIO()
        image.save(buffer, format=image_format)
        return base64.b64encode(buffer.getvalue()).decode()

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """Pairs of what the user and the assistant say, after the template's own messages; a
        picture stands before its text as an HTML image, as upstream's demo shows it."""
        pairs: list[list[str | None]] = []
        for i, (_, message) in enumerate(self.messages[self.offset :]):
            text = _text(message)
            if i % 2:
                pairs[-1][1] = text
                continue
            if isinstance(message, tuple):
                _, picture, _ = message
                data = self.process_image(picture, "Default", image_format="JPEG")
                shown = f'<img src="data:image/jpeg;base64,{data}" alt="user upload image" />'
                text = shown + (text or "").replace(DEFAULT_IMAGE_TOKEN, "").strip()
            pairs.append([text, None])
        return pairs

    def copy(self) -> Conversation:
        """A copy whose turns can be added to."""
        return dataclasses.replace(self, messages=[list(message) for message in self.messages])

    def dict(self) -> dict[str, Any]:
        """The conversation in a worker's message, without the pictures."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


def _text(message: Any) -> str | None:
    return message[0] if isinstance(message, tuple) else message


def get_template(name: str) -> Conversation:
    """A fresh copy of the template called `name`; an unknown name is an `InputError`."""
    if name not in conv_templates:
        near = difflib.get_close_matches(name, conv_templates, n=3, cutoff=0.5)
        known = ", ".join(conv_templates)
        hint = f"did you mean {' or '.join(near)}" if near else f"known are {known}"
        raise InputError(f"{name!r} is no conversation template; {hint}")
    return conv_templates[name].copy()


def default_template() -> str:
    """The name of `default_conversation`, to which programs assign one of `conv_templates`."""
    for name, template in conv_templates.items():
        if template is default_conversation:
            return name
    raise InputError("llava.conversation.default_conversation is none of conv_templates")


def template_of(tokenizer: Any) -> str | None:
    """The template that renders talk as the tokenizer's own `chat_template` does; None: there is
    none, or none such."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    talk = (("user", "What?"), ("assistant", "That."), ("user", "Why?"), ("assistant", None))
    said = [{"role": role, "content": text} for role, text in talk if text]
    try:
        wanted = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program, which may refuse any talk
        return None
    for name, template in conv_templates.items():
        chat = template.copy()
        for i, (_, text) in enumerate(talk):
            chat.append_message(chat.roles[i % 2], text)
        if chat.get_prompt() == wanted:
            return name
    return None


def _chat(person: str) -> str:
    return (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )


_SEES = (
    "able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    f"The assistant is {_SEES}"
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = """\
You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, \
while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, \
dangerous, or illegal content. Please ensure that your responses are socially unbiased and \
positive in nature.

If a question does not make any sense, or is not factually coherent, explain why instead of \
answering something not correct. If you don't know the answer to a question, please don't share \
false information."""

_FEW_SHOT = [
    [
        "Human",
        "What are the key differences between renewable and non-renewable energy sources?",
    ],
    [
        "Assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively "
        "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
        "Non-renewable energy sources, on the other hand, are finite and will eventually be "
        "depleted, such as coal, oil, and natural gas. Here are some key differences between "
        "renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while "
        "non-renewable energy sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
        "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
        "emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
        "typically have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
        "remote locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
        "different situations and needs, while non-renewable sources are more rigid and "
        "inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, "
        "while non-renewable sources are not, and their depletion can lead to economic and social "
        "instability.\n",
    ],
]


def _single(system: str, messages: list[list[Any]] | None = None, **more: Any) -> Conversation:
    messages = messages or []
    return Conversation(system, ("Human", "Assistant"), messages, offset=len(messages), **more)


def _two(system: str, style: SeparatorStyle = SeparatorStyle.TWO, **more: Any) -> Conversation:
    more = {"sep": " ", "sep2": "</s>", "version": "v1"} | more
    return Conversation(system, ("USER", "ASSISTANT"), [], 0, style, **more)


def _llama_2(system: str, sep: str) -> Conversation:
    return _two(system, SeparatorStyle.LLAMA_2, sep=sep, version="llama_v2")


def _chatml(system: str, sep: str = "<|im_end|>") -> Conversation:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    system = f"<|im_start|>system\n{system}"
    return Conversation(system, roles, [], 0, SeparatorStyle.MPT, sep, version="mpt")


_vicuna_v0 = _single(_chat("human"), _FEW_SHOT)
_vicuna_v1 = _two(_chat("user"))
_plain = Conversation("", ("", ""), [], 0, SeparatorStyle.PLAIN, "\n")
_direct = _chatml("Answer the questions.")

conv_templates: dict[str, Conversation] = {
    "default": _vicuna_v0,
    "v0": _vicuna_v0,
    "v1": _vicuna_v1,
    "vicuna_v1": _vicuna_v1,
    "llama_2": _llama_2(_LLAMA_2, sep="<s>"),
    "mistral_instruct": _llama_2("", sep=""),
    "chatml_direct": _direct,
    "mistral_direct": _direct,
    "plain": _plain,
    "v0_plain": _plain,
    "llava_v0": _single(_chat("human")),
    "v0_mmtag": _single(_MMTAG, version="v0_mmtag"),
    "llava_v1": _two(_chat("human")),
    "v1_mmtag": _two(_MMTAG, version="v1_mmtag"),
    "llava_llama_2": _llama_2(
        f"You are a helpful language and vision assistant. You are {_SEES}", "<s>"
    ),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers."
    ),
    # Not upstream's: as the language model's own chat template has it.
    "smollm2": _chatml(
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face", "<|im_end|>\n"
    ),
}
"""Every template by the key that `--version` and `--conv-mode` take. Copy before adding turns."""

default_conversation = conv_templates["vicuna_v1"]
