"""All grids, one line each, in the order of reports. A new grid is a file of its own and its line here."""

from __future__ import annotations

from logart.grids.apot import APOT
from logart.grids.grid import Grid
from logart.grids.linear import LINEAR_MINMAX, LINEAR_MSE
from logart.grids.logarithmic import DYNAMIC, LOG_2, LOG_SQRT2
from logart.grids.plain import PLAIN_LINEAR, PLAIN_LOG

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        LOG_2,
        LOG_SQRT2,
        DYNAMIC,
        APOT,
        LINEAR_MINMAX,
        LINEAR_MSE,
    )
}


def grid_named(name: str) -> Grid:
    """The grid that a user asks for.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown grid {name!r:.40}; expected one of {', '.join(GRIDS)}")
    return GRIDS[name]


def stored_grid(name: str) -> Grid:
    """The grid that a packed file names: one of `GRIDS`, or plain levels. ValueError for another."""
    plain = {grid.name: grid for grid in (PLAIN_LOG, PLAIN_LINEAR)}
    return plain[name] if name in plain else grid_named(name)
