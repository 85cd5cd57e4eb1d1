"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from logart.errors import printable


def table(header: Sequence[str], rows: Iterable[Sequence[object]], text: Collection[str] = ()) -> str:
    """Rows under their headings, columns two spaces apart; None is an empty cell.

    Args:
        header: one heading a column.
        rows: a cell for each heading; of its `str`, what would move a terminal's cursor is replaced.
        text: the headings of columns that are words, aligned left; the others are numbers, aligned right.
    """
    cells = [[printable("" if cell is None else cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align = ["<" if heading in text else ">" for heading in header]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in cells
    )


def shape_text(shape: Iterable[int]) -> str:
    """A shape as tables show it: 8×1×3×3."""
    return "×".join(map(str, shape))
