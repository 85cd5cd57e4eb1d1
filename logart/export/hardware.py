"""What a multiplier-less datapath does with log codebooks: levels as shifts and adds, number formats, counts.

A level is sign · 2^shift · (1 + Σ ± 2^-k), so a product is a few shifted copies of the activation, added or subtracted.
Arrays and codebooks in, arrays out; nothing here reads files or runs networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from logart.grids.grid import SCALE_UNIT, CodebookSpec

Array = np.ndarray[Any, np.dtype[Any]]
ACTIVATION_BITS = 16


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

    def saturated(self, x: Array) -> int:
        """How many of x are out of range."""
        integers, limit = np.rint(np.ldexp(x.astype(np.float64), self.fraction)), 2 ** (self.bits - 1)
        return int(np.count_nonzero((integers < -limit) | (integers >= limit)))

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
        """The levels as their grid says.

        Raises:
            ExactRoot2Error: a √2 that is not approximated.
            ValueError: a grid without shifts, or a scale that the range of the weights' type cut.
        """
        shifts = spec.grid.shifts(spec, n_bits, dtype)
        every = (None if part is None else part.cpu().numpy().astype(np.int16) for part in shifts)
        return cls(*every)  # type: ignore[arg-type]

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
class Cost:
    """Counts for one input of a layer, and bits stored; nothing about silicon.

    Attributes:
        multiplications: what a linear grid multiplies, one a weight and output position; here all are replaced.
        shifts, adds: one of each for every term of a weight that is not zero, at every output position: 1 for a
            base-2 level, 2 for an odd half-step with √2 ≈ 1 + 1/2; a scale adds its shifts, and one add fewer.
        storage_bits: codes and the integers of the codebooks, in whole bytes.
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
