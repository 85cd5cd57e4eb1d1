"""The rows of results.csv as groups of what may be averaged: the same settings, whatever they are, but for the seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from logart.quantization.rounding_methods import method_named
from logart.runs.columns import Part, columns_of

Row = dict[str, str]
# A checkpoint is known by its digest where it has one (`network`).
NETWORK = (*(name for name in columns_of(Part.NETWORK) if name != "checkpoint"), "val_images")
GRID = (*columns_of(Part.GRID), "device")
SEARCH = columns_of(Part.SEARCH, Part.IMAGES)
CALIBRATION = columns_of(Part.CALIBRATION, Part.IMAGES)
LLR = (*CALIBRATION, *columns_of(Part.LLR))
DEFAULTS = columns_of(Part.DEFAULTS)


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
        row, closed = self.row, not method_named(self.row["rounding"]).uses_dbs
        first = (row["scale_method"], row["search_method"], "compensated" if closed else "")
        saw = values(row, SEARCH) if row["search_samples"] else ("",) * len(SEARCH)
        return (*first, *saw, *(values(row, CALIBRATION) if closed else ("",) * len(CALIBRATION)))

    @property
    def settings(self) -> tuple[object, ...]:
        """All that acted: measures that share it differ in their seeds only."""
        acted = (*values(self.row, LLR), *values(self.row, DEFAULTS)) if self.llr or self.method[2] else ()
        return (network(self.row), values(self.row, GRID), self.method, self.row["bits"], self.llr, acted)


@dataclass(frozen=True)
class Group:
    """Measures of the same settings, of one seed each."""

    measures: tuple[Measure, ...]

    @property
    def row(self) -> Row:
        return self.measures[0].row

    @property
    def method(self) -> tuple[str, ...]:
        return self.measures[0].method

    @property
    def llr(self) -> bool:
        return self.measures[0].llr

    @property
    def bits(self) -> int:
        return int(self.row["bits"])

    @property
    def closed(self) -> bool:
        """Whether compensated rounding took part, which searches in a metric and a time of its own."""
        return bool(self.method[2])

    @property
    def search(self) -> object:
        """What decided the search."""
        return values(self.row, GRID), self.method

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


def groups_of(rows: Sequence[Row]) -> tuple[list[Group], list[str]]:
    """Group the rows of a results file.

    Args:
        rows: as `report_rows.read_rows` gives them.

    Returns:
        The groups, in the order of the file; and what the reader should know of the rows.
    """
    measures, notes = _newest(measure for row in rows for measure in _measures(row))
    groups: dict[object, list[Measure]] = {}
    for measure in measures:
        groups.setdefault(measure.settings, []).append(measure)
    return [Group(tuple(members)) for members in groups.values()], notes


def _measures(row: Row) -> Iterable[Measure]:
    search, rounding = number(row["search_seconds"]), number(row["reconstruction_seconds"])
    if row["hardware_approx"] != "True" and row["hardware_approx_terms"]:  # the sum stands for √2 at test only
        at_test, row = row | {"hardware_approx": "at test"}, row | {"hardware_approx_terms": ""}
    else:
        at_test = row | {"approx_Acc@1": ""}
    method = method_named(row["rounding"])
    total = None if search is None or rounding is None else search + rounding
    if len(method.stages) > 1 and row["search_Acc@1"]:
        yield Measure(row, False, float(row["search_Acc@1"]), search, False)
    yield Measure(row, method.learns, float(row["Acc@1"]), total, True)
    if at_test["approx_Acc@1"]:
        yield Measure(at_test, method.learns, float(at_test["approx_Acc@1"]), total, False)


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


def network(row: Row) -> tuple[str, ...]:
    """What tells a network and its data from others."""
    return (*values(row, NETWORK), "" if row["checkpoint_sha256"] else row["checkpoint"])


def values(row: Row, names: Iterable[str]) -> tuple[str, ...]:
    """Some columns of a row."""
    return tuple(row[name] for name in names)
