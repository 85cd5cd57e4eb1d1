"""Levels of no known grid: a user's own, stored as they are. Nothing makes candidates of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from logart.grids.grid import Codebook, CodebookSpec, Grid, Spacing


@dataclass(frozen=True)
class PlainLevels(Grid):
    """Codebooks whose one column, [C, 2^n] float64, holds the levels themselves."""

    def codebook(self, columns: Mapping[str, Tensor], n_bits: int, terms: int, dtype: torch.dtype) -> Codebook:
        return Codebook(columns["levels"], CodebookSpec(self, dict(columns)))

    def wrong(self, columns: Mapping[str, Tensor], n_bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
        levels = columns["levels"]
        if levels.ndim != 2 or levels.shape[1] != 2**n_bits:
            raise ValueError(f"levels are {list(levels.shape)}; expected {2**n_bits} a channel at {n_bits} bits")
        held = levels.abs() <= torch.finfo(dtype).max  # False for NaN
        return {"levels": ~(held.all(1) & (levels.diff(dim=1) >= 0).all(1))}


PLAIN_LOG, PLAIN_LINEAR = (
    PlainLevels(f"plain_{spacing.value}", "own levels", spacing, {"levels": None}, ("levels",))
    for spacing in (Spacing.LOG, Spacing.LINEAR)
)


def plain_codebook(levels: Tensor, spacing: Spacing) -> Codebook:
    """A codebook of levels [C, 2^n] that no grid makes.

    Args:
        levels: finite, each row ascending; float64, or what becomes it.
        spacing: how weights between two of them are rounded and learned.

    Raises:
        ValueError: levels that are no codebook.
    """
    levels, n_bits = levels.double(), max(1, levels.shape[-1] - 1).bit_length()
    grid = PLAIN_LOG if spacing is Spacing.LOG else PLAIN_LINEAR
    return Codebook(levels, CodebookSpec.checked(grid, {"levels": levels}, 0, levels.shape, n_bits, torch.float64))


def stored_spec(codebook: Codebook, dtype: torch.dtype = torch.float32) -> CodebookSpec:
    """The spec that gives a codebook back: its own, as short as can be, or its levels where that gives others.

    Args:
        codebook: any.
        dtype: the weights' type.
    """
    spec = codebook.spec.short()
    if torch.equal(spec.codebook(codebook.n_bits, dtype).levels, codebook.levels):
        return spec
    return plain_codebook(codebook.levels, codebook.spacing).spec
