"""Codebooks as tests ask for them: options by name, and the parts of logarithmic ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logart.grids import search
from logart.grids.grid import SCALE_UNIT, Codebook, CodebookSpec, ErrorFunction, Grid, GridOptions, Spacing
from logart.grids.linear import LINEAR_MINMAX, LINEAR_MSE
from logart.grids.logarithmic import DYNAMIC, actual_scale, half_steps_and_signs, log_candidates, reassigned
from logart.grids.registry import GRIDS

LOG_GRIDS = tuple(grid for grid in GRIDS.values() if "n_base2" in grid.integers)


def choose_codebook(
    w: Tensor,
    grid: Grid,
    n_bits: int,
    *,
    error: ErrorFunction = search.squared_error,
    spacing: Spacing | None = None,
    **options: Any,
) -> Codebook:
    """`search.choose_codebook` with the fields of `GridOptions` that act on the grid; the others are left out."""
    acting = {name: value for name, value in options.items() if name in grid.options}
    return search.choose_codebook(w, grid, n_bits, error=error, options=GridOptions(**acting), spacing=spacing)


def half_steps(book: Codebook) -> Tensor:
    """[C, 2^n], of a logarithmic codebook."""
    return half_steps_and_signs(book.spec.columns, book.n_bits)[0]


def signs(book: Codebook) -> Tensor:
    """[C, 2^n], of a logarithmic codebook."""
    return half_steps_and_signs(book.spec.columns, book.n_bits)[1]


def n_base2(book: Codebook) -> Tensor:
    """[C], of a logarithmic codebook."""
    return book.spec.columns["n_base2"]


def scale(book: Codebook, dtype: torch.dtype = torch.float32) -> Tensor:
    """[C], of a scaled logarithmic codebook."""
    found = actual_scale(book.spec.columns, book.spec.terms, dtype)
    assert found is not None
    return found


def scaled(book: Codebook, factor: float | Tensor, dtype: torch.dtype = torch.float32) -> Codebook:
    """A logarithmic codebook with every level times a whole number of 1/32."""
    numerators = (torch.as_tensor(factor).double() * SCALE_UNIT).round().long().expand(len(book.levels))
    columns = {**book.spec.columns, "scale": numerators}
    return book.spec.grid.codebook(columns, book.n_bits, book.spec.terms, dtype)


def reassign(book: Codebook, w: Tensor, *, asymmetric: bool, zero_code: bool) -> Codebook:
    """`logarithmic.reassigned`."""
    return reassigned(book, w, asymmetric=asymmetric, zero_code=zero_code)


def candidate_books(absmax: Tensor, n_bits: int, *mixes: Any, terms: int = 0, **options: Any) -> list[Codebook]:
    """The codebooks of `log_candidates`."""
    dtype = options.get("dtype", torch.float32)
    each = log_candidates(absmax, n_bits, *mixes, **options)
    return [DYNAMIC.codebook(columns, n_bits, terms, dtype) for columns in each]


def minmax_codebook(w: Tensor, n_bits: int) -> Codebook:
    """`linear_minmax`."""
    return choose_codebook(w, LINEAR_MINMAX, n_bits)


def mse_codebook(w: Tensor, n_bits: int) -> Codebook:
    """`linear_mse`."""
    return choose_codebook(w, LINEAR_MSE, n_bits)


def same_spec(a: CodebookSpec, b: CodebookSpec) -> bool:
    """Equal grids, terms and integers."""
    integers = a.columns.keys() == b.columns.keys() and all(torch.equal(a.columns[k], b.columns[k]) for k in a.columns)
    return integers and (a.grid, a.terms) == (b.grid, b.terms)
