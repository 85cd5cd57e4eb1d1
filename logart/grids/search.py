"""Choosing a codebook per channel: candidates × an error function, the least error wins (DESIGN section 3).

An error function takes δ = q - w [G, M], the rounding error of every weight under one candidate, and returns one
error per codebook, [G] float64. The measures differ only in how they weigh δ:

* tensor-wise (TW): Σ δ²;
* layer-wise (LW): the error of the layer's output, ‖X w - X̂ q‖²;
* block-wise (BW): the error of the block's output, to first order in δ.

TW is here, `measures` has LW and BW; no candidate needs a forward pass of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from enum import Enum
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from logart.grids.grid import (
    Codebook,
    ScaleMethod,
    distinct_n_base2,
    linear_codebook,
    log_codebook,
    minmax_codebook,
)
from logart.grids.reassigned_codes import reassign_unused_codes
from logart.grids.rounding import count_below, dequantize, nearest

ErrorFunction = Callable[[Tensor], Tensor]


# What scale search multiplies the levels with, 3/8 to 5/4 in steps of 1/32; below 1 the largest weights are clipped,
# for finer small levels. 1 comes last, which on equal errors wins.
SCALES = (*(i / 32 for i in range(12, 41) if i != 32), 1.0)
HALF_STEPS = (-4, -3, -2, -1, 1, 0)
# Of candidates held together, about 21 bytes each: 8 bits with scale search has 482,560 a channel.
_LEVELS_PER_CHUNK = 2**24


class ScaleSearch(str, Enum):
    """Whether levels get a factor per channel: any of `SCALES`, or only whole half-steps 2^(j/2), j of `HALF_STEPS`."""

    NONE = "none"
    GRID = "grid"
    HALF_STEP = "half_step"


def log_candidates(
    absmax: Tensor,
    n_bits: int,
    n_base2: Sequence[int] | None = None,
    *,
    terms: int = 0,
    dtype: torch.dtype = torch.float32,
    scale_search: ScaleSearch = ScaleSearch.NONE,
) -> Iterator[Codebook]:
    """The codebooks of every channel for each n_base2 and each scale, one after the other; n_base2 ascends.

    Args:
        absmax: [C].
        n_bits, terms, dtype: as `log_codebook`.
        n_base2: the mixes; default: every one that has levels of its own, see `distinct_n_base2`.
        scale_search: which factors are tried; 1 always is.
    """
    steps = HALF_STEPS if scale_search is ScaleSearch.HALF_STEP else (0,)
    largest = torch.finfo(absmax.dtype).max
    tops = [(absmax.double() * 2 ** (step / 2)).clamp(max=largest) if step else absmax for step in steps]
    each: list[Sequence[int] | Tensor]
    each = [distinct_n_base2(top, n_bits, dtype) if n_base2 is None else n_base2 for top in tops]
    for mixes in zip(*each, strict=True):
        for top, k in zip(tops, mixes, strict=True):
            book = log_codebook(top, n_bits, k, terms=terms, dtype=dtype)
            scales = SCALES if scale_search is ScaleSearch.GRID else ()
            yield from [book.scaled(scale, terms, dtype) for scale in scales] or [book]


def n_candidates(method: ScaleMethod, n_bits: int, scale_search: ScaleSearch) -> int:
    """How many codebooks a search looks at."""
    mixes = 2 ** (n_bits - 2) + 1 if method is ScaleMethod.DYNAMIC else 1
    scales = {ScaleSearch.NONE: 1, ScaleSearch.GRID: len(SCALES), ScaleSearch.HALF_STEP: len(HALF_STEPS)}
    return mixes * scales[scale_search]


def shrunk_candidates(w: Tensor, n_bits: int) -> list[Codebook]:
    """Linear codebooks over 21 %, 22 %, … 100 % of the range of w [C, K]."""
    low, high = w.double().amin(1), w.double().amax(1)
    return [linear_codebook(low * p / 100, high * p / 100, n_bits, dtype=w.dtype) for p in range(21, 101)]


def squared_error(delta: Tensor) -> Tensor:
    """TW: Σ δ² per codebook, [G, M] -> [G] float64."""
    return delta.double().square().sum(1)


def power_error(delta: Tensor) -> Tensor:
    """Σ |δ|^2.4 per codebook, the measure of `linear_mse`, [G, M] -> [G] float64."""
    return delta.double().abs().pow(2.4).sum(1)


def rounding_error(w: Tensor, codebook: Codebook) -> Tensor:
    """δ = q - w [C, K] float64 of rounding w to nearest."""
    return dequantize(nearest(w, codebook), codebook.levels) - w.double()


def rounding_errors(w: Tensor, candidates: Sequence[Codebook]) -> Iterator[Tensor]:
    """`rounding_error` of every candidate in turn, for one search through the borders instead of one a candidate.

    All borders of all candidates cut a row into intervals; within one, every candidate has one code. So each weight's
    interval is found once, and a candidate only looks up its level there. With more intervals than weights that
    would cost more than it saves.
    """
    borders = [candidate.borders for candidate in candidates]
    if sum(b.shape[1] for b in borders) >= w.shape[1]:
        yield from (rounding_error(w, candidate) for candidate in candidates)
        return
    every = torch.cat(borders, dim=1).sort(dim=1).values
    interval = count_below(every, w)
    starts = torch.cat([torch.full_like(every[:, :1], -torch.inf), every], dim=1)
    for candidate, own in zip(candidates, borders, strict=True):
        codes = torch.searchsorted(own.contiguous(), starts, right=True)
        yield candidate.levels.gather(1, codes).gather(1, interval).sub_(w)


def least_error(w: Tensor, candidates: Sequence[Codebook], error: ErrorFunction) -> tuple[Codebook, Tensor]:
    """The best candidate of every channel.

    Args:
        w: [G, M] weights, one row per codebook.
        candidates: codebooks of G channels each; on equal error the later one wins.
        error: from δ [G, M] to [G].

    Returns:
        The chosen codebooks, and all errors [candidates, G] float64.
    """
    errors = torch.stack([error(delta) for delta in rounding_errors(w, candidates)])
    return _pick(candidates, _last_least(errors)), errors


def _last_least(errors: Tensor) -> Tensor:
    """The last row that holds the least error of each column."""
    return len(errors) - 1 - errors.flip(0).argmin(0)


def _pick(candidates: Sequence[Codebook], chosen: Tensor) -> Codebook:
    """Row g of the result is row g of candidates[chosen[g]]; all have the same tensors."""
    rows = torch.arange(len(chosen), device=chosen.device)
    each = {field.name: [getattr(c, field.name) for c in candidates] for field in fields(Codebook)}
    picked: dict[str, Any] = {
        name: torch.stack(values)[chosen, rows] if isinstance(values[0], Tensor) else values[0]
        for name, values in each.items()
    }
    return Codebook(**picked)


def mse_codebook(w: Tensor, n_bits: int) -> Codebook:
    """`linear_mse`: the linear codebook of w [C, K] whose range leaves the least Σ|w - q|^2.4."""
    return least_error(w, shrunk_candidates(w, n_bits), power_error)[0]


def choose_codebook(
    w: Tensor,
    method: ScaleMethod,
    n_bits: int,
    *,
    terms: int = 0,
    error: ErrorFunction = squared_error,
    scale_search: ScaleSearch = ScaleSearch.NONE,
    asymmetric: bool = False,
    zero_code: bool = False,
) -> Codebook:
    """The codebook of each row of w [G, M] by the grid asked for.

    `error` decides where there is more than one candidate: among the mixes of the dynamic grid, and among scales. The
    options after it act on log grids; see `log_candidates` and `reassign_unused_codes`.
    """
    if method is ScaleMethod.LINEAR_MINMAX:
        return minmax_codebook(w, n_bits)
    if method is ScaleMethod.LINEAR_MSE:
        return mse_codebook(w, n_bits)
    mixes = {ScaleMethod.LOG_2: (2 ** (n_bits - 1),), ScaleMethod.LOG_SQRT2: (0,)}.get(method)
    candidates = partial(log_candidates, w.abs().amax(1), n_bits, terms=terms, dtype=w.dtype, scale_search=scale_search)
    books: Iterator[Codebook] = candidates(mixes)
    if asymmetric and mixes is None:  # below equal levels, k = 0 spaces the codes that move by √2, k = 1 by 2
        books = chain(candidates((0,)), books)
    if asymmetric or zero_code:
        books = (reassign_unused_codes(b, w, asymmetric=asymmetric, zero_code=zero_code, terms=terms) for b in books)
    if n_candidates(method, n_bits, scale_search) == 1:
        return next(books)
    chosen: list[Codebook] = []
    least: list[Tensor] = []
    while some := list(islice(books, max(1, _LEVELS_PER_CHUNK // (len(w) * 2**n_bits)))):
        book, errors = least_error(w, some, error)
        chosen.append(book)
        least.append(errors.amin(0))
    return _pick(chosen, _last_least(torch.stack(least)))
