"""Draw the README's picture, docs/grids.svg: weights of one channel and the 16 levels that each 4-bit grid gives it.

    python scripts/picture.py [--out PATH.svg]

The channel is one of the built-in CNN's, the levels are those that it is quantized with (needs the extra [report]).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from logart.files import write_atomically
from logart.grids.logarithmic import DYNAMIC, LOG_2, LOG_SQRT2
from logart.grids.search import choose_codebook
from logart.report.charts import Chart, data, quantity
from logart.report.styles import COLOURS
from logart_cnn.models import load_network

PICTURE = Path(__file__).parents[1] / "docs" / "grids.svg"
BITS = 4
LAYER, CHANNEL = "blocks.0.conv1", 7
GRIDS = {grid.label: grid for grid in (LOG_2, LOG_SQRT2, DYNAMIC)}
HEIGHT, RUG = 70, 22  # of a histogram and of the levels below it, in pixels


def weights() -> Tensor:
    """[1, K], the channel's."""
    layer = load_network("digits_resnet").model.get_submodule(LAYER)
    return layer.get_parameter("weight").detach().flatten(1)[CHANNEL : CHANNEL + 1]


def levels() -> dict[str, list[float]]:
    """The levels of the channel on each grid, ascending."""
    return {name: choose_codebook(weights(), grid, BITS).levels[0].tolist() for name, grid in GRIDS.items()}


def picture() -> bytes:
    """The SVG."""
    w = weights()[0].numpy()
    reach = 1.15 * float(np.abs(w).max())
    counts, edges = np.histogram(w, 60, (-reach, reach))
    bars = [
        {"from": float(edges[i]), "to": float(edges[i + 1]), "n": int(n)} for i, n in enumerate(counts) if n
    ]
    found = levels()
    panels = tuple(
        _panel(name, bars, found[name], colour, reach) for name, colour in zip(GRIDS, COLOURS, strict=False)
    )
    k = choose_codebook(weights(), DYNAMIC, BITS).spec.columns["n_base2"]
    title = f"One channel's weights (grey) and its {2**BITS} levels on {BITS}-bit grids"
    below = f"of a sign's {2 ** (BITS - 1)} dynamic levels, the inner {int(k[0])} are powers of 2, the others of √2"
    chart = Chart("grids", f"{title}; {below}", title, panels, height=HEIGHT, columns=1)
    return chart.files["svg"]


def _panel(name: str, bars: list[dict[str, Any]], found: list[float], colour: str, reach: float) -> dict[str, Any]:
    y = quantity("n", None) | {"axis": None}
    x = quantity("from", None, domain=[-reach, reach], axis={"grid": False, "offset": RUG + 4, "tickCount": 9})
    return {
        "title": {"text": name, "color": colour},
        "layer": [
            {"data": data(bars), "mark": {"type": "rect", "color": "#a9b2bc"},
             "encoding": {"x": x, "x2": {"field": "to"}, "y": y, "y2": {"datum": 0}}},
            {"data": data([{"level": level} for level in found]), "mark": {"type": "rule", "color": colour},
             "encoding": {"x": {**x, "field": "level"}, "y": {"value": HEIGHT + 3}, "y2": {"value": HEIGHT + RUG}}},
        ],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the SVG file (default docs/grids.svg)")
    write_atomically(parser.parse_args(argv).out, picture())
    return 0


if __name__ == "__main__":
    sys.exit(main())
