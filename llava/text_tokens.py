"""The token ids of a piece of text between two pictures, as upstream's tokenizer gives them.

Upstream runs the slow Llama tokenizer of transformers 4, which puts a space before a text whatever
the text begins with. The fast one, which alone is left in transformers 5, leaves it out where there
is a space already; so the space that it would leave out is put there first.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import lru_cache
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.texts import half_character

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chunk_ids(chunk: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The chunk's token ids, without any that begin or end a text."""
    padded, _ = _pad(chunk, tokenizer)
    return tokenizer(padded, add_special_tokens=False, verbose=False).input_ids


def chunk_offsets(chunk: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """`chunk_ids`, and the index of the character in `chunk` at which each token begins.

    The tokenizer must be a fast one. A space that is put before a text counts as the text's first
    character.
    """
    padded, places = _pad(chunk, tokenizer)
    encoded = tokenizer(
        padded, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    begins = [begin - bisect_left(places, begin) for begin, _ in encoded.offset_mapping]
    return encoded.input_ids, begins


def _pad(chunk: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """The chunk with the spaces that Metaspace would leave out, and where they stand in it.

    `InputError` for what is no text, wherever it comes from.
    """
    if (half := half_character(chunk)) is not None:
        raise InputError(f"the text has half a character in {half!r}, which no tokenizer takes")
    metaspace = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    scheme = getattr(metaspace, "prepend_scheme", "never")
    if scheme == "never":
        return chunk, []
    # With `legacy` the text after a special token is one that begins as well.
    special = tuple(tokenizer.get_added_vocab()) if scheme == "always" else ()
    places, pieces, end = [], [], 0
    for i, match in enumerate(_beginnings(special).finditer(chunk)):
        pieces += [chunk[end : match.end()], " "]
        end = match.end()
        places.append(end + i)
    return "".join([*pieces, chunk[end:]]), places


@lru_cache(maxsize=8)
def _beginnings(special: tuple[str, ...]) -> re.Pattern[str]:
    """The places where a text begins with a space: the chunk's begin, a special token's end."""
    tokens = [re.escape(token) for token in sorted(special, key=len, reverse=True)]
    either = "|".join([r"\A", *tokens])
    return re.compile(f"(?:{either})(?=[ ▁])")
