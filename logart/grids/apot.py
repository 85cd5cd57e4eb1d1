"""`apot`: every level is a sum of at most two powers of two, so a product is two shifts and an add; no √2 anywhere.

After Li, Dong and Wang, "Additive Powers-of-Two Quantization", ICLR 2020, eq. 5: with a magnitude of m = k·t bits, t
terms of k bits each, its magnitudes are all sums p_0 + … + p_(t-1), where p_i is zero or one of the 2^k - 1 powers
2^-i, 2^-(i+t), 2^-(i+2t), …; a factor per channel, γ, then fits them to the weights. Here:

* m = n - 1, one bit is the sign's. +0 and -0 are one value, so a channel has 2^n - 1 distinct ones, zero included.
* t = 2 and k = m / 2. Up to 2 bits one term is left, t = 1, as with the paper's k = 2: zero and powers of two.
* Where m is odd, the first term has a bit more: its powers begin 2^0, 2^-1, and alternate with the second term's from
  there on. At 4 bits that gives the magnitudes {0, 1, 2, 3, 4, 6, 8, 10} / 8.
* From 6 bits on the paper adds a third term; this grid keeps two and gives them more bits, so that a weight never costs
  more than an add.
* γ is searched like any grid's choice, by the measure asked for: 17/32 … 32/32 times a power of two (`SCALES`). Its
  five bits are applied once to a channel's sum, as shifts and adds.

Rounding to nearest and learning are linear between two levels, as the paper projects weights. A codebook is an
exponent and the numerator of its factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from logart.grids.grid import (
    NO_OPTIONS,
    SCALE_UNIT,
    Codebook,
    CodebookSpec,
    Grid,
    GridOptions,
    Shifts,
    Spacing,
    check_bits,
)

# (halvings, numerator) of the factors tried, from a quarter of what the largest weight asks for to all of it and more;
# the largest come last, which on equal errors win: without need nothing is clipped.
SCALES = tuple((halvings, i) for halvings in (2, 1, 0) for i in range(SCALE_UNIT // 2 + 1, SCALE_UNIT + 1))
_LOWEST = -2200  # no type has smaller numbers


@cache
def magnitudes(n_bits: int) -> tuple[tuple[int, ...], ...]:
    """The N = 2^(n-1) magnitudes, ascending, each as the places of its powers: (0, 2) is 2^0 + 2^-2.

    Raises:
        ValueError: a bit width out of range.
    """
    check_bits(n_bits)
    m = n_bits - 1
    first_bits, second_bits = ((m + 1) // 2, m // 2) if m > 2 else (m, 0)
    start = 1 + first_bits - second_bits  # 2 where the first term's powers begin 2^0, 2^-1
    second = [start + 2 * j for j in range(2**second_bits - 1)]
    places = range(2**first_bits - 1 + len(second))
    first = [place for place in places if place not in second]
    sums = [(*p, *q) for p in ((), *((place,) for place in first)) for q in ((), *((place,) for place in second))]
    return tuple(sorted((tuple(sorted(s)) for s in sums), key=lambda s: sum(2.0**-place for place in s)))


@dataclass(frozen=True)
class ApotGrid(Grid):
    """Columns: `exponent`, of the place 0; `scale`, over `SCALE_UNIT`, 0 in an all-zero channel."""

    def candidates(self, w: Tensor, n_bits: int, options: GridOptions) -> Iterator[Codebook]:
        absmax = w.abs().amax(1).double()
        if not torch.isfinite(absmax).all():
            raise ValueError("weights must be finite")
        top = float(unit_levels(n_bits)[-1])
        exponent = torch.frexp(absmax / top)[1].long()  # top·2^exponent is above the largest weight, by less than 2
        for halvings, numerator in SCALES:
            scale = torch.where(absmax > 0, numerator, 0)
            columns = {"exponent": torch.where(absmax > 0, exponent - halvings, 0), "scale": scale}
            yield self.codebook(columns, n_bits, 0, w.dtype)

    def n_candidates(self, n_bits: int, options: GridOptions = NO_OPTIONS) -> int:
        return len(SCALES)

    def codebook(self, columns: Mapping[str, Tensor], n_bits: int, terms: int, dtype: torch.dtype) -> Codebook:
        spec = CodebookSpec(self, dict(columns))
        units, factor = self.units(spec, n_bits, dtype)
        largest = torch.finfo(dtype).max
        return Codebook((units * factor[:, None]).clamp(-largest, largest) + 0.0, spec)

    def wrong(self, columns: Mapping[str, Tensor], n_bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
        exponent, scale = columns["exponent"], columns["scale"]
        return {
            "exponent": (exponent < _LOWEST) | (exponent > math.frexp(torch.finfo(dtype).max)[1]),
            "scale": (scale < 0) | (scale > SCALE_UNIT),
        }

    def shifts(self, spec: CodebookSpec, n_bits: int, dtype: torch.dtype) -> Shifts:
        if (self.units(spec, n_bits, dtype)[0].amax() * self._factor(spec)).amax() > torch.finfo(dtype).max:
            raise ValueError("a scale takes the largest level out of its type's range")
        exponent, scale = spec.columns["exponent"][:, None], spec.columns["scale"]
        used = [places or (0,) for places in magnitudes(n_bits)]
        shift = torch.tensor([-places[0] for places in used])
        adds = torch.tensor([[places[1] - places[0] if len(places) > 1 else 0] for places in used])
        sign = torch.tensor([int(bool(places)) for places in magnitudes(n_bits)])
        live = (scale > 0)[:, None]
        both = torch.cat([-sign.flip(0), sign]) * live
        shifts = torch.where(both != 0, torch.cat([shift.flip(0), shift]) + exponent, 0)
        every = torch.cat([adds.flip(0), adds]) * (both != 0)[..., None]
        every = every if every.any() else every[..., :0]
        return Shifts(both, shifts, every, torch.where(scale > 0, scale, SCALE_UNIT))

    def units(self, spec: CodebookSpec, n_bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        units = unit_levels(n_bits).to(spec.columns["scale"].device)
        every = torch.cat([-units.flip(0), units]) + 0.0  # no -0
        return every.expand(spec.channels, -1), self._factor(spec)

    @staticmethod
    def _factor(spec: CodebookSpec) -> Tensor:
        scale = spec.columns["scale"].double() / SCALE_UNIT
        exponent = spec.columns["exponent"].cpu().int().numpy()
        return torch.from_numpy(np.ldexp(scale.cpu().numpy(), exponent)).to(scale.device)


def unit_levels(n_bits: int) -> Tensor:
    """The magnitudes [N] float64 of exponent 0, ascending."""
    return torch.tensor([sum(2.0**-place for place in places) for places in magnitudes(n_bits)], dtype=torch.float64)


APOT = ApotGrid("apot", "APoT", Spacing.LINEAR, {"exponent": None, "scale": None})
