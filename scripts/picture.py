"""Draw the README's picture, docs/grids.svg: weights of one channel and the 16 levels that each 4-bit grid gives it.

    python scripts/picture.py [--out PATH.svg]

The channel is one of the built-in CNN's, the levels are those that it is quantized with (needs the extra [report]).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import Tensor

from logart.files import write_atomically
from logart.grids.logarithmic import DYNAMIC, LOG_2, LOG_SQRT2
from logart.grids.search import choose_codebook
from logart.report.plots import COLOURS, INK, drawing, finished
from logart_cnn.models import load_network

PICTURE = Path(__file__).parents[1] / "docs" / "grids.svg"
BITS = 4
LAYER, CHANNEL = "blocks.0.conv1", 7
GRIDS = (LOG_2, LOG_SQRT2, DYNAMIC)


def weights() -> Tensor:
    """[1, K], the channel's."""
    layer = load_network("digits_resnet").model.get_submodule(LAYER)
    return layer.get_parameter("weight").detach().flatten(1)[CHANNEL : CHANNEL + 1]


def picture() -> bytes:
    """The SVG."""
    w = weights()
    reach = 1.15 * float(w.abs().max())
    with drawing(7.5, 3.6, len(GRIDS)) as (canvas, axes):
        for axis, grid, colour in zip(axes[:, 0], GRIDS, COLOURS, strict=False):
            codebook = choose_codebook(w, grid, BITS)
            axis.hist(w[0].numpy(), bins=60, range=(-reach, reach), color="#c3cad2")
            levels = codebook.levels[0].tolist()
            axis.vlines(levels, 0, 1, color=colour, linewidth=1.1, transform=axis.get_xaxis_transform())
            axis.set(xlim=(-reach, reach), yticks=[], ylabel=grid.label)
            axis.yaxis.label.set(rotation=0, ha="right", va="center", color=colour, size=11)
            axis.grid(False)
            axis.spines["left"].set_visible(False)
            if axis is not axes[-1, 0]:
                axis.tick_params(labelbottom=False)
        k = int(codebook.spec.columns["n_base2"][0])
        axes[-1, 0].set_xlabel(
            f"weight; of a sign's {2 ** (BITS - 1)} dynamic levels, the inner {k} are powers of 2, the others of √2",
            color=INK,
        )
        title = f"One channel's weights (grey: histogram) and its {2**BITS} levels on {BITS}-bit grids"
        return finished(canvas, "grids", title, title).svg


def main(argv: list[str] | None = None) -> int:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the SVG file (default docs/grids.svg)")
    write_atomically(parser.parse_args(argv).out, picture())
    return 0


if __name__ == "__main__":
    sys.exit(main())
