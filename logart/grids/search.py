"""Choosing a codebook per channel: candidates × an error function, the least error wins (DESIGN section 3).

An error function takes δ = q - w [G, M], the rounding error of every weight under one candidate, and returns one
error per codebook, [G] float64. The measures differ only in how they weigh δ:

* tensor-wise (TW): Σ δ²;
* layer-wise (LW): the error of the layer's output, ‖X w - X̂ q‖²;
* block-wise (BW): the error of the block's output, to first order in δ.

TW is here, `measures` has LW and BW; no candidate needs a forward pass of the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from logart.grids.grid import NO_OPTIONS, Codebook, ErrorFunction, Grid, GridOptions, Spacing, borders_between
from logart.grids.rounding import count_below, dequantize, nearest, off_borders

# Of candidates held together, about 21 bytes each: 8 bits with scale search has 482,560 a channel.
_LEVELS_PER_CHUNK = 2**24


def squared_error(delta: Tensor) -> Tensor:
    """TW: Σ δ² per codebook, [G, M] -> [G] float64."""
    return delta.double().square().sum(1)


def rounding_error(w: Tensor, codebook: Codebook) -> Tensor:
    """δ = q - w [C, K] float64 of rounding w to nearest."""
    return dequantize(nearest(w, codebook), codebook.levels) - w.double()


def rounding_errors(w: Tensor, candidates: Sequence[Codebook], spacing: Spacing | None = None) -> Iterator[Tensor]:
    """`rounding_error` of every candidate in turn, for one search through the borders instead of one a candidate.

    With `spacing` borders lie as that has them, whatever the grid.
    All borders of all candidates cut a row into intervals; within one, every candidate has one code. So each weight's
    interval is found once, and a candidate only looks up its level there. With more intervals than weights that
    would cost more than it saves.
    """
    borders = [borders_between(each.levels, spacing or each.spacing) for each in candidates]
    if sum(b.shape[1] for b in borders) >= w.shape[1]:
        exact, compared = w.double(), off_borders(w)  # equal for all candidates
        for candidate, own in zip(candidates, borders, strict=True):
            codes = torch.searchsorted(own.contiguous(), compared, right=True)
            yield candidate.levels.gather(1, codes).sub_(exact)
        return
    every = torch.cat(borders, dim=1).sort(dim=1).values
    interval = count_below(every, w)
    starts = torch.cat([torch.full_like(every[:, :1], -torch.inf), every], dim=1)
    for candidate, own in zip(candidates, borders, strict=True):
        codes = torch.searchsorted(own.contiguous(), starts, right=True)
        yield candidate.levels.gather(1, codes).gather(1, interval).sub_(w)


def least_error(
    w: Tensor, candidates: Sequence[Codebook], error: ErrorFunction, spacing: Spacing | None = None
) -> tuple[Codebook, Tensor]:
    """The best candidate of every channel.

    Args:
        w: [G, M] weights, one row per codebook.
        candidates: codebooks of G channels each; on equal error the later one wins.
        error: from δ [G, M] to [G].
        spacing: see `rounding_errors`.

    Returns:
        The chosen codebooks, and all errors [candidates, G] float64.
    """
    errors = torch.stack([error(delta) for delta in rounding_errors(w, candidates, spacing)])
    return _pick(candidates, _last_least(errors)), errors


def _last_least(errors: Tensor) -> Tensor:
    """The last row that holds the least error of each column."""
    return len(errors) - 1 - errors.flip(0).argmin(0)


def _pick(candidates: Sequence[Codebook], chosen: Tensor) -> Codebook:
    """Row g of the result is row g of candidates[chosen[g]]; all have the same columns."""
    rows = torch.arange(len(chosen), device=chosen.device)

    def picked(each: list[Tensor]) -> Tensor:
        return torch.stack(each)[chosen, rows]

    spec = candidates[0].spec
    columns = {name: picked([c.spec.columns[name] for c in candidates]) for name in spec.columns}
    return Codebook(picked([c.levels for c in candidates]), replace(spec, columns=columns))


def choose_codebook(
    w: Tensor,
    grid: Grid,
    n_bits: int,
    *,
    error: ErrorFunction = squared_error,
    options: GridOptions = NO_OPTIONS,
    spacing: Spacing | None = None,
) -> Codebook:
    """The codebook of each row of w [G, M] by the grid asked for.

    `error` decides where there is more than one candidate, unless the grid has a measure of its own. Weights are
    rounded as the grid does, or with borders of another `spacing`.
    """
    books = grid.candidates(w, n_bits, options)
    if grid.n_candidates(n_bits, options) == 1:
        return next(books)
    chosen: list[Codebook] = []
    least: list[Tensor] = []
    while some := list(islice(books, max(1, _LEVELS_PER_CHUNK // (len(w) * 2**n_bits)))):
        book, errors = least_error(w, some, grid.own_error or error, spacing)
        chosen.append(book)
        least.append(errors.amin(0))
    return _pick(chosen, _last_least(torch.stack(least)))
