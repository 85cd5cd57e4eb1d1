"""A report to look at: `python -m logart.report results.csv --out report`, `--run` for packed files and runs.

It writes one self-contained page (`report.html`), the same as Markdown (`report.md`), and every plot as PNG and SVG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from logart.cli import FlagParser, run_command
from logart.errors import UserError
from logart.files import write_atomically
from logart.report.groups import Group, Row, signed
from logart.report.page import Block, Cell, Details, Grid, Heading, Paragraph, figure_names, figures, markdown, page
from logart.report.paper import Sources, paper_figures
from logart.report.plots import against_bits, against_time, costs
from logart.report.rows import read_rows
from logart.report.run_plots import run_figures
from logart.report.runs import Run, RunLayer, read_run
from logart.report.tables import Section, Table, sections

PROG, TITLE = "logart-report", "LogART report"
KINDS = ("png", "svg")
HOW_TO_READ = (
    "Top-1 accuracy in %, mean ± standard deviation over n seeds; below it the distance to the float network in points "
    "and the seconds of search and rounding. Rows with different settings are never averaged."
)
SEVERAL_FILES = "(same settings; given by {})"


def results_blocks(rows: Sequence[Row], paper: Sequence[Row], left_out: str = "") -> list[Block]:
    """The tables and plots of a results file.

    Args:
        rows: as `report_rows.read_rows` gives them.
        paper: figures to show beside, as `report_paper.paper_figures` gives them.
        left_out: what to say of rows that are not among them.

    Raises:
        UserError: matplotlib is missing.
    """
    found, notes = sections(rows)
    sources = Sources(paper)
    notes = [left_out, *notes] if left_out else notes
    blocks: list[Block] = [Paragraph(f"{len(rows)} runs. {HOW_TO_READ}"), *map(Paragraph, notes)]
    for index, section in enumerate(found, 1):
        blocks += _section(section, f"network{index}", sources)
    return blocks + sources.blocks()


def _section(section: Section, name: str, sources: Sources) -> list[Block]:
    blocks: list[Block] = [Heading(2, section.title)]
    known = [group.row["float_Acc@1"] for group in section.groups if group.row["float_Acc@1"]]
    reference = f"{float(known[0]):.2f} %" if known else "not measured"
    images = section.row["val_images"]
    blocks.append(Paragraph(f"Float network: {reference} on {images or 'an unknown number of'} test images."))
    for index, table in enumerate(section.tables, 1):
        if table.title:
            blocks.append(Heading(3, table.title))
        blocks.append(_grid(table, sources))
        settings = ", ".join(f"{key} {value}" for key, value in table.settings.items() if value)
        if settings:
            blocks.append(Details("settings of this table", (Paragraph(settings),)))
        blocks.append(against_bits(section, table, f"{name}_table{index}_bits"))
    plots = (against_time(section, f"{name}_time"), costs(section, f"{name}_costs"))
    return blocks + [plot for plot in plots if plot is not None]


def _grid(table: Table, sources: Sources) -> Grid:
    head = ["method", *(f"{bits} bits{', LLR' * llr}" for bits, llr in table.columns)]
    rows = []
    for method, label in table.labels.items():
        cells = [_cell(table.cells.get((method, *column), []), sources) for column in table.columns]
        rows.append((Cell(label), *cells))
    return Grid("Top-1 accuracy [%]", tuple(head), tuple(rows))


def _cell(groups: Sequence[Group], sources: Sources) -> Cell:
    if not groups:
        return Cell("")
    notes: list[str] = []
    for index, group in enumerate(groups):
        message = [f"n {group.n}"]
        if group.distance is not None:
            message.append(signed(group.distance))
        if group.seconds is not None:
            message.append(f"{group.seconds:.3g} s" if group.seconds < 999.5 else f"{group.seconds:.0f} s")
        if index:
            notes.append(accuracy_text(group))
        if len(groups) > 1:
            notes.append(SEVERAL_FILES.format(group.row["config"] or group.row["preset"] or "flags"))
        notes.append(" · ".join(message))
    return Cell(accuracy_text(groups[0]), (*notes, *sources.notes(groups[0])), groups[0].accuracy)


def accuracy_text(group: Group) -> str:
    """The mean, with the standard deviation where there are several seeds."""
    spread = "" if group.deviation is None else f" ± {group.deviation:.2f}"
    return f"{group.accuracy:.2f}{spread}"


def run_blocks(run: Run, prefix: str) -> list[Block]:
    """What is shown of one run."""
    plots = run_figures(run, prefix)
    blocks: list[Block] = [Heading(2, f"Run {run.name}")]
    if not run.floats:
        blocks.append(Paragraph("A packed file holds no float weights: the histograms are of the quantized weights, "
                                "and loss curves are not known."))  # fmt: skip
    if run.row:
        message = ", ".join(f"{name} {value}" for name, value in run.row.items() if value not in (None, ""))
        blocks.append(Details("settings and results of this run", (Paragraph(message),)))
    head = ("layer", "shape", "bits", "block", "channels per number of base-2 levels", "error, nearest",
            "error, final", "n_changed_codes", "moved [%]")  # fmt: skip
    blocks.append(Grid("Layers; error: ‖w − q‖² / ‖w‖²; moved: weights on another level than the nearest",
                       head, tuple(map(_layer_cells, run.layers))))  # fmt: skip
    if run.blocks:
        rows = tuple(
            (
                Cell(block.name),
                *(Cell(f"{error:.4g}", (), error) for error in (block.error_before, block.error_learned)),
                Cell("kept" if block.kept == "learned" else "reverted: no improvement"),
            )
            for block in run.blocks
        )
        blocks.append(Grid("Blocks; error of the block's output", ("block", "before LLR", "after LLR", "LLR"), rows))
    for title, key in (("Base mix", "mix"), ("Weights and levels", "histograms"), ("Loss curves", "losses")):
        if plots[key]:
            first, rest = plots[key][:1], plots[key][1:]
            blocks += [Heading(3, title), *first]
            blocks += [Details(f"{title}: {len(rest)} more", tuple(rest))] if rest else []
    if run.skipped:
        rows = tuple((Cell(name), Cell(reason)) for name, reason in run.skipped)
        blocks.append(Grid("Left in float", ("module", "reason"), rows))
    return blocks


def _layer_cells(layer: RunLayer) -> tuple[Cell, ...]:
    weights = 1
    for size in layer.shape:
        weights *= size
    share = None if layer.n_changed_codes is None else 100 * layer.n_changed_codes / max(1, weights)
    return (
        Cell(layer.name),
        Cell("×".join(map(str, layer.shape)), (), float(weights)),
        Cell(str(layer.n_bits), (), float(layer.n_bits)),
        Cell(layer.block),
        Cell(", ".join(f"{k}: {count}" for k, count in sorted(layer.base_mix.items()))),
        *(Cell("" if e is None else f"{e:.4g}", (), e) for e in (layer.error_nearest, layer.error)),
        Cell(
            "" if layer.n_changed_codes is None else str(layer.n_changed_codes),
            (),
            None if layer.n_changed_codes is None else float(layer.n_changed_codes),
        ),
        Cell("" if share is None else f"{share:.1f}", (), share),
    )


def report_files(blocks: Sequence[Block]) -> dict[str, bytes]:
    """The files of a report by name, the page last."""
    files = {f"{figure.name}.{kind}": getattr(figure, kind) for figure in figures(blocks) for kind in KINDS}
    return files | {"report.md": markdown(TITLE, blocks), "report.html": page(TITLE, blocks)}


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
        shown = figure_names(text) if text.startswith(f"# {TITLE}\n") else []
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
    left_out = ""
    if args.results is not None:
        try:
            rows, left_out = read_rows(args.results)
        except UserError as error:
            raise UserError(str(error).removeprefix("--")) from None  # here it is no flag
        blocks += results_blocks(rows, paper_figures(), left_out)
    for index, run in enumerate(runs, 1):
        blocks += run_blocks(run, f"run{index}")
    write_report(report_files(blocks), args.out)
    if left_out:
        print(f"{PROG}: {left_out}", file=sys.stderr)
    print(f"report: {Path(args.out) / 'report.html'}")


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


if __name__ == "__main__":
    sys.exit(main())
