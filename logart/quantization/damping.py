"""Damping chosen by images that the estimate has not seen.

A and T are estimates from few images. Without damping they fit these images and no others: in a layer of 960 inputs
with 2,048 rows the output error on other images may be thirty times as large. So each half of the images gives an
estimate, for several dampings, and the codes rounded by it are judged by the moments of the other half. Few channels,
error feedback alone, codebooks near the weight itself and the precision of the inputs tell dampings apart, so the grid
is searched once, with the damping that was chosen. The error falls and rises again along the shares: from one that is
near, the walk downhill is short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from logart.grids.grid import Codebook
from logart.grids.measures import OutputMoments
from logart.grids.rounding import dequantize
from logart.quantization.column_rounding import Factor, error_feedback, quadratic_error, reordered

DAMPING = 0.01  # where nothing is chosen
SHARES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
CHANNELS = 64  # of each group that take part: enough to tell dampings apart
RIDGE_FLOOR = 1e-12  # λ per row where inputs are dead, and per row and squared mean: float32 knows no input any better


def metric(moments: OutputMoments, share: float | Tensor = DAMPING) -> Tensor:
    """A [G, K, K] of centred moments, in their type, λ a share of the mean diagonal, one or [G]."""
    a = moments.gram.clone()
    diagonal = a.diagonal(dim1=1, dim2=2)
    strength = share * diagonal.mean(1) + RIDGE_FLOOR * moments.count * (1 + moments.mean_input.square().mean(1))
    diagonal += strength[:, None]
    return a


def target(w: Tensor, factor: Factor, moments: OutputMoments) -> Tensor:
    """T [C, K] float64 for weights w [C, K], of centred moments and their A."""
    return w.double() + factor.solve(moments.cross)


class Damping(NamedTuple):
    """What was chosen for a layer, and what its codes are worth on images that the estimate has not seen.

    Attributes:
        share: λ over the mean squared input, the median of the layer's groups.
        error_seen, error_unseen: the output error over the output's variance, of codes rounded by the moments of one
            half of the images: on this half and on the other.
    """

    share: float
    error_seen: float
    error_unseen: float


def choose_damping(
    w: Tensor, halves: tuple[OutputMoments, OutputMoments], search: Callable[[Tensor], Codebook]
) -> tuple[Tensor, Damping]:
    """The damping of each group with which codes from one half have the least output error on the other.

    Args:
        w: [C, K].
        halves: moments of each half of the images.
        search: the codebook of each of some rows [C', K], on which they are rounded.

    Returns:
        Shares of the mean squared input [G] float64, and what they come to.
    """
    w, codebook, parts = _some_rows(w, halves, search)
    first, second = parts

    def errors(at: Tensor) -> Tensor:
        share = shares[at]
        return _errors(w, first, second, share, codebook) + _errors(w, second, first, share, codebook)

    shares = torch.tensor(SHARES, dtype=torch.float64, device=w.device)
    start = (shares.log() - math.log(_expected_share(first))).abs().argmin().expand(len(first.gram))
    best, least = start, errors(start)
    for step in (-1, 1):  # more damping; where that is no better, less
        going = best == start
        while (going := going & (best + step >= 0) & (best + step < len(shares))).any():
            tried = torch.where(going, best + step, best)
            found = errors(tried)
            going = going & (found[1] < least[1])
            best, least = torch.where(going, tried, best), torch.where(going, found, least)
    seen, unseen_error = least.masked_fill(least.isinf(), 0.0).sum(1).tolist()
    variance = max(sum(float(quadratic_error(w, half.gram).sum()) for half in parts), 1e-300)
    return shares[best], Damping(float(shares[best].median()), seen / variance, unseen_error / variance)


def _expected_share(half: OutputMoments) -> float:
    """Where to start: the best λ grew with the inputs, not the rows, in what was measured (docs/experiments.md)."""
    return max(0.3, 3 * half.gram.shape[1] / half.count)


def _some_rows(
    w: Tensor, halves: Sequence[OutputMoments], search: Callable[[Tensor], Codebook]
) -> tuple[Tensor, Codebook, list[OutputMoments]]:
    """Evenly spread rows of every group, at most `CHANNELS`: their weights, codebooks and moments.

    Moments are centred, their inputs in order of rising variance, which no damping changes, so that Cholesky factors
    are those of `Factor`, and their products in the inputs' own precision.
    """
    groups = len(halves[0].gram)
    per_group = len(w) // groups
    some = torch.arange(0, per_group, -(-per_group // CHANNELS), device=w.device)
    rows = (torch.arange(groups, device=w.device)[:, None] * per_group + some).flatten()
    variances = [half.gram.diagonal(dim1=1, dim2=2) - half.input_sum.square() / half.count for half in halves]
    order = torch.stack(variances).sum(0).argsort(dim=1, stable=True)
    columns = order.repeat_interleave(len(some), 0)

    def part(half: OutputMoments) -> OutputMoments:
        half = half.centred()
        return replace(
            half,
            gram=reordered(half.gram.to(half.precision), order),
            cross=half.cross[rows].gather(1, columns),
            energy=half.energy[rows],
            shift=half.mean_input.gather(1, order),
        )

    parts = [part(half) for half in halves]  # one centred at a time: matrices are large
    return w[rows].double().gather(1, columns), search(w[rows]), parts


def _errors(w: Tensor, fit: OutputMoments, other: OutputMoments, share: Tensor, codebook: Codebook) -> Tensor:
    """Output errors [2, G], on the half that codes are fitted to and on the other, with a share [G] of each group.

    They are infinite where rounding errors leave A indefinite: too little damping for float32, or inputs that are
    constant in this half alone, far from the shift.
    """
    lower, failed = torch.linalg.cholesky_ex(metric(fit, share))
    order = torch.arange(w.shape[1], device=w.device).flip(0).expand(len(lower), -1)
    factor = Factor(order, lower)
    delta = dequantize(error_feedback(target(w, factor, fit), factor, codebook), codebook.levels) - w
    errors = torch.stack([half.error(delta).reshape(len(lower), -1).sum(1) for half in (fit, other)])
    return errors.masked_fill(failed > 0, torch.inf)
