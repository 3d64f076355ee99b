"""A table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, padded: bool = True
) -> str:
    """The lines of a table; `padded` aligns columns in the text too, all but the first right."""
    if not padded:
        return "".join(map(_line, [head, ["---"] * len(head), *rows]))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    left, *right = widths
    rule = "|".join(["-" * (left + 2), *("-" * (width + 1) + ":" for width in right)])

    def aligned(cells: Sequence[str]) -> str:
        first, *others = cells
        numbers = (cell.rjust(width) for cell, width in zip(others, right, strict=True))
        return _line([first.ljust(left), *numbers])

    return "".join([aligned(head), f"|{rule}|\n", *map(aligned, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"
