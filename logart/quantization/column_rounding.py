"""Codes of whole rows of weights in a quadratic metric: error feedback, then coordinate descent.

The error of a row's codes q around its real target T is (q - T)ᵀA(q - T). Both methods go through the columns in
blocks: inside a block every weight depends on the one before it, which is a loop (`loops_compiled` on the CPU,
`loops_triton` on CUDA, `loops_plain` where these cannot be built; their codes are equal); what a block does to the
columns behind it is one matrix product.

Rows of weights come as [G, R, K]: R output channels of each of G groups, which share the group's A [G, K, K].
Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from logart.grids.grid import Codebook, Spacing, borders_between
from logart.grids.rounding import dequantize, nearest
from logart.quantization import loops_plain

SWEEPS = 200  # far more than descent was ever seen to need: 3 to 8 from error feedback, 52 from random codes
BLOCK = 64  # columns worked on before the others hear of it
# What a step of descent must gain to stand out from rounding, as a share of the terms it is the sum of; without it two
# choices that are equally good can alternate for ever.
LEAST_GAIN = 1e-12


def quadratic_error(delta: Tensor, a: Tensor) -> Tensor:
    """δᵀAδ of every channel, δ [C, K] and A [G, K, K], in whose type products are taken -> [C] float64."""
    grouped = delta.double().unflatten(0, (len(a), -1))
    return ((grouped.to(a.dtype) @ a) * grouped).sum(-1).flatten()


def round_compensated(t: Tensor, a: Tensor, codebook: Codebook, factor: Factor | None = None) -> Tensor:
    """Codes near the least (q - T)ᵀA(q - T), never worse than rounding to nearest.

    Args:
        t: [C, K] float64.
        a: [G, K, K] float64, positive definite; C is a multiple of G.
        codebook: of the C rows.
        factor: of a, where it is known.

    Returns:
        [C, K] uint8 codes.
    """
    plain, fed_back = nearest(t, codebook), error_feedback(t, factor or Factor.of(a), codebook)
    better = _error(fed_back, t, a, codebook) < _error(plain, t, a, codebook)
    return coordinate_descent(torch.where(better[:, None], fed_back, plain), t, a, codebook)


def _error(codes: Tensor, t: Tensor, a: Tensor, codebook: Codebook) -> Tensor:
    return quadratic_error(dequantize(codes, codebook.levels) - t, a)


@dataclass(frozen=True)
class Factor:
    """A = UUᵀ with its columns in order of falling diagonal, U upper triangular.

    Attributes:
        order: [G, K] int64.
        lower: [G, K, K], U with rows and columns reversed; float64, or less where codes need not be the best.
    """

    order: Tensor
    lower: Tensor

    @classmethod
    def of(cls, a: Tensor) -> Factor:
        """Of positive definite matrices a [G, K, K]."""
        order = a.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        return cls(order, torch.linalg.cholesky(reordered(a, order.flip(1))))

    def solve(self, rows: Tensor) -> Tensor:
        """A⁻¹ times each of rows [C, K]."""
        grouped = rows.to(self.lower.dtype).unflatten(0, (len(self.order), -1))
        columns = self.order.flip(1)[:, None].expand_as(grouped)
        solved = torch.cholesky_solve(grouped.gather(2, columns).mT, self.lower).mT
        return torch.empty_like(grouped).scatter_(2, columns, solved).flatten(0, 1)


def error_feedback(t: Tensor, factor: Factor, codebook: Codebook) -> Tensor:
    """Round column by column, in order of falling diagonal of A, and let the columns to come make up for each error.

    The recursion of OBQ and GPTQ (Frantar et al. 2022): once the errors δ = q - T of the columns before are made, the
    next is rounded where the rest of the row, left real, could still bring the error to its least. With A = UUᵀ that
    is T_k - Σ_j<k δ_j·U[j, k]/U[k, k], so A is never inverted. Arguments and result as `round_compensated`.
    """
    groups, order = len(factor.order), factor.order
    grid, loops = LinearLevels.of(codebook, groups), _loops(t.device)
    upper = factor.lower.flip(1, 2)
    upper /= upper.diagonal(dim1=1, dim2=2).clone()[:, None]
    columns = order[:, None].expand(-1, t.shape[0] // groups, -1)
    t = t.double().unflatten(0, (groups, -1)).gather(2, columns)
    codes = torch.empty_like(t, dtype=torch.uint8)

    def round_block(block: slice, values: Tensor, inner: Tensor) -> Tensor:
        codes[:, :, block], errors = loops.error_feedback(
            values.double(), inner.double(), t[:, :, block], grid.levels, grid.borders
        )
        return errors.to(upper.dtype)  # type: ignore[no-any-return]

    _blocked_update(t.to(upper.dtype, copy=True), upper, round_block)
    return torch.empty_like(codes).scatter_(2, columns, codes).flatten(0, 1)


def coordinate_descent(codes: Tensor, t: Tensor, a: Tensor, codebook: Codebook) -> Tensor:
    """Cyclic coordinate descent that looks one weight ahead, until no weight moves.

    Each weight in turn stays or takes the level nearest to q_j - [A(q - T)]_j / A_jj, which is best given all others,
    or a neighbour of its own: whichever is best once the weight that comes next has answered with its best level. So
    two weights move together where neither gains alone, which are those of correlated inputs; hence the order of
    `correlation_order`. No sweep makes the error larger. Arguments and result as `round_compensated`.
    """
    groups, grid = len(a), LinearLevels.of(codebook, len(a))
    order = _loops(a.device).correlation_order(a)
    columns = order[:, None].expand(-1, t.shape[0] // groups, -1)
    a, t = reordered(a, order), t.double().unflatten(0, (groups, -1)).gather(2, columns)
    codes = codes.unflatten(0, (groups, -1)).gather(2, columns)
    moving = torch.arange(codes.shape[1], device=a.device).expand(groups, -1)  # a row that rests once rests for ever
    for _ in range(SWEEPS):
        rows = moving[:, :, None].expand(-1, -1, codes.shape[2])
        before = codes.gather(1, rows)
        after = _descend_once(before, t.gather(1, rows), a, grid.select(moving))
        codes.scatter_(1, rows, after)
        changed = (after != before).any(2)
        most = int(changed.sum(1).max())
        moving = moving.gather(1, changed.sort(dim=1, descending=True, stable=True).indices[:, :most])
        if not moving.numel():
            break
    return torch.empty_like(codes).scatter_(2, columns, codes).flatten(0, 1)


def _descend_once(codes: Tensor, t: Tensor, a: Tensor, grid: LinearLevels) -> Tensor:
    """Codes [G, R, K] after one sweep over all columns, codes and t [G, R, K]."""
    loops, chosen = _loops(a.device), codes.clone()

    def descend_block(block: slice, slope: Tensor, inner: Tensor) -> Tensor:
        chosen[:, :, block], steps = loops.coordinate_descent(
            slope, inner, codes[:, :, block], grid.levels, grid.borders, LEAST_GAIN
        )
        return steps  # type: ignore[no-any-return]

    # The slope recomputed in each sweep: no error piles up.
    _blocked_update((grid.levels.gather(2, codes.long()) - t) @ a, a, descend_block)
    return chosen


def _blocked_update(state: Tensor, matrix: Tensor, decide: Callable[[slice, Tensor, Tensor], Tensor]) -> None:
    """state -= e·matrix[j] for every column j in turn, a block of columns at a time.

    Args:
        state: [G, R, K], changed in place: a block's columns are right when it is decided.
        matrix: [G, K, K].
        decide: from a block of B columns, the state there [G, R, B] and the matrix inside [G, B, B] to e [G, R, B].
    """
    size = state.shape[2]
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        block = slice(start, end)
        errors = decide(block, state[:, :, block].contiguous(), matrix[:, block, block].contiguous())
        if end < size:
            state[:, :, end:].baddbmm_(errors, matrix[:, block, end:], alpha=-1)


def reordered(a: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of a [G, K, K] in an order [G, K]."""
    rows = order[:, :, None].expand_as(a)
    return a.gather(1, rows).gather(2, rows.mT)


@dataclass(frozen=True)
class LinearLevels:
    """A codebook's levels [G, R, L], and borders [G, R, L - 1] by distance, not by ratio: what a quadratic error asks.

    Both are contiguous.
    """

    levels: Tensor
    borders: Tensor

    @classmethod
    def of(cls, codebook: Codebook, groups: int) -> LinearLevels:
        """Of a codebook of G·R rows."""
        borders = borders_between(codebook.levels, Spacing.LINEAR)
        return cls(*(x.unflatten(0, (groups, -1)).contiguous() for x in (codebook.levels, borders)))

    def select(self, rows: Tensor) -> LinearLevels:
        """Those of some rows [G, R'] of every group."""
        return LinearLevels(
            *(x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2])) for x in (self.levels, self.borders))
        )


@cache
def _compiled_loops() -> ModuleType | None:
    try:
        from logart.quantization import loops_compiled
    except ImportError:  # numba has no build for every Python and processor
        return None
    return loops_compiled


@cache
def _triton_loops(device: torch.device) -> ModuleType | None:
    try:
        from logart.quantization import loops_triton
    except ImportError:  # torch brings Triton on Linux alone
        return None
    return loops_triton if loops_triton.works(device) else None


def _loops(device: torch.device) -> ModuleType:
    """What works inside a block of columns: compiled for the device where that can be done, else torch's operations."""
    if device.type == "cuda":
        return _triton_loops(device) or loops_plain
    return (_compiled_loops() if device.type == "cpu" else None) or loops_plain
