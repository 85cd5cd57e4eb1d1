"""One colour and one marker for each method, the same in every table and plot of a page.

The colour says grid and search, or the preset; the marker says the rounding. Colours are of middle lightness, so that
they can be seen on white and on a dark page; the first ones are close to Okabe and Ito's, which colour-blind readers
tell apart, and the marker helps where colours are not enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from logart.report.groups import Group
from logart.runs.methods import GRID_NAMES, ROUNDING_NAMES, SEARCH_NAMES, family

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#C4609A", "#A87900", "#7B5FC9", "#3A93C9", "#C0304A", "#8C6D46", "#6B8E23",
           "#7A7A7A")  # fmt: skip
SHAPES = {  # SVG paths within ±1
    "circle": "M0,-1A1,1,0,1,1,0,1A1,1,0,1,1,0,-1Z",
    "square": "M-.87,-.87H.87V.87H-.87Z",
    "diamond": "M0,-1.15L1.15,0L0,1.15L-1.15,0Z",
    "up": "M0,-1.1L1.1,.9H-1.1Z",
    "down": "M0,1.1L1.1,-.9H-1.1Z",
    "plus": "M-.38,-1.1H.38V-.38H1.1V.38H.38V1.1H-.38V.38H-1.1V-.38H-.38Z",
    "left": "M-1.1,0L.9,-1.1V1.1Z",
    "right": "M1.1,0L-.9,-1.1V1.1Z",
    "times": "M-1,-.5L-.5,-1L0,-.5L.5,-1L1,-.5L.5,0L1,.5L.5,1L0,.5L-.5,1L-1,.5L-.5,0Z",
    "hourglass": "M-1,-1H1L-1,1H1Z",
    "hexagon": "M-1,0L-.5,-.9H.5L1,0L.5,.9H-.5Z",
}  # fmt: skip
_FIRST_SHAPE = dict(zip(ROUNDING_NAMES, SHAPES, strict=False))


@dataclass(frozen=True)
class Style:
    """How a method is drawn: a colour, and a marker as an SVG path within ±1."""

    colour: str
    shape: str


def order(group: Group) -> tuple[object, ...]:
    """Where a method stands in tables and legends: grids as the paper lists them, then presets; RTN first."""
    row = group.row
    places = [_place(row["preset"] and "preset", ("",)), row["preset"]]
    for column, known in (("scale_method", GRID_NAMES), ("search_method", SEARCH_NAMES), ("rounding", ROUNDING_NAMES)):
        places += [_place(row[column], ("", *known)), row[column]]
    return (*places, group.label)


def _place(value: str, known: Sequence[str]) -> int:
    return known.index(value) if value in known else len(known)


def styles(groups: Iterable[Group]) -> dict[str, Style]:
    """A style for each label, in the order of legends; no two share one until all pairs of both are used up."""
    found: dict[str, Style] = {}
    colours: dict[str, str] = {}
    taken: set[Style] = set()
    for group in sorted(groups, key=order):
        if group.label in found:
            continue
        colour = colours.setdefault(family(group.row), COLOURS[len(colours) % len(COLOURS)])
        first = _FIRST_SHAPE.get(group.row["rounding"], "circle")
        shapes = [first, *(name for name in SHAPES if name not in _FIRST_SHAPE.values()), *SHAPES]
        others = [c for c in COLOURS if c != colour]
        free = (Style(c, SHAPES[s]) for c in (colour, *others) for s in shapes if Style(c, SHAPES[s]) not in taken)
        found[group.label] = next(free, Style(colour, SHAPES[first]))
        taken.add(found[group.label])
    return found
