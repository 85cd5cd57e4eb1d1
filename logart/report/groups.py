"""The rows of results.csv as groups of what may be averaged: the same settings, whatever they are, but for the seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from logart.quantization.rounding_methods import method_named
from logart.runs.columns import SETTINGS, Part, columns_of
from logart.runs.headline import drop_error
from logart.runs.methods import difference_word, method_name, seed_acts

Row = dict[str, str]
# A checkpoint is known by its digest where it has one (`network`).
NETWORK = (*(name for name in columns_of(Part.NETWORK) if name != "checkpoint"), "val_images")
IMAGES, DEFAULTS, CALIBRATION = map(columns_of, (Part.IMAGES, Part.DEFAULTS, Part.CALIBRATION))
LLR = columns_of(Part.LLR)
# What tells methods of one name apart, the most telling first.
_TELLING = (*DEFAULTS, *CALIBRATION, *LLR, *(name for name in SETTINGS if name not in (*NETWORK, "checkpoint", "seed")))


@dataclass(frozen=True)
class Measure:
    """One accuracy of one run.

    Attributes:
        row: the run's; what did not act up to this accuracy is empty.
        accuracy: top-1, in %.
        seconds: search and rounding up to there; None where the row does not say.
        final: whether it is the run's own result, and not one before LLR or with √2 replaced at test.
    """

    row: Row
    accuracy: float
    seconds: float | None
    final: bool

    @property
    def settings(self) -> tuple[object, ...]:
        """All that acted: measures that share it differ in their seeds only."""
        names = [name for name in SETTINGS if name not in ("seed", "checkpoint")]
        return (network(self.row), values(self.row, (*names, "device")))

    @property
    def seed(self) -> str:
        """Empty where it cannot act."""
        return self.row["seed"] if seed_acts(self.row) else ""


@dataclass
class Group:
    """Measures of the same settings, of one seed each.

    Attributes:
        label: the method's name; `name_groups` makes it tell groups of one network and bit width apart.
    """

    measures: tuple[Measure, ...]
    label: str = ""

    @property
    def row(self) -> Row:
        return self.measures[0].row

    @property
    def bits(self) -> int:
        return int(self.row["bits"])

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
    def drop(self) -> float | None:
        """What the float network's accuracy is above, on average, in points; negative where it is below."""
        known = [float(text) - m.accuracy for m in self.measures if (text := m.row["float_Acc@1"])]
        return mean(known) if known else None

    @property
    def drop_error(self) -> float:
        """Standard error of the drop by the choice of test images, in points, as `headline.drop_error`; or nan."""
        return mean(drop_error(m.row | {"Acc@1": str(m.accuracy)}) for m in self.measures)

    @property
    def seconds(self) -> float | None:
        """Mean time of search and rounding; None where not every run says."""
        return _mean(m.seconds for m in self.measures)

    def measured(self, column: str) -> float | None:
        """The mean of another column; None where the runs went on after this, or not every one says."""
        return _mean(number(m.row.get(column, "")) if m.final else None for m in self.measures)


def groups_of(rows: Sequence[Row]) -> tuple[list[Group], list[str]]:
    """Group the rows of a results file.

    Args:
        rows: as `rows.read_rows` gives them.

    Returns:
        The groups, in the order of the file; and what the reader should know of the rows.
    """
    measures, notes = _newest(measure for row in rows for measure in _measures(row))
    groups: dict[object, list[Measure]] = {}
    for measure in measures:
        groups.setdefault(measure.settings, []).append(measure)
    found = [Group(tuple(members)) for members in groups.values()]
    name_groups(found)
    return found, notes


def name_groups(groups: Sequence[Group]) -> None:
    """Give every group its method's name; groups of one network and bit width that share it are told apart.

    What tells them apart is said of all methods of that name, so that a name means the same throughout a page.
    """
    by_name: dict[str, dict[object, list[Group]]] = {}
    for group in groups:
        cells = by_name.setdefault(method_name(group.row), {})
        cells.setdefault((network(group.row), group.bits), []).append(group)
    for name, cells in by_name.items():
        members = [(place, group) for place, found in enumerate(cells.values()) for group in found]
        words: list[tuple[str, ...]] = [() for _ in members]
        for column in (*_TELLING, "device"):
            distinct = len({(place, w) for (place, _), w in zip(members, words, strict=True)})
            if distinct == len(members):
                break
            more = [(*w, difference_word(column, g.row[column])) for (_, g), w in zip(members, words, strict=True)]
            if len({(place, w) for (place, _), w in zip(members, more, strict=True)}) > distinct:
                words = more
        seen: dict[tuple[int, str], int] = {}
        for (place, group), said in zip(members, words, strict=True):
            label = ", ".join([name, *filter(None, said)])
            again = seen[place, label] = seen.get((place, label), 0) + 1
            group.label = label if again == 1 else f"{label} ({again})"  # what differs reads the same in short


def _measures(row: Row) -> Iterable[Measure]:
    search, rounding = number(row["search_seconds"]), number(row["reconstruction_seconds"])
    approximated = row["approx_Acc@1"]
    at_test = row | {"hardware_approx": "at test"}
    if row["hardware_approx"] != "True":  # the sum stands for √2 at test only
        row = row | {"hardware_approx_terms": ""}
    total = None if search is None or rounding is None else search + rounding
    method = method_named(row["rounding"])
    if len(method.stages) > 1 and row["search_Acc@1"]:
        yield Measure(_unlearned(row), float(row["search_Acc@1"]), search, False)
    row = row if method.calibrates else _unlearned(row)
    yield Measure(row, float(row["Acc@1"]), total, True)
    if approximated and at_test["hardware_approx_terms"] and row["hardware_approx"] != "True":
        yield Measure(at_test, float(approximated), total, False)


def _unlearned(row: Row) -> Row:
    """The row of a run that ends before LLR: what acts in LLR alone is empty."""
    idle = (*CALIBRATION, *LLR, *DEFAULTS, *(() if row["search_samples"] else IMAGES))
    return row | dict.fromkeys(idle, "") | {"rounding": "nearest", "iters_w": "0"}


def _newest(measures: Iterable[Measure]) -> tuple[list[Measure], list[str]]:
    """One measure per settings and seed, in the order of the file, and what was left out."""
    kept: dict[object, Measure] = {}
    repeated = differing = 0
    for measure in measures:
        key = (measure.settings, measure.seed)
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
        notes.append(f"{repeated} row(s) repeat the settings of a newer one, the seed too where it acts; "
                     "the newest counts.")  # fmt: skip
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
    """A number of points, with a true minus sign."""
    return f"{0.0 if abs(value) < 0.005 else value:.2f}".replace("-", "−")


def network(row: Row) -> tuple[str, ...]:
    """What tells a network and its data from others."""
    return (*values(row, NETWORK), "" if row["checkpoint_sha256"] else row["checkpoint"])


def values(row: Row, names: Iterable[str]) -> tuple[str, ...]:
    """Some columns of a row."""
    return tuple(row[name] for name in names)
