"""The groups of a report as ablation tables.

Settings that stages after the search do not share with rounding to nearest (LLR's steps, say) part tables of a network;
what the search itself saw parts rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from logart.grids.registry import GRIDS
from logart.quantization.config import SearchMethod
from logart.report.groups import CALIBRATION, GRID, LLR, NETWORK, SEARCH, Group, Row, groups_of, network, values

GRID_NAMES = {name: grid.label for name, grid in GRIDS.items()}
SEARCH_NAMES = {
    SearchMethod.TENSOR_WISE.value: "TW",
    SearchMethod.LAYER_WISE.value: "LW",
    SearchMethod.BLOCK_WISE.value: "BW",
}
_ORDER = [*GRID_NAMES]


@dataclass
class Table:
    """Methods against bits, of one network and one set of other settings.

    Attributes:
        settings: those of the table, by name.
        title: its number and what tells it from the network's other tables; empty where there are none.
        cells: by (method, bits, whether LLR ran); several groups where only the file that gave the defaults differs.
        labels: the methods' names, in the order of the table.
    """

    settings: dict[str, str]
    cells: dict[tuple[tuple[str, ...], int, bool], list[Group]]
    title: str = ""
    labels: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def columns(self) -> list[tuple[int, bool]]:
        """(bits, LLR), wide first, without before with."""
        return sorted({key[1:] for key in self.cells}, key=lambda column: (-column[0], column[1]))


@dataclass
class Section:
    """A network on its data: its tables, every group once, and what tells it from others of the same names."""

    row: Row
    tables: list[Table]
    groups: list[Group]
    difference: str = ""

    @property
    def title(self) -> str:
        return f"{self.row['arch']} on {self.row['data']}" + (f" ({self.difference})" if self.difference else "")

    @property
    def lines(self) -> list[tuple[str, Group]]:
        """Every group once, with its method's name; the table's number is before it where there are several."""
        found: dict[int, tuple[str, Group]] = {}
        for number, table in enumerate(self.tables, 1):
            for method, label in table.labels.items():
                for key in sorted(key for key in table.cells if key[0] == method):
                    for group in table.cells[key]:
                        found.setdefault(id(group), (f"{number}: " * (len(self.tables) > 1) + label, group))
        return list(found.values())


def sections(rows: Sequence[Row]) -> tuple[list[Section], list[str]]:
    """The tables of a results file.

    Args:
        rows: as `report_rows.read_rows` gives them.

    Returns:
        A section per network and data, in the order of the file; and what the reader should know of the rows.
    """
    groups, notes = groups_of(rows)
    networks: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        networks.setdefault(network(group.row), []).append(group)
    for found in networks.values():
        found.sort(key=lambda group: _place(group.method))
    return [Section(g[0].row, _tables(g), g, _difference(g[0].row, networks)) for g in networks.values()], notes


def _difference(row: Row, networks: Mapping[tuple[str, ...], Sequence[Group]]) -> str:
    """What tells a network from others with its name on data with the same name."""
    rows = [groups[0].row for groups in networks.values()]
    same = [other for other in rows if (other["arch"], other["data"]) == (row["arch"], row["data"])]
    message = [name for name in ("checkpoint", *NETWORK) if len({other[name] for other in same}) > 1]
    return ", ".join(f"{name} {row[name][:24] or 'unknown'}" for name in message)


def _tables(groups: Sequence[Group]) -> list[Table]:
    """The network's tables: one per settings of the grid and of LLR.

    What was rounded without LLR stands beside each LLR of the same method; what no LLR followed, in the table that has
    most methods.
    """
    by_grid: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        by_grid.setdefault(values(group.row, GRID), []).append(group)
    tables = []
    for grid, members in by_grid.items():
        learned: dict[tuple[str, ...], list[Group]] = {}
        for group in members:
            if group.llr:
                learned.setdefault(values(group.row, LLR), []).append(group)
        order = sorted(learned, key=lambda llr: -len(learned[llr])) or [()]
        followed = {group.method for group in members if group.llr}
        for llr in order:
            mine = learned.get(llr, [])
            methods = {group.method for group in mine}
            plain = [g for g in members if not g.llr]
            mine += [g for g in plain if g.method in methods or (llr == order[0] and g.method not in followed)]
            tables.append(_table(dict(zip(GRID, grid, strict=True)), dict(zip(LLR, llr, strict=False)), mine))
    for number, table in enumerate(tables, 1):
        # What only LLR has tells nothing where a table is without.
        message = {
            k: v for k, v in table.settings.items() if len({t.settings[k] for t in tables if k in t.settings}) > 1
        }
        if len(tables) > 1:
            table.title = f"Table {number}: " + ", ".join(f"{name} {value}" for name, value in message.items() if value)
    return tables


def _table(grid: dict[str, str], llr: dict[str, str], groups: Iterable[Group]) -> Table:
    cells: dict[tuple[tuple[str, ...], int, bool], list[Group]] = {}
    for group in groups:
        cells.setdefault((group.method, group.bits, group.llr), []).append(group)
    table = Table(grid | llr, cells)
    methods = list(dict.fromkeys(key[0] for key in cells))
    plain = {method: method_label(method) for method in methods}
    for method in sorted(methods, key=_place):
        same = [other for other in methods if plain[other] == plain[method]]
        message = [
            f"{name} {method[3 + i] or 'none'}"
            for i, name in enumerate((*SEARCH, *CALIBRATION))
            if len({other[3 + i] for other in same}) > 1
            # a closed form may have seen other images than the LLR that the table's title tells of
            or (
                name in ("calib_samples", "calib_augment", "calib_list", "capture_precision")
                and method[3 + i] not in ("", "False", llr.get(name))
            )
        ]
        table.labels[method] = ", ".join([plain[method], *message])
    return table


def method_label(method: tuple[str, ...]) -> str:
    """A method's name: its grid, search and rounding."""
    grid, search, closed = method[:3]
    parts = [GRID_NAMES.get(grid, grid), SEARCH_NAMES.get(search, search), closed]
    return ", ".join(part for part in parts if part)


def _place(method: tuple[str, ...]) -> tuple[object, ...]:
    grid, search, closed = method[:3]
    known = [*SEARCH_NAMES]
    return (bool(closed), _ORDER.index(grid) if grid in _ORDER else len(_ORDER), grid,
            known.index(search) if search in known else -1,
            [(text.isdecimal() and int(text), text) for text in method])  # fmt: skip
