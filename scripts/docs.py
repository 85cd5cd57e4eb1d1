"""Writes what the documentation says from the code: `python scripts/docs.py`; `--check` only looks whether it is true.

docs/cli.md from the parsers, the names in docs/networks.md from the networks that each track knows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from logart.cli import FlagParser
from logart.export import command as export
from logart.packed import inspect
from logart.report import command as report
from logart.report import compare
from logart_cnn import command as cnn
from logart_cnn import models as cnn_models
from logart_vit import command as vit
from logart_vit import models as vit_models

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMANDS = {
    "logart_cnn.main": cnn.build_parser,
    "logart_vit.main": vit.build_parser,
    "logart.inspect": inspect.build_parser,
    "logart.export": export.build_parser,
    "logart.report": report.build_parser,
    "logart.compare": compare.build_parser,
}
BEGIN, END = "<!-- names: written by scripts/docs.py -->", "<!-- end of names -->"


def commands() -> str:
    """docs/cli.md."""
    parts = [
        "# Command line\n\n<!-- written by scripts/docs.py -->\n",
        "Every flag may be written with `_` or `-`, and each track takes the other's name for the same thing. A flag\n"
        "with no effect in the given combination is rejected; bad input gets one line on stderr, exit code 2.\n",
    ]
    for module, build in COMMANDS.items():
        parser = build()
        parts += [f"## python -m {module}\n", f"{parser.description}\n", *_groups(parser)]
    return "\n".join(parts)


def _groups(parser: FlagParser) -> list[str]:
    tables = []
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if action.dest != "help"]
        if rows:
            title = f"### {group.title}\n" if len(parser._action_groups) > 3 else ""
            tables.append("\n".join([title, "| flag | meaning |", "|---|---|", *rows, ""]))
    return tables


def _row(action: argparse.Action) -> str:
    name = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
    value = action.metavar if action.nargs != 0 and action.option_strings else None
    if value is None and action.choices is not None and action.option_strings:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if isinstance(value, tuple):
        value = " ".join(value)
    meaning = " ".join((action.help or "").replace("%%", "%").split()).replace("|", "\\|")
    return f"| `{name}{f' {value}' if value else ''}` | {meaning} |".replace("|png", "\\|png")


def names() -> str:
    """The tables of names in docs/networks.md."""
    return f"`--arch`:\n\n{cnn_models.names_documentation()}\n\n`--model`:\n\n{vit_models.names_documentation()}"


def pages() -> dict[Path, str]:
    """The text that each page should have."""
    networks = (DOCS / "networks.md").read_text("utf-8")
    before, _, rest = networks.partition(BEGIN)
    return {
        DOCS / "cli.md": commands(),
        DOCS / "networks.md": f"{before}{BEGIN}\n{names()}\n{END}{rest.partition(END)[2]}",
    }


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns 1 where `--check` finds a page that the code does not say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of date")
    args = parser.parse_args(argv)
    old = [path for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]
    for path in old:
        if args.check:
            print(f"{path.name} is out of date: python scripts/docs.py", file=sys.stderr)
        else:
            path.write_text(pages()[path], "utf-8")
    return int(args.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
