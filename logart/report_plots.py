"""The plots of a report: matplotlib, without a display, the same bytes from the same figures.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and each goes with a marker and a kind of line of
its own. Every plot stands on a white plate, so that it reads the same in the light and in the dark.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from logart.report_page import Figure, printable
from logart.report_tables import Group, Section, Table, method_label
from logart.runtime import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Canvas

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
def drawing(width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple[Canvas, Any]]:
    """A figure of `width` × `height` inches and its axes [rows, columns], in the report's style.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise UserError(f"needs the extra [report] ({error}); install logart[report]") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # what a user has set elsewhere changes no report
        matplotlib.rcParams.update(STYLE)
        canvas = Canvas(figsize=(width, height), layout="constrained")  # no pyplot: no window, nothing kept
        yield canvas, canvas.subplots(rows, columns, squeeze=False)


def finished(canvas: Canvas, name: str, title: str, alt: str) -> Figure:
    """The drawn figure as files."""
    canvas.suptitle(title, fontsize=11, color=INK)
    png, svg = io.BytesIO(), io.BytesIO()
    canvas.savefig(png, format="png", dpi=150, metadata={"Software": None})
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Figure(name, title, alt, png.getvalue(), svg.getvalue())


def short(text: str) -> str:
    """A name as it fits a plot: a leading underscore would keep it out of the legend."""
    text = printable(text).lstrip("_")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a kind of line for each label."""
    return {
        label: {"color": COLOURS[i % 7], "marker": MARKERS[i % 9], "linestyle": LINES[i // 7 % 4]}
        for i, label in enumerate(dict.fromkeys(labels))
    }


def against_bits(section: Section, table: Table, name: str) -> Figure:
    """Accuracy against bits of a table's methods, without and with LLR."""
    stages = sorted({llr for _, _, llr in table.cells})
    style = looks(list(table.labels.values()))
    with drawing(4.3 * len(stages) + 0.6, 4.6, 1, len(stages)) as (canvas, axes):
        for axis, llr in zip(axes[0], stages, strict=True):
            for method, label in table.labels.items():
                groups = [g for (m, _, stage), found in table.cells.items() if (m, stage) == (method, llr)
                          for g in found[:1]]  # fmt: skip
                if not groups:
                    continue
                groups.sort(key=lambda group: group.bits)
                points = [(g.bits, g.accuracy, g.deviation or 0.0) for g in groups]
                axis.errorbar(*zip(*points, strict=True), capsize=2, label=short(label), **style[label])
            _float_line(axis, section)
            axis.set(title="with LLR" if llr else "without LLR", xlabel="bits per weight", ylabel="top-1 accuracy [%]")
            axis.set_xticks(sorted({bits for bits, _ in table.columns}))
            axis.margins(x=0.15)
        _legend(canvas, axes, style)
        alt = f"Top-1 accuracy against bits per weight, one line per method: {_said(table.labels.values())}."
        more = "\n" + textwrap.fill(printable(table.title), 78, max_lines=3, placeholder=" …") if table.title else ""
        return finished(canvas, name, f"{short(section.title)}: accuracy against bits{more}", alt)


def against_time(section: Section, name: str) -> Figure:
    """Accuracy against the seconds of search and rounding, one panel per bit width."""
    widths = sorted({group.bits for group in section.groups})
    style = looks([method_label(group.measures[0].method) for group in section.groups])
    columns = min(3, len(widths))
    rows = -(-len(widths) // columns)
    with drawing(max(5.5, 3.6 * columns), 3.2 * rows + 1.4, rows, columns) as (canvas, axes):
        for axis in axes.flat[len(widths) :]:
            axis.set_visible(False)
        for axis, bits in zip(axes.flat, widths, strict=False):
            for group in (g for g in section.groups if g.bits == bits):
                label = method_label(group.measures[0].method)
                look = style[label] | {"linestyle": "none", "markerfacecolor": None if group.llr else "white"}
                axis.errorbar(max(SHORTEST, group.seconds), group.accuracy, group.deviation, capsize=2,
                              label=short(label), **look)  # fmt: skip
            _float_line(axis, section)
            axis.set(title=f"{bits} bits", xlabel="search and rounding [s]", ylabel="top-1 accuracy [%]")
            axis.set_xscale("log")
            plain_numbers(axis.xaxis)
            axis.margins(0.1)
        _legend(canvas, axes, style)
        title = f"{short(section.title)}: accuracy against time (filled: with LLR)"
        alt = "Top-1 accuracy against seconds of search and rounding on a logarithmic axis, one panel per bit width."
        return finished(canvas, name, title, alt)


def costs(section: Section, name: str) -> Figure:
    """Search time and peak memory per method, a mark per bit width."""
    searches = _costs([g for g in section.groups if not g.llr and not g.measures[0].method[2]], "seconds")
    memory = _costs([group for group in section.groups if group.memory is not None], "memory")
    widths = sorted({group.bits for group in section.groups})
    style = looks([f"{bits} bits" for bits in widths])
    panels = [("search time [s]", searches), ("peak memory of the whole run [MiB]", memory)]
    panels = [panel for panel in panels if panel[1]]
    height = 1.9 + 0.3 * sum(len(values) for _, values in panels)
    with drawing(7.5, height, len(panels), 1) as (canvas, axes):
        for axis, (unit, values) in zip(axes[:, 0], panels, strict=True):
            for place, points in enumerate(values.values()):
                for bits, value in points:
                    look = style[f"{bits} bits"] | {"linestyle": "none", "alpha": 0.85}
                    axis.plot(max(SHORTEST, value), place, label=f"{bits} bits", **look)
            axis.set_yticks(range(len(values)), [short(label) for label in values])
            axis.set(xlabel=unit, ylim=(len(values) - 0.4, -0.6))
            if unit.endswith("[s]"):
                axis.set_xscale("log")
                plain_numbers(axis.xaxis)
            axis.margins(x=0.08)
        _legend(canvas, axes, style)
        alt = "Per method, one mark per bit width: seconds of the search, and peak memory of the run in MiB."
        return finished(canvas, name, f"{short(section.title)}: search time and memory per method", alt)


def has_costs(section: Section) -> bool:
    """Whether `costs` has anything to draw."""
    return any(g.memory is not None or not (g.llr or g.measures[0].method[2]) for g in section.groups)


def _costs(groups: Sequence[Group], figure: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for group in groups:
        label = method_label(group.measures[0].method) + (", LLR" if group.llr else "")
        found.setdefault(label, []).append((group.bits, getattr(group, figure)))
    return found


def plain_numbers(axis: Axis) -> None:
    """Give a logarithmic axis plain numbers: the usual ones are mathematics, which no text here is."""

    def between(value: float, _: float | None = None) -> str:
        low, high = axis.get_view_interval()  # less than two decades hold too few powers of ten to read by
        return f"{value:g}" if high < 30 * low and f"{value:e}"[0] in "235" else ""

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(between)


def _float_line(axis: Axes, section: Section) -> None:
    known = [float(text) for group in section.groups if (text := group.row["float_Acc@1"])]
    if known:
        axis.axhline(known[0], color="#5b6470", linewidth=1, linestyle=(0, (1, 1.5)), label="float", zorder=1)


def _legend(canvas: Canvas, axes: Any, style: Mapping[str, Any]) -> None:
    """One legend below all panels, each label once."""
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    places = {short(label): place for place, label in enumerate(style)}
    found = dict(sorted(found.items(), key=lambda item: places.get(item[0], -1)))
    longest = max(map(len, found), default=0)
    columns = max(1, int(canvas.get_figwidth() / (0.55 + 0.075 * longest)))
    canvas.legend([*found.values()], [*found], loc="outside lower center", ncols=min(columns, len(found)))


def _said(labels: Any) -> str:
    return "; ".join(short(label) for label in labels)
