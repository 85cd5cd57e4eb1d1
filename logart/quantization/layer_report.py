"""What a quantization did: per layer, per block, as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from logart.grids.logarithmic import base_mix
from logart.grids.rounding import nearest
from logart.grids.search import rounding_error
from logart.quantization import surgery
from logart.quantization.activation_stage import ActivationReport
from logart.quantization.blocks import Block
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.reconstruct import BlockReport

HISTOGRAM_RANGE, HISTOGRAM_BINS = 1.25, 60  # of w over the largest magnitude among its codebook's levels

GENERALISATION = ("damping", "output_error_calibration", "output_error_held_out")  # as `Damping` has them


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name, shape, n_bits: of the layer.
        block: the block it was reconstructed in.
        base_mix: see `base_mix`.
        error_nearest: relative squared error of the weight after plain rounding, ‖w - q‖² / ‖w‖².
        error: the same of the final codes.
        n_changed_codes: how many weights learning put on another level than plain rounding.
        histogram: see `weight_histogram`.
        damping: what compensated rounding chose, the median of the layer's groups; None where it did not choose.
        output_error_calibration, output_error_held_out: relative to the output's variance, of codes rounded by one half
            of the calibration images on this half and on the other; None likewise.
        zeros, zeros_lost: how many weights were exactly zero, and how many of them are no longer.
        output_errors: in the network as a whole, see `fidelity.layer_output_errors`; empty where nobody measured.
    """

    name: str
    shape: tuple[int, ...]
    n_bits: int
    block: str
    base_mix: dict[int, int]
    error_nearest: float
    error: float
    n_changed_codes: int
    histogram: tuple[int, ...] = ()
    damping: float | None = None
    output_error_calibration: float | None = None
    output_error_held_out: float | None = None
    zeros: int = 0
    zeros_lost: int = 0
    output_errors: tuple[float | None, ...] = ()

    @property
    def overfits(self) -> bool:
        """Whether the output error on images that the estimate has not seen is more than twice that on the others."""
        seen, unseen = self.output_error_calibration, self.output_error_held_out
        return seen is not None and unseen is not None and unseen > 2 * seen


@dataclass
class Report:
    """What quantize_model did.

    Attributes:
        layers: one entry per quantized layer, in the order they run.
        skipped: (name, reason) of every weight that stays float, by the name of its layer or its own.
        blind: by name why a quantized weight was rounded to nearest without data: what it is multiplied with is not
            seen.
        apart: by name why a weight is in no block: it was rounded through the whole network, in closed form where
            blocks learn.
        n_weights: elements of all the network's weights, quantized or not; see `survey.Survey`.
        baked: names of the layers whose weight was computed from parameters alone, and is a parameter now.
        folded, unfolded: names of the batch norms folded, and (name, reason) of those that were not.
        blocks: one entry per learned block.
        rerun: names of the blocks whose inputs were made from the images on, the blocks before run again for it.
        activations: one entry per tensor that is quantized.
        float_products: (name, reason) of weights and modules where activations that stay float are multiplied, though
            others are quantized.
        seconds: time in each stage of the rounding method, by its event.
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    blind: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    n_weights: int = 0
    baked: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    unfolded: list[tuple[str, str]] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    rerun: list[str] = field(default_factory=list)
    activations: list[ActivationReport] = field(default_factory=list)
    float_products: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def search_seconds(self) -> float:
        """Time in DBS."""
        return self.seconds.get("searched", 0.0)

    @property
    def reconstruction_seconds(self) -> float:
        """Time in compensation and LLR."""
        return self.seconds.get("rounded", 0.0)

    @property
    def quantized_share(self) -> float:
        """The share of the network's weights that was quantized, 0 to 1."""
        return sum(torch.Size(layer.shape).numel() for layer in self.layers) / max(self.n_weights, 1)

    @property
    def bits(self) -> dict[int, int]:
        """How many layers have each bit width."""
        return dict(sorted(Counter(layer.n_bits for layer in self.layers).items()))

    @property
    def mean_bits(self) -> float:
        """Bits per quantized weight."""
        weights = [torch.Size(layer.shape).numel() for layer in self.layers]
        return sum(n * layer.n_bits for n, layer in zip(weights, self.layers, strict=True)) / sum(weights)

    def share_line(self) -> str:
        """What was quantized, and below 99 % what was not, in a line."""
        line = f"{100 * self.quantized_share:.2f} % of the weights are quantized"
        if self.quantized_share >= 0.99:
            return line
        names = [f"{name} ({reason})" for name, reason in self.skipped[:3]]
        more = len(self.skipped) - len(names)
        return f"{line}; float: {', '.join(names)}" + f" and {more} more" * (more > 0)

    def blind_line(self) -> str:
        """Which weights were rounded without data, in a line; empty where none was."""
        return _line("rounded to nearest without data", self.blind)

    def apart_line(self) -> str:
        """Which weights are in no block, in a line; empty where none is or no block learned."""
        return _line("compensated in place of learned", self.apart) if self.blocks else ""

    def activation_line(self) -> str:
        """How many tensors are quantized and which saturates most, in a line."""
        most = max(self.activations, key=lambda one: one.saturated)
        line = f"activations: {len(self.activations)} tensors are quantized"
        if most.saturated > 0:
            line += f"; most saturates what {most.name} reads, {100 * most.saturated:.2g} % of its values"
        left = [f"{name} ({reason})" for name, reason in self.float_products[:2]]
        return f"{line}; float: {', '.join(left)}{' …' * (len(self.float_products) > 2)}" if left else line

    def gap_line(self) -> str:
        """Which layers do worse on images that they were not calibrated on, in a line; empty where none does."""
        gaps = [layer for layer in self.layers if layer.overfits]
        if not gaps:
            return ""
        worst = max(gaps, key=lambda one: (one.output_error_held_out or 0) / (one.output_error_calibration or 1e-300))
        return (
            f"output error of {len(gaps)} of {len(self.layers)} layers more than doubles on images kept back, most of "
            f"{worst.name}, {worst.output_error_calibration:.2g} to {worst.output_error_held_out:.2g}; "
            "more calibration images would help"
        )

    def zeros_line(self) -> str:
        """How many weights that were zero, pruned ones say, are no longer, in a line; empty where none."""
        zeros, lost = (sum(getattr(layer, name) for layer in self.layers) for name in ("zeros", "zeros_lost"))
        if not lost:
            return ""
        worst = max(self.layers, key=lambda layer: layer.zeros_lost)
        return (
            f"{lost:,} of {zeros:,} zero weights are no longer zero, {worst.zeros_lost:,} of them in {worst.name}; the "
            "grid has no zero unless zero_code gives it one"
        )

    def info(self) -> dict[str, Any]:
        """What a packed file says of the whole network, as JSON can say it."""
        info: dict[str, Any] = {"quantized_share": round(self.quantized_share, 6), "skipped": dict(self.skipped)} | (
            {"rounded_without_data": self.blind} if self.blind else {}
        )
        info |= {"in_no_block": self.apart} if self.apart else {}
        if self.activations:
            info["activations"] = {one.name: one.as_dict() for one in self.activations}
            info["float_products"] = dict(self.float_products)
        return info

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """What became of each layer, by name, as JSON can say it."""
        return {
            layer.name: {
                "block": layer.block,
                "error_nearest": float(f"{layer.error_nearest:.4g}"),
                "error": float(f"{layer.error:.4g}"),
                "n_changed_codes": layer.n_changed_codes,
            }
            | ({"zeros": layer.zeros, "zeros_lost": layer.zeros_lost} if layer.zeros else {})
            | {name: float(f"{getattr(layer, name):.4g}") for name in GENERALISATION if layer.damping is not None}
            | ({"output_errors": [e and float(f"{e:.3g}") for e in layer.output_errors]} if layer.output_errors else {})
            for layer in self.layers
        }


def _line(what: str, reasons: Mapping[str, str]) -> str:
    names = [f"{name} ({reason})" for name, reason in list(reasons.items())[:3]]
    more = len(reasons) - len(names)
    return f"{what}: {', '.join(names)}" + f" and {more} more" * (more > 0) if names else ""


def _generalisation(layer: QuantizedWeight) -> dict[str, float]:
    return dict(zip(GENERALISATION, layer.damping or (), strict=False))


@torch.no_grad()
def layer_reports(
    quantized: nn.Module,
    blocks: list[Block],
    output_errors: Mapping[str, tuple[float | None, ...]] = MappingProxyType({}),
    blind: Iterable[str] = (),
) -> list[LayerReport]:
    """The report of every layer of a network that was quantized and still knows its float weights.

    Args:
        output_errors: see `fidelity.layer_output_errors`.
        blind: the layers in no block.
    """
    layers = surgery.quantized_layers(quantized)
    owners = {name: block.name for block in blocks for name in block.layers} | dict.fromkeys(blind, "")
    return [_report(name, layers[name], block, output_errors.get(name, ())) for name, block in owners.items()]


def _report(
    name: str, layer: QuantizedWeight, block: str, output_errors: tuple[float | None, ...]
) -> LayerReport:
    w, codebook, codes = layer.rows, layer.codebook, layer.codes
    assert codes is not None
    energy = max(float(w.double().square().sum()), 1e-300)
    final, zero = layer.current_rows.double() - w.double(), w == 0
    return LayerReport(
        name=name,
        shape=tuple(layer.shape),
        n_bits=layer.n_bits,
        block=block,
        base_mix=base_mix(codebook.spec),
        error_nearest=float(rounding_error(w, codebook).square().sum()) / energy,
        error=float(final.square().sum()) / energy,
        n_changed_codes=int((codes.reshape(w.shape) != nearest(w, codebook)).sum()),
        histogram=weight_histogram(layer),
        zeros=int(zero.sum()),
        zeros_lost=int((zero & (final != 0)).sum()),
        **_generalisation(layer),
        output_errors=output_errors,
    )


def weight_histogram(layer: QuantizedWeight) -> tuple[int, ...]:
    """How many float weights lie where, each over the largest magnitude among its codebook's levels.

    Equal bins from -`HISTOGRAM_RANGE` to `HISTOGRAM_RANGE`; what lies beyond counts in the end bins.
    """
    top = layer.codebook.levels.abs().amax(1, keepdim=True)
    relative = layer.rows.double() / torch.where(top > 0, top, 1.0)
    relative = relative.clamp(-HISTOGRAM_RANGE, HISTOGRAM_RANGE).cpu()
    counts: Tensor = torch.histc(relative, HISTOGRAM_BINS, -HISTOGRAM_RANGE, HISTOGRAM_RANGE)
    return tuple(int(count) for count in counts)
