"""Rounding: from weights to codes, and the soft rounding that learning moves (DESIGN sections 2 and 4).

Pure functions over matrices w[C, K] with one codebook per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logart.grids.grid import Codebook, Spacing

# The rectified sigmoid stretches (0, 1) to (-0.1, 1.1) so that h reaches 0 and 1 at a finite alpha
# (Louizos et al. 2018; Nagel et al. 2020, eq. 23).
_STRETCH, _SHIFT = 1.2, 0.1
# Where a weight below the smallest magnitude starts: on its own side of zero, inside the clip, so that it can move.
_STRADDLE_H = 0.9
# The furthest that a weight starts from the code it had, where learning goes on from codes. Nearer to the middle the
# soft weights would have forgotten what the codes were good for (measured in docs/experiments.md).
_AWAY = 0.1


def nearest(w: Tensor, codebook: Codebook) -> Tensor:
    """Round to nearest (RTN): the code of the level on whose side of the borders each weight lies.

    Log grids are nearest in the log domain, linear grids in the linear one; weights past either end take the end
    level; a tie goes away from zero; ±0 takes the smallest positive level.

    Args:
        w: [C, K] float32 or float64, finite.

    Returns:
        [C, K] uint8 codes.
    """
    return count_below(codebook.borders, w).to(torch.uint8)


def count_below(borders: Tensor, w: Tensor) -> Tensor:
    """How many borders of its row each weight has reached; a tie is decided away from zero.

    Args:
        borders: [C, B] float64, ascending.
        w: [C, K] float32 or float64.

    Returns:
        [C, K] int64 in 0..B.
    """
    return torch.searchsorted(borders.contiguous(), off_borders(w), right=True)


def off_borders(w: Tensor) -> Tensor:
    """Float64 values that lie among borders as weights do, none on one from below.

    A weight on a border goes up; one ulp lower, a negative weight on a border goes down: away from zero both.
    """
    w = w.double()
    return torch.where(w < 0, torch.nextafter(w, w.new_tensor(-torch.inf)), w).contiguous()


def lower_neighbour(w: Tensor, codebook: Codebook) -> Tensor:
    """The code lo [C, K] uint8 with levels[lo] ≤ w ≤ levels[lo + 1]; the end interval for weights past an end."""
    levels = codebook.levels.contiguous()
    upper = torch.searchsorted(levels, w.double().contiguous(), right=True)
    return (upper - 1).clamp(0, levels.shape[1] - 2).to(torch.uint8)


def dequantize(codes: Tensor, levels: Tensor) -> Tensor:
    """The level of every code: codes [C, K] of any integer type, levels [C, L] -> [C, K] of the levels' type."""
    return levels.gather(1, codes.long())


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(α) = clip(1.2·sigmoid(α) - 0.1, 0, 1): how far up from the lower neighbour a weight stands."""
    return (torch.sigmoid(alpha) * _STRETCH - _SHIFT).clamp(0, 1)


def soft_neighbours(
    w: Tensor, codebook: Codebook, codes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The two neighbours of each weight, prepared for learning.

    Between levels lo and hi of one sign on a log grid, the soft weight is the log-domain interpolation
    sign·|lo|^(1-h)·|hi|^h = lo·exp(a·h) with a = ln(hi/lo); anywhere else (a linear grid, a zero level, or between the
    smallest levels of both signs, where no logarithm exists) it is lo + b·h with b = hi - lo. Written
    lo·exp(a·h) + b·h with a = 0 or b = 0, both are one formula.

    A weight below the smallest magnitude of a grid without zero is past the end of the grid. It starts close to the
    level of its own sign and may change sign; were it to start at its value, the layer would first learn with a zero
    that it does not have (measured in docs/experiments.md).

    Args:
        w: [C, K], the float weights.
        codes: [C, K] uint8, where learning starts if not at w: the neighbours are then the code's level and the one
            next to it towards w, and α lies on the code's side of the middle.

    Returns:
        The lower neighbours' codes [C, K] uint8; lo, a, b and α, each [C, K] of w's type. Without `codes`, α makes the
        soft weight equal w within the grid's range, and the end level past it.
    """
    if codes is None:
        lower = lower_neighbour(w, codebook).long()
    else:
        beyond = w.double() < dequantize(codes, codebook.levels)
        lower = (codes.long() - beyond.long()).clamp(0, codebook.levels.shape[1] - 2)
    lo, hi = codebook.levels.gather(1, lower), codebook.levels.gather(1, lower + 1)
    geometric = (lo * hi > 0) & (codebook.spacing is Spacing.LOG)
    a = torch.where(geometric, torch.log(torch.where(geometric, hi / lo, 1.0)), 0.0)
    b = torch.where(geometric, 0.0, hi - lo)
    inside = w.double().clamp(lo, hi)
    log_h = torch.log(torch.where(geometric, inside / lo, 1.0)) / torch.where(a != 0, a, 1.0)
    linear_h = (inside - lo) / torch.where(b > 0, b, 1.0)
    h = torch.where(geometric, log_h, linear_h).clamp(0, 1)
    straddles = (lo * hi < 0) & (w > lo) & (codebook.spacing is Spacing.LOG)
    h = torch.where(straddles, torch.where(w < 0, 1 - _STRADDLE_H, _STRADDLE_H), h)
    if codes is not None:
        h = torch.where(codes.long() == lower, h.clamp(max=_AWAY), h.clamp(min=1 - _AWAY))
    alpha = torch.logit((h + _SHIFT) / _STRETCH)
    return lower.to(torch.uint8), lo.to(w.dtype), a.to(w.dtype), b.to(w.dtype), alpha.to(w.dtype)


class _SoftRound(torch.autograd.Function):
    """Soft weights and the rounding penalty in one pass, with the derivative written out.

    Left to autograd, this takes a dozen weight-sized temporaries each way; here it saves three.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        alpha: Tensor,
        lo: Tensor,
        a: Tensor,
        b: Tensor,
        beta: float | Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sigmoid = torch.sigmoid(alpha)
        h = torch.mul(sigmoid, _STRETCH).sub_(_SHIFT).clamp_(0, 1)
        soft = torch.mul(a, h).exp_().mul_(lo).addcmul_(b, h)
        if beta is None:
            penalty, penalty_slope = soft.new_zeros(()), None
        else:
            signed = h.mul(2).sub_(1)
            power = signed.abs().pow_(beta - 1)
            penalty = alpha.numel() - (power * signed.abs()).sum()
            penalty_slope = power.mul_(signed.sign_()).mul_(-2 * beta)
        ctx.save_for_backward(sigmoid, h, soft, a, b, penalty_slope)  # type: ignore[attr-defined,arg-type]
        return soft, penalty

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, soft_grad: Tensor, penalty_grad: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        sigmoid, h, soft, a, b, penalty_slope = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = torch.addcmul(b, a, soft).mul_(soft_grad)
        if penalty_slope is not None:
            grad.addcmul_(penalty_slope, penalty_grad)
        inside = (h > 0) & (h < 1)
        slope = sigmoid.mul(1 - sigmoid).mul_(_STRETCH).mul_(inside)
        return grad.mul_(slope), None, None, None, None


def soft_round(
    alpha: Tensor, lo: Tensor, a: Tensor, b: Tensor, beta: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Soft weights and rounding penalty, differentiable in α alone.

    Args:
        alpha, lo, a, b: [C, K] from `soft_neighbours`.
        beta: the penalty's exponent, a number or a scalar; None leaves the penalty out (0).

    Returns:
        The soft weights [C, K], and Σ(1 - |2h - 1|^β), a scalar (Nagel et al. 2020, eq. 24).
    """
    return _SoftRound.apply(alpha, lo, a, b, beta)  # type: ignore[no-untyped-call, no-any-return]
