"""One run of either track: measure the float network, quantize, evaluate, report, append the row."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from logart.config import QuantConfig
from logart.data import ImageSource, validation_batches
from logart.evaluate import Accuracy, accuracy
from logart.grid import ScaleMethod
from logart.layers import hardware_approximation
from logart.pipeline import Report, quantize_model
from logart.results import Cell, append_row, environment
from logart.runtime import peak_memory_mb, progress_bar


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about it, apart from what decides the codes.

    Attributes:
        device: where to compute.
        results: the CSV file that gets the row.
        val_batch_size, workers: of the evaluation's loader.
        test_before_calibration: evaluate after DBS too.
        test_with_hardware_approx: evaluate a second time with √2 ≈ 1 + 1/2 in a network calibrated without it.
        quiet: print no progress and no table, only the results.
    """

    device: torch.device
    results: str
    val_batch_size: int = 128
    workers: int = 2
    test_before_calibration: bool = False
    test_with_hardware_approx: bool = False
    quiet: bool = False


def run(
    model: nn.Module,
    block_types: Sequence[str],
    source: ImageSource,
    images: Tensor,
    config: QuantConfig,
    options: RunOptions,
    columns: Mapping[str, Cell],
    started: float,
) -> Report:
    """Quantize and evaluate one network, print what comes out and append it to the results file.

    Args:
        model, block_types, images, config: as for `quantize_model`.
        source: holds the validation images.
        columns: what the results row says of the network and the data.
        started: `time.perf_counter()` when the command began.

    Returns:
        The report of `quantize_model`.
    """
    accuracies: dict[str, Accuracy] = {}

    def measure(stage: str, network: nn.Module) -> None:
        batches = validation_batches(source, options.val_batch_size, options.workers)
        with progress_bar(len(source.val), f"evaluate {stage}", options.quiet) as bar:
            accuracies[stage] = accuracy(network, batches, options.device, bar.update)
        print(f"{stage:<28} Acc@1 {accuracies[stage].top1:6.2f} %  Acc@5 {accuracies[stage].top5:6.2f} %", flush=True)

    def observe(stage: str, network: nn.Module) -> None:
        if stage == "float":
            measure("float", network)
        elif stage == "searched" and (options.test_before_calibration or not config.iters):
            measure("after DBS" if config.scale_method is ScaleMethod.DYNAMIC else "after rounding", network)
            accuracies["searched"] = list(accuracies.values())[-1]
        elif stage == "learned":
            measure("after LLR", network)

    quantized, report = quantize_model(
        model, config, images, block_types=block_types, device=options.device, quiet=options.quiet, observe=observe
    )
    final = accuracies.get("after LLR") or accuracies["searched"]
    if options.test_with_hardware_approx:
        with hardware_approximation(quantized, terms=2):
            measure("with √2 ≈ 1 + 1/2 at test", quantized)
    total = time.perf_counter() - started
    row = dict(columns) | config_columns(config) | environment()
    row |= _accuracy_columns("", final) | _accuracy_columns("float_", accuracies["float"])
    row |= _accuracy_columns("search_", accuracies.get("searched"))
    row |= _accuracy_columns("approx_", accuracies.get("with √2 ≈ 1 + 1/2 at test"))
    row |= {
        "val_images": final.images,
        "search_seconds": round(report.search_seconds, 3),
        "reconstruction_seconds": round(report.reconstruction_seconds, 3),
        "total_seconds": round(total, 3),
        "peak_memory_mb": round(peak_memory_mb(options.device)),
        "device": device_name(options.device),
    }
    append_row(options.results, row)
    if not options.quiet:
        print(layer_table(report))
    print(
        f"DBS {report.search_seconds:.1f} s, LLR {report.reconstruction_seconds:.1f} s, total {total:.1f} s; "
        f"row appended to {options.results}"
    )
    return report


def config_columns(config: QuantConfig) -> dict[str, Cell]:
    """The results columns that the settings decide; settings that did not act stay empty."""
    dynamic, learns = config.scale_method is ScaleMethod.DYNAMIC, config.iters > 0
    row: dict[str, Cell] = {
        "bits": config.n_bits,
        "first_last_bits": config.first_last_bits or "same",
        "channel_wise": str(config.channel_wise),
        "scale_method": config.scale_method.value,
        "hardware_approx": str(bool(config.hardware_terms)),
        "iters_w": config.iters,
        "seed": config.seed,
    }
    if dynamic:
        row |= {"search_method": config.search_method.value, "search_samples": config.search_samples}
    if learns:
        row |= {
            "calib_samples": config.calib_samples,
            "batch_size": config.batch_size,
            "lr": config.lr,
            "rrweight": config.rrweight,
            "b_start": config.b_start,
            "b_end": config.b_end,
            "warmup": config.warmup,
            "recon_input": config.recon_input.value,
            "recon_metric": "mse",
        }
    return row


def _accuracy_columns(prefix: str, value: Accuracy | None) -> dict[str, Cell]:
    if value is None:
        return {}
    return {f"{prefix}Acc@1": round(value.top1, 3), f"{prefix}Acc@5": round(value.top5, 3)}


def device_name(device: torch.device) -> str:
    """The device as the results file names it: `cpu`, or the GPU's product name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def layer_table(report: Report) -> str:
    """The report per layer as text: shape, bits, base mix, relative error before and after LLR, roundings moved."""
    width = max(len(layer.name) for layer in report.layers)
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
    lines += [f"block {b.name}: LLR ended worse, plain rounding kept" for b in report.blocks if b.kept == "nearest"]
    return "\n".join(lines)
