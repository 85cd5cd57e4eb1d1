"""Codebooks: which levels an n-bit weight may take.

One idea carries the whole project: a grid is a sorted codebook of at most 2^n levels per channel. Base 2, base √2,
their per-channel mix and the linear grids are four ways to fill it; everything behind (rounding, search, learning,
packing) sees only the codebook.

Magnitudes of logarithmic grids are counted in *half-steps*: the integer h stands for 2^(h/2). Even half-steps are
powers of two, odd ones carry a factor √2. Levels are float64, so that comparing a float32 weight with the border
between two levels is exact, and 2^(h/2) of an even half-step is exact too.

Everything here is a pure function of tensors; C is the number of channels (of codebooks), n the bit width,
N = 2^(n-1) the number of magnitudes of one sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8

# √2 as sums of powers of two, for a multiplier-less product: one shift and `terms - 1` adds.
_ROOT2 = {
    0: math.sqrt(2.0),
    2: 1 + 1 / 2,
    3: 1 + 1 / 2 - 1 / 16,
    4: 1 + 1 / 2 - 1 / 16 - 1 / 64,
}


ROOT2_TEXT = {2: "1 + 1/2", 3: "1 + 1/2 - 1/16", 4: "1 + 1/2 - 1/16 - 1/64"}


class Spacing(str, Enum):
    """How neighbouring levels are spaced, which decides the mean that separates them."""

    LOG = "log"
    LINEAR = "linear"


class ScaleMethod(str, Enum):
    """The five grids a user can ask for."""

    LINEAR_MSE = "linear_mse"
    LINEAR_MINMAX = "linear_minmax"
    LOG_2 = "log_2"
    LOG_SQRT2 = "log_sqrt2"
    DYNAMIC = "dynamic"

    @property
    def spacing(self) -> Spacing:
        return Spacing.LINEAR if self.value.startswith("linear") else Spacing.LOG


@dataclass(frozen=True)
class Codebook:
    """The levels of C channels.

    On log grids a level is sign·2^(half_step/2)·scale, with √2 exact or approximated.

    Attributes:
        levels: [C, 2^n] float64, ascending. A channel that needs fewer levels repeats one (all-zero: 2^n zeros).
        spacing: log or linear.
        half_steps: [C, 2^n] int64, the half-step of each level; None, as all the following, for linear grids.
        signs: [C, 2^n] int64, -1, 0 or 1: the sign of each level.
        n_base2: [C] int64, how many of the N magnitudes, from the smallest, are base 2.
        scale: [C] float64, the factor of each channel's levels; None is 1 everywhere.
    """

    levels: Tensor
    spacing: Spacing
    half_steps: Tensor | None = None
    signs: Tensor | None = None
    n_base2: Tensor | None = None
    scale: Tensor | None = None

    @property
    def borders(self) -> Tensor:
        """[C, 2^n - 1] float64: a weight at or past border i, seen from zero, belongs to the level beyond it.

        On log grids the geometric mean; 0 between both signs; half the other level where one is zero.
        """
        lower, upper = self.levels[:, :-1], self.levels[:, 1:]
        if self.spacing is Spacing.LINEAR:
            return lower + (upper - lower) / 2
        geometric = lower.sign() * lower.abs().sqrt() * upper.abs().sqrt()
        signs = lower.sign() * upper.sign()  # the product of the levels themselves may vanish
        return torch.where(signs > 0, geometric, torch.where(signs == 0, (lower + upper) / 2, 0.0))

    def select(self, rows: Tensor) -> Codebook:
        """The codebooks of some channels; `rows` is an index [C'] of integers."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Codebook:
        """The same on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Codebook:
        tensors = (self.half_steps, self.signs, self.n_base2, self.scale)
        return Codebook(change(self.levels), self.spacing, *(None if t is None else change(t) for t in tensors))

    def with_terms(self, terms: int) -> Codebook:
        """The same codes on levels whose √2 is approximated by `terms` terms; a linear codebook is unchanged."""
        if self.half_steps is None or self.signs is None:
            return self
        return replace(self, levels=log_levels(self.half_steps, self.signs, self.scale, terms))

    def scaled(self, scale: Tensor | float, terms: int, dtype: torch.dtype = torch.float32) -> Codebook:
        """The same log grid with every level times a positive scale, [C] or one; no further than `dtype` holds."""
        assert self.half_steps is not None and self.signs is not None
        scale = torch.as_tensor(scale, dtype=torch.float64, device=self.levels.device).expand(len(self.levels))
        largest = torch.finfo(dtype).max
        scale = scale.minimum(largest / self.levels[:, -1].clamp(min=1.0))
        return replace(self, levels=log_levels(self.half_steps, self.signs, scale, terms), scale=scale)


def root2(terms: int) -> float:
    """√2, exact (`terms` 0) or as a sum of 2, 3 or 4 powers of two: 1.5, 1.4375, 1.421875.

    Raises:
        ValueError: any other number of terms.
    """
    if terms not in _ROOT2:
        raise ValueError(f"terms must be one of {sorted(_ROOT2)} (0 is the exact square root), got {terms}")
    return _ROOT2[terms]


def check_bits(n_bits: int) -> None:
    """Raise ValueError unless a code of `n_bits` bits is one this project can pack."""
    if not MIN_BITS <= n_bits <= MAX_BITS:
        raise ValueError(f"bit width must be {MIN_BITS} to {MAX_BITS}, got {n_bits}")


def log_codebook(
    absmax: Tensor, n_bits: int, n_base2: int | Tensor, *, terms: int = 0, dtype: torch.dtype = torch.float32
) -> Codebook:
    """The logarithmic codebook of DESIGN section 2: k = n_base2 base-2 levels below, N - k base-√2 levels on top.

    Args:
        absmax: [C], largest magnitude of each channel's weights; 0 gives the codebook {0}.
        n_bits: 2 to 8.
        n_base2: k in 0..N, one for all channels or an integer tensor [C]. N is `log_2`, 0 is `log_sqrt2`.
        terms: how √2 is approximated, see `root2`.
        dtype: the weights' type; the top level is lowered where it would overflow that type.

    Returns:
        A log-spaced codebook with both signs of N magnitudes, no zero: exactly 2^n levels.

    Raises:
        ValueError: a bit width, n_base2 or number of terms out of range, or an absmax that is not finite.
    """
    check_bits(n_bits)
    n_levels = 2 ** (n_bits - 1)
    if not torch.isfinite(absmax).all():
        raise ValueError("absmax must be finite")
    k = torch.as_tensor(n_base2, device=absmax.device).expand(absmax.shape).long()
    if k.numel() and not (0 <= int(k.min()) and int(k.max()) <= n_levels):
        raise ValueError(f"n_base2 must be 0 to {n_levels} at {n_bits} bits, got {int(k.min())} to {int(k.max())}")
    top_exponent, top_half_step = _top_levels(absmax.double(), dtype)
    top = torch.where(k == n_levels, 2 * top_exponent, top_half_step)
    return mixed_codebook(top, k, n_bits, empty=absmax == 0, terms=terms)


def mixed_codebook(top: Tensor, n_base2: Tensor, n_bits: int, *, empty: Tensor, terms: int = 0) -> Codebook:
    """The logarithmic codebook below a largest magnitude.

    Args:
        top: [C] int64, the half-step of the largest magnitude; even where all magnitudes are base 2.
        n_base2: [C] int64, 0..N.
        empty: [C] bool, which channels have the codebook {0}.
    """
    n_levels = 2 ** (n_bits - 1)
    magnitudes = mixed_half_steps(top, n_base2, n_levels)
    half_steps = torch.cat([magnitudes.flip(1), magnitudes], dim=1)
    signs = torch.ones_like(half_steps)
    signs[:, :n_levels] = -1
    signs *= ~empty[:, None]
    return Codebook(log_levels(half_steps, signs, None, terms), Spacing.LOG, half_steps, signs, n_base2)


def mixed_half_steps(top: Tensor, n_base2: Tensor, n_levels: int) -> Tensor:
    """Half-steps [C, N] of the N magnitudes, ascending; arguments as `mixed_codebook`."""
    top, k = top[:, None], n_base2[:, None]
    exponent = torch.div(top - (n_levels - k), 2, rounding_mode="floor")
    position = torch.arange(n_levels, device=top.device)[None]
    base2 = 2 * (exponent - (k - 1 - position))
    sqrt2 = top - (n_levels - 1 - position)
    return torch.where(position < k, base2, sqrt2)


def distinct_n_base2(absmax: Tensor, n_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mixes that have levels of their own, about half of all; of those with equal levels the largest k.

    Where h + k is odd, h the channel's top half-step, the lowest √2-spaced level lies where a base-2 one would: k + 1
    has the same levels.

    Args:
        absmax: [C], of weights of `dtype`.

    Returns:
        [N / 2 + 1, C] int64, ascending along the first dimension up to N.
    """
    n_levels = 2 ** (n_bits - 1)
    _, top_half_step = _top_levels(absmax.double(), dtype)
    even = torch.arange(0, n_levels + 1, 2, device=absmax.device)
    return (even[:, None] + top_half_step % 2).clamp(max=n_levels)


def _top_levels(absmax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """floor(log2 a + 1/2) and floor(2·log2 a + 1/2), each [C] int64, no larger than `dtype` can hold.

    From the mantissa, not from a logarithm: log2 rounds, and a weight one ulp below a border would cross it. The
    floats 2**-0.25 and 2**-0.75 lie just below the true borders, 2**-0.5 just above its own, hence <= and <.
    """
    mantissa, exponent = torch.frexp(absmax)  # a = mantissa · 2^exponent with mantissa in [1/2, 1)
    exponent = exponent.long()
    top_exponent = exponent - (mantissa < 2**-0.5).long()
    top_half_step = 2 * exponent - (mantissa <= 2**-0.25).long() - (mantissa <= 2**-0.75).long()
    largest = largest_half_step(dtype)
    return top_exponent.clamp(max=largest // 2), top_half_step.clamp(max=largest)


def largest_half_step(dtype: torch.dtype) -> int:
    """Of the largest magnitude that a type holds: an odd one, 2^(h/2) with h = 2·exponent + 1."""
    return 2 * (math.frexp(torch.finfo(dtype).max)[1] - 1) + 1


def log_levels(half_steps: Tensor, signs: Tensor, scale: Tensor | None, terms: int) -> Tensor:
    """Levels [C, 2^n] float64 from half-steps and signs [C, 2^n] and scales [C]."""
    odd = half_steps % 2
    factor = torch.tensor([1.0, root2(terms)], dtype=torch.float64)[odd.cpu()]
    # NumPy's ldexp is exact everywhere; a GPU's may go through a power function that rounds.
    magnitudes = torch.from_numpy(np.ldexp(factor.numpy(), ((half_steps - odd) // 2).cpu().int().numpy()))
    levels = magnitudes.to(half_steps.device) * signs
    return (levels if scale is None else levels * scale[:, None]) + 0.0  # + 0.0 turns -0 into 0


def linear_codebook(low: Tensor, high: Tensor, n_bits: int, *, dtype: torch.dtype = torch.float32) -> Codebook:
    """2^n evenly spaced levels over [low, high], widened to hold zero, which falls on a level (asymmetric affine).

    Args:
        low, high: [C], the range of each channel.
        n_bits: 2 to 8.
        dtype: the weights' type; moving zero onto a level can push an end past what it holds, which is cut.

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
    return affine_codebook(step, zero_point, n_bits, dtype=dtype)


def affine_codebook(step: Tensor, zero_point: Tensor, n_bits: int, *, dtype: torch.dtype = torch.float32) -> Codebook:
    """The linear codebook step·(i - zero_point), i in 0..2^n - 1, of steps [C] float64 and codes of zero [C]."""
    index = torch.arange(2**n_bits, device=step.device, dtype=torch.float64)
    largest = torch.finfo(dtype).max
    levels = step[:, None] * (index - zero_point[:, None])
    return Codebook(levels.clamp(-largest, largest), Spacing.LINEAR)


def minmax_codebook(w: Tensor, n_bits: int) -> Codebook:
    """The linear codebook over the whole range of w [C, K]."""
    return linear_codebook(w.amin(1), w.amax(1), n_bits, dtype=w.dtype)
