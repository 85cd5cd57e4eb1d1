"""The plots of a report: matplotlib, without a display, the same bytes from the same figures.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and each goes with a marker and a kind of line of
its own. Every plot stands on a white plate, so that it reads the same in the light and in the dark.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from logart.errors import UserError, printable
from logart.report.page import Figure
from logart.report.tables import Section, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", ":")
INK = "#1b1f24"
LONGEST = 44  # characters of a name in a plot
SHORTEST = 1e-3  # s: what took less is drawn there
STYLE: Any = {  # its keys are literals to newer matplotlibs, text to older ones
    "text.parse_math": False,  # a name with a $ is a name
    "svg.hashsalt": "logart",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d5dae0",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "lines.markersize": 5,
}


@contextmanager
def drawing(
    width: float, height: float, rows: int = 1, columns: int = 1, height_ratios: Sequence[float] | None = None
) -> Iterator[tuple[Canvas, Any]]:
    """A figure of `width` × `height` inches and its axes [rows, columns], in the report's style.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise UserError(f"needs the extra [report] ({error}); install logart[report]") from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's text has the name
        matplotlib.rcdefaults()  # what a user has set elsewhere changes no report
        matplotlib.rcParams.update(STYLE)
        canvas = Canvas(figsize=(width, height), layout="constrained")  # no pyplot: no window, nothing kept
        yield canvas, canvas.subplots(rows, columns, squeeze=False, height_ratios=height_ratios)


def finished(canvas: Canvas, name: str, title: str, alt: str) -> Figure:
    """The drawn figure as files."""
    _fit(canvas, canvas.suptitle(title, fontsize=11, color=INK))
    png, svg = io.BytesIO(), io.BytesIO()
    canvas.savefig(png, format="png", dpi=150, metadata={"Software": None})
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Figure(name, title, alt, png.getvalue(), svg.getvalue())


def _fit(canvas: Canvas, title: Text) -> None:
    """Break the lines of a title until it is no wider than its figure."""
    lines, columns = title.get_text().split("\n"), 120
    while title.get_window_extent().width > 0.97 * canvas.bbox.width and columns > 8:
        columns -= 4
        title.set_text("\n".join(textwrap.fill(line, columns) for line in lines))


def short(text: str, longest: int = LONGEST) -> str:
    """A name as it fits a plot: a leading underscore would keep it out of the legend."""
    text = printable(text).lstrip("_")
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def named(text: str, width: int = LONGEST) -> str:
    """A name as it stands in a plot, on several lines where it is longer than `width` characters."""
    return textwrap.fill(printable(text).lstrip("_"), width, max_lines=4, placeholder=" …")


def looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a kind of line for each label."""
    return {
        label: {"color": COLOURS[i % 7], "marker": MARKERS[i % 9], "linestyle": LINES[i // 7 % 4]}
        for i, label in enumerate(dict.fromkeys(labels))
    }


def against_bits(section: Section, table: Table, name: str) -> Figure:
    """Accuracy against bits of a table's methods, without and with LLR."""
    stages = sorted({llr for _, _, llr in table.cells})
    style = looks(table.labels.values())
    width = 4.3 * len(stages) + 0.6
    with drawing(width, 3.9 + legend_shape(width, style)[1], 1, len(stages)) as (canvas, axes):
        for axis, llr in zip(axes[0], stages, strict=True):
            for method, label in table.labels.items():
                groups = [g for (m, _, stage), found in table.cells.items() if (m, stage) == (method, llr)
                          for g in found[:1]]  # fmt: skip
                if not groups:
                    continue
                groups.sort(key=lambda group: group.bits)
                points = [(g.bits, g.accuracy, g.deviation or 0.0) for g in groups]
                axis.errorbar(*zip(*points, strict=True), capsize=2, **style[label])
            _float_line(axis, section)
            axis.set(title="with LLR" if llr else "without LLR", xlabel="bits per weight", ylabel="top-1 accuracy [%]")
            axis.set_xticks(sorted({bits for bits, _ in table.columns}))
            axis.margins(x=0.15)
        _legend(canvas, axes, style)
        alt = f"Top-1 accuracy against bits per weight, one line per method: {'; '.join(map(short, style))}."
        more = "\n" + textwrap.shorten(printable(table.title), 240, placeholder=" …") if table.title else ""
        return finished(canvas, name, f"{short(section.title, 90)}: accuracy against bits{more}", alt)


def against_time(section: Section, name: str) -> Figure | None:
    """Accuracy against the seconds of search and rounding, one panel per bit width; None where no time is known."""
    timed = [(label, group, group.seconds) for label, group in section.lines if group.seconds is not None]
    if not timed:
        return None
    widths = sorted({group.bits for _, group, _ in timed})
    style = looks([label for label, _, _ in timed])
    columns = min(3, len(widths))
    rows = -(-len(widths) // columns)
    width = max(5.5, 3.6 * columns)
    with drawing(width, 3.2 * rows + 0.6 + legend_shape(width, style)[1], rows, columns) as (canvas, axes):
        for axis in axes.flat[len(widths) :]:
            axis.set_visible(False)
        for axis, bits in zip(axes.flat, widths, strict=False):
            for label, group, seconds in timed:
                if group.bits == bits:
                    look = style[label] | {"linestyle": "none", "markerfacecolor": None if group.llr else "white"}
                    axis.errorbar(max(SHORTEST, seconds), group.accuracy, group.deviation, capsize=2, **look)
            _float_line(axis, section)
            axis.set(title=f"{bits} bits", xlabel="search and rounding [s]", ylabel="top-1 accuracy [%]")
            axis.set_xscale("log")
            plain_numbers(axis.xaxis)
            axis.margins(0.1)
        _legend(canvas, axes, {label: look | {"linestyle": "none"} for label, look in style.items()})
        numbers = "; number: table" * (len(section.tables) > 1)
        title = f"{short(section.title, 90)}: accuracy against time\nfilled: with LLR, hollow: without{numbers}"
        alt = "Top-1 accuracy against seconds of search and rounding on a logarithmic axis, one panel per bit width."
        return finished(canvas, name, title, alt)


def costs(section: Section, name: str) -> Figure | None:
    """Search time and peak memory per method, a mark per bit width; None where neither is known."""
    panels = [("search time [s]", _searches(section)), ("peak memory of the whole run [MiB]", _memory(section))]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    style = looks([f"{bits} bits" for bits in sorted({bits for _, found in panels for _, bits, _ in found})])
    style = {label: look | {"linestyle": "none", "alpha": 0.85} for label, look in style.items()}
    labels = [list(dict.fromkeys(label for label, _, _ in found)) for _, found in panels]
    lines = [sum(1 + named(label).count("\n") for label in each) for each in labels]
    height = 0.9 + sum(0.5 + 0.3 * count for count in lines)
    with drawing(7.5, height, len(panels), 1, height_ratios=[1 + count for count in lines]) as (canvas, axes):
        for axis, (unit, found), names in zip(axes[:, 0], panels, labels, strict=True):
            for label, bits, value in found:
                axis.plot(max(SHORTEST, value), names.index(label), **style[f"{bits} bits"])
            axis.set_yticks(range(len(names)), [named(label) for label in names])
            axis.set(xlabel=unit, ylim=(len(names) - 0.4, -0.6))
            if unit.endswith("[s]"):
                axis.set_xscale("log")
                plain_numbers(axis.xaxis)
            axis.margins(x=0.08)
        _legend(canvas, axes, style)
        numbers = " (number: table)" * (len(section.tables) > 1)
        alt = "Per method, one mark per bit width: seconds of the search, and peak memory of the run in MiB."
        return finished(canvas, name, f"{short(section.title, 90)}: search time and memory per method{numbers}", alt)


def _searches(section: Section) -> list[tuple[str, int, float]]:
    """(method, bits, s) of each search once: tables with other settings of LLR share theirs."""
    found: dict[object, tuple[str, int, float]] = {}
    for label, group in sorted(section.lines, key=lambda line: line[1].llr):
        if group.search_seconds is not None and not group.closed:
            found.setdefault((group.search, group.bits), (label, group.bits, group.search_seconds))
    return list(found.values())


def _memory(section: Section) -> list[tuple[str, int, float]]:
    return [
        (label + ", LLR" * group.llr, group.bits, group.memory)
        for label, group in section.lines
        if group.memory is not None
    ]


def plain_numbers(axis: Axis) -> None:
    """Give a logarithmic axis plain numbers: the usual ones are mathematics, which no text here is."""

    def between(value: float, _: float | None = None) -> str:
        low, high = axis.get_view_interval()  # less than two decades hold too few powers of ten to read by
        first = "123456789" if high < 3 * low else "2357" if high < 10 * low else "235" if high < 30 * low else ""
        return f"{value:g}" if f"{value:e}"[0] in first else ""

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(between)


def _float_line(axis: Axes, section: Section) -> None:
    known = [float(text) for group in section.groups if (text := group.row["float_Acc@1"])]
    if known:
        axis.axhline(known[0], color="#5b6470", linewidth=1, linestyle=(0, (1, 1.5)), label="float", zorder=1)


def legend_shape(width: float, labels: Iterable[str]) -> tuple[int, float]:
    """How many columns a legend of these has room for in `width` inches, and the inches that it is high."""
    lines = [named(label).split("\n") for label in labels]
    longest = max((len(line) for each in lines for line in each), default=0)
    columns = max(1, int(width / (0.55 + 0.075 * longest)))
    return columns, 0.2 * sum(map(len, lines)) / columns + 0.2


def _legend(canvas: Canvas, axes: Any, style: Mapping[str, Any]) -> None:
    """One legend below all panels: each label once, behind those that the panels themselves hold."""
    from matplotlib.lines import Line2D

    found = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    lines = [*found.values(), *(Line2D([], [], **look) for look in style.values())]
    columns, _ = legend_shape(canvas.get_figwidth(), style)
    canvas.legend(lines, [*found, *map(named, style)], loc="outside lower center", ncols=min(columns, len(lines)))
