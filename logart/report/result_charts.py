"""The plots of a network's results: what accuracy the methods lose, by bits and by time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from logart.quantization.rounding_methods import method_named
from logart.report.charts import Chart, Panel, by_method, data, quantity, tooltip
from logart.report.groups import Group, Row, signed
from logart.report.styles import Style
from logart.runs.headline import band, duration

DROP = "drop from float [points]"
TICKS = [-5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100]
FEWEST_SECONDS = 0.01  # what took less is drawn there, the axis being logarithmic
PANELS = ("rounded to nearest", "learned (LLR)", "compensated")  # of the plot against bits
HOVER = ("method", "bits", "top-1 [%]", "drop", "seeds", "time", "settings")


def settings(row: Row) -> dict[str, str]:
    """The settings of a row that acted, but for the seed and what names the network."""
    hidden = ("utc_time", "track", "arch", "checkpoint", "checkpoint_sha256", "data", "bits", "seed")
    names = list(row)[: list(row).index("val_images")]
    return {name: row[name] for name in names if name not in hidden and row[name] not in ("", "none", "False", "0")}


def _point(group: Group) -> dict[str, Any]:
    assert group.drop is not None
    seconds = group.seconds
    spread = group.deviation or 0.0
    return {
        "method": group.label,
        "bits": group.bits,
        "y": group.drop,
        "low": group.drop - spread,
        "high": group.drop + spread,
        "x": None if seconds is None else max(FEWEST_SECONDS, seconds),
        "top-1 [%]": f"{group.accuracy:.2f}" + (f" ± {spread:.2f}" if group.n > 1 else ""),
        "drop": f"{signed(group.drop)}{band(group.drop_error)} (standard error)",
        "seeds": group.n,
        "time": "" if seconds is None else duration(seconds),
        "settings": ", ".join(f"{name} {value}" for name, value in settings(group.row).items()),
    }


def against_bits(groups: Sequence[Group], legend: Mapping[str, Style], title: str, name: str) -> Chart | None:
    """Drop from float against bits, a panel per kind of rounding; None where no method has two bit widths."""
    by_label: dict[str, list[Group]] = {}
    for group in groups:
        if group.drop is not None:
            by_label.setdefault(group.label, []).append(group)
    lines = {label: found for label, found in by_label.items() if len(found) > 1}
    stages = {text: [g for found in lines.values() for g in found if _panel_of(g) == text] for text in PANELS}
    stages = {stage: found for stage, found in stages.items() if found}
    if not stages:
        return None
    widths = sorted({g.bits for found in stages.values() for g in found})
    x = quantity("bits", "bits per weight", domain=[widths[0] - 0.3, widths[-1] + 0.3],
                 axis={"values": widths, "format": "d", "grid": False})  # fmt: skip
    panels = _panels(stages, x, _drops([g for found in stages.values() for g in found]), legend, joined=True)
    alt = "Drop from the float network's top-1 accuracy against bits per weight, a line per method."
    return Chart(name, f"{title}: {DROP} by bits", alt, panels, _used(legend, stages))


def against_time(groups: Sequence[Group], legend: Mapping[str, Style], title: str, name: str) -> Chart | None:
    """Drop from float against the seconds of search and rounding, a panel per bit width with three methods or more."""
    timed = [g for g in groups if g.drop is not None and g.seconds is not None]
    panels = {f"{bits} bits": [g for g in timed if g.bits == bits] for bits in sorted({g.bits for g in timed})}
    panels = {text: found for text, found in panels.items() if len(found) > 2}
    if not panels:
        return None
    shown = [g for found in panels.values() for g in found]
    seconds = [max(FEWEST_SECONDS, g.seconds or 0.0) for g in shown]
    x = quantity("x", "search and rounding [s]", type="log", domain=[min(seconds) / 1.5, max(seconds) * 1.5],
                 axis={"format": "~f", "values": [10.0**k for k in range(-2, 7)], "grid": True})  # fmt: skip
    alt = "Drop from the float network's top-1 accuracy against seconds of search and rounding, a panel per bit width."
    return Chart(name, f"{title}: {DROP} by time", alt, _panels(panels, x, _drops(shown), legend),
                 _used(legend, panels))  # fmt: skip


def _panel_of(group: Group) -> str:
    method = method_named(group.row["rounding"])
    return PANELS[2 if not method.uses_dbs else method.learns]


def _used(legend: Mapping[str, Style], panels: Mapping[str, Sequence[Group]]) -> dict[str, Style]:
    labels = {group.label for found in panels.values() for group in found}
    return {label: style for label, style in legend.items() if label in labels}


def _drops(groups: Sequence[Group]) -> dict[str, Any]:
    """The axis of drops, the same for all panels; better is above. Its scale bends beyond ±1 point."""
    ends = [d for g in groups if g.drop is not None for d in (g.drop - (g.deviation or 0), g.drop + (g.deviation or 0))]
    low, high = min(-0.25, *ends) - 0.1, max(0.25, *ends) * 1.1
    ticks = [tick for tick in TICKS if low <= tick <= high]
    return quantity("y", DROP, type="symlog", constant=1, domain=[low, high], reverse=True,
                    axis={"values": ticks, "format": "~f"})  # fmt: skip


def _panels(panels: Mapping[str, Sequence[Group]], x: Mapping[str, Any], y: Mapping[str, Any],
            legend: Mapping[str, Style], joined: bool = False) -> tuple[Panel, ...]:  # fmt: skip
    style = by_method(_used(legend, panels))
    low, high = y["scale"]["domain"]
    made = []
    for text, found in panels.items():
        error = max((g.drop_error for g in found if g.drop_error == g.drop_error), default=0.0)
        zero = {"low": max(low, -error), "high": min(high, error)}  # within it, chance in the choice of images rules
        reach = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
        chance: Panel = {
            "data": {"values": [zero]},
            "mark": {"type": "rect", "color": "#808080", "opacity": 0.16},
            "encoding": reach,
        }
        still = {"x": x, "color": style["color"]}
        shades = [
            {"mark": {"type": "area", "opacity": 0.18}, "encoding": still | reach},
            {"mark": {"type": "line", "strokeWidth": 1.6}, "encoding": still | {"y": y}},
        ]  # fmt: skip
        points = [
            {"mark": {"type": "rule"}, "encoding": still | reach},
            {"mark": {"type": "point", "filled": True, "size": 62, "opacity": 1},
             "encoding": {"x": x, "y": y, **style, "tooltip": tooltip(*HOVER)}},
        ]  # fmt: skip
        rows = data([_point(group) for group in sorted(found, key=lambda g: g.bits)])
        made.append({"title": text, "data": rows, "layer": [chance, *shades * joined, *points]})
    return tuple(made)
