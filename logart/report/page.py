"""A report as a document: blocks that become one self-contained HTML page, and Markdown.

Everything that a block holds is text, escaped where it is written: names come from files that others may have made.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from logart.errors import printable


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Cell:
    """A table's cell: its main text, smaller lines below, and the number it is sorted by (None: by its text)."""

    text: str
    notes: tuple[str, ...] = ()
    value: float | None = None


@dataclass(frozen=True)
class Grid:
    """A table that can be sorted; the first column names the rows."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A plot, as PNG and SVG.

    Attributes:
        name: of its files, without the ending.
        title, alt: what it is, and what it shows in words.
    """

    name: str
    title: str
    alt: str
    png: bytes
    svg: bytes


@dataclass(frozen=True)
class Details:
    """Blocks behind a line that opens them."""

    summary: str
    blocks: tuple[Block, ...]


Block = Heading | Paragraph | Grid | Figure | Details

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#5b6470;--line:#d5dae0;--shade:#f3f5f7}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--paper:#14171b;--soft:#a3adb8;--line:#363c44;--shade:#1e2329}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);
 font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1,h2,h3,h4{line-height:1.25;margin:1.6em 0 .5em}h1{margin-top:.3em}
h2{border-bottom:1px solid var(--line);padding-bottom:.2em}
.scroll{overflow-x:auto;margin:.8em 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{caption-side:top;text-align:left;color:var(--soft);padding-bottom:.3em}
th,td{border:1px solid var(--line);padding:.35em .6em;text-align:right;vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
thead th{background:var(--shade);padding:0}
th button{all:unset;box-sizing:border-box;width:100%;padding:.35em .6em;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid #0072b2}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
small{display:block;color:var(--soft);font-size:.8em}
figure{margin:1em 0;padding:.5rem;overflow-x:auto;background:#fff;border:1px solid var(--line);border-radius:.4rem}
figure img{display:block;max-width:100%;height:auto;margin:auto}
details{margin:.8em 0}summary{cursor:pointer;color:var(--soft)}
@media screen and (max-width:40rem){figure img{max-width:none;width:38rem}}
@media print{caption span{display:none}
 body{max-width:none;padding:0;font-size:9pt}.scroll{overflow:visible}figure,tr{break-inside:avoid}
 details::details-content{content-visibility:visible;block-size:auto}
 th,td{padding:.15em .3em;white-space:normal}h2,h3{break-after:avoid}}
"""
SCRIPT = """
for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const th = button.parentElement, table = th.closest('table'), body = table.tBodies[0];
  const up = th.getAttribute('aria-sort') !== 'ascending', column = th.cellIndex;
  for (const other of table.querySelectorAll('th[aria-sort]')) other.removeAttribute('aria-sort');
  th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = row => { const c = row.cells[column]; return c.dataset.value ? +c.dataset.value : c.textContent.trim(); };
  const order = (a, b) => {
    const x = key(a), y = key(b);
    if (x === '' || y === '') return (x === '') - (y === '');
    const d = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y));
    return up ? d : -d;
  };
  body.append(...[...body.rows].sort(order));
});
"""


def page(title: str, blocks: Sequence[Block]) -> bytes:
    """The whole page. Nothing is fetched, and no script runs but its own, whatever the texts say."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_text(title)}</h1>\n"
        f"{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    ).encode()


def markdown(title: str, blocks: Sequence[Block]) -> bytes:
    """The same in Markdown; figures are the SVG files beside it."""
    return ("\n\n".join([f"# {_plain(title)}", *(_markdown(block) for block in blocks)]) + "\n").encode()


def figures(blocks: Sequence[Block]) -> list[Figure]:
    """Every figure, in order, those behind details as well."""
    found: list[Figure] = []
    for block in blocks:
        found += [block] if isinstance(block, Figure) else figures(block.blocks) if isinstance(block, Details) else []
    return found


def figure_names(text: str) -> list[str]:
    """The names of the figures that a Markdown page shows, as `markdown` wrote them: each on a line of its own."""
    return re.findall(r"^!\[.*\]\((\w+)\.svg\)$", text, re.MULTILINE)


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_text(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Details(summary, inner):
            return f"<details><summary>{_text(summary)}</summary>\n" + "\n".join(map(_html, inner)) + "\n</details>"
        case Figure():
            data = base64.b64encode(block.svg).decode()
            return f'<figure><img alt="{_text(block.alt)}" src="data:image/svg+xml;base64,{data}"></figure>'
        case Grid():
            head = "".join(f'<th scope="col"><button type="button">{_text(name)}</button></th>' for name in block.head)
            rows = "\n".join(f"<tr>{''.join(_cell(c, i == 0) for i, c in enumerate(row))}</tr>" for row in block.rows)
            caption = f"<caption>{_text(block.caption)}<span>; a click on a column's name sorts</span></caption>"
            table = f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"
            return f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(block.caption)}">{table}</div>'


def _cell(cell: Cell, first: bool) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    notes = "".join(f"<small>{_text(note)}</small>" for note in cell.notes)
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    return f"<{tag}{scope}{value}>{_text(cell.text)}{notes}</{tag}>"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Details(summary, inner):
            return "\n\n".join([f"**{_plain(summary)}**", *map(_markdown, inner)])
        case Figure():
            return f"![{_plain(block.alt)}]({block.name}.svg)"
        case Grid():
            lines = [[_plain(name) for name in block.head], ["---"] * len(block.head)]
            lines += [["<br>".join(map(_plain, (cell.text, *cell.notes))) for cell in row] for row in block.rows]
            return f"{_plain(block.caption)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: object) -> str:
    return html.escape(printable(text))


def _plain(text: object) -> str:
    return re.sub(r"([\\`*_\[\]|#!])", r"\\\1", html.escape(printable(text), quote=False))
