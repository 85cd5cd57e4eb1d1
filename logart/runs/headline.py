"""What came out, as a compact table in a terminal: at the end of a run and of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from logart.runs.methods import method_name
from logart.text import table

HEAD = ("network", "bits", "method", "Acc@1 [%]", "drop [points]", "size", "time")


def headline(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows' network, method, accuracy, drop from the float network, size and time.

    Args:
        rows: of the results file, or about to be written there; cells that are missing or None count as empty.
    """
    lines = []
    for cells in rows:
        row = _Cells({name: "" if value is None else str(value) for name, value in cells.items()})
        drop = float(row["float_Acc@1"]) - float(row["Acc@1"]) if row["float_Acc@1"] else None
        seconds = [float(row[name]) for name in ("search_seconds", "reconstruction_seconds") if row[name]]
        lines.append((
            row["arch"], row["bits"], method_name(row), f"{float(row['Acc@1']):.2f}",
            None if drop is None else f"{drop:.2f}{band(drop_error(row))}",
            size_text(row["packed_bytes"]), duration(sum(seconds)) if seconds else None,
        ))  # fmt: skip
    return table(HEAD, lines, text=("network", "method"))


class _Cells(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return ""


def drop_error(row: Mapping[str, str]) -> float:
    """The standard error of the drop from float on these test images, in points.

    Exact (paired) where the row says on how many images float and quantized network differ in being right; else of the
    two accuracies as if on other images, which is too large.
    """
    n = int(row["val_images"] or 0)
    if not n:
        return math.nan
    if row.get("lost") and row.get("won"):
        lost, won = int(row["lost"]), int(row["won"])
        return 100 * math.sqrt(lost + won - (won - lost) ** 2 / n) / n
    shares = [float(row[name]) / 100 for name in ("Acc@1", "float_Acc@1") if row[name]]
    return 100 * math.sqrt(sum(share * (1 - share) for share in shares) / n)


def band(error: float) -> str:
    """A standard error behind its figure; nothing where it is not known."""
    return "" if math.isnan(error) else f" ± {error:.2f}"


def size_text(n_bytes: str) -> str:
    """A file's size, in kB or MB; empty where it is not known."""
    if not n_bytes:
        return ""
    value = int(n_bytes)
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
