"""Caption styles: each another way to describe a picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fed.data.samples import Sample
from llava.errors import InputError

# Words that say nothing of what is to be seen.
STOP = frozenset(
    """a about above across after against all along also am among an and another any are around as
    at be been before behind being below beside between both but by can could did do does doing down
    during each for from had has have having he her here him his how i if in inside into is it its
    just me more most my near next no nor not of off on one onto or other our out outside over own
    same she so some such than that the their them then there these they this those through to too
    under until up upon us very was we were what when where which while who whom why will with
    within without would you your""".split()
)


def first_sentence(text: str) -> str:
    """Up to the first full stop, exclamation or question mark that ends a word.

    >>> first_sentence("A cat sleeps.  It is 3.5 kg. Grey.")
    'A cat sleeps.'
    """
    return re.split(r"(?<=[.!?])\s+", text.strip(), maxsplit=1)[0]


def keywords(text: str) -> str:
    """The words that carry the meaning, in lower case and their order, each once.

    >>> keywords("A cat sleeps on the mat, and a dog beside the cat")
    'cat, sleeps, mat, dog'
    """
    words = re.findall(r"\w+(?:['’-]\w+)*", text.lower())
    kept = dict.fromkeys(word for word in words if word not in STOP)
    return ", ".join(kept or dict.fromkeys(words))


FORMS: dict[str, Callable[[str], str]] = {
    "": str.strip,
    "first-sentence": first_sentence,
    "keywords": keywords,
}


@dataclass(frozen=True)
class Style:
    """A name, the field that the caption comes from, and the form that it is given."""

    name: str
    field: str
    form: str = ""

    def caption(self, sample: Sample) -> str | None:
        """The caption in this style; None if the field is empty. No such field: `InputError`."""
        if self.field not in sample.fields:
            raise InputError(
                f"{sample.name}: style {self.name} needs `{self.field}`; "
                f"it has {', '.join(sorted(sample.fields))}"
            )
        value = sample.fields[self.field]
        return (FORMS[self.form](value) or None) if isinstance(value, str) else None


def read_styles(texts: Sequence[str]) -> list[Style]:
    """Styles from `NAME=FIELD` or `NAME=FIELD:FORM`."""
    styles: list[Style] = []
    for text in texts:
        match = re.fullmatch(r"([^=]+)=([^:]+)(?::(.+))?", text)
        if not match:
            raise InputError(f"--styles {text}: NAME=FIELD or NAME=FIELD:FORM is expected")
        name, field, form = match[1], match[2], match[3] or ""
        if form not in FORMS:
            known = ", ".join(filter(None, FORMS))
            raise InputError(f"--styles {text}: form {form!r} is unknown; known are {known}")
        if name in {style.name for style in styles}:
            raise InputError(f"--styles: two styles are called {name!r}")
        styles.append(Style(name, field, form))
    return styles


def restyle(sample: Sample, style: Style) -> dict[str, Any]:
    """The record with the caption in this style; `InputError` unless it is one turn each."""
    turns = sample.record["conversations"]
    if len(turns) != 2:
        raise InputError(
            f"{sample.name}: has {len(turns)} turns; a style needs question and answer"
        )
    caption = style.caption(sample)
    return {**sample.record, "conversations": [turns[0], {**turns[1], "value": caption}]}
