"""A quantized network as a graph of integer operations: traced with torch.fx, each value with a format of its own.

Every value of the graph is an integer tensor that counts units of 2^-fraction. A value that a convolution or linear
layer reads has `a_bit` bits, any other (the two sides of a residual sum) `WIDE_BITS`; a value never below zero is
unsigned, so that saturation does what ReLU does.

`IntegerNetwork.run` computes the same integers as the NumPy reference that an export ships, with torch in float64,
whose 53 bits hold every sum exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from logart.export.hardware import Array, HardwareLevels
from logart.export.integer_formats import Format, IntegerWeights, rounded
from logart.export.integer_trace import Step

WIDE_BITS = 16  # of values that no layer reads: the terms of residual sums, and the logits
RECIPROCAL_BITS = 16  # 1 / count of an average pooling, where count is no power of two: an integer over 2^16
Layers = Mapping[str, tuple[HardwareLevels, Array, Tensor | None]]  # by module: levels, codes as the weight, bias


@dataclass
class IntegerNetwork:
    """The graph with formats and weights; what `integer_export` writes.

    Attributes:
        steps: the operations in the order they run, the first of kind `input`.
        formats: of every value, by the name of the step that makes it.
        weights: of every layer, by its step.
        shapes: of every value, without the image dimension.
    """

    steps: list[Step]
    formats: dict[str, Format]
    weights: dict[str, IntegerWeights]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def calibrate(
        cls,
        steps: list[Step],
        layers: Layers,
        images: Tensor,
        a_bit: int,
    ) -> IntegerNetwork:
        """Choose formats from calibration images.

        Args:
            steps: the traced network.
            layers: by module name: levels, codes of the weight's shape, bias.
            images: float [n, C, H, W], preprocessed.
            a_bit: bits of what layers read, 2 to 16.

        Raises:
            ValueError: a value that is not finite; the message names its step.
        """
        network = cls(steps, {}, {})
        read = {name for step in steps if step.op in ("conv", "linear") for name in step.inputs}
        last = {name: index for index, step in enumerate(steps) for name in step.inputs}
        values: dict[str, Tensor] = {}
        for index, step in enumerate(steps):
            if step.module:
                levels, codes, bias = layers[step.module]
                rows, input_format = codes.reshape(len(codes), -1), network.formats[step.inputs[0]]
                network.weights[step.name] = IntegerWeights.of(levels, rows, bias, input_format)
            if step.inputs:
                integers, fraction = exact(step, [values[name] for name in step.inputs], network)
                x = torch.ldexp(integers, -torch.as_tensor(fraction))
                x = x.clamp(*step.clamp) if step.clamp else x
            else:
                x = images.double()
            network.shapes[step.name] = tuple(x.shape[1:])
            if step.format is not None:
                chosen = step.format
            elif step.same_format:
                chosen = network.formats[step.inputs[0]]
            else:
                bits = a_bit if network._reaches(step.name, read) else WIDE_BITS
                try:
                    chosen = Format.choose(x, bits)
                except ValueError as error:
                    raise ValueError(f"{step.name}: {error}") from None
            network.formats[step.name] = chosen
            values[step.name] = chosen.quantize(x)
            values = {name: value for name, value in values.items() if last.get(name, -1) > index}
        return network

    def _reaches(self, name: str, read: set[str]) -> bool:
        """Whether a layer reads this value, directly or through steps that keep its format."""
        if name in read:
            return True
        return any(self._reaches(s.name, read) for s in self.steps if s.same_format and name in s.inputs)

    def run(self, images: Tensor, saturated: dict[str, int] | None = None) -> dict[str, Tensor]:
        """Integers (float64) of every value, for real images [n, C, H, W].

        Args:
            images: preprocessed.
            saturated: gets, by name, how many integers were cut at an end of their format; those that a ReLU sets to
                its
                own ends are not.
        """
        values: dict[str, Tensor] = {}
        for step in self.steps:
            inputs = [values[name] for name in step.inputs]
            to = self.formats[step.name]
            x = (
                integer(step, inputs, self)
                if inputs
                else rounded(torch.ldexp(images.double(), torch.tensor(to.fraction)))
            )
            low, high = limits(step, to)
            if saturated is not None:
                relu = bool(step.clamp)
                cut = (x > high) & ~(relu & (high < to.high)) if relu else (x > high) | (x < low)
                saturated[step.name] = int(cut.sum())
            values[step.name] = x.clamp(low, high)
        return values


def reciprocal(count: int) -> tuple[int, int]:
    """1/count as (integer, exponent), integer · 2^-exponent; exact for powers of two."""
    if count & (count - 1) == 0:
        return 1, count.bit_length() - 1
    exponent = RECIPROCAL_BITS + count.bit_length() - 1
    return round(2**exponent / count), exponent


def requantized(x: Tensor, places: int | Tensor) -> Tensor:
    """Integers shifted right by so many places, to nearest, ties up (to the left exactly)."""
    return rounded(torch.ldexp(x, -torch.as_tensor(places, dtype=torch.int64)))


def _weighted(step: Step, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution or linear map of a step without its bias, in float64."""
    if step.op == "linear":
        return F.linear(x, weight)
    g = step.geometry
    assert g is not None
    (top, bottom), (left, right) = g.padding
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight, None, g.stride, 0, g.dilation, g.groups)


def exact(step: Step, inputs: list[Tensor], network: IntegerNetwork) -> tuple[Tensor, int | Tensor]:
    """What a step makes of integers before they go into its format: integers (float64), and their fraction."""
    formats, x = [network.formats[name] for name in step.inputs], inputs[0]
    if step.op in ("conv", "linear"):
        y = _finished(step, x, network.weights[step.name], step.weight_shape)
        return y, _per_channel(torch.from_numpy(_fractions(step, network)), y)
    if step.op in ("add", "concatenate"):
        most = max(f.fraction for f in formats)
        terms = [torch.ldexp(x, torch.tensor(most - f.fraction)) for x, f in zip(inputs, formats, strict=True)]
        return (sum(terms[1:], terms[0]) if step.op == "add" else torch.cat(terms, 1)), most
    if step.op == "average_pool":
        factor, exponent = reciprocal(step.count)
        return _windows(step, x, 0.0).sum((4, 5)) * factor, formats[0].fraction + exponent
    return _moved(step, x, fill=float(formats[0].low)), formats[0].fraction


def integer(step: Step, inputs: list[Tensor], network: IntegerNetwork) -> Tensor:
    """A step on integers, before saturation: bit for bit what the NumPy reference does."""
    y, fraction = exact(step, inputs, network)
    return requantized(y, fraction - network.formats[step.name].fraction)


def _fractions(step: Step, network: IntegerNetwork) -> Array:
    """[C]: of a layer's finished sums."""
    weights, input_format = network.weights[step.name], network.formats[step.inputs[0]]
    result: Array = input_format.fraction + weights.extra - weights.unit
    return result


def shifts(step: Step, network: IntegerNetwork) -> Array:
    """[C]: places to the right from a layer's sum to its output format."""
    result: Array = _fractions(step, network) - network.formats[step.name].fraction
    return result


def limits(step: Step, to: Format) -> tuple[int, int]:
    """The range of a step's integers: its format's, and that of a ReLU or ReLU6 in it."""
    if not step.clamp:
        return to.low, to.high
    low, high = (
        value if math.isinf(value) else math.floor(math.ldexp(value, to.fraction) + 0.5) for value in step.clamp
    )
    return int(max(low, to.low)), int(min(high, to.high))


def _per_channel(values: Tensor, y: Tensor) -> Tensor:
    """[C] in the place of y's channels, [n, C, ...] or [n, C]."""
    return values.reshape(1, -1, *[1] * (y.ndim - 2))


def _finished(step: Step, x: Tensor, weights: IntegerWeights, shape: Iterable[int]) -> Tensor:
    """Sums of integers, factor and bias included, in the unit of each channel."""
    y = _weighted(step, x, weights.integers.reshape(*shape))
    if weights.factor:
        y = y * _per_channel(torch.tensor(weights.factor, dtype=torch.float64), y)
    return y + _per_channel(weights.bias, y)


def _windows(step: Step, x: Tensor, fill: float) -> Tensor:
    (top, bottom), (left, right) = step.padding
    x = F.pad(x, (left, right, top, bottom), value=fill)
    (kh, kw), (down, across) = step.kernel, step.stride
    return x.unfold(2, kh, down).unfold(3, kw, across)


def _moved(step: Step, x: Tensor, fill: float) -> Tensor:
    """Steps that compute nothing."""
    if step.op == "max_pool":
        return _windows(step, x, fill).amax((4, 5))
    if step.op == "flatten":
        return x.flatten(1)
    if step.op == "pad":
        return F.pad(x, [n for before_after in reversed(step.padding) for n in before_after])
    if step.op in ("relu", "requantize"):
        return x
    assert step.op == "slice", step.op
    return x[tuple([slice(None), *(slice(*part) for part in step.slices)])]
