"""The ablation in the paper's form: grids and searches without and with LLR, networks side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from logart.grids.logarithmic import DYNAMIC, LOG_2, LOG_SQRT2
from logart.quantization.config import SearchMethod
from logart.report.groups import Group, Row, network, signed
from logart.report.page import Block, Cell, Heading, Paragraph, Table
from logart.report.paper import Sources
from logart.report.styles import Style
from logart.runs.headline import band
from logart.runs.methods import GRID_NAMES, ROUNDING_NAMES, SEARCH_NAMES

_GRIDS = [(LOG_2.name, ""), (LOG_SQRT2.name, ""), *((DYNAMIC.name, search.value) for search in SearchMethod)]
ROWS = [(grid, search, rounding) for grid, search in _GRIDS for rounding in ("nearest", "learned")]
# Without these the paper's rows are of the grid and the search alone.
PLAIN = {"scale_search": "none", "asymmetric": "False", "zero_code": "False", "wide_gap": "",
         "hardware_approx": "False", "channel_wise": "True", "first_last_bits": "same", "preset": ""}  # fmt: skip
FEWEST = 6  # of the paper's rows in a column of its figures
SAID = (
    "Grids and searches of the paper's ablation, rounded to nearest (RTN) and learned (LLR): top-1 accuracy in %, and "
    "below it the drop from the float network in points, ± one standard error by the choice of test images. A number "
    "in brackets marks the paper's own figures, on ImageNet, by their source at the end of the page."
)


def ablation(groups: Sequence[Group], sources: Sources, legend: Mapping[str, Style]) -> list[Block]:
    """A table per bit width that has one of the rows; nothing where none has."""
    blocks: list[Block] = []
    for bits in sorted({g.bits for g in groups}):
        mine = [g for g in groups if g.bits == bits and _row(g.row) in ROWS and _is_plain(g.row)]
        if len({_row(g.row) for g in mine}) > 1:
            blocks += [Heading(3, f"{bits} bits"), _table(bits, mine, sources, legend)]
    return [Heading(2, "Ablation"), Paragraph(SAID), *blocks] if blocks else []


def _row(row: Row) -> tuple[str, str, str]:
    return row["scale_method"], row["search_method"], row["rounding"]


def _is_plain(row: Row) -> bool:
    return all(row.get(name, value) == value for name, value in PLAIN.items())


def _table(bits: int, groups: Sequence[Group], sources: Sources, legend: Mapping[str, Style]) -> Table:
    networks = {network(g.row): g.row["arch"] for g in groups}
    papers: dict[tuple[str, str], dict[tuple[str, str, str], Row]] = {}
    for row in sources.figures:
        if row["bits"] == str(bits) and _row(row) in ROWS and _is_plain(row):
            papers.setdefault((row["arch"], row["source"]), {})[_row(row)] = row
    papers = {key: found for key, found in papers.items() if len(found) >= FEWEST}
    lines = []
    for place in ROWS:
        # Where settings of LLR differ, those with most seeds, and then the first of the legend.
        found = [g for label in legend for g in groups if g.label == label and _row(g.row) == place]
        found.sort(key=lambda g: -g.n)
        cells = [next((_cell(g) for g in found if network(g.row) == key), Cell()) for key in networks]
        for rows in papers.values():
            cells.append(Cell(rows[place]["Acc@1"], (), float(rows[place]["Acc@1"])) if place in rows else Cell())
        name = _name(place)
        lines.append((Cell(name, style=legend.get(name)), *cells))
    head = ("method", *networks.values(), *(f"{arch} [{sources.number(source)}]" for arch, source in papers))
    return Table(f"Ablation at {bits} bits: top-1 accuracy [%]", head, tuple(lines))


def _name(place: tuple[str, str, str]) -> str:
    grid, search, rounding = place
    return f"{GRID_NAMES[grid]} {SEARCH_NAMES.get(search, '')}".strip() + f", {ROUNDING_NAMES[rounding]}"


def _cell(group: Group) -> Cell:
    spread = "" if group.deviation is None else f" ± {group.deviation:.2f}"
    drop = () if group.drop is None else (f"drop {signed(group.drop)}{band(group.drop_error)}",)
    return Cell(f"{group.accuracy:.2f}{spread}", drop, group.accuracy)
