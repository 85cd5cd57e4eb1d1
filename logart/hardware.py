"""What a multiplier-less datapath does with log codebooks: levels as shifts and adds, an integer reference, counts.

A level is sign · 2^shift · (1 + Σ ± 2^-k), so a product is a few shifted copies of the activation, added or subtracted.
The reference computes a layer in int64 that way and only that way: data is shifted, added and subtracted, never
multiplied. Arrays and codebooks in, arrays out; nothing here reads files or runs networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from logart.grid import Spacing, root2
from logart.spec import SCALE_UNIT, CodebookSpec

Array = np.ndarray[Any, np.dtype[Any]]
ACTIVATION_BITS = 16
SCALE_FRACTION = SCALE_UNIT.bit_length() - 1  # a scale is an integer over 2^5
_LIMIT = 61  # sums and biases stay below 2^61 each, so that int64 holds their sum
_ELEMENTS_AT_ONCE = 2**23
_PAD_MODES: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class ExactRoot2Error(ValueError):
    """Levels with an exact √2, where shifts and adds are needed."""


def signed_powers(value: float) -> list[tuple[int, int]]:
    """A number as a short sum of ±2^e, [(±1, e), …], largest first: each time the nearest power of what is left."""
    powers = []
    while value:
        mantissa, exponent = math.frexp(abs(value))
        exponent -= mantissa <= 0.75  # halfway takes the smaller: 3/2 is 1 + 1/2
        sign = 1 if value > 0 else -1
        powers.append((sign, exponent))
        value -= math.ldexp(sign, exponent)
    return powers


@dataclass(frozen=True)
class FixedPoint:
    """Two's complement numbers of `bits` bits that count units of 2^-fraction."""

    bits: int
    fraction: int

    @classmethod
    def holding(cls, x: Array, bits: int = ACTIVATION_BITS) -> FixedPoint:
        """The finest format of so many bits that holds all of x, finite floats, without saturation."""
        largest = float(np.abs(x).max(initial=0.0))
        fraction = bits - 1 - (math.frexp(largest)[1] if largest else 0)
        if np.rint(math.ldexp(largest, fraction)) >= 2 ** (bits - 1):
            fraction -= 1
        return cls(bits, fraction)

    def quantize(self, x: Array) -> Array:
        """Floats as int64 of this format, to nearest, ties to even; what is out of range takes the end of the range."""
        limit = 2 ** (self.bits - 1)
        return np.clip(np.rint(np.ldexp(x.astype(np.float64), self.fraction)), -limit, limit - 1).astype(np.int64)

    @property
    def half_unit(self) -> float:
        """How far rounding to nearest moves a number at most."""
        return math.ldexp(0.5, -self.fraction)


@dataclass(frozen=True)
class Powers:
    """Weights [C, K] as sums of at most T signed powers of two.

    Attributes:
        signs: [T, C, K] int8; 0 where a weight has fewer than T terms.
        exponents: [T, C, K] int16.
    """

    signs: Array
    exponents: Array

    def rows(self, part: slice) -> Powers:
        """Those of some rows."""
        return Powers(self.signs[:, part], self.exponents[:, part])

    @property
    def counts(self) -> Array:
        """How many terms each row has, [C]."""
        counts: Array = np.count_nonzero(self.signs, axis=(0, 2))
        return counts

    @property
    def used(self) -> list[int]:
        """The exponents that occur, ascending."""
        return [int(e) for e in np.unique(self.exponents[self.signs != 0])]


@dataclass(frozen=True)
class HardwareLevels:
    """The levels of G codebooks of L codes as shifts and adds.

    Attributes:
        signs: [G, L] int16, -1, 0 or 1; a zero level has neither shift nor adds.
        shifts: [G, L] int16.
        adds: [G, L, A] int16, the add-shifts: k for + 2^-k, -k for - 2^-k, 0 for none.
        numerators: [G] int16, what the outputs of each channel are multiplied by, over 32; None where nothing is.
    """

    signs: Array
    shifts: Array
    adds: Array
    numerators: Array | None

    @classmethod
    def of(cls, spec: CodebookSpec, n_bits: int, dtype: torch.dtype = torch.float32) -> HardwareLevels:
        """The levels of a log grid.

        Raises:
            ExactRoot2Error: an odd half-step whose √2 is not approximated.
            ValueError: a linear grid, or a scale that the range of the weights' type cut.
        """
        if spec.spacing is Spacing.LINEAR:
            raise ValueError("a linear grid has no shifts; only logarithmic grids are exported to hardware")
        book = spec.codebook(n_bits, dtype)
        assert book.half_steps is not None and book.signs is not None
        signs, half_steps = book.signs.numpy().astype(np.int16), book.half_steps.numpy()
        odd = (half_steps % 2 != 0) & (signs != 0)
        if spec.terms == 0 and odd.any():
            raise ExactRoot2Error("an exact √2 is no sum of a few shifts")
        numerators = spec.columns["scale"] if "scale" in spec.columns else None
        if numerators is not None and book.scale is not None and not torch.equal(book.scale * SCALE_UNIT, numerators):
            raise ValueError("a scale takes the largest level out of its type's range")
        tail = np.array([-sign * e for sign, e in signed_powers(root2(spec.terms))[1:]] if odd.any() else [], np.int16)
        shifts = np.where(signs != 0, half_steps // 2, 0).astype(np.int16)
        adds = np.where(odd[..., None], tail, 0).astype(np.int16)
        return cls(signs, shifts, adds, None if numerators is None else numerators.numpy().astype(np.int16))

    def values(self) -> Array:
        """The levels [G, L] as float64, scales included."""
        factor = 1 + np.sum(np.sign(self.adds) * np.ldexp(1.0, -np.abs(self.adds).astype(np.int32)), axis=-1)
        values: Array = np.ldexp(factor, self.shifts.astype(np.int32)) * self.signs
        if self.numerators is not None:
            values = values * (self.numerators[:, None] / SCALE_UNIT)
        return values + 0.0  # no -0

    def codebook_of_row(self, rows: int) -> Array:
        """[C]: rows of a weight share the codebooks evenly, in order."""
        return np.arange(rows) // (rows // len(self.signs))

    def numerators_of_rows(self, rows: int) -> tuple[int, ...]:
        """[C]; empty where nothing is scaled."""
        return () if self.numerators is None else tuple(self.numerators[self.codebook_of_row(rows)].tolist())

    def powers(self, codes: Array) -> Powers:
        """The weights of codes [C, K] uint8, without their scales."""
        at = (self.codebook_of_row(len(codes))[:, None], codes)
        sign, shift, adds = self.signs[at], self.shifts[at], np.moveaxis(self.adds[at], -1, 0)
        signs = np.concatenate([sign[None], np.sign(adds) * sign]).astype(np.int8)
        return Powers(signs, np.concatenate([shift[None], shift - np.abs(adds)]))


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


@dataclass(frozen=True)
class Cost:
    """Counts for one input of a layer, and bits at rest; nothing about silicon.

    Attributes:
        multiplications: what a linear grid multiplies, one a weight and output position; here all are replaced.
        shifts, adds: one of each for every term of a weight that is not zero, at every output position: 1 for a
            base-2 level, 2 for an odd half-step with √2 ≈ 1 + 1/2; a scale adds its shifts, and one add fewer.
        storage_bits: codes and the packed integers of the codebooks.
        linear_storage_bits: the same weights on a linear grid, codes with a 32-bit scale and a zero point a channel.
    """

    multiplications: int
    shifts: int
    adds: int
    storage_bits: int
    linear_storage_bits: int

    @classmethod
    def of(cls, levels: HardwareLevels, codes: Array, n_bits: int, codebook_bytes: int, positions: int) -> Cost:
        """The counts of a layer whose codes have the weight's shape, `positions` output positions an input."""
        rows, groups = codes.reshape(len(codes), -1), len(levels.signs)
        terms = int(levels.powers(rows).counts.sum())
        scales = levels.numerators_of_rows(len(rows))
        digits = sum(len(signed_powers(i)) for i in scales)
        return cls(
            positions * rows.size,
            positions * (terms + digits),
            positions * (terms + digits - len(scales)),
            rows.size * n_bits + codebook_bytes * 8,
            rows.size * n_bits + groups * (32 + n_bits),
        )

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """Their sum."""
        fields = [(c.multiplications, c.shifts, c.adds, c.storage_bits, c.linear_storage_bits) for c in costs]
        return cls(*map(sum, zip(*fields, strict=True))) if fields else cls(0, 0, 0, 0, 0)
