"""Grids of activations, one for a whole tensor: 2^n evenly spaced levels, zero among them.

Signed tensors take step·{-2^(n-1) … 2^(n-1)-1}, others step·{0 … 2^n-1}: two's complement and plain integers, so that
hardware needs no zero point. These are the linear grid's levels (`linear`) with its zero point at an end or in the
middle; their codes go up to 16 bits, so that levels are computed where weights look them up.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from logart.grids.grid import Grid, GridOptions, ScaleSearch, Spacing, borders_between
from logart.grids.rounding import count_below, dequantize
from logart.grids.search import choose_codebook

MIN_BITS_A, MAX_BITS_A, FLOAT_BITS = 2, 16, 32
# Of a tensor's values errors are measured on all, or on so many evenly spaced ones and all of the largest: a few
# that saturate make most of the error near the best step, and of those an even sample has next to none.
SAMPLE, LARGEST = 2**15, 2**15
_PER_OCTAVE, _OCTAVES = 16, 5  # steps tried: 4.4 % apart, down to 1/32 of the one at which nothing saturates


class ActScale(str, Enum):
    """Which steps an activation grid may have: powers of two (requantization is a shift), or any."""

    AUTO = "auto"  # powers of two with a hardware approximation, else any
    POW2 = "pow2"
    FLOAT = "float"


class SoftmaxGrid(str, Enum):
    """The levels of what softmax gives: as of other activations, or a log grid, so that its product is shifts."""

    UNIFORM = "uniform"
    LOG_2 = "log_2"
    LOG_SQRT2 = "log_sqrt2"


class EvenGrid(NamedTuple):
    """Levels step·{low … high}."""

    step: float
    low: int
    high: int


def code_range(n_bits: int, signed: bool) -> tuple[int, int]:
    """The least and the largest integer of so many bits."""
    return (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)


def quantize_even(x: Tensor, step: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """The nearest level of each element, ties up, saturated.

    Differentiable in x (straight through within the range, zero beyond) and in the step, as LSQ has it (Esser et al.
    2020): q - x/step within the range, the end code beyond.

    Args:
        x: any shape, float16 to float64; computed in float32 at least.
        step: scalar.
    """
    scaled = (x.float() if x.dtype.itemsize < 4 else x) / step
    nearest = torch.floor(scaled.detach() + 0.5)
    codes = nearest.clamp(low, high)  # type: ignore[arg-type]
    if scaled.requires_grad:  # the sum is exact: its parts differ by no more than half
        codes = torch.where(codes == nearest, scaled + (codes - scaled).detach(), codes)
    return (codes * step).to(x.dtype)


class Seen(NamedTuple):
    """The values of a tensor, or some that stand for all.

    Attributes:
        values: any shape, finite.
        counts: in their shape, how many values each stands for; a number for all.
        extremes: the least and the largest of all values.
    """

    values: Tensor
    counts: Tensor | float
    extremes: tuple[float, float]

    @classmethod
    def of(cls, x: Tensor) -> Seen:
        """All values of x."""
        low, high = x.detach().aminmax()
        return cls(x.detach(), 1.0, (float(low), float(high)))

    @classmethod
    def sampled(cls, x: Tensor) -> Seen:
        """All values of x, or `SAMPLE` of them and the `LARGEST` magnitudes."""
        stride = sampling_stride(x.numel(), x.numel())
        if stride == 1:
            return cls.of(x)
        x = x.detach().flatten()
        return cls.weighted(x[::stride], largest(x), x.numel(), cls.of(x).extremes)

    @classmethod
    def weighted(cls, some: Tensor, top: Tensor, total: int, extremes: tuple[float, float]) -> Seen:
        """Evenly spaced values of `total`, which stand for all but the largest magnitudes, and those."""
        limit = top.abs().min()
        top, others = top[top.abs() > limit], some[some.abs() <= limit]
        counts = torch.ones(len(top) + len(others), device=some.device)
        counts[len(top) :] = (total - len(top)) / max(1, len(others))
        return cls(torch.cat([top, others]), counts, extremes)

    def error(self, delta: Tensor) -> Tensor:
        """Σ|δ|^2.4 over all values, a float64 scalar; the exponent of BRECQ (Li et al. 2021)."""
        return (delta.abs().double().pow(2.4) * self.counts).sum(dtype=torch.float64)


def sampling_stride(total: int, part: int) -> int:
    """Every which of `total` values is taken, where they come in parts of so many: prime to it, else some channels
    would never be seen.
    """
    if total <= SAMPLE + LARGEST:
        return 1
    stride = math.ceil(total / SAMPLE)
    while math.gcd(stride, part) > 1:
        stride += 1
    return stride


def largest(x: Tensor) -> Tensor:
    """The `LARGEST` elements of x [n] by magnitude, in no order."""
    return x[x.abs().topk(min(LARGEST, len(x)), sorted=False).indices]


def choose_even_grid(x: Seen, n_bits: int, *, pow2: bool) -> EvenGrid:
    """The grid of least Σ|x - q|^2.4; of equal ones the finest.

    Args:
        x: what it is for.
        n_bits: 2 to 16.
        pow2: whether only powers of two are tried.
    """
    lowest, highest = x.extremes
    low, high = code_range(n_bits, lowest < 0)
    coarsest = max(highest / high, lowest / low if low else 0.0)
    if not coarsest > 0:
        return EvenGrid(1.0, low, high)
    if pow2:
        top = math.ceil(math.log2(coarsest))
        steps = [2.0 ** (top - i) for i in range(_OCTAVES + 2)]
    else:
        steps = [coarsest * 2 ** (-i / _PER_OCTAVE) for i in range(_PER_OCTAVE * _OCTAVES + 1)]
    tried = torch.tensor(steps, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    errors = torch.stack([even_error(x, EvenGrid(float(step), low, high)) for step in tried])
    chosen = len(steps) - 1 - int(errors.flip(0).argmin())
    return EvenGrid(float(tried[chosen]), low, high)


def even_error(x: Seen, grid: EvenGrid) -> Tensor:
    """Σ|x - q|^2.4 of a grid, a float64 scalar."""
    step = torch.tensor(grid.step, dtype=torch.float32, device=x.values.device)
    return x.error(quantize_even(x.values, step, grid.low, grid.high) - x.values)


def choose_log_levels(x: Seen, grid: Grid, n_bits: int, terms: int = 0) -> Tensor:
    """Levels [2^n] float64 of a log grid for values from zero on, such as softmax gives: zero and 2^n - 1 magnitudes.

    The grid's codebook whose unused negative codes go to the positive side (`reassigned_codes`), its top by the least
    error of power 2.4; the smallest level gives way to zero, for thousands of values near zero must not add up.

    Args:
        x: values from zero on.
        grid: `log_2` or `log_sqrt2`.
        n_bits: 2 to 8.
        terms: powers of two that stand for √2; 0 is exact.
    """
    options = GridOptions(terms, ScaleSearch.HALF_STEP, asymmetric=True)
    values = x.values.reshape(1, -1)
    levels = choose_codebook(values, grid, n_bits, error=lambda delta: x.error(delta)[None], options=options).levels[0]
    levels[0] = 0.0
    return levels


def quantize_log(x: Tensor, levels: Tensor) -> Tensor:
    """The level [L] of each element, nearest in the log domain; differentiable in x, straight through."""
    borders = borders_between(levels[None], Spacing.LOG)
    exact = x.detach().reshape(1, -1)
    q = dequantize(count_below(borders, exact.float() if x.dtype.itemsize < 4 else exact), levels[None])
    q = q.reshape(x.shape).to(x.dtype)
    return x + (q - x).detach() if x.requires_grad else q
