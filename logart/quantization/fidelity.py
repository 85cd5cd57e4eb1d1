"""How true each layer's output is to the float network's: through both whole networks, on the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from logart.grids.rounding import nearest
from logart.quantization.layers import find_parameter, get_weight
from logart.quantization.operations import Use
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.surgery import quantized_layers
from logart.quantization.watching import Watch

N_IMAGES = 32  # of either kind: outputs have many positions, and so few tell layers apart
_AT_ONCE = 8  # images: a batch's outputs of all layers are held

# The order of `LayerReport.output_errors`: on which images, and with which codes.
KINDS = ("calibration, nearest", "calibration, final", "held out, nearest", "held out, final")


@torch.no_grad()
def layer_output_errors(
    reference: nn.Module,
    quantized: nn.Module,
    calibration: Tensor | None,
    held_out: Tensor | None,
    blind: Collection[str] = (),
) -> dict[str, tuple[float | None, ...]]:
    """Of every quantized layer whose operation is seen its output errors, in the order of `KINDS`.

    An error is Σ(y - ŷ)² / Σ(y - mean y)², y the layer's outputs in the float network and ŷ those in the quantized
    one, behind its quantized prefix; means are per channel. "nearest" takes the same codebooks with codes rounded to
    nearest and the float biases. None: not measured, or y varies by no more than the rounding of its type.

    Args:
        reference: the float network.
        quantized: the one that was made of it, rounded; unchanged in the end.
        calibration, held_out: images [n, ...], of which the first `N_IMAGES` are looked at; None leaves these out.
        blind: layers whose operations are not seen, or not as one.
    """
    layers = {name: layer for name, layer in quantized_layers(quantized).items() if name not in blind}
    final = [layer.snapshot() for layer in layers.values()]
    for name, layer in layers.items():
        _round_to_nearest(layer, find_parameter(reference, name)[0])
    plain = [layer.snapshot() for layer in layers.values()]
    found: list[Mapping[str, float | None]] = []
    try:
        for images in (calibration, held_out):
            some = None if images is None else images[:N_IMAGES]
            found += [{}, {}] if some is None else output_errors(reference, quantized, layers, some, plain, final)
    finally:
        for restore in final:
            restore()
    names = dict.fromkeys(name for errors in found for name in errors)
    return {name: tuple(errors.get(name) for errors in found) for name in names}


@torch.no_grad()
def output_errors(
    reference: nn.Module,
    quantized: nn.Module,
    layers: Mapping[str, QuantizedWeight],
    images: Tensor,
    *states: Sequence[Callable[[], None]],
) -> list[dict[str, float | None]]:
    """The relative squared error of each quantized layer's output on images [n, ...], see `layer_output_errors`.

    Args:
        layers: of the quantized network, by name.
        states: what each layer is made by, as its `snapshot` gives it; an entry of the result for each.
    """
    sums = [{name: _Sums() for name in layers} for _ in states]
    float_weights = {name: get_weight(reference, name) for name in layers}
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, use: Use) -> None:
        outputs[name].append(_channels_last(use).clone())

    def compare(of: Mapping[str, _Sums], at: Counter[str], name: str, use: Use) -> None:
        if at[name] < len(outputs[name]):
            of[name].add(outputs[name][at[name]], _channels_last(use))
        at[name] += 1

    device = next(quantized.parameters()).device
    for batch in images.split(_AT_ONCE):
        outputs = {name: [] for name in layers}
        with Watch(float_weights, keep):
            reference(batch.to(device, copy=True))  # some networks normalise in place
        for state, of in zip(states, sums, strict=True):
            for restore in state:
                restore()
            with Watch({name: layer.weight for name, layer in layers.items()}, partial(compare, of, Counter())):
                quantized(batch.to(device, copy=True))
    return [{name: each.relative() for name, each in of.items() if each.count} for of in sums]


def _channels_last(use: Use) -> Tensor:
    """An operation's output as [n·positions, C]."""
    return use.positions_last(use.y).mT.reshape(-1, use.channels)


class _Sums:
    """The squared error of a layer's outputs and their variance, batch by batch.

    Sums are of distances to the first output, in float64: of outputs that hardly vary, squares in float32, or of the
    outputs themselves, would have a variance of rounding errors alone.
    """

    def __init__(self) -> None:
        self.count, self._first, self._eps = 0, torch.zeros(()), 0.0
        self._error, self._total, self._squares = (torch.zeros((), dtype=torch.float64) for _ in range(3))

    def add(self, target: Tensor, output: Tensor) -> None:
        if not self.count:
            self._first, self._eps = target[:1].double(), torch.finfo(target.dtype).eps
        self.count += len(target)
        target, output = target.double() - self._first, output.double() - self._first
        self._error = self._error.to(target.device) + (target - output).square().sum()
        self._total = self._total.to(target.device) + target.sum(0)
        self._squares = self._squares.to(target.device) + target.square().sum(0)

    def relative(self) -> float | None:
        """None where the outputs vary by no more than the rounding of their type: there is nothing to relate to."""
        variance = float((self._squares - self._total.square() / self.count).sum())
        rounding = self._eps**2 * self.count * float(self._first.square().sum())
        return float(self._error) / variance if variance > rounding else None


def _round_to_nearest(layer: QuantizedWeight, float_layer: nn.Module) -> None:
    """Codes rounded to nearest on the same codebook, and the float bias."""
    layer.set_codes(nearest(layer.rows, layer.codebook))
    if layer.bias_name is not None:
        layer.module._parameters[layer.bias_name] = float_layer._parameters.get(layer.bias_name)
