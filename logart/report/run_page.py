"""What a report shows of a run or a packed file: how true it is to the float network, and what became of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scipy.stats import binomtest

from logart.report.groups import signed
from logart.report.page import Block, Cell, Details, Heading, Paragraph, Plot, Table
from logart.report.run_charts import base_mix, block_errors, histograms, losses, output_errors
from logart.report.runs import Run, RunActivation, RunLayer
from logart.runs.headline import size_text


def run_blocks(run: Run, prefix: str) -> list[Block]:
    """What is shown of one run."""
    blocks: list[Block] = [Heading(2, f"Run {run.name}"), _summary(run), *_confusion(run)]
    if not run.floats:
        blocks.append(Paragraph("A packed file holds no float weights: the histograms are of the quantized weights, "
                                "and loss curves are not known."))  # fmt: skip
    kinds = {"output_errors": output_errors, "blocks": block_errors, "base_mix": base_mix}
    drawn = [chart for name, draw in kinds.items() if (chart := draw(run, f"{prefix}_{name}"))]
    blocks += map(Plot, drawn)
    blocks.append(_layers(run.layers))
    if run.activations:
        blocks.append(_activations(run.activations))
    if run.blocks:
        blocks.append(_blocks(run))
    for title, charts in (("Weights and levels", histograms(run, f"{prefix}_weights")),
                          ("Loss curves", losses(run, f"{prefix}_losses"))):  # fmt: skip
        first, rest = charts[:1], charts[1:]
        blocks += [Heading(3, title), *map(Plot, first)] if first else []
        blocks += [Details(f"{title}: {len(rest)} more", tuple(map(Plot, rest)))] if rest else []
    if run.skipped:
        rows = tuple((Cell(name), Cell(reason)) for name, reason in run.skipped)
        blocks.append(Table("Left in float", ("module", "reason"), rows, words=(1,)))
    if run.row:
        message = ", ".join(f"{name} {value}" for name, value in run.row.items() if value not in (None, ""))
        blocks.append(Details("Settings and results of this run", (Paragraph(message),)))
    return blocks


def _summary(run: Run) -> Table:
    """The figures of the whole network."""
    row, weights = run.row, sum(layer.weights for layer in run.layers)
    bits = sum(layer.weights * layer.n_bits for layer in run.layers) / max(1, weights)
    said: list[tuple[str, str, str]] = []
    if (top := _number(row, "Acc@1")) is not None:
        said.append(("top-1 accuracy", f"{top:.2f} %", f"on {row.get('val_images') or 'unknown'} test images"))
        if (reference := _number(row, "float_Acc@1")) is not None:
            said.append(("drop from float", f"{signed(reference - top)} points", f"float {reference:.2f} %"))
    said.append(("file", size_text(str(run.n_bytes)), ""))
    said.append(("quantized", f"{100 * weights / max(1, weights + run.rest):.2f} %", "of all numbers in the file"))
    said.append(("bits per quantized weight", f"{bits:.3g}", f"{weights} weights in {len(run.layers)} layers"))
    changed = [layer.n_changed_codes for layer in run.layers]
    if None not in changed and weights:
        share = 100 * sum(n or 0 for n in changed) / weights
        said.append(("codes off the nearest", f"{share:.1f} %", "by compensation or learning"))
    mixes = [(k, n) for layer in run.layers for k, n in layer.base_mix.items()]
    if mixes:
        levels = sum(n * 2 ** (layer.n_bits - 1) for layer in run.layers for n in layer.base_mix.values())
        share = 100 * sum(k * n for k, n in mixes) / max(1, levels)
        said.append(("base-2 levels", f"{share:.1f} %", "of all channels' levels; the others are base √2"))
    rows = tuple((Cell(what), Cell(figure), Cell(note)) for what, figure, note in said)
    return Table("The network as a whole", ("figure", "value", "of what"), rows, words=(2,))


def _confusion(run: Run) -> list[Block]:
    """Float against quantized, where the run has recorded on which images they differ."""
    numbers = [_number(run.row, name) for name in ("val_images", "float_Acc@1", "lost", "won")]
    if None in numbers or not numbers[0]:
        return []
    n, accuracy, lost, won = (number or 0.0 for number in numbers)
    right = round(n * accuracy / 100)
    counts = ((right - lost, lost), (won, n - right - won))
    rows = tuple(
        (Cell(f"float {what}"), *(Cell(f"{value:.0f}", (), value) for value in line))
        for what, line in zip(("right", "wrong"), counts, strict=True)
    )
    p = float(binomtest(round(won), round(lost + won)).pvalue) if lost + won else 1.0
    agreement = _number(run.row, "agreement")
    same = "" if agreement is None else f" Both give the same answer on {agreement:.2f} % of the images."
    verdict = "chance alone explains that" if p > 0.05 else "that is more than chance explains"
    images = "image" if lost == 1 else "images"
    said = f"The quantized network loses {lost:.0f} {images} and wins {won:.0f}: {verdict} (McNemar p {p:.2g}).{same}"
    head = ("", "quantized right", "quantized wrong")
    return [Table("Test images by who has them right", head, rows), Paragraph(said)]


def _layers(layers: Sequence[RunLayer]) -> Table:
    more = list(dict.fromkeys(name for layer in layers for name in layer.more))
    head = ("layer", "shape", "bits", "block", "channels per number of base-2 levels", "weight error, nearest",
            "weight error, final", *(name.replace("_", " ") for name in more), "off the nearest [%]")  # fmt: skip
    rows = []
    for layer in layers:
        share = None if layer.n_changed_codes is None else 100 * layer.n_changed_codes / max(1, layer.weights)
        rows.append((
            Cell(layer.name),
            Cell("×".join(map(str, layer.shape)), (), float(layer.weights)),
            Cell(str(layer.n_bits), (), float(layer.n_bits)),
            Cell(layer.block),
            Cell(", ".join(f"{k}: {count}" for k, count in sorted(layer.base_mix.items()))),
            *map(_figure, (layer.error_nearest, layer.error, *(layer.more.get(name) for name in more))),
            Cell("" if share is None else f"{share:.1f}", (), share),
        ))  # fmt: skip
    return Table("Layers; weight error: ‖w − q‖² / ‖w‖²; it may rise while the output's error falls", head, tuple(rows),
                 words=(3, 4)).without_empty_columns()  # fmt: skip


def _activations(found: Mapping[str, RunActivation]) -> Table:
    rows = tuple(
        (
            Cell(name),
            Cell(str(one.bits), (), float(one.bits)),
            Cell(f"{'signed' if one.signed else 'unsigned'}, {f'step {one.step:.4g}' if one.step else 'log'}"),
            _figure(one.error),
            Cell(f"{100 * one.saturated:.2f}", (), one.saturated),
        )
        for name, one in found.items()
    )
    title = (
        "Quantized activations, on calibration images; error: Σ|x − q|^2.4 / Σ|x|^2.4; saturated: beyond the end levels"
    )
    return Table(title, ("read by", "bits", "levels", "error", "saturated [%]"), rows, words=(2,))


def _blocks(run: Run) -> Table:
    more = list(dict.fromkeys(name for block in run.blocks for name in block.more))
    rows = tuple(
        (Cell(b.name), *map(_figure, (b.error_before, b.error_learned, *(b.more.get(name) for name in more))),
         Cell(b.outcome))
        for b in run.blocks
    )  # fmt: skip
    head = ("block", "output error before", "output error after", *(name.replace("_", " ") for name in more), "LLR")
    return Table("Blocks; error of the block's output on calibration images", head, rows, words=(len(head) - 1,))


def _figure(value: float | None) -> Cell:
    return Cell("" if value is None else f"{value:.4g}", (), value)


def _number(row: Mapping[str, object], name: str) -> float | None:
    value = row.get(name)
    try:
        return None if value in (None, "") or isinstance(value, bool) else float(str(value))
    except ValueError:
        return None
