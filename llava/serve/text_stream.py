"""The text of an answer while it grows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def visible_text(text: str, stop: str, whole: bool) -> str:
    """The part of a text so far that may be shown: up to `stop`, and no beginning of one.

    `whole`: no more is to come, so what may have been a beginning is none.
    """
    end = text.find(stop) if stop else -1
    if end >= 0:
        return text[:end]
    if whole:
        return text
    part = next((n for n in range(len(stop), 0, -1) if text.endswith(stop[:n])), 0)
    return text[: len(text) - part]


class TextStream:
    """Tokens that become text. `ends`: tokens that end an answer; `stop`: a text that does."""

    def __init__(self, tokenizer: Any, stop: str, ends: Collection[int]):
        self.tokenizer, self.stop, self.ends = tokenizer, stop, ends
        self.ids: list[int] = []
        self._decoded = self._told = ""

    def add(self, token: int) -> bool:
        """Take a token in; whether the answer ends with it."""
        if token in self.ends:
            return True
        self.ids.append(token)
        # All of them, since bytes that are no text yet change what was before; tokenizers'
        # DecodeStream gives other texts than `decode` for such bytes, or fails at them.
        self._decoded = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        return bool(self.stop) and self.stop in self._decoded

    def text(self, whole: bool) -> str | None:
        """The answer so far, if there is more of it to show than the last time."""
        text = self._decoded if whole else self._decoded.rstrip("\ufffd")  # half a character
        text = visible_text(text, self.stop, whole).strip()
        if text == self._told:
            return None
        self._told = text
        return text
