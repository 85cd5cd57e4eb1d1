"""What a report shows of a results file: the best first, then the ablation, then everything, network by network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from logart.report.ablation import ablation
from logart.report.groups import NETWORK, Group, Row, groups_of, network, signed
from logart.report.page import Block, Cell, Details, Heading, Paragraph, Plot, Table
from logart.report.paper import Sources
from logart.report.result_charts import against_bits, against_time, settings
from logart.report.styles import Style, order, styles
from logart.runs.headline import band, duration, size_text

HEADLINE = (
    "The most accurate method of each network and bit width. The drop is what the float network's accuracy is above, "
    "in points; behind it, one standard error by the choice of test images{}. Smaller differences than that say "
    "little, and the best of several methods on the same images looks better than it is."
)
BOUND = ", here an upper bound: how many images both networks have right is not recorded"
HOW_TO_READ = (
    "Top-1 accuracy in %, its mean ± standard deviation where several seeds ran; below it the drop from the float "
    "network in points, the number of seeds and the time of search and rounding. Rows with different settings are "
    "never averaged."
)


@dataclass
class Section:
    """A network on its data: its groups, and what tells it from others of the same names."""

    row: Row
    groups: list[Group]
    difference: str = ""

    @property
    def title(self) -> str:
        return f"{self.row['arch']} on {self.row['data']}" + (f" ({self.difference})" if self.difference else "")

    @property
    def reference(self) -> str:
        """The float network's accuracy, in words."""
        known = self.row["float_Acc@1"]
        return f"{float(known):.2f} %" if known else "not measured"


def results_blocks(rows: Sequence[Row], paper: Sequence[Row], left_out: str = "") -> list[Block]:
    """The tables and plots of a results file.

    Args:
        rows: as `rows.read_rows` gives them.
        paper: figures to show beside, as `paper.paper_figures` gives them.
        left_out: what to say of rows that are not among them.
    """
    groups, notes = groups_of(rows)
    legend, sources = styles(groups), Sources(paper)
    found = sections(groups)
    blocks: list[Block] = [*headline_blocks(found, legend), *map(Paragraph, filter(None, (left_out, *notes)))]
    blocks += ablation(groups, sources, legend)
    for index, section in enumerate(found, 1):
        blocks += _section(section, f"network{index}", legend, sources)
    return blocks + sources.blocks()


def sections(groups: Sequence[Group]) -> list[Section]:
    """The groups by network and data, in the order of the file; those of each in the order of legends and bits."""
    networks: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        networks.setdefault(network(group.row), []).append(group)
    rows = [found[0].row for found in networks.values()]
    return [
        Section(found[0].row, sorted(found, key=lambda g: (order(g), g.bits)), _difference(found[0].row, rows))
        for found in networks.values()
    ]


def _difference(row: Row, rows: Sequence[Row]) -> str:
    """What tells a network from others with its name on data with the same name."""
    same = [other for other in rows if (other["arch"], other["data"]) == (row["arch"], row["data"])]
    message = [name for name in ("checkpoint", *NETWORK) if len({other[name] for other in same}) > 1]
    return ", ".join(f"{name} {row[name][:24] or 'unknown'}" for name in message)


def headline_blocks(found: Sequence[Section], legend: Mapping[str, Style]) -> list[Block]:
    """The best method of each network and bit width."""
    paired = all(g.row.get("lost") for section in found for g in section.groups)
    head = ("bits", "top-1 [%]", "drop [points]", "method", "size", "time")
    blocks: list[Block] = [Heading(2, "Headline"), Paragraph(HEADLINE.format("" if paired else BOUND))]
    for section in found:
        widths = sorted({g.bits for g in section.groups})
        rows = tuple(_headline_row([g for g in section.groups if g.bits == bits], legend) for bits in widths)
        caption = f"{section.title}: float {section.reference}"
        blocks.append(Table(caption, head, rows, words=(3,)).without_empty_columns())
    return blocks


def _headline_row(groups: Sequence[Group], legend: Mapping[str, Style]) -> tuple[Cell, ...]:
    best = max(groups, key=lambda g: g.accuracy)
    error, size = best.drop_error, best.measured("packed_bytes")
    close = [g for g in groups if g is not best and g.seconds is not None and best.accuracy - g.accuracy <= error]
    quick = min(close, key=lambda g: g.seconds or 0.0, default=None)
    notes: tuple[str, ...] = ()
    if quick is not None and best.seconds and (quick.seconds or 0.0) <= best.seconds / 2:
        notes = (f"no worse by more than that, and quicker: {quick.label} ({accuracy_text(quick)}, {_time(quick)})",)
    return (
        Cell(str(best.bits), (), float(best.bits)),
        Cell(accuracy_text(best), (), best.accuracy, strong=True),
        Cell("" if best.drop is None else f"{signed(best.drop)}{band(error)}", (), best.drop),
        Cell(best.label, notes, style=legend[best.label]),
        Cell("" if size is None else size_text(str(round(size))), (), size),
        Cell(_time(best), (), best.seconds),
    )


def _section(section: Section, name: str, legend: Mapping[str, Style], sources: Sources) -> list[Block]:
    images = section.row["val_images"] or "an unknown number of"
    common = {name: value for name, value in settings(section.groups[0].row).items()
              if all(g.row[name] == value for g in section.groups)}  # fmt: skip
    same = "Settings of all: " + ", ".join(f"{name} {value}" for name, value in common.items()) + "."
    charts = [draw(section.groups, legend, section.title, f"{name}_{what}")
              for what, draw in (("bits", against_bits), ("time", against_time))]  # fmt: skip
    return [
        Heading(2, section.title),
        Paragraph(f"Float network: {section.reference} on {images} test images. {HOW_TO_READ}"),
        _matrix(section, legend, sources),
        *(Plot(chart) for chart in charts if chart is not None),
        Details(f"All {len(section.groups)} measurements with their settings",
                (*([Paragraph(same)] if common else []), _all(section, legend, common), *_commands(section, legend))),
    ]


def _matrix(section: Section, legend: Mapping[str, Style], sources: Sources) -> Table:
    widths = sorted({g.bits for g in section.groups})
    best = {bits: max(g.accuracy for g in section.groups if g.bits == bits) for bits in widths}
    cells: dict[str, dict[int, Cell]] = {}
    for g in section.groups:
        drop = "" if g.drop is None else f"drop {signed(g.drop)}"
        effort = " · ".join(filter(None, (f"n {g.n}" * (g.n > 1), _time(g))))
        notes = (*filter(None, (drop, effort)), *sources.notes(g))
        cell = Cell(accuracy_text(g), notes, g.accuracy, strong=g.accuracy == best[g.bits])
        cells.setdefault(g.label, {})[g.bits] = cell
    lines = [
        (Cell(label, style=legend[label]), *(found.get(bits, Cell()) for bits in widths))
        for label, found in cells.items()
    ]
    return Table("Top-1 accuracy [%]", ("method", *(f"{bits} bits" for bits in widths)), tuple(lines))


def _all(section: Section, legend: Mapping[str, Style], common: Mapping[str, str]) -> Table:
    costs = {"search_seconds": "search [s]", "reconstruction_seconds": "rounding [s]", "peak_memory_mb": "memory [MiB]"}
    head = ("method", "bits", "top-1 [%]", "drop [points]", "seeds", *costs.values(), "settings")
    lines = []
    for g in section.groups:
        measured = [g.measured(column) for column in costs]
        lines.append((
            Cell(g.label, style=legend[g.label]),
            Cell(str(g.bits), (), float(g.bits)),
            Cell(accuracy_text(g), (), g.accuracy),
            Cell("" if g.drop is None else f"{signed(g.drop)}{band(g.drop_error)}", (), g.drop),
            Cell(str(g.n), (), float(g.n)),
            *(Cell("" if value is None else f"{value:.4g}", (), value) for value in measured),
            Cell(", ".join(f"{name} {value}" for name, value in settings(g.row).items() if name not in common)),
        ))  # fmt: skip
    return Table("Every measurement", head, tuple(lines), words=(len(head) - 1,)).without_empty_columns()


def _commands(section: Section, legend: Mapping[str, Style]) -> list[Table]:
    """What the measurements are made by, of the rows that say it."""
    lines = tuple(
        (Cell(g.label, style=legend[g.label]), Cell(str(g.bits), (), float(g.bits)), Cell(g.row["command"]))
        for g in section.groups if g.row.get("command") and g.measures[0].final
    )  # fmt: skip
    return [Table("Commands, of the first seed", ("method", "bits", "command"), lines, words=(2,))] if lines else []


def accuracy_text(group: Group) -> str:
    """The mean, with the standard deviation where there are several seeds that can act."""
    return f"{group.accuracy:.2f}" + ("" if group.deviation is None else f" ± {group.deviation:.2f}")


def _time(group: Group) -> str:
    return "" if group.seconds is None else duration(group.seconds)


def facts(rows: Sequence[Row], path: str) -> dict[str, str]:
    """When, with what and where the runs were made, for the head of the page."""
    times = sorted(row["utc_time"] for row in rows)
    said = {
        "results": f"{len(rows)} runs of {path}",
        "run": " to ".join(dict.fromkeys(time[:10] for time in (times[0], times[-1]))),
    }
    for column, word in (("project_version", "LogART"), ("torch_version", "torch"), ("timm_version", "timm"),
                         ("device", "on")):  # fmt: skip
        said[word] = ", ".join(sorted({row[column] for row in rows if row[column]}))
    return {word: text for word, text in said.items() if text}
