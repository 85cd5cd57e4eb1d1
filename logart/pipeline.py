"""quantize_model(): the one verb. It reads like DESIGN section 6."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from logart import capture, surgery
from logart.compensate import compensate_unit
from logart.config import QuantConfig, ReconInput, ReconMetric
from logart.dbs import search_unit
from logart.importance import IMPORTANCE_IMAGES, PerturbationImportance
from logart.losses import absolute_error, kl_divergence, squared_error
from logart.reconstruct import BlockReport, Loss, learn_rounding
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
        search_seconds, reconstruction_seconds: time in DBS and in compensation and LLR.
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    search_seconds: float = 0.0
    reconstruction_seconds: float = 0.0

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """What became of each layer, by name, as JSON can say it."""
        return {
            layer.name: {
                "block": layer.block,
                "error_nearest": float(f"{layer.error_nearest:.4g}"),
                "error": float(f"{layer.error:.4g}"),
                "moved": layer.moved,
            }
            for layer in self.layers
        }


def quantize_model(
    model: nn.Module,
    config: QuantConfig,
    calibration_images: Tensor | Iterable[Tensor],
    *,
    block_types: Sequence[str] = (),
    row_groups: Mapping[str, int] = MappingProxyType({}),
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
        row_groups: by the last part of a layer's name, into how many groups its rows fall that get a codebook each
            where grids are not channel-wise; {"qkv": 3} parts queries, keys and values.
        device: where to compute, and where the result is.
        quiet: no progress bars.
        observe: called with ("float", folded float model), ("searched", …) after DBS, unless rounding is compensated,
            and ("rounded", …) after compensation and LLR; the time it takes is not counted.

    Returns:
        The quantized network in eval mode, with what `save_packed` keeps of this run as `packed_info`; and the report.

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
    surgery.replace_layers(quantized, config.bits_of(names), config.channel_wise, row_groups)
    start = time.perf_counter()
    if not config.compensates:  # which searches each layer's grid itself
        _search(reference, quantized, units, images[: config.search_samples], config, quiet, device)
        report.search_seconds = time.perf_counter() - start
        observe("searched", quantized)

    start = time.perf_counter()
    if config.learns:
        report.blocks = _reconstruct(reference, quantized, units, images, config, quiet, device)
    elif config.compensates:
        _compensate(reference, quantized, units, images, config, quiet, device)
    if config.learns or config.compensates:
        report.reconstruction_seconds = time.perf_counter() - start
        observe("rounded", quantized)
    report.layers = _layer_reports(quantized, units)
    quantized.packed_info = {"settings": config.as_dict(), "layers": report.as_dict()}  # type: ignore[assignment]
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
                size = config.search_batch_size
                data = tuple(capture.inputs(net, unit.name, images, size, device) for net in networks)
            search_unit(reference, quantized, unit, data, config)
            bar.update()


def _compensate(
    reference: nn.Module,
    quantized: nn.Module,
    units: list[Unit],
    images: Tensor,
    config: QuantConfig,
    quiet: bool,
    device: torch.device,
) -> None:
    """Compensated rounding, layer by layer in the order they run, with the search for each layer's grid."""
    images = images[: config.calib_samples]
    with progress_bar(len(units), "compensate", quiet) as bar:
        for unit in units:
            bar.set_description(f"compensate {unit.name}")
            _compensate_unit(reference, quantized, unit, images, config, device)
            bar.update()


def _compensate_unit(
    reference: nn.Module, quantized: nn.Module, unit: Unit, images: Tensor, config: QuantConfig, device: torch.device
) -> list[Tensor]:
    """Round one unit, compensated; the targets of its layers, from which LLR may go on."""
    how = (unit.name, images, config.batch_size, device)
    data = capture.inputs(reference, *how), capture.inputs(quantized, *how)
    return compensate_unit(reference, quantized, unit, data, config)


def _reconstruct(
    reference: nn.Module,
    quantized: nn.Module,
    units: list[Unit],
    images: Tensor,
    config: QuantConfig,
    quiet: bool,
    device: torch.device,
) -> list[BlockReport]:
    """LLR, unit by unit in the order they run: quantized, float or mixed prefix in, float target out."""
    images = images[: config.calib_samples]
    reports = []
    losses = _Losses(reference, quantized, units, images, config, device)
    with progress_bar(len(units) * config.iters, "LLR", quiet) as bar:
        for index, unit in enumerate(units):
            bar.set_description(f"LLR {unit.name}")
            start = time.perf_counter()
            starts = None
            if config.compensates:
                starts = _compensate_unit(reference, quantized, unit, images, config, device)
            inputs, float_inputs, targets = _capture(reference, quantized, unit, images, config, device)
            loss = losses.of(unit, targets)
            captured = time.perf_counter()

            def show(step: int, loss: float, done: int = index * config.iters) -> None:
                bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
                bar.update(done + step - bar.n)

            block = quantized.get_submodule(unit.name)
            layers = [surgery.quantized_layers(quantized)[name] for name in unit.layers]
            report = learn_rounding(unit.name, block, layers, inputs, targets, config, loss, show, float_inputs, starts)
            learning = time.perf_counter() - captured
            reports.append(replace(report, capture_seconds=captured - start, learning_seconds=learning))
    return reports


def _capture(
    reference: nn.Module,
    quantized: nn.Module,
    unit: Unit,
    images: Tensor,
    config: QuantConfig,
    device: torch.device,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the unit is fed, what the float one is fed if inputs are mixed, and what it gives: two passes at most."""
    how = (unit.name, images, config.batch_size, device)
    if config.recon_input is ReconInput.QUANTIZED:
        return capture.inputs(quantized, *how), None, capture.outputs(reference, *how)
    float_inputs, targets = capture.inputs_and_outputs(reference, *how)
    if config.recon_input is ReconInput.FLOAT:
        return float_inputs, None, targets
    return capture.inputs(quantized, *how), float_inputs, targets


class _Losses:
    """The reconstruction loss of each unit."""

    def __init__(
        self,
        reference: nn.Module,
        quantized: nn.Module,
        units: list[Unit],
        images: Tensor,
        config: QuantConfig,
        device: torch.device,
    ) -> None:
        self._config, self._head = config, units[-1].name
        layers = surgery.quantized_layers(quantized)
        self._channels = {unit.name: layers[unit.layers[-1]].shape[0] for unit in units}
        if config.recon_metric is ReconMetric.HESSIAN_PERTURB:
            self._importance = PerturbationImportance(
                reference, images[:IMPORTANCE_IMAGES], config.temperature, config.batch_size, device, config.seed
            )

    def of(self, unit: Unit, targets: Tensor) -> Loss:
        """The loss of one unit, whose float outputs are `targets`."""
        if self._config.head_kl and unit.name == self._head:
            return kl_divergence
        dim = channel_dim(targets, self._channels[unit.name])
        if self._config.recon_metric is ReconMetric.MAE:
            return partial(absolute_error, channel_dim=dim)
        if self._config.recon_metric is ReconMetric.MSE:
            return partial(squared_error, channel_dim=dim)
        return partial(squared_error, channel_dim=dim, importance=self._importance.of(unit.name))


def channel_dim(output: Tensor, channels: int) -> int:
    """Where an output has its channels: dimension 1, unless only the last has as many as the unit's last layer."""
    return -1 if output.shape[-1] == channels != output.shape[1] else 1


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
