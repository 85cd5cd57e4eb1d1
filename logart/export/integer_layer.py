"""The integer-only reference of a layer on log codebooks.

It computes in int64 as the hardware would and only that way: data is shifted, added and subtracted, never multiplied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from logart.export.hardware import Array, FixedPoint, HardwareLevels, Powers, signed_powers
from logart.grids.grid import SCALE_UNIT

SCALE_FRACTION = SCALE_UNIT.bit_length() - 1  # a scale is an integer over 2^5
_LIMIT = 61  # sums and biases stay below 2^61 each, so that int64 holds their sum
_ELEMENTS_AT_ONCE = 2**23
_PAD_MODES: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@dataclass(frozen=True)
class Geometry:
    """What a convolution does beside its weights; each pair is of height and width, paddings are (before, after)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str = "zeros"

    def windows(self, x: Array) -> Array:
        """What each output sees of x [n, C, H, W]: a view [C, kh, kw, n, H', W'] of the padded x."""
        x = np.pad(x, ((0, 0), (0, 0), *self.padding), mode=_PAD_MODES[self.padding_mode])
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        seen = sliding_window_view(x, spans, axis=(2, 3))
        (down, right), (dy, dx) = self.stride, self.dilation
        return seen[:, :, ::down, ::right, ::dy, ::dx].transpose(1, 4, 5, 0, 2, 3)


@dataclass(frozen=True)
class IntegerLayer:
    """The integer-only reference of a quantized convolution or linear layer.

    Activations come in `input` format. A term ±2^e of a weight shifts one by e + guard, to the left where that is
    positive: exact; to the right else, rounded to nearest, ties up. Terms are summed in `accumulator` format, whose
    fraction is the input's and `guard` more. A scale i/32 is applied to the sum once, as the signed powers of i: the
    output has 5 fraction bits more than the accumulator. The bias, in output format, is added last. No input of that
    format can make a sum overflow: the widths are those of the worst case.
    """

    powers: Powers
    numerators: tuple[int, ...]  # empty where nothing is scaled
    geometry: Geometry | None
    input: FixedPoint
    accumulator: FixedPoint
    output: FixedPoint
    bias: Array | None

    @classmethod
    def plan(
        cls,
        levels: HardwareLevels,
        codes: Array,
        input_format: FixedPoint,
        *,
        geometry: Geometry | None = None,
        bias: Array | None = None,
    ) -> IntegerLayer:
        """Choose the formats: guard bits so that no shift loses a bit, as far as 63 bits hold the worst case.

        Args:
            codes: the weight's shape, uint8.
            input_format: of the activations.
            geometry: of a convolution; None is a linear layer.
            bias: [C] float.
        """
        powers = levels.powers(codes.reshape(len(codes), -1))
        numerators = levels.numerators_of_rows(len(codes))
        used = powers.used or [0]
        relative = np.where(powers.signs != 0, np.ldexp(1.0, powers.exponents.astype(np.int32) - used[-1]), 0.0)
        growth = relative.sum((0, 2))  # Σ|terms| of each row, in units of the largest term
        widest = np.log2(max(1.0, float((growth * (numerators or 1)).max()))) + used[-1] + input_format.bits - 1
        guard = min(max(0, -used[0]), math.floor(_LIMIT - widest))
        extra = SCALE_FRACTION if numerators else 0
        largest_bias = 0.0 if bias is None else float(np.abs(bias).max(initial=0.0))
        if largest_bias:
            guard = min(guard, _LIMIT - math.frexp(largest_bias)[1] - input_format.fraction - extra)
        fraction = input_format.fraction + guard
        sums = np.ldexp(growth, used[-1] + guard + input_format.bits - 1)  # rounding takes no term past a power of two
        rounded = None if bias is None else np.rint(np.ldexp(bias.astype(np.float64), fraction + extra))
        ends = sums * (numerators or 1) + (0 if rounded is None else np.abs(rounded))
        return cls(
            powers,
            numerators,
            geometry,
            input_format,
            FixedPoint(_width(sums), fraction),
            FixedPoint(_width(ends), fraction + extra),
            None if rounded is None else rounded.astype(np.int64),
        )

    @property
    def guard(self) -> int:
        """How many fraction bits the accumulator has beyond the input."""
        return self.accumulator.fraction - self.input.fraction

    @property
    def rounded_terms(self) -> Array:
        """How many terms of each row are shifted to the right, [C]; no bit is lost where it is 0."""
        right = (self.powers.signs != 0) & (self.powers.exponents + self.guard < 0)
        return right.sum((0, 2))  # type: ignore[no-any-return]

    def error_bound(self) -> Array:
        """[C] float64: how far an output may lie from the layer computed in real numbers with the same levels.

        With scale s, Σ|w| over the row's weights, u the half units (half of 2^-fraction) of the three formats, and R
        the terms that are shifted to the right, for activations that do not saturate:

            Σ|s·w| · u_input  +  s · R · u_accumulator  +  u_output where there is a bias
        """
        weights = np.ldexp(self.powers.signs.astype(np.float64), self.powers.exponents.astype(np.int32)).sum(0)
        scale = np.array(self.numerators) / SCALE_UNIT if self.numerators else 1.0
        bound: Array = scale * np.abs(weights).sum(1) * self.input.half_unit
        bound = bound + scale * self.rounded_terms * self.accumulator.half_unit
        return bound + (0.0 if self.bias is None else self.output.half_unit)

    def run(self, x: Array) -> Array:
        """Integers [n, C, H, W], or [..., K] of a linear layer, in input format -> the outputs in output format."""
        if self.geometry is None:
            y = self._finish(_accumulate(x.reshape(-1, x.shape[-1]).T.copy(), self.powers, self.guard))
            return y.T.reshape(*x.shape[:-1], len(y))
        seen = self.geometry.windows(x)
        _, _, _, n, height, width = seen.shape
        images = max(1, _ELEMENTS_AT_ONCE // max(1, seen.size // n))
        parts = [self._convolve(seen[:, :, :, start : start + images]) for start in range(0, n, images)]
        return np.concatenate(parts, axis=1).reshape(-1, n, height, width).transpose(1, 0, 2, 3)

    def _convolve(self, seen: Array) -> Array:
        """The outputs [C, positions] of windows [C, kh, kw, n, H', W'], group by group."""
        assert self.geometry is not None
        groups, rows = self.geometry.groups, self.powers.signs.shape[1]
        sums = []
        for group in range(groups):
            inputs, outputs = (slice(group * c // groups, (group + 1) * c // groups) for c in (len(seen), rows))
            columns = seen[inputs].reshape(self.powers.signs.shape[2], -1)
            sums.append(_accumulate(columns, self.powers.rows(outputs), self.guard))
        return self._finish(np.concatenate(sums))

    def _finish(self, sums: Array) -> Array:
        """Scale and bias on sums [C, positions]."""
        if self.numerators:
            sums = np.stack([_scaled(row, i) for row, i in zip(sums, self.numerators, strict=True)])
        return sums if self.bias is None else sums + self.bias[:, None]


def _accumulate(columns: Array, powers: Powers, guard: int) -> Array:
    """Activations [K, positions] times weights [C, K], without a multiplication: [C, positions]."""
    signs, exponents = powers.signs, powers.exponents
    sums = np.zeros((signs.shape[1], columns.shape[1]), columns.dtype)
    for exponent in powers.used:
        shifted = _shifted(columns, exponent + guard)
        signs_here = np.where(exponents == exponent, signs, 0).sum(0)  # no two terms of a weight are equal
        for row, sign in enumerate(signs_here):
            if (plus := np.flatnonzero(sign > 0)).size:
                sums[row] = sums[row] + shifted[plus].sum(0)
            if (minus := np.flatnonzero(sign < 0)).size:
                sums[row] = sums[row] - shifted[minus].sum(0)
    return sums


def _shifted(x: Array, places: int) -> Array:
    """To the left, or rounded to the right; beyond 62 places nothing of a 63-bit number is left."""
    if places >= 0:
        return x << places
    places = min(-places, 62)
    return (x + (1 << (places - 1))) >> places


def _scaled(x: Array, numerator: int) -> Array:
    """x times a positive integer, by its signed powers of two."""
    (_, exponent), *rest = signed_powers(numerator)
    result = x << exponent
    for sign, exponent in rest:
        result = result + (x << exponent) if sign > 0 else result - (x << exponent)
    return result


def _width(largest: Array) -> int:
    """Bits of a two's complement number up to these magnitudes, floats that may be a little off."""
    return math.frexp(float(largest.max(initial=0.0)) * (1 + 2**-30))[1] + 1
