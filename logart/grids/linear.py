"""The linear grids: 2^n evenly spaced levels, asymmetric affine; `linear_minmax` and `linear_mse`.

A codebook is its step and the code of zero: level i = step·(i - zero_point).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from logart.grids.grid import NO_OPTIONS, Codebook, CodebookSpec, Grid, GridOptions, Spacing, check_bits

SHRUNK = range(21, 101)  # per cent of the range that `linear_mse` tries


@dataclass(frozen=True)
class LinearGrid(Grid):
    """Evenly spaced levels over shares of a channel's range.

    Attributes:
        shares: the shares tried, in per cent.
    """

    shares: tuple[int, ...] = (100,)

    def candidates(self, w: Tensor, n_bits: int, options: GridOptions) -> Iterator[Codebook]:
        low, high = w.double().amin(1), w.double().amax(1)
        for share in self.shares:
            columns = affine_columns(low * share / 100, high * share / 100, n_bits)
            yield self.codebook(columns, n_bits, 0, w.dtype)

    def n_candidates(self, n_bits: int, options: GridOptions = NO_OPTIONS) -> int:
        return len(self.shares)

    def codebook(self, columns: Mapping[str, Tensor], n_bits: int, terms: int, dtype: torch.dtype) -> Codebook:
        step, largest = columns["step"], torch.finfo(dtype).max
        index = torch.arange(2**n_bits, device=step.device, dtype=torch.float64)
        levels = (step[:, None] * (index - columns["zero_point"][:, None])).clamp(-largest, largest)
        return Codebook(levels, CodebookSpec(self, dict(columns)))

    def wrong(self, columns: Mapping[str, Tensor], n_bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
        step, zero_point = columns["step"], columns["zero_point"]
        return {
            "step": ~(step.isfinite() & (step >= 0)),
            "zero_point": (zero_point < 0) | (zero_point >= 2**n_bits),
        }

    def units(self, spec: CodebookSpec, n_bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        steps = torch.arange(2**n_bits, dtype=torch.float64) - spec.columns["zero_point"][:, None]
        return steps, spec.columns["step"]


def affine_columns(low: Tensor, high: Tensor, n_bits: int) -> dict[str, Tensor]:
    """The step and code of zero of 2^n levels over [low, high], widened to hold zero, which falls on a level.

    Args:
        low, high: [C], the range of each channel.
        n_bits: 2 to 8.

    Raises:
        ValueError: a bit width out of range, or a bound that is not finite.
    """
    check_bits(n_bits)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the range of a linear grid must be finite")
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    steps = 2**n_bits - 1
    step = high / steps - low / steps  # two divisions: high - low may overflow
    zero_point = torch.where(step > 0, torch.round(-low / torch.where(step > 0, step, 1.0)), 0.0)
    return {"step": step, "zero_point": zero_point.long()}


def linear_codebook(low: Tensor, high: Tensor, n_bits: int, *, dtype: torch.dtype = torch.float32) -> Codebook:
    """The linear codebook over [low, high], each [C]; moving zero onto a level can push an end past `dtype`: cut."""
    return LINEAR_MINMAX.codebook(affine_columns(low, high, n_bits), n_bits, 0, dtype)


def power_error(delta: Tensor) -> Tensor:
    """Σ |δ|^2.4 per codebook, the measure of `linear_mse`, [G, M] -> [G] float64."""
    return delta.double().abs().pow(2.4).sum(1)


_COLUMNS: dict[str, int | None] = {"step": None, "zero_point": None}
LINEAR_MINMAX = LinearGrid("linear_minmax", "linear min-max", Spacing.LINEAR, _COLUMNS, ("step",))
LINEAR_MSE = LinearGrid(
    "linear_mse", "linear MSE", Spacing.LINEAR, _COLUMNS, ("step",), own_error=power_error, shares=tuple(SHRUNK)
)
