"""Which rows of a results file can be shown: a row that is damaged costs itself, and not the page of all others."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from logart.errors import UserError
from logart.grids.grid import MAX_BITS, MIN_BITS
from logart.report.groups import Row, number
from logart.runs.columns import NAMES
from logart.runs.results_file import read_table

_RANGES = {
    "bits": (MIN_BITS, MAX_BITS),
    **dict.fromkeys(("Acc@1", "float_Acc@1", "search_Acc@1", "approx_Acc@1"), (0, 100)),
    **dict.fromkeys(("search_seconds", "reconstruction_seconds", "peak_memory_mb"), (0, 1e9)),
}


class Rows(NamedTuple):
    """The rows to show, and a line on those that were left out; empty where none was."""

    rows: list[Row]
    left_out: str


def read_rows(path: str | Path) -> Rows:
    """Read the rows of a results file that can be shown.

    Args:
        path: the file, as runs write it; nothing is locked or made.

    Raises:
        UserError: there is no such file, it is no results file, has no rows, or none that can be shown.
    """
    header, lines = read_table(path)
    if not lines:
        raise UserError("results: the file holds no rows; expected at least one run")
    rows, damaged = [], []
    for line, cells in lines:
        wrong = f"has {len(cells)} cell{'s' * (len(cells) != 1)}; expected {len(header)}"
        if len(cells) == len(header):
            row = dict.fromkeys(NAMES, "") | dict(zip(header, cells, strict=True))
            wrong = damage(row)
            if not wrong:
                rows.append(row)
                continue
        damaged.append(f"the first, at line {line}, {wrong}")
    if not rows:
        raise UserError(f"results: none of the {len(lines)} rows of {str(path)!r} can be shown; {damaged[0]}")
    message = f"results: left out {len(damaged)} of the {len(lines)} rows of {str(path)!r}; "
    return Rows(rows, message + damaged[0] if damaged else "")


def damage(row: Row) -> str:
    """Why a row, all its columns by name, cannot be shown; empty where it can."""
    for name, (low, high) in _RANGES.items():
        kind = f"expected a {'whole number' if name == 'bits' else 'number'} from {low:g} to {high:g}"
        try:
            value = number(row[name])
            if name == "bits":
                int(row[name] or 0)
            if value is not None and not low <= value <= high:  # nan is in no range
                raise ValueError
        except ValueError:
            return f"has {name} {row[name][:40]!r}; {kind}"
        if value is None and name in ("bits", "Acc@1"):
            return f"has no {name}; {kind}"
    return ""
