"""A report to look at: `python -m logart.report results.csv --out report`, `--run` for packed files and runs.

It writes one self-contained page (`report.html`), the same as Markdown (`report.md`), and every plot as PNG and SVG.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from logart.cli import FlagParser, run_command
from logart.errors import UserError
from logart.files import write_atomically
from logart.report.page import Block, markdown, page, plot_names, plots
from logart.report.paper import paper_figures
from logart.report.results_page import facts as results_facts
from logart.report.results_page import results_blocks
from logart.report.rows import read_rows
from logart.report.run_page import run_blocks
from logart.report.runs import read_run

PROG, TITLE = "logart-report", "LogART report"
KINDS = ("png", "svg")


def report_files(blocks: Sequence[Block], facts: Mapping[str, str]) -> dict[str, bytes]:
    """The files of a report by name, the page last."""
    files = {f"{plot.chart.name}.{kind}": plot.files[kind] for plot in plots(blocks) for kind in KINDS}
    return files | {"report.md": markdown(TITLE, blocks, facts), "report.html": page(TITLE, blocks, facts)}


def write_report(files: Mapping[str, bytes], out: str) -> None:
    """Write the files into a folder, made where it is missing; each atomically.

    Of an older report there, the plots that its Markdown shows and this one has not are deleted, and nothing else.

    Raises:
        UserError: that is no folder, or cannot be written.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = folder / "report.md"
        text = old.read_text("utf-8", "replace") if old.is_file() else ""
        shown = plot_names(text) if text.startswith(f"# {TITLE}\n") else []
        for name, data in files.items():
            write_atomically(folder / name, data)
        for name in {f"{name}.{kind}" for name in shown for kind in KINDS} - set(files):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write {out!r}: {error.strerror or error}; expected a folder") from None


def command(args: argparse.Namespace) -> None:
    """From flags to files."""
    if args.results is None and not args.run:
        raise UserError("nothing to report: expected a results file, or --run PATH")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out: {args.out!r} is a file; expected a folder")
    runs = [read_run(path) for path in args.run or []]  # before the plots, which take seconds
    blocks: list[Block] = []
    left_out, facts = "", {"made by": f"python -m logart.report {shlex.join(_words(args))}"}
    if args.results is not None:
        try:
            rows, left_out = read_rows(args.results)
        except UserError as error:
            raise UserError(str(error).removeprefix("--")) from None  # here it is no flag
        blocks += results_blocks(rows, paper_figures(), left_out)
        facts = results_facts(rows, args.results) | facts
    for index, run in enumerate(runs, 1):
        blocks += run_blocks(run, f"run{index}")
    write_report(report_files(blocks, facts), args.out)
    if left_out:
        print(f"{PROG}: {left_out}", file=sys.stderr)
    print(f"report: {Path(args.out) / 'report.html'}")


def _words(args: argparse.Namespace) -> list[str]:
    runs = [word for path in args.run or [] for word in ("--run", path)]
    return [*([args.results] if args.results is not None else []), *runs, "--out", args.out]


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog=PROG,
        description="Tables and plots of a results file, packed files and run folders, as one HTML page.",
    )
    parser.add_argument("results", nargs="?", metavar="RESULTS.csv", help="a results file, as the runs write it")
    parser.flag("--out", required=True, metavar="DIR", help="write the report there, over any that is there")
    parser.flag("--run", action="append", metavar="PATH", help="a packed file or a run folder; may be given again")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_command(build_parser(), command, None if argv is None else list(argv))
