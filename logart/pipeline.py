"""quantize_model(): the one verb. It reads like DESIGN section 6."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from logart import capture, surgery
from logart.config import QuantConfig, ReconInput
from logart.dbs import search_unit
from logart.losses import squared_error
from logart.reconstruct import BlockReport, learn_rounding
from logart.rounding import nearest
from logart.runtime import NetworkError, progress_bar
from logart.search import rounding_error
from logart.surgery import Unit


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name, shape, n_bits: of the layer.
        block: the block it was reconstructed in.
        base_mix: how many codebooks have each n_base2; empty for linear grids.
        error_nearest: relative squared error of the weight after plain rounding, ‖w - q‖² / ‖w‖².
        error: the same of the final codes.
        moved: how many weights learning put on another level than plain rounding.
    """

    name: str
    shape: tuple[int, ...]
    n_bits: int
    block: str
    base_mix: dict[int, int]
    error_nearest: float
    error: float
    moved: int


@dataclass
class Report:
    """What quantize_model did.

    Attributes:
        layers: one entry per quantized layer, in the order they run.
        skipped: (name, reason) of every module with a weight matrix that stays float.
        folded: names of the batch norms folded.
        blocks: one entry per learned block.
        search_seconds, reconstruction_seconds: time in DBS and in LLR.
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    search_seconds: float = 0.0
    reconstruction_seconds: float = 0.0


def quantize_model(
    model: nn.Module,
    config: QuantConfig,
    calibration_images: Tensor | Iterable[Tensor],
    *,
    block_types: Sequence[str] = (),
    device: torch.device | str = "cpu",
    quiet: bool = True,
    observe: Callable[[str, nn.Module], None] = lambda stage, model: None,
) -> tuple[nn.Module, Report]:
    """Quantize the convolutions and linear layers of a network onto the grid that `config` asks for.

    Args:
        model: any module of Conv2d and Linear layers that maps a batch of images to logits. It is not changed.
        config: the settings.
        calibration_images: a tensor [n, C, H, W], or batches of images; DBS uses the first `search_samples`, LLR the
            first `calib_samples`.
        block_types: class names of the blocks to reconstruct; without any, each layer is its own block.
        device: where to compute, and where the result is.
        quiet: no progress bars.
        observe: called with ("float", folded float model), ("searched", …) after DBS and ("learned", …) after LLR;
            the time it takes is not counted.

    Returns:
        The quantized network in eval mode, and the report.

    Raises:
        ValueError: fewer images than the settings ask for, a layer that cannot be quantized (named), non-finite
            weights or losses, no block of the types given.
    """
    device = torch.device(device)
    images = gather_images(calibration_images, max(2, config.images_needed))  # tracing takes an example
    report = Report()
    reference = surgery.clone_sharing(model).eval().requires_grad_(False).to(device)
    example = images[:2].to(device, copy=True)  # some networks normalise in place
    report.folded = surgery.fold_batch_norms(reference, example)
    names, report.skipped = surgery.layers_to_quantize(reference, example)
    if not names:
        raise NetworkError(f"{type(model).__name__} has no layer that can be quantized")
    units = surgery.find_units(reference, names, block_types)
    observe("float", reference)

    quantized = surgery.clone_sharing(reference)
    surgery.replace_layers(quantized, config.bits_of(names), config.channel_wise)
    start = time.perf_counter()
    _search(reference, quantized, units, images[: config.search_samples], config, quiet, device)
    report.search_seconds = time.perf_counter() - start
    observe("searched", quantized)

    if config.iters:
        start = time.perf_counter()
        report.blocks = _reconstruct(reference, quantized, units, images, config, quiet, device)
        report.reconstruction_seconds = time.perf_counter() - start
        observe("learned", quantized)
    report.layers = _layer_reports(quantized, units)
    return quantized, report


def gather_images(images: Tensor | Iterable[Tensor], count: int) -> Tensor:
    """The first `count` images of a tensor or of batches, as one tensor; ValueError when there are fewer."""
    if isinstance(images, Tensor):
        gathered = images[:count]
    else:
        batches: list[Tensor] = []
        for batch in images:
            batches.append(batch)
            if sum(map(len, batches)) >= count:
                break
        gathered = torch.cat(batches)[:count] if batches else torch.empty(0)
    if len(gathered) < count:
        raise NetworkError(f"the settings ask for {count} calibration images, got {len(gathered)}")
    if not torch.isfinite(gathered).all():
        raise NetworkError("the calibration images hold NaN or infinite values")
    return gathered


def _search(
    reference: nn.Module,
    quantized: nn.Module,
    units: list[Unit],
    images: Tensor,
    config: QuantConfig,
    quiet: bool,
    device: torch.device,
) -> None:
    """DBS, unit by unit in the order they run; every layer then holds its codebook and codes of plain rounding."""
    with progress_bar(len(units), "DBS", quiet) as bar:
        for unit in units:
            bar.set_description(f"DBS {unit.name}")
            data = None
            if config.searches_data:
                networks = (reference, quantized)
                data = tuple(capture.inputs(net, unit.name, images, config.batch_size, device) for net in networks)
            search_unit(reference, quantized, unit, data, config)
            bar.update()


def _reconstruct(
    reference: nn.Module,
    quantized: nn.Module,
    units: list[Unit],
    images: Tensor,
    config: QuantConfig,
    quiet: bool,
    device: torch.device,
) -> list[BlockReport]:
    """LLR, unit by unit in the order they run: quantized prefix in, float target out."""
    images = images[: config.calib_samples]
    reports = []
    prefix = quantized if config.recon_input is ReconInput.QUANTIZED else reference
    with progress_bar(len(units) * config.iters, "LLR", quiet) as bar:
        for index, unit in enumerate(units):
            bar.set_description(f"LLR {unit.name}")
            inputs = capture.inputs(prefix, unit.name, images, config.batch_size, device)
            targets = capture.outputs(reference, unit.name, images, config.batch_size, device)

            def show(step: int, loss: float, done: int = index * config.iters) -> None:
                bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
                bar.update(done + step - bar.n)

            layers = [surgery.quantized_layers(quantized)[name] for name in unit.layers]
            reports.append(
                learn_rounding(
                    unit.name, quantized.get_submodule(unit.name), layers, inputs, targets, config, squared_error, show
                )
            )
    return reports


@torch.no_grad()
def _layer_reports(quantized: nn.Module, units: list[Unit]) -> list[LayerReport]:
    layers = surgery.quantized_layers(quantized)
    reports = []
    for unit in units:
        for name in unit.layers:
            layer = layers[name]
            w, codebook, codes = layer.rows, layer.codebook, layer.codes
            assert codes is not None
            plain = nearest(w, codebook)
            energy = max(float(w.double().square().sum()), 1e-300)
            final = layer.weight.reshape(w.shape).double() - w.double()
            mix = {} if codebook.n_base2 is None else dict(sorted(Counter(codebook.n_base2.tolist()).items()))
            reports.append(
                LayerReport(
                    name=name,
                    shape=tuple(layer.shape),
                    n_bits=layer.n_bits,
                    block=unit.name,
                    base_mix=mix,
                    error_nearest=float(rounding_error(w, codebook).square().sum()) / energy,
                    error=float(final.square().sum()) / energy,
                    moved=int((codes.reshape(w.shape) != plain).sum()),
                )
            )
    return reports
