"""The one way to print a table as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from logart.errors import printable


def text_table(head: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A table with aligned columns, two spaces between.

    Args:
        head: the columns' names.
        rows: of as many cells each; None is an empty one.
        left: how many columns, from the first, are aligned to the left; the others, numbers, to the right.
    """
    lines = [[printable("" if cell is None else cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in lines
    )
