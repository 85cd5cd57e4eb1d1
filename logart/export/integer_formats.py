"""Number formats of the integer network, and the weights of its layers as integers in each channel's own unit.

Formats are the even grids of quantized activations whose steps are powers of two, so that requantization is a shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logart.export.hardware import Array, HardwareLevels
from logart.export.integer_layer import SCALE_FRACTION
from logart.grids.activations import Seen, choose_even_grid

ACCUMULATOR_BITS = 32


def rounded(x: Tensor) -> Tensor:
    """To nearest, ties up."""
    return torch.floor(x + 0.5)


@dataclass(frozen=True)
class Format:
    """Integers of `bits` bits that count units of 2^-fraction, in two's complement where signed."""

    bits: int
    fraction: int
    signed: bool

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return 2 ** (self.bits - self.signed) - 1

    def quantize(self, x: Tensor) -> Tensor:
        """Real numbers as integers (float64), to nearest, ties up, saturated."""
        return rounded(torch.ldexp(x.double(), torch.tensor(self.fraction))).clamp(self.low, self.high)

    def real(self, x: Tensor) -> Tensor:
        """What integers of this format stand for."""
        return torch.ldexp(x.double(), torch.tensor(-self.fraction))

    @classmethod
    def choose(cls, x: Tensor, bits: int) -> Format:
        """The format of so many bits with the least error, as `choose_even_grid` measures it.

        Raises:
            ValueError: x is not finite.
        """
        seen = Seen.sampled(x)
        if not all(math.isfinite(end) for end in seen.extremes):
            raise ValueError("its values are not finite")
        grid = choose_even_grid(seen, bits, pow2=True)
        return cls(bits, round(-math.log2(grid.step)), grid.low < 0)


@dataclass(frozen=True)
class IntegerWeights:
    """A layer's weights as terms ±2^(unit + place), each channel with a unit of its own.

    Attributes:
        unit: [C] int64, exponents; terms below a channel's unit are left out.
        integers: [C, K] float64, the weights in their channel's unit: exact integers.
        factor: [C] ints over 2^SCALE_FRACTION that the sums are multiplied by; empty where there is none.
        bias: [C] float64 integers, in the unit of the finished sum.
        bits: [C], of the worst case of the accumulator, factor and bias included.
        left_out: [C], how many terms lie below the unit.
    """

    unit: Array
    integers: Tensor
    factor: tuple[int, ...]
    bias: Tensor
    bits: Array
    left_out: Array

    @property
    def extra(self) -> int:
        """Fraction bits that the channels' factors add."""
        return SCALE_FRACTION if self.factor else 0

    @classmethod
    def of(cls, levels: HardwareLevels, codes: Array, bias: Tensor | None, input_format: Format) -> IntegerWeights:
        """Choose each channel's unit: its smallest term, or larger where the accumulator would not fit.

        Args:
            levels: of the layer.
            codes: [C, K] uint8.
            bias: [C] real.
            input_format: the format of the layer's input.
        """
        powers = levels.powers(codes)
        signs, exponents = powers.signs.astype(np.int64), powers.exponents.astype(np.int64)
        factor = levels.numerators_of_rows(len(codes))
        extra = SCALE_FRACTION if factor else 0
        used = signs != 0
        least = np.where(used, exponents, np.iinfo(np.int64).max).min((0, 2), initial=np.iinfo(np.int64).max)
        largest = max(-input_format.low, input_format.high)
        weight = np.where(used, np.ldexp(1.0, exponents), 0.0).sum((0, 2)) * largest * np.array(factor or 1)
        offset = np.zeros(len(codes)) if bias is None else bias.double().abs().numpy()
        # in real units: |Σ| ≤ weight · 2^-fraction · 2^-extra, and the bias; the accumulator counts
        # 2^(unit-fraction-extra)
        worst = np.ldexp(weight, -input_format.fraction - extra) + offset
        fits = np.frexp(worst)[1].astype(np.int64) + input_format.fraction + extra - (ACCUMULATOR_BITS - 1)
        floor = np.where(worst > 0, fits, 0)
        unit = np.where(least < np.iinfo(np.int64).max, np.maximum(least, floor), floor)
        kept = used & (exponents >= unit[:, None])
        integers = (signs * np.where(kept, np.ldexp(1.0, np.where(kept, exponents - unit[:, None], 0)), 0.0)).sum(0)
        rounded = np.floor(np.ldexp(offset * 0 if bias is None else bias.double().numpy(),
                                    input_format.fraction + extra - unit) + 0.5)  # fmt: skip
        sums = np.abs(integers).sum(1) * largest * np.array(factor or 1) + np.abs(rounded)
        return cls(
            unit,
            torch.from_numpy(integers),
            factor,
            torch.from_numpy(rounded),
            np.frexp(sums)[1] + 1,
            (used & ~kept).sum((0, 2)),
        )
