"""A report as a document: blocks that become one self-contained HTML page, and Markdown, by the templates beside this.

Everything that a block holds is text, escaped where it is written: names come from files that others may have made.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from logart.errors import printable
from logart.report.charts import Chart, bundle
from logart.report.styles import Style

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Heading:
    """Of level 2, which the page's navigation lists, or 3."""

    level: int
    text: str

    @property
    def anchor(self) -> str:
        """What the navigation links to."""
        return "section-" + hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()[:8]


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        text: its main line.
        notes: smaller lines below.
        value: the number it is sorted by; None: its text.
        style: the marker before it, where it names a method.
        strong: whether it is the one to look at.
    """

    text: str = ""
    notes: tuple[str, ...] = ()
    value: float | None = None
    style: Style | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table that can be sorted; the first column names the rows. `words`: the other columns that hold no numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: tuple[int, ...] = ()

    def without_empty_columns(self) -> Table:
        """The table less the columns that say nothing in any row."""
        kept = [i for i in range(len(self.head)) if i == 0 or any(row[i].text for row in self.rows)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        words = tuple(place for place, i in enumerate(kept) if i in self.words)
        return Table(self.caption, tuple(self.head[i] for i in kept), rows, words)


@dataclass(frozen=True)
class Plot:
    """A chart, and its files by ending."""

    chart: Chart

    @cached_property
    def files(self) -> dict[str, bytes]:
        return self.chart.files


@dataclass(frozen=True)
class Details:
    """Blocks behind a line that opens them."""

    summary: str
    blocks: tuple[Block, ...] = field(default=())


Block = Heading | Paragraph | Table | Plot | Details


def page(title: str, blocks: Sequence[Block], facts: Mapping[str, str]) -> bytes:
    """The whole page. Nothing is fetched, and no script runs but its own, whatever the texts say.

    Args:
        title: its heading.
        blocks: what is in it, in order.
        facts: what the page is of, in lines below the heading: a word and what is said of it.
    """
    found = plots(blocks)
    charts = {plot.chart.name: plot.chart.live() for plot in found}
    script = (TEMPLATES / "page.js").read_text("utf-8")
    script = bundle(script) if found else script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made = _environment(True).get_template("report.html.j2").render(
        title=title, blocks=blocks, facts=facts, digest=Markup(digest), script=Markup(script),
        style=Markup((TEMPLATES / "style.css").read_text("utf-8")),
        charts=Markup(json.dumps(charts, ensure_ascii=True).replace("<", "\\u003c")),
    )  # fmt: skip
    return made.encode("utf-8", "replace")


def markdown(title: str, blocks: Sequence[Block], facts: Mapping[str, str]) -> bytes:
    """The same in Markdown; plots are the SVG files beside it."""
    text = _environment(False).get_template("report.md.j2").render(title=title, blocks=blocks, facts=facts)
    return (re.sub(r"\n{3,}", "\n\n", text).strip() + "\n").encode("utf-8", "replace")


def plots(blocks: Sequence[Block]) -> list[Plot]:
    """Every plot, in order, those behind details as well."""
    found: list[Plot] = []
    for block in blocks:
        found += [block] if isinstance(block, Plot) else plots(block.blocks) if isinstance(block, Details) else []
    return found


def plot_names(text: str) -> list[str]:
    """The names of the plots that a Markdown page shows, as `markdown` wrote them: each on a line of its own."""
    return re.findall(r"^!\[.*\]\((\w+)\.svg\)$", text, re.MULTILINE)


def _environment(escaped: bool) -> Environment:
    """Templates in which what is put in is text: printable, and escaped for HTML or, else, for Markdown."""

    def shown(value: Any) -> Any:
        if isinstance(value, Markup) or not isinstance(value, str):
            return value
        text = printable(value)
        return text if escaped else re.sub(r"([\\`*_\[\]|#!])", r"\\\1", html.escape(text, False))

    def breaking(text: str) -> Markup:
        """Long names may break where a reader would break them."""
        return Markup(re.sub(r"([_:/]|\.(?=[^\W\d]))", r"\1<wbr>", html.escape(printable(text), False)))

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=escaped, finalize=shown,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters["base64"] = lambda data: Markup(base64.b64encode(data).decode())
    environment.filters["breaking"] = breaking
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    return environment
