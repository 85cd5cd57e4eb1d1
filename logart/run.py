"""One run of either track: measure the float network, quantize, evaluate, report, append the row."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logart.cache import Cache, Place
from logart.checkpoint import SizeTable, can_be_loaded, save_packed
from logart.config import QuantConfig
from logart.data import ImageSource, validation_batches
from logart.errors import NetworkError, NonFiniteError, NoRoomError, UserError
from logart.evaluate import Accuracy, accuracy
from logart.grid import ROOT2_TEXT
from logart.layers import hardware_approximation
from logart.network import Network
from logart.outcome import Report
from logart.pipeline import quantize_model
from logart.results import Cell, append_row, check_results, environment
from logart.run_columns import cost_columns, settings_columns
from logart.run_folder import PACKED, RunFolder
from logart.runtime import progress_bar
from logart.weights import one_line

_SAID = ("track", "arch", "checkpoint", "checkpoint_sha256", "data")  # by a packed file's `network` and `source`


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about it, apart from what decides the codes.

    Attributes:
        device: where to compute.
        results: the CSV file that gets the row.
        val_batch_size, workers: of the evaluation's loader.
        test_before_calibration: evaluate after DBS too.
        test_with_terms: if not 0, evaluate a second time with √2 as a sum of so many powers of two, in a network
            calibrated without it.
        quiet: print no progress and no table, only the accuracies.
        network_flags: the flags that choose the network, for errors about it.
        save: the packed file that gets the network; None saves none.
        cache: where captured inputs live; None decides by what is free.
        once: do no run whose row is there or being run, see `claims.claimed`: the silent minutes; None does it anyway.
    """

    device: torch.device
    results: str
    val_batch_size: int = 128
    workers: int = 2
    test_before_calibration: bool = False
    test_with_terms: int = 0
    quiet: bool = False
    network_flags: str = "--arch, --checkpoint"
    save: str | None = None
    cache: Place | None = None
    once: float | None = None


def check_network(model: nn.Module, images: Tensor, num_classes: int, *, flags: str = "--arch, --checkpoint") -> None:
    """Run the float network once, so that one that does not fit its images shows before any long work.

    Args:
        model: on the CPU, in eval mode.
        images: [n, C, H, W]; the first two are looked at.
        num_classes: how many logits an image must get.
        flags: what errors name.

    Raises:
        UserError: it cannot run on these images, or gives anything but finite logits [n, num_classes].
    """
    images = images[:2].clone()  # some networks normalise in place
    size = "×".join(map(str, images.shape[1:]))
    try:
        with torch.no_grad():
            logits = model(images)
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's and timm's answers to a size that is wrong
        reason = f"({one_line(error)}); see --input_size"
        raise UserError(f"{flags}: the network cannot run on images of {size} {reason}") from error
    expected = [len(images), num_classes]
    seen = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if seen != expected:
        raise UserError(f"{flags}: expected logits {expected} for {len(images)} images, got {seen}")
    if not logits.isfinite().all():
        raise UserError(f"{flags}: the float network's logits are not all finite")


def run(
    network: Network,
    source: ImageSource,
    images: Tensor,
    config: QuantConfig,
    options: RunOptions,
    columns: Mapping[str, Cell],
    started: float,
    *,
    names: Sequence[str] = (),
    folder: RunFolder | None = None,
) -> Report:
    """Quantize and evaluate one network, print what comes out and append it to the results file.

    Args:
        network: what to quantize; its model is not changed.
        source: holds the validation images.
        images, config: as for `quantize_model`.
        columns: what the results row says of the network and the data.
        started: `time.perf_counter()` when the command began.
        names: of the images, for messages.
        folder: keeps what the run comes to, and may hold what it came to before it was interrupted.

    Returns:
        The report of `quantize_model`.

    Raises:
        UserError: the network cannot be quantized, an image cannot be read or the row cannot be written.
    """
    stages = _Stages(source, config, options, folder)
    with _naming(options.network_flags, names):
        quantized, report = quantize_model(
            network.model,
            config,
            images,
            block_types=network.block_types,
            row_groups=network.row_groups,
            device=options.device,
            quiet=options.quiet,
            observe=stages.observe,
            cache=Cache(options.device, options.cache, folder.path if folder else None),
            keeper=folder,
        )
    if options.test_with_terms:
        with hardware_approximation(quantized, options.test_with_terms):
            stages.measure("approximated", quantized)
    total = time.perf_counter() - started if folder is None else folder.seconds
    row = (
        settings_columns(columns, config, options.test_with_terms)
        | stages.columns()
        | cost_columns(report, total, options.device)
    )
    row |= environment()
    told = {"run": {name: value for name, value in columns.items() if value is not None and name not in _SAID}}
    info = {**quantized.packed_info, **run_info(network, source, stages), **told}  # type: ignore[dict-item]
    sizes, problems = _write(quantized, info, report, row, options, folder)
    if not options.quiet:
        print(layer_table(report))
        if sizes is not None:
            print(f"{sizes}\nsaved as {options.save}")
        rounding = "LLR" if config.learns and not config.compensates else "rounding"
        print(
            f"DBS {report.search_seconds:.1f} s, {rounding} {report.reconstruction_seconds:.1f} s, total {total:.1f} s"
            + f"; row appended to {options.results}" * (not problems)
        )
    if problems:
        raise UserError("; ".join(problems))
    return report


def _write(
    quantized: nn.Module,
    info: dict[str, Any],
    report: Report,
    row: Mapping[str, Cell],
    options: RunOptions,
    folder: RunFolder | None,
) -> tuple[SizeTable | None, list[str]]:
    """Write all that a run leaves, the run's folder first.

    Returns:
        The packed file's sizes; and what could not be written, with what was, where something could not.
    """
    problems: list[str] = []
    written: list[str] = []
    sizes = None
    if folder is not None:
        with _going_on(problems, f"--run_dir: cannot write to {folder.path}", (OSError, ValueError)):
            folder.finish(report, row, None)
            written.append(f"the run is kept in {folder.path}")
            save_packed(quantized, folder.path / PACKED, info)
    with _going_on(problems, f"--run_dir: cannot note in {folder and folder.path} that the row is appended"):
        append_row(options.results, row)
        written.append(f"the row is in {options.results}")
        if folder is not None and len(written) == 2:
            folder.finish(report, row, options.results)
    if options.save is not None:
        with _going_on(problems, f"--save: {options.save!r} cannot be written", (OSError, ValueError)):
            sizes = save_packed(quantized, options.save, info)
    return sizes, problems and problems + written


@contextmanager
def _going_on(problems: list[str], what: str, kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Collect what cannot be written, for an error of these kinds; the rest still is."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))
    except kinds as error:
        problems.append(f"{what} ({one_line(error)})")


def check_outputs(
    options: RunOptions, model_kwargs: Mapping[str, Any] | None, checkpoint: str | None, *, run_dir: str | None = None
) -> None:
    """Raise UserError where the results row or the packed file could not be written at the end of the run.

    Args:
        options: names both files.
        model_kwargs: of the network, which the packed file must be able to say.
        checkpoint: the file of float weights, which the packed file must not replace.
        run_dir: the run's folder, which gets a packed file too.
    """
    check_results(options.results)
    if options.save is not None:
        _check_place(options.save, checkpoint)
    if options.save is None and run_dir is None:
        return
    try:
        if not can_be_loaded(json.loads(json.dumps(model_kwargs, allow_nan=False))):
            raise ValueError("a packed file could not be loaded with these")
    except (TypeError, ValueError) as error:
        flag = "--save" if options.save is not None else "--run_dir"
        raise UserError(f"--model-kwargs: {one_line(error)}; with {flag}, expected numbers, texts and lists") from error


def _check_place(save: str, checkpoint: str | None) -> None:
    path, place = save, Path(save)
    if place.suffix != ".safetensors":
        raise UserError(f"--save: {path!r}; expected a file that ends in .safetensors")
    if place.is_dir() or not place.parent.is_dir():
        problem = "is a folder" if place.is_dir() else "lies in no folder that exists"
        raise UserError(f"--save: {path!r} {problem}; expected the path of a file")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise UserError(f"--save: {str(place.parent)!r} is not writable; expected a folder that takes the file")
    if checkpoint is not None and place.resolve() == Path(checkpoint).resolve():
        raise UserError(f"--save: {path!r} is the file that --checkpoint reads; expected another")


def run_info(network: Network, source: ImageSource, stages: _Stages) -> dict[str, Any]:
    """What a packed file says of the network and its run, beside settings and layers."""
    versions = {name: value for name, value in environment().items() if name.endswith("_version")}
    return {
        "network": dict(network.recipe),
        "preprocessing": asdict(network.preprocessing),
        "class_names": list(source.class_names),
        "source": {"checkpoint": network.source, "sha256": network.sha256, "data": source.name},
        "accuracy": {stage: value._asdict() for stage, value in stages.accuracies.items()},
        "versions": versions,
    }


@dataclass
class _Stages:
    """Evaluates the network stage by stage, prints the accuracies and keeps them."""

    source: ImageSource
    config: QuantConfig
    options: RunOptions
    folder: RunFolder | None
    accuracies: dict[str, Accuracy] = field(default_factory=dict)

    def observe(self, stage: str, network: nn.Module) -> None:
        """What `quantize_model` calls: measures, unless learning goes on from here and nobody asked."""
        if stage != "searched" or self.options.test_before_calibration or not self.config.learns:
            self.measure(stage, network)

    def measure(self, stage: str, network: nn.Module) -> None:
        title = {
            "float": "float",
            "searched": "after DBS" if self.config.searches else "after rounding",
            "rounded": "after LLR" if self.config.learns else "after compensated rounding",
            "approximated": f"with √2 ≈ {ROOT2_TEXT.get(self.options.test_with_terms)} at test",
        }[stage]
        value = None if self.folder is None else self.folder.accuracies.get(stage)
        if value is None:
            batches = validation_batches(self.source, self.options.val_batch_size, self.options.workers)
            with progress_bar(len(self.source.val), f"evaluate {title}", self.options.quiet) as bar:
                value = accuracy(network, batches, self.options.device, bar.update)
            if self.folder is not None:
                self.folder.measured(stage, value)
        print(f"{title:<28} Acc@1 {value.top1:6.2f} %  Acc@5 {value.top5:6.2f} %", flush=True)
        self.accuracies[stage] = value

    def columns(self) -> dict[str, Cell]:
        """The results columns; a stage that was not measured leaves its own empty."""
        final = "rounded" if self.config.learns or self.config.compensates else "searched"
        stages = {"": final, "float_": "float", "search_": "searched", "approx_": "approximated"}
        row: dict[str, Cell] = {"val_images": self.accuracies[final].images}
        for prefix, stage in stages.items():
            if stage in self.accuracies:
                value = self.accuracies[stage]
                row |= {f"{prefix}Acc@1": round(value.top1, 3), f"{prefix}Acc@5": round(value.top5, 3)}
        return row


@contextmanager
def _naming(flags: str, names: Sequence[str]) -> Iterator[None]:
    """Let what is wrong with the user's network reach them as one line naming `flags`, and the image by its name."""
    try:
        yield
    except NonFiniteError as error:
        name = f" ({names[error.image]})" if error.image < len(names) else ""
        raise UserError(f"{flags}: {one_line(error)}{name}") from error
    except NoRoomError as error:
        raise UserError(f"--device, --cache: {one_line(error)}") from error
    except NetworkError as error:
        raise UserError(f"{flags}: {one_line(error)}") from error


def layer_table(report: Report) -> str:
    """The report per layer as text: shape, bits, base mix, relative error before and after LLR, roundings moved."""
    width = max(len("layer"), *(len(layer.name) for layer in report.layers))
    lines = [f"{'layer':<{width}}  {'shape':<18} bits  error: RTN   final  moved  channels per n_base2"]
    for layer in report.layers:
        weights = torch.Size(layer.shape).numel()
        mix = " ".join(f"{k}:{count}" for k, count in layer.base_mix.items())
        shape = "×".join(map(str, layer.shape))
        lines.append(
            f"{layer.name:<{width}}  {shape:<18} {layer.n_bits:>4}  {layer.error_nearest:10.5f} {layer.error:7.5f} "
            f"{100 * layer.moved / weights:5.1f}%  {mix}"
        )
    lines += [f"skipped {name}: {reason}" for name, reason in report.skipped]
    lines += [f"block {b.name}: LLR ended worse and was undone" for b in report.blocks if b.kept == "before"]
    return "\n".join(lines)
