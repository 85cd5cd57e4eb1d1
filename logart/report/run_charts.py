"""The plots of one run: what it did to each block, its weights and levels, base mix and loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logart.quantization.fidelity import KINDS
from logart.report.charts import Chart, Panel, data, domain, quantity, tooltip
from logart.report.runs import Run, RunBlock, RunLayer
from logart.report.styles import COLOURS

A_PAGE = 24  # small panels in one plot
ROW = 17  # pixels of a layer's or block's line
BEFORE, AFTER = "before", "after"
CODES = {"nearest": "rounded to nearest", "final": "as it is"}  # by the words of `fidelity.KINDS`


def _pages(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + A_PAGE] for start in range(0, len(items), A_PAGE)]


def _names(field: str, names: Sequence[str]) -> dict[str, Any]:
    return {"field": field, "type": "nominal", "sort": list(names), "title": None, "axis": {"labelPadding": 6}}


def block_errors(run: Run, name: str) -> Chart | None:
    """Each block's output error before and after learning, joined by a line; None for fewer than two blocks."""
    blocks = [b for b in run.blocks if b.error_before > 0 and b.error_learned > 0]
    if len(blocks) < 2:
        return None
    ends = [e for b in blocks for e in (b.error_before, b.error_learned)]
    x = quantity("error", "output error, calibration images", type="log",
                 domain=[min(ends) / 1.3, max(ends) * 1.3], axis={"format": "~g", "tickCount": 5})  # fmt: skip
    y = _names("block", [b.name for b in blocks])
    rows = data([{"block": b.name, "low": b.error_before, "high": b.error_learned} for b in blocks])
    points = data([
        {"block": b.name, "stage": stage, "error": error, "shown": f"{error:.4g}", "LLR": b.outcome}
        for b in blocks for stage, error in ((BEFORE, b.error_before), (AFTER, b.error_learned))
    ])  # fmt: skip
    colour = {"field": "stage", "type": "nominal", "title": None, "scale": {"domain": [BEFORE, AFTER],
              "range": [COLOURS[1], COLOURS[0]]}, "legend": {"orient": "top", "title": None}}  # fmt: skip
    panel: Panel = {
        "height": ROW * len(blocks),
        "layer": [
            {"data": rows, "mark": {"type": "rule", "color": "#909090"},
             "encoding": {"y": y, "x": x | {"field": "low"}, "x2": {"field": "high"}}},
            {"data": points, "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
             "encoding": {"y": y, "x": x, "color": colour, "tooltip": tooltip("block", "stage", "shown", "LLR")}},
        ],
    }  # fmt: skip
    alt = "Per block, the error of its output before and after learnable rounding, on a logarithmic axis."
    return Chart(name, f"{run.name}: output error of each block", alt, (panel,), height=ROW * len(blocks) + 60)


def output_errors(run: Run, name: str) -> Chart | None:
    """Each layer's output error, rounded to nearest and as it is, by images; None where it was not measured."""
    panels, layers = [], [layer for layer in run.layers if any(layer.output_errors)]
    kinds = [kind.split(", ") for kind in KINDS]
    points = [
        {"layer": layer.name, "images": images, "codes": CODES[codes], "error": error, "shown": f"{error:.4g}"}
        for layer in layers for (images, codes), error in zip(kinds, layer.output_errors, strict=True) if error
    ]  # fmt: skip
    if len(layers) < 2:
        return None
    ends = [float(str(point["error"])) for point in points]
    x = quantity("error", "relative output error", type="log",
                 domain=[min(ends) / 1.3, max(ends) * 1.3], axis={"format": "~g", "tickCount": 4})  # fmt: skip
    colour = {"field": "codes", "type": "nominal", "title": None,
              "scale": {"domain": list(CODES.values()), "range": [COLOURS[1], COLOURS[0]]},
              "legend": {"orient": "top", "title": None}}  # fmt: skip
    for images in dict.fromkeys(point["images"] for point in points):
        panels.append({
            "title": {"text": f"{images} images", "fontSize": 11},
            "height": ROW * len(layers),
            "data": data([point for point in points if point["images"] == images]),
            "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
            "encoding": {"y": _names("layer", [layer.name for layer in layers]), "x": x, "color": colour,
                         "tooltip": tooltip("layer", "codes", "shown")},
        })  # fmt: skip
    alt = "Per layer, how far its output is from the float network's, with codes rounded to nearest and the final ones."
    title = f"{run.name}: output error of each layer, through the whole network"
    return Chart(name, title, alt, tuple(panels), height=ROW * len(layers) + 60)


def base_mix(run: Run, name: str) -> Chart | None:
    """The share of channels by how many of their levels are base 2; None where every layer says the same."""
    layers = [layer for layer in run.layers if layer.base_mix]
    if len({tuple(layer.base_mix) for layer in layers}) < 2 and all(len(layer.base_mix) == 1 for layer in layers):
        return None
    rows = data([
        {"layer": layer.name, "k": k, "channels": count, "share": f"{100 * count / sum(layer.base_mix.values()):.1f} %"}
        for layer in layers for k, count in sorted(layer.base_mix.items())
    ])  # fmt: skip
    colour = {"field": "k", "type": "quantitative", "title": "base-2 levels of a sign",
              "scale": {"scheme": "viridis", "domain": [0, max(1, *(k for layer in layers for k in layer.base_mix))]},
              "legend": {"orient": "top", "format": "d", "tickMinStep": 1, "gradientLength": 160}}  # fmt: skip
    panel: Panel = {
        "height": ROW * len(layers),
        "data": rows,
        "mark": "bar",
        "encoding": {
            "y": _names("layer", [layer.name for layer in layers]),
            "x": {"field": "channels", "type": "quantitative", "stack": "normalize", "title": "channels",
                  "axis": {"format": "%"}},
            "order": {"field": "k"}, "color": colour, "tooltip": tooltip("layer", "k", "channels", "share"),
        },
    }  # fmt: skip
    alt = "Per layer, the share of channels by how many of their magnitudes are base 2 (the others are base √2)."
    return Chart(name, f"{run.name}: base mix over the channels", alt, (panel,), height=ROW * len(layers) + 80)


def histograms(run: Run, prefix: str) -> list[Chart]:
    """Each layer's weights, and below the axis the levels of one of its channels."""
    what = "weights" if run.floats else "quantized weights"
    mixed = any(layer.base_mix for layer in run.layers)
    whose = "of a channel of the most common base mix" if mixed else "of the first channel"
    alt = f"Per layer, the histogram of the {what}; the lines below it are the levels {whose}."
    return [
        Chart(f"{prefix}_{place}", f"{run.name}: {what} over the largest level; lines: levels {whose}", alt,
              tuple(map(_histogram, part)), small=True, height=110)
        for place, part in enumerate(_pages(run.layers), 1)
    ]  # fmt: skip


def _histogram(layer: RunLayer) -> Panel:
    bins, total = len(layer.histogram), max(1, sum(layer.histogram))
    edges = [layer.reach * (2 * i / bins - 1) for i in range(bins + 1)]
    bars = [{"from": edges[i], "to": edges[i + 1], "share": 100 * n / total, "shown": f"{100 * n / total:.2f} %"}
            for i, n in enumerate(layer.histogram) if n]  # fmt: skip
    x = quantity("from", None, domain=[-1.3, 1.3], axis={"values": [-1, 0, 1], "grid": False, "offset": 12})
    y = quantity("share", "share [%]", type="sqrt", zero=True, axis={"tickCount": 4})  # few weights are seen as well
    level = {**x, "field": "level"}
    return {
        "title": {"text": f"{layer.name} ({layer.n_bits} bits)", "fontSize": 11},
        "layer": [
            {"data": data(bars), "mark": {"type": "rect", "color": COLOURS[6]},
             "encoding": {"x": x, "x2": {"field": "to"}, "y": y, "y2": {"datum": 0},
                          "tooltip": tooltip("from", "to", "shown")}},
            {"data": data([{"level": v, "shown": f"{v:.4g}"} for v in layer.levels]),
             "mark": {"type": "rule", "color": COLOURS[1], "strokeWidth": 1 if len(layer.levels) <= 32 else 0.5},
             "encoding": {"x": level, "y": {"value": 112}, "y2": {"value": 121}, "tooltip": tooltip("shown")}},
        ],
    }  # fmt: skip


def losses(run: Run, prefix: str) -> list[Chart]:
    """Each block's loss over the steps of LLR, over its first one; blocks of a single figure have no curve."""
    blocks = [b for b in run.blocks if len(b.losses) > 1 and b.losses[0] > 0]
    ends = [loss / b.losses[0] for b in blocks for loss in b.losses]
    alt = "Per block, the loss of learnable rounding over its steps, as a share of the first."
    return [
        Chart(f"{prefix}_{place}", f"{run.name}: loss of LLR over its first value", alt,
              tuple(_loss(block, domain(ends)) for block in part), small=True, height=110)
        for place, part in enumerate(_pages(blocks), 1)
    ]  # fmt: skip


def _loss(block: RunBlock, shared: list[float]) -> Panel:
    last = len(block.losses) - 1
    rows = [
        {"done": 100 * i / last, "loss": loss / block.losses[0], "shown": f"{loss:.4g}"}
        for i, loss in enumerate(block.losses)
    ]
    return {
        "title": {"text": block.name + " (reverted)" * (block.kept != "learned"), "fontSize": 11},
        "data": data(rows),
        "mark": {"type": "line", "color": COLOURS[0], "strokeWidth": 1.2, "tooltip": False},
        "encoding": {
            "x": quantity("done", "steps [%]", domain=[0, 100], axis={"values": [0, 50, 100], "grid": False}),
            "y": quantity("loss", "loss", domain=shared, axis={"tickCount": 4, "format": "~g"}),
            "tooltip": tooltip("shown"),
        },
    }
