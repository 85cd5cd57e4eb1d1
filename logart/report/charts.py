"""Plots as Vega-Lite: one description gives the live panel of the page and the SVG and PNG beside it.

The library comes with the package vl-convert-python, both as JavaScript for the page, which then needs no network, and
as a renderer without a browser. Vega-Lite: Satyanarayan et al., IEEE TVCG 23 (2017).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from logart.errors import UserError, printable
from logart.report.styles import Style

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
VERSION = "6.4"
INK, SOFT, LINE = "#1b1f24", "#5b6470", "#d5dae0"
WIDTH, HEIGHT, PER_ROW = 230, 210, 3  # of a static panel, in pixels, and how many stand side by side
STATIC = {
    "background": "white", "font": "DejaVu Sans, Liberation Sans, sans-serif", "padding": 8,
    "view": {"stroke": None}, "title": {"fontSize": 12, "fontWeight": 600, "color": INK, "anchor": "start"},
    "axis": {"labelColor": SOFT, "titleColor": INK, "gridColor": LINE, "domainColor": SOFT, "tickColor": SOFT,
             "titleFontWeight": 500, "labelLimit": 260},
    "legend": {"labelLimit": 400, "labelColor": INK, "titleColor": INK, "orient": "bottom", "columns": 2,
               "symbolOpacity": 1},
    "concat": {"spacing": 24},
}  # fmt: skip
Panel = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A plot of one or several panels.

    Attributes:
        name: of its files, without the ending.
        title, alt: what it is, and what it shows in words.
        panels: Vega-Lite views without width; each has a title of its own unless it is alone.
        legend: labels and styles of what is drawn by method.
        small: whether the panels are many and small.
        height: of a panel, in pixels.
        columns: how many panels stand side by side in the static plot; 0: as many as fit.
    """

    name: str
    title: str
    alt: str
    panels: tuple[Panel, ...]
    legend: Mapping[str, Style] = field(default_factory=dict)
    small: bool = False
    height: int = HEIGHT
    columns: int = 0

    def live(self) -> list[Panel]:
        """The panels as the page shows them: as wide as there is room, with the page's legend."""
        return [{"$schema": SCHEMA, "width": "container", "height": self.height, **panel} for panel in self.panels]

    def static(self) -> Panel:
        """The plot as one picture, with a legend of its own."""
        count = self.columns or min(4 if self.small else PER_ROW, len(self.panels))
        width = {1: 620, 2: 320}.get(count, 170 if self.small else WIDTH)
        panels = [{"width": width, "height": self.height, **panel} for panel in self.panels]
        title = textwrap.wrap(printable(self.title), width * count // 8)
        picture = {"$schema": SCHEMA, "title": {"text": title, "fontSize": 14, "offset": 12}, "config": STATIC,
                   "columns": count, "concat": panels}  # fmt: skip
        if self.legend:
            picture["concat"] = [_with_legend(panel) for panel in panels]
        return picture

    @property
    def files(self) -> dict[str, bytes]:
        """The static plot, by ending."""
        library, picture = vega(), self.static()
        return {
            "svg": library.vegalite_to_svg(picture, vl_version=VERSION).encode(),
            "png": library.vegalite_to_png(picture, vl_version=VERSION, scale=2),
        }


def _with_legend(panel: Panel) -> Panel:
    return json.loads(json.dumps(panel).replace('"legend": null', '"legend": {"title": null}'))  # type: ignore[no-any-return]


def vega() -> Any:
    """The library; UserError where it is missing."""
    try:
        import vl_convert
    except ImportError as error:
        raise UserError(f"needs the extra [report] ({error}); install logart[report]") from None
    return vl_convert


@lru_cache
def bundle(script: str) -> str:
    """A script that uses `vegaEmbed`, with all of it inside."""
    return str(vega().javascript_bundle(script, vl_version=VERSION))


def by_method(legend: Mapping[str, Style]) -> dict[str, Any]:
    """The encoding of a method's colour and marker, from the column `method`."""
    names = [printable(label) for label in legend]
    scales = {
        "color": [style.colour for style in legend.values()],
        "shape": [style.shape for style in legend.values()],
    }
    return {
        channel: {"field": "method", "type": "nominal", "scale": {"domain": names, "range": range_}, "legend": None}
        for channel, range_ in scales.items()
    }


def quantity(name: str, title: str | None, **more: Any) -> dict[str, Any]:
    """A quantitative encoding of a column; what is more, but for `axis`, is its scale's."""
    axis = more.pop("axis", {})
    usual = {"nice": False} if more.get("type") in ("log", "symlog") else {"zero": False, "nice": False}
    return {"field": name, "type": "quantitative", "title": title, "scale": usual | more, "axis": axis}


def tooltip(*columns: str) -> list[dict[str, Any]]:
    """What hovering shows: these columns."""
    return [{"field": column, "type": "nominal"} for column in columns]


def domain(values: Iterable[float], margin: float = 0.05) -> list[float]:
    """A range with some room, for panels that share an axis."""
    known = list(values)
    low, high = min(known), max(known)
    room = margin * (high - low or 1.0)
    return [low - room, high + room]


def data(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows as a view holds them; text is made printable."""
    return {"values": [{k: printable(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]}
