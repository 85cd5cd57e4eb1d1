"""The loops inside a block of columns, in torch's operations: column by column, all rows at once.

What `loops_compiled` and `loops_triton` are held against, and what runs where neither can be built. Shapes: G groups,
R rows of each, B columns of the block, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error_feedback(values: Tensor, factor: Tensor, t: Tensor, levels: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """Round column by column; the error of each moves those behind it.

    Args:
        values: [G, R, B] float64, T less what the columns before have moved; used up.
        factor: [G, B, B], upper triangular with a unit diagonal.
        t: [G, R, B] float64.
        levels, borders: [G, R, L] and [G, R, L - 1].

    Returns:
        Codes [G, R, B] uint8, and the errors q - T [G, R, B].
    """
    codes, errors = torch.empty_like(values, dtype=torch.uint8), torch.empty_like(values)
    for j in range(values.shape[2]):
        chosen = _nearest(values[:, :, j, None], borders)
        error = levels.gather(2, chosen)[:, :, 0] - t[:, :, j]
        codes[:, :, j], errors[:, :, j] = chosen[:, :, 0], error
        values -= error[:, :, None] * factor[:, j, None]
    return codes, errors


def coordinate_descent(
    slope: Tensor, a: Tensor, codes: Tensor, levels: Tensor, borders: Tensor, least_gain: float
) -> tuple[Tensor, Tensor]:
    """One pass over the block: each weight takes the best of four options, given the next weight's best answer.

    Args:
        slope: [G, R, B] float64, A(q - T); used up.
        a: [G, B, B], the block of A.
        codes: [G, R, B] uint8, before.
        levels, borders: as `error_feedback`.
        least_gain: what a step must gain, as a share of the squares that make up its change.

    Returns:
        Codes [G, R, B] uint8, and [G, R, B] how far each weight went down, before less after.
    """
    chosen, moved = torch.empty_like(codes), torch.empty_like(slope)
    q, last, top = levels.gather(2, codes.long()), slope.shape[2] - 1, levels.shape[2] - 1
    for j in range(last + 1):
        own, own_q, own_slope = codes[:, :, j, None].long(), q[:, :, j, None], slope[:, :, j, None]
        curvature = a[:, j, j, None, None]
        best = _nearest(own_q - own_slope / curvature, borders)
        options = torch.cat([own, best, own - 1, own + 1], -1).clamp(0, top)
        steps = levels.gather(2, options) - own_q
        change = steps * (2 * own_slope + steps * curvature)
        squares = curvature * steps.square()
        if j < last:
            next_q, next_curvature = q[:, :, j + 1, None], a[:, j + 1, j + 1, None, None]
            next_slope = slope[:, :, j + 1, None] + steps * a[:, j, j + 1, None, None]
            answers = levels.gather(2, _nearest(next_q - next_slope / next_curvature, borders)) - next_q
            change += answers * (2 * next_slope + answers * next_curvature)
            squares += next_curvature * answers.square()
        possible = change < change[..., :1] - least_gain * squares
        possible[..., 0] = True  # to stay
        choice = change.where(possible, torch.inf).argmin(-1, keepdim=True)
        chosen[:, :, j] = options.gather(2, choice)[..., 0]
        moved[:, :, j] = -steps.gather(2, choice)[..., 0]
        slope -= moved[:, :, j, None] * a[:, j, None]
    return chosen, moved


def correlation_order(a: Tensor) -> Tensor:
    """An order [G, K] of the columns of a [G, K, K]: after each the one left that is most correlated with it."""
    importance = a.diagonal(dim1=1, dim2=2)
    group, at = torch.arange(len(a), device=a.device), importance.argmax(1)
    order, rest = [at], importance.rsqrt()
    for _ in range(a.shape[2] - 1):
        rest[group, at] = -torch.inf
        at = torch.where(rest > 0, a[group, at].abs() * rest, -1.0).argmax(1)
        order.append(at)
    return torch.stack(order, 1)


def _nearest(values: Tensor, borders: Tensor) -> Tensor:
    """Codes [G, R, V] int64 of values [G, R, V]."""
    return torch.searchsorted(borders, values.contiguous(), right=True)
