"""How true each layer's output is to the float network's: through both whole networks, on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from logart.grids.rounding import nearest
from logart.quantization.layers import find_parameter, get_weight
from logart.quantization.operations import Use
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.surgery import quantized_layers
from logart.quantization.watching import Watch

N_IMAGES = 64  # of either kind: outputs have many positions, and so few tell layers apart
_AT_ONCE = 8  # images: a batch's outputs of all layers are held

# The order of `LayerReport.output_errors`: on which images, and with which codes.
KINDS = ("calibration, nearest", "calibration, final", "held out, nearest", "held out, final")


@torch.no_grad()
def layer_output_errors(
    reference: nn.Module, quantized: nn.Module, calibration: Tensor | None, held_out: Tensor | None
) -> dict[str, tuple[float | None, ...]]:
    """Of every quantized layer whose operation is seen its output errors, in the order of `KINDS`; None: not measured.

    An error is Σ(y - ŷ)² / Σ(y - mean y)², y the layer's outputs in the float network and ŷ those in the quantized
    one, behind its quantized prefix; means are per channel. "nearest" takes the same codebooks with codes rounded to
    nearest and the float biases.

    Args:
        reference: the float network.
        quantized: the one that was made of it, rounded; unchanged in the end.
        calibration, held_out: images [n, ...], of which the first `N_IMAGES` are looked at; None leaves these out.
    """
    found: list[Mapping[str, float]] = []
    for images in (calibration, held_out):
        if images is None:
            found += [{}, {}]
            continue
        with _rounded_to_nearest(reference, quantized):
            found.append(output_errors(reference, quantized, images[:N_IMAGES]))
        found.append(output_errors(reference, quantized, images[:N_IMAGES]))
    names = dict.fromkeys(name for errors in found for name in errors)
    return {name: tuple(errors.get(name) for errors in found) for name in names}


@torch.no_grad()
def output_errors(reference: nn.Module, quantized: nn.Module, images: Tensor) -> dict[str, float]:
    """The relative squared error of each quantized layer's output on images [n, ...], see `layer_output_errors`."""
    layers = quantized_layers(quantized)
    sums = {name: _Sums() for name in layers}
    waiting: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, use: Use) -> None:
        waiting[name].append(_channels_last(use).clone())

    def compare(name: str, use: Use) -> None:
        if waiting[name]:
            sums[name].add(waiting[name].pop(0), _channels_last(use))

    device = next(quantized.parameters()).device
    float_weights = {name: get_weight(reference, name) for name in layers}
    weights = {name: layer.weight for name, layer in layers.items()}
    for batch in images.split(_AT_ONCE):
        with Watch(float_weights, keep):
            reference(batch.to(device, copy=True))  # some networks normalise in place
        with Watch(weights, compare):
            quantized(batch.to(device, copy=True))
    return {name: of.relative() for name, of in sums.items() if of.count}


def _channels_last(use: Use) -> Tensor:
    """An operation's output as [n·positions, C]."""
    return use.positions_last(use.y).mT.reshape(-1, use.channels)


class _Sums:
    """The squared error of a layer's outputs and their variance, batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self._error, self._total, self._squares = (torch.zeros((), dtype=torch.float64) for _ in range(3))

    def add(self, wanted: Tensor, given: Tensor) -> None:
        wanted, given = wanted.double(), given.double()
        self.count += len(wanted)
        self._error = self._error.to(wanted.device) + (wanted - given).square().sum()
        self._total = self._total.to(wanted.device) + wanted.sum(0)
        self._squares = self._squares.to(wanted.device) + wanted.square().sum(0)

    def relative(self) -> float:
        variance = float((self._squares - self._total.square() / self.count).sum())
        return float(self._error) / max(variance, 1e-300)


@contextmanager
def _rounded_to_nearest(reference: nn.Module, quantized: nn.Module) -> Iterator[None]:
    """While the context lasts, codes are rounded to nearest on the same codebooks, and biases are the float ones."""
    with ExitStack() as undo:
        for name, layer in quantized_layers(quantized).items():
            undo.callback(layer.snapshot())
            _round_to_nearest(layer, find_parameter(reference, name)[0])
        yield


def _round_to_nearest(layer: QuantizedWeight, float_layer: nn.Module) -> None:
    layer.set_codes(nearest(layer.rows, layer.codebook))
    if layer.bias_name is not None:
        layer.module._parameters[layer.bias_name] = float_layer._parameters.get(layer.bias_name)
