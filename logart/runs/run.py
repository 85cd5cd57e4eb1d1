"""One run of either track: measure the float network, quantize, evaluate, report, append the row."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logart import ranks
from logart.errors import NetworkError, NonFiniteError, NoRoomError, PartlyQuantized, SettingError, UserError, one_line
from logart.grids.root2 import ROOT2_TEXT
from logart.networks.data import ImageSource, Split
from logart.networks.evaluate import Accuracy, accuracy
from logart.networks.loader import validation_batches
from logart.networks.network import Network
from logart.packed.checkpoint import SizeTable, save_packed, to_packed
from logart.quantization.cache import Cache, CacheLocation
from logart.quantization.config import QuantConfig
from logart.quantization.fidelity import N_IMAGES
from logart.quantization.layer_report import GENERALISATION, Report
from logart.quantization.layers import hardware_approximation
from logart.quantization.pipeline import quantize_model
from logart.quantization.state import StageStore
from logart.runs.columns import SETTINGS_OF_COMMAND, Cell, Facts, measured_row, versions
from logart.runs.headline import headline
from logart.runs.rank_store import RankStore
from logart.runs.results_file import append_row
from logart.runs.run_folder import PACKED, RunFolder
from logart.runtime import peak_memory_mb, progress_bar
from logart.text import shape_text, table

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
        quiet: print no progress and no table, only the accuracies and the share of the weights that was quantized.
        network_flags: the flags that choose the network, for errors about it.
        save: the packed file that gets the network; None saves none.
        run_dir: the new folder that gets the run; None keeps none.
        resume: the folder of an interrupted run, in place of `run_dir`.
        cache: where captured inputs live; None decides by what is free.
        once: do no run whose row is there or being run, see `claims.claimed`.
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
    run_dir: str | None = None
    resume: str | None = None
    cache: CacheLocation | None = None
    once: bool = False


def run(
    network: Network,
    source: ImageSource,
    images: Tensor,
    config: QuantConfig,
    options: RunOptions,
    row: Mapping[str, Cell],
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
        row: the settings' cells of the results row, and its `run_id`.
        started: `time.perf_counter()` when the command began.
        names: of the images, for messages.
        folder: keeps what the run comes to, and may hold what it came to before it was interrupted.

    Returns:
        The report of `quantize_model`.

    Raises:
        UserError: the network cannot be quantized, an image cannot be read or the row cannot be written.
    """
    stages, held_out = _Stages(source, config, options, folder), _some(source.val)
    with _naming(options.network_flags, names), warnings.catch_warnings():
        warnings.simplefilter("ignore", PartlyQuantized)  # printed below
        quantized, report = quantize_model(
            network.model,
            config,
            images,
            row_groups=network.row_groups,
            held_out_images=held_out,
            device=options.device,
            quiet=options.quiet,
            on_stage_end=stages.on_stage_end,
            cache=Cache(options.device, options.cache, folder.path if folder else None),
            stage_store=folder if ranks.size() == 1 else RankStore(folder or StageStore()),
        )
    print(report.share_line(), flush=True)
    if report.activations:
        print(report.activation_line(), flush=True)
    for line in filter(None, (report.blind_line(), report.apart_line(), report.gap_line(), report.zeros_line())):
        print(line, flush=True)
    if options.test_with_terms:
        with hardware_approximation(quantized, options.test_with_terms):
            stages.measure("approximated", quantized)
    if not ranks.is_first():
        return report
    facts = Facts(
        config,
        accuracies=stages.accuracies,
        quantized_share=report.quantized_share,
        layers_by_bits=report.bits,
        mean_bits=report.mean_bits,
        search_seconds=report.search_seconds,
        reconstruction_seconds=report.reconstruction_seconds,
        total_seconds=time.perf_counter() - started if folder is None else folder.seconds,
        memory_mb=peak_memory_mb(options.device),
        packed_bytes=len(to_packed(quantized).to_bytes()),
        device=device_name(options.device),
    )
    row = {**measured_row(facts), **row}
    info = {**quantized.packed_info, **run_info(network, source, stages, row)}  # type: ignore[dict-item]
    left = _write(quantized, info, report, row, options, folder)
    if not options.quiet:
        print(layer_table(report))
        if left.sizes is not None:
            print(f"{left.sizes}\nsaved as {options.save}")
        print(headline([row]))
        seconds = [f"{stage.title} {report.seconds[stage.event]:.1f} s" for stage in config.stages]
        print(", ".join([*seconds, f"total {facts.total_seconds:.1f} s"]) + f"; {left.row}" * (not left.problems))
    if left.problems:
        raise UserError("; ".join(left.problems))
    return report


def _some(split: Split) -> Tensor:
    """Images [n, C, H, W] of a split, evenly spread: `N_IMAGES`, or all where there are fewer."""
    places = torch.linspace(0, len(split) - 1, min(N_IMAGES, len(split))).round().int().tolist()
    return torch.stack([split[place][0] for place in places])


class _Left(NamedTuple):
    """What `_write` came to: the sizes of `--save`, what became of the row, and what could not be written."""

    sizes: SizeTable | None
    row: str
    problems: list[str]


def _write(
    quantized: nn.Module,
    info: dict[str, Any],
    report: Report,
    row: Mapping[str, Cell],
    options: RunOptions,
    folder: RunFolder | None,
) -> _Left:
    """Write all that a run leaves; what cannot be written keeps nothing else from it."""
    problems: list[str] = []
    sizes, message = None, ""
    if folder is not None:
        with _collected(problems, f"--run_dir: cannot write to {folder.path}"):
            save_packed(quantized, folder.path / PACKED, info)
    if options.save is not None:
        with _collected(problems, f"--save: {options.save!r} cannot be written"):
            sizes = save_packed(quantized, options.save, info)
    with _collected(problems, "--results"):
        appended = append_row(options.results, row)
        message = f"row appended to {options.results}" if appended else f"its row was in {options.results} already"
    if folder is not None and not problems:
        with _collected(problems, f"--run_dir: cannot write to {folder.path}"):
            folder.finish(report, row)
    if problems:
        problems += [f"the row is in {options.results}"] * bool(message)
        problems += [] if folder is None else [f"--resume {folder.path} writes the rest when it can"]
    return _Left(sizes, message, problems)


@contextmanager
def _collected(problems: list[str], what: str) -> Iterator[None]:
    """Collect what could not be written, instead of raising it."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))
    except (OSError, ValueError) as error:
        problems.append(f"{what} ({getattr(error, 'strerror', None) or one_line(error)})")


def run_info(network: Network, source: ImageSource, stages: _Stages, row: Mapping[str, Cell]) -> dict[str, Any]:
    """What a packed file says of the network and its run, beside settings and layers."""
    said = [name for name in SETTINGS_OF_COMMAND if name not in _SAID and row.get(name) is not None]
    return {
        "network": dict(network.recipe),
        "preprocessing": asdict(network.preprocessing),
        "class_names": list(source.class_names),
        "source": {"checkpoint": network.source, "sha256": network.sha256, "data": source.name},
        "accuracy": {stage: value.figures() for stage, value in stages.accuracies.items()},
        "versions": versions(),
        "run": {name: row[name] for name in said},
    }


@dataclass
class _Stages:
    """Evaluates the network stage by stage, prints the accuracies and keeps them."""

    source: ImageSource
    config: QuantConfig
    options: RunOptions
    folder: RunFolder | None
    accuracies: dict[str, Accuracy] = field(default_factory=dict)

    def on_stage_end(self, stage: str, network: nn.Module) -> None:
        """What `quantize_model` calls: measures, unless another stage goes on from here and nobody asked."""
        shown = ("float", self.config.method.stages[-1].event, self.config.stages[-1].event)
        if stage in shown or self.options.test_before_calibration:
            self.measure(stage, network)

    def measure(self, stage: str, network: nn.Module) -> None:
        title = {
            "float": "float",
            "approximated": f"with √2 ≈ {ROOT2_TEXT.get(self.options.test_with_terms)} at test",
            **{step.event: step.result(self.config) for step in self.config.stages},
        }[stage]
        if self.config.calibrate_with_act and stage == self.config.method.stages[-1].event:
            title += f", {self.config.n_bits_a}-bit activations"
        value = ranks.from_first(None if self.folder is None else self.folder.accuracies.get(stage))
        if value is None:
            batches = validation_batches(self.source, self.options.val_batch_size, self.options.workers)
            with progress_bar(len(self.source.val), f"evaluate {title}", self.options.quiet) as bar:
                value = accuracy(network, batches, self.options.device, bar.update)
            if self.folder is not None:
                self.folder.measured(stage, value)
        print(f"{title:<28} Acc@1 {value.top1:6.2f} %  Acc@5 {value.top5:6.2f} %", flush=True)
        self.accuracies[stage] = value


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
    except SettingError as error:
        raise UserError(f"--{one_line(error)}") from error
    except NetworkError as error:
        raise UserError(f"{flags}: {one_line(error)}") from error


def device_name(device: torch.device) -> str:
    """The device as the results file names it: `cpu`, or the GPU's product name; of several ranks "2 × cpu"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if ranks.size() == 1 else f"{ranks.size()} × {name}"


def layer_table(report: Report) -> str:
    """The report per layer as text: shape, bits, weight error of plain rounding and final, changed codes, mix.

    Where it was chosen, also the damping, and the output error on images that were and were not calibrated on.
    """
    chosen = GENERALISATION if any(layer.damping is not None for layer in report.layers) else ()
    rows = [
        (
            layer.name,
            shape_text(layer.shape),
            layer.n_bits,
            f"{layer.error_nearest:.5f}",
            f"{layer.error:.5f}",
            f"{100 * layer.n_changed_codes / math.prod(layer.shape):.1f}%",
            " ".join(f"{k}:{count}" for k, count in layer.base_mix.items()),
            *(f"{getattr(layer, name):.3g}" for name in chosen),
        )
        for layer in report.layers
    ]
    head = ["layer", "shape", "bits", "weight error: RTN", "final", "changed", "channels per n_base2"]
    head += ["damping", "output error: calibration", "held out"] if chosen else []
    lines = [table(head, rows, text=("layer", "shape", "channels per n_base2"))]
    lines += [f"skipped {name}: {reason}" for name, reason in report.skipped]
    lines += [f"activations at {name} stay float: {reason}" for name, reason in report.float_products]
    lines += [f"block {name}: reached from the images on, every block before it run again" for name in report.rerun]
    lines += [f"block {b.name}: LLR reverted: no improvement" for b in report.blocks if b.kept == "before"]
    return "\n".join(lines)
