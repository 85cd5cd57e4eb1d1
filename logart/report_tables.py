"""The figures of a report: rows of results.csv as ablation tables.

A cell holds what may be averaged and nothing else: rows with the same settings, whatever they are, but for the seed.
Settings that stages after the search do not share with rounding to nearest (LLR's steps, say) part tables of a network;
what the search itself saw parts rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

from logart.config import Rounding, SearchMethod
from logart.grid import MAX_BITS, MIN_BITS, ScaleMethod
from logart.runtime import UserError

Row = dict[str, str]
NETWORK = ("track", "arch", "checkpoint_sha256", "network_options", "data", "val_images")
GRID = (
    "first_last_bits channel_wise scale_search asymmetric zero_code hardware_approx hardware_approx_terms device"
).split()
SEARCH = ("search_samples", "search_batch_size", "calib_augment")
CALIBRATION = ("calib_samples", "batch_size", "calib_augment")
LLR = (
    "calib_samples batch_size calib_augment iters_w lr rrweight b_start b_end warmup recon_input recon_metric "
    "drop_prob temperature"
).split()
DEFAULTS = ("preset", "config")
GRID_NAMES = {
    ScaleMethod.LOG_2.value: "base 2",
    ScaleMethod.LOG_SQRT2.value: "base √2",
    ScaleMethod.DYNAMIC.value: "dynamic",
}
SEARCH_NAMES = {
    SearchMethod.TENSOR_WISE.value: "TW",
    SearchMethod.LAYER_WISE.value: "LW",
    SearchMethod.BLOCK_WISE.value: "BW",
}
_ORDER = [*GRID_NAMES, ScaleMethod.LINEAR_MINMAX.value, ScaleMethod.LINEAR_MSE.value]
_RANGES = {
    "bits": (MIN_BITS, MAX_BITS),
    **dict.fromkeys(("Acc@1", "float_Acc@1", "search_Acc@1", "approx_Acc@1"), (0, 100)),
    **dict.fromkeys(("search_seconds", "reconstruction_seconds", "peak_memory_mb"), (0, 1e9)),
}


@dataclass(frozen=True)
class Measure:
    """One accuracy of one run.

    Attributes:
        row: the run's.
        llr: whether rounding was learned when it was taken.
        accuracy: top-1, in %.
        seconds: search and rounding up to there; None where the row does not say.
        final: whether it is the run's own result, and not one before LLR or with √2 replaced at test.
    """

    row: Row
    llr: bool
    accuracy: float
    seconds: float | None
    final: bool

    @property
    def method(self) -> tuple[str, ...]:
        """Which row of a table it is in: grid, search, what the search and a closed form saw."""
        row, closed = self.row, self.row["rounding"] in (Rounding.COMPENSATED.value, Rounding.BOTH.value)
        first = (row["scale_method"], row["search_method"], "compensated" if closed else "")
        saw = _values(row, SEARCH) if row["search_samples"] else ("",) * len(SEARCH)
        return (*first, *saw, *(_values(row, CALIBRATION) if closed else ("",) * len(CALIBRATION)))

    @property
    def settings(self) -> tuple[object, ...]:
        """All that acted: measures that share it differ in their seeds only."""
        acted = (*_values(self.row, LLR), *_values(self.row, DEFAULTS)) if self.llr or self.method[2] else ()
        return (_network(self.row), _values(self.row, GRID), self.method, self.row["bits"], self.llr, acted)


@dataclass(frozen=True)
class Group:
    """Measures of the same settings, of one seed each."""

    measures: tuple[Measure, ...]

    @property
    def row(self) -> Row:
        return self.measures[0].row

    @property
    def llr(self) -> bool:
        return self.measures[0].llr

    @property
    def bits(self) -> int:
        return int(self.row["bits"])

    @property
    def closed(self) -> bool:
        """Whether compensated rounding took part, which searches in a metric and a time of its own."""
        return bool(self.measures[0].method[2])

    @property
    def search(self) -> object:
        """What decided the search."""
        return _values(self.row, GRID), self.measures[0].method

    @property
    def n(self) -> int:
        return len(self.measures)

    @property
    def accuracy(self) -> float:
        """Mean over the seeds, in %."""
        return mean(m.accuracy for m in self.measures)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (of a sample), in points; None of a single one."""
        return stdev(m.accuracy for m in self.measures) if self.n > 1 else None

    @property
    def distance(self) -> float | None:
        """Mean distance to the float network, in points."""
        pairs = [(m.accuracy, number(m.row["float_Acc@1"])) for m in self.measures]
        known = [accuracy - reference for accuracy, reference in pairs if reference is not None]
        return mean(known) if known else None

    @property
    def seconds(self) -> float | None:
        """Mean time of search and rounding; None where not every run says."""
        return _mean(m.seconds for m in self.measures)

    @property
    def search_seconds(self) -> float | None:
        """Mean time of the search alone; None where not every run says."""
        return _mean(number(m.row["search_seconds"]) for m in self.measures)

    @property
    def memory(self) -> float | None:
        """Mean of the runs' peaks, in MiB; None where the runs went on after this."""
        return _mean(number(m.row["peak_memory_mb"]) for m in self.measures if m.final)


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


def number(text: str) -> float | None:
    """A cell's number; None where it is empty."""
    return float(text) if text else None


def _mean(values: Iterable[float | None]) -> float | None:
    seen = list(values)
    known = [value for value in seen if value is not None]
    return mean(known) if known and len(known) == len(seen) else None


def signed(value: float) -> str:
    """A difference in points."""
    return f"{value:+.2f}".replace("-", "−")


def sections(rows: Sequence[Row]) -> tuple[list[Section], list[str]]:
    """Group the rows of a results file.

    Args:
        rows: as `results.read_rows` gives them.

    Returns:
        A section per network and data, in the order of the file; and what the reader should know of the rows.

    Raises:
        UserError: a figure that is no number, or a row without an accuracy.
    """
    for index, row in enumerate(rows):
        _check(row, index)
    measures, notes = _newest(measure for row in rows for measure in _measures(row))
    groups: dict[object, list[Measure]] = {}
    for measure in measures:
        groups.setdefault(measure.settings, []).append(measure)
    networks: dict[tuple[str, ...], list[Group]] = {}
    for members in groups.values():
        group = Group(tuple(members))
        networks.setdefault(_network(group.row), []).append(group)
    for found in networks.values():
        found.sort(key=lambda group: _place(group.measures[0].method))
    return [Section(g[0].row, _tables(g), g, _difference(g[0].row, networks)) for g in networks.values()], notes


def _difference(row: Row, networks: Mapping[tuple[str, ...], Sequence[Group]]) -> str:
    """What tells a network from others with its name on data with the same name."""
    rows = [groups[0].row for groups in networks.values()]
    same = [other for other in rows if (other["arch"], other["data"]) == (row["arch"], row["data"])]
    told = [name for name in ("checkpoint", *NETWORK) if len({other[name] for other in same}) > 1]
    return ", ".join(f"{name} {row[name][:24] or 'unknown'}" for name in told)


def _check(row: Row, index: int) -> None:
    for name, (low, high) in _RANGES.items():
        try:
            value = number(row[name])
            if name == "bits":
                int(row[name] or 0)
            if value is not None and not low <= value <= high:  # nan is in no range
                raise ValueError
        except ValueError:
            seen = f"row {index + 1} has {name} {row[name][:40]!r}"
            kind = "whole number" if name == "bits" else "number"
            raise UserError(f"results: {seen}; expected a {kind} from {low:g} to {high:g}") from None
    for name in ("bits", "Acc@1"):
        if not row[name]:
            raise UserError(f"results: row {index + 1} has no {name}; expected a number")


def _measures(row: Row) -> Iterable[Measure]:
    search, rounding = number(row["search_seconds"]), number(row["reconstruction_seconds"])
    if row["hardware_approx"] != "True" and row["hardware_approx_terms"]:  # the sum stands for √2 at test only
        at_test, row = row | {"hardware_approx": "at test"}, row | {"hardware_approx_terms": ""}
    else:
        at_test = row | {"approx_Acc@1": ""}
    learned = row["rounding"] in (Rounding.LEARNED.value, Rounding.BOTH.value)
    total = None if search is None or rounding is None else search + rounding
    if row["rounding"] == Rounding.LEARNED.value and row["search_Acc@1"]:
        yield Measure(row, False, float(row["search_Acc@1"]), search, False)
    yield Measure(row, learned, float(row["Acc@1"]), total, True)
    if at_test["approx_Acc@1"]:
        yield Measure(at_test, learned, float(at_test["approx_Acc@1"]), total, False)


def _newest(measures: Iterable[Measure]) -> tuple[list[Measure], list[str]]:
    """One measure per settings and seed, in the order of the file, and what was left out."""
    kept: dict[object, Measure] = {}
    repeated = differing = 0
    for measure in measures:
        key = (measure.settings, measure.row["seed"])
        other = kept.get(key)
        if other is not None:
            repeated += measure.final and other.final
            differing += measure.accuracy != other.accuracy and not (measure.final and other.final)
            # The final figure of a run of its own goes before one that a run took on its way.
            if (measure.final, measure.row["utc_time"]) < (other.final, other.row["utc_time"]):
                continue
        kept[key] = measure
    notes = []
    if repeated:
        notes.append(f"{repeated} row(s) repeat the settings and seed of a newer one; the newest counts.")
    if differing:
        notes.append(f"{differing} accuracies taken on a run's way differ at the same settings and seed; one counts.")
    return list(kept.values()), notes


def _tables(groups: Sequence[Group]) -> list[Table]:
    """The network's tables: one per settings of the grid and of LLR.

    What was rounded without LLR stands beside each LLR of the same method; what no LLR followed, in the table that has
    most methods.
    """
    by_grid: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        by_grid.setdefault(_values(group.row, GRID), []).append(group)
    tables = []
    for grid, members in by_grid.items():
        learned: dict[tuple[str, ...], list[Group]] = {}
        for group in members:
            if group.llr:
                learned.setdefault(_values(group.row, LLR), []).append(group)
        order = sorted(learned, key=lambda llr: -len(learned[llr])) or [()]
        followed = {_method(group) for group in members if group.llr}
        for llr in order:
            mine = learned.get(llr, [])
            methods = {_method(group) for group in mine}
            plain = [g for g in members if not g.llr]
            mine += [g for g in plain if _method(g) in methods or (llr == order[0] and _method(g) not in followed)]
            tables.append(_table(dict(zip(GRID, grid, strict=True)), dict(zip(LLR, llr, strict=False)), mine))
    for number, table in enumerate(tables, 1):
        # What only LLR has tells nothing where a table is without.
        told = {k: v for k, v in table.settings.items() if len({t.settings[k] for t in tables if k in t.settings}) > 1}
        if len(tables) > 1:
            table.title = f"Table {number}: " + ", ".join(f"{name} {value}" for name, value in told.items() if value)
    return tables


def _table(grid: dict[str, str], llr: dict[str, str], groups: Iterable[Group]) -> Table:
    cells: dict[tuple[tuple[str, ...], int, bool], list[Group]] = {}
    for group in groups:
        cells.setdefault((_method(group), group.bits, group.llr), []).append(group)
    table = Table(grid | llr, cells)
    methods = list(dict.fromkeys(key[0] for key in cells))
    plain = {method: method_label(method) for method in methods}
    for method in sorted(methods, key=_place):
        same = [other for other in methods if plain[other] == plain[method]]
        told = [
            f"{name} {method[3 + i] or 'none'}"
            for i, name in enumerate((*SEARCH, *CALIBRATION))
            if len({other[3 + i] for other in same}) > 1
            # a closed form may have seen other images than the LLR that the table's title tells of
            or (name in ("calib_samples", "calib_augment") and method[3 + i] not in ("", "False", llr.get(name)))
        ]
        table.labels[method] = ", ".join([plain[method], *told])
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
            known.index(search) if search in known else -1, method)  # fmt: skip


def _method(group: Group) -> tuple[str, ...]:
    return group.measures[0].method


def _network(row: Row) -> tuple[str, ...]:
    return (*_values(row, NETWORK), "" if row["checkpoint_sha256"] else row["checkpoint"])


def _values(row: Row, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(row[name] for name in names)
