"""The plots of one run: its weights and levels, base mix and loss curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logart.report.page import Figure
from logart.report.plots import COLOURS, drawing, finished, named, plain_numbers, short
from logart.report.runs import Run, RunBlock, RunLayer

A_PAGE = 24  # small multiples in one figure
PANEL = 34  # characters in a line of the title of one


def run_figures(run: Run, prefix: str) -> dict[str, list[Figure]]:
    """The run's plots, by what they show."""
    found: dict[str, list[Figure]] = {"histograms": [], "mix": [], "losses": []}
    for start in range(0, len(run.layers), A_PAGE):
        part = run.layers[start : start + A_PAGE]
        found["histograms"].append(_histograms(run, part, f"{prefix}_weights_{start // A_PAGE + 1}"))
    mixed = [layer for layer in run.layers if layer.base_mix]
    if mixed:
        found["mix"].append(_mixes(run, mixed, f"{prefix}_base_mix"))
    curves = [block for block in run.blocks if block.losses]
    for start in range(0, len(curves), A_PAGE):
        part_ = curves[start : start + A_PAGE]
        found["losses"].append(_losses(run, part_, f"{prefix}_losses_{start // A_PAGE + 1}"))
    return found


def _multiples(count: int) -> tuple[int, int]:
    columns = min(4, count)
    return -(-count // columns), columns


def _histograms(run: Run, layers: Sequence[RunLayer], name: str) -> Figure:
    rows, columns = _multiples(len(layers))
    what = "weights" if run.floats else "quantized weights"
    mixed = any(layer.base_mix for layer in layers)
    lines = f"levels of a channel{' of the most common base mix' if mixed else ', the first'}"
    with drawing(max(6.0, 2.5 * columns), 1.7 * rows + 0.9, rows, columns) as (canvas, axes):
        for axis in axes.flat[len(layers) :]:
            axis.set_visible(False)
        for axis, layer in zip(axes.flat, layers, strict=False):
            edges = np.linspace(-layer.reach, layer.reach, len(layer.histogram) + 1)
            share = 100 * np.array(layer.histogram, float) / max(1, sum(layer.histogram))
            axis.stairs(share, edges, fill=True, color=COLOURS[5])
            axis.vlines(
                layer.levels,
                0,
                max(1e-9, share.max()),
                color=COLOURS[1],
                linewidth=0.5 if len(layer.levels) <= 32 else 0.15,
            )
            axis.set_title(named(f"{layer.name} ({layer.n_bits} bits)", PANEL), fontsize=8)
            axis.tick_params(labelsize=7)
            axis.set(xlim=(-1.3, 1.3), ylim=(0, None))
            axis.grid(False)
        canvas.supxlabel(f"value / largest level of its codebook; lines: {lines}", fontsize=9)
        canvas.supylabel("share [%]", fontsize=9)
        alt = f"Per layer, the histogram of the {what}, with the {lines}, as lines."
        return finished(canvas, name, f"{short(run.name)}: {what} per layer", alt)


def _mixes(run: Run, layers: Sequence[RunLayer], name: str) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    colours = ScalarMappable(Normalize(0, max(1, *(k for layer in layers for k in layer.base_mix))), "cividis")
    names = [named(layer.name) for layer in layers]
    lines = 1 + max(name.count("\n") for name in names)
    with drawing(7.5, max(2.6, 1.7 + 0.2 * lines * len(layers))) as (canvas, axes):
        axis = axes[0, 0]
        for place, layer in enumerate(layers):
            total, left = sum(layer.base_mix.values()), 0.0
            for k, count in sorted(layer.base_mix.items()):
                axis.barh(place, 100 * count / total, 0.8, left, color=colours.to_rgba(np.array(k)), edgecolor="white",
                          linewidth=0.5)  # fmt: skip
                left += 100 * count / total
        axis.set_yticks(range(len(layers)), names, fontsize=8)
        axis.set(xlim=(0, 100), ylim=(len(layers) - 0.5, -0.5), xlabel="channels [%]")
        axis.grid(False)
        bar = canvas.colorbar(colours, ax=axis, label="base-2 levels of a sign", fraction=0.04)
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
        alt = "Per layer, the share of channels by how many of their magnitudes are base 2 (the others are base √2)."
        return finished(canvas, name, f"{short(run.name)}: base mix over the channels", alt)


def _losses(run: Run, blocks: Sequence[RunBlock], name: str) -> Figure:
    rows, columns = _multiples(len(blocks))
    with drawing(max(6.0, 2.5 * columns), 1.7 * rows + 0.9, rows, columns) as (canvas, axes):
        for axis in axes.flat[len(blocks) :]:
            axis.set_visible(False)
        for axis, block in zip(axes.flat, blocks, strict=False):
            axis.plot(np.linspace(0, 100, len(block.losses)), block.losses, color=COLOURS[0], linewidth=1,
                      marker="." if len(block.losses) == 1 else "")  # fmt: skip
            if min(block.losses) > 0:
                axis.set_yscale("log")
                plain_numbers(axis.yaxis)
            reverted = " (reverted)" if block.kept != "learned" else ""
            axis.set_title(named(f"{block.name}{reverted}", PANEL), fontsize=8)
            axis.tick_params(labelsize=7, which="both")
        canvas.supxlabel("LLR steps done [%]", fontsize=9)
        canvas.supylabel("loss", fontsize=9)
        alt = "Per block, the loss of learnable rounding over its steps."
        return finished(canvas, name, f"{short(run.name)}: loss of LLR per block", alt)
