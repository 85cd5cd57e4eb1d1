"""Codes spent elsewhere: asymmetric codes and the zero code (DESIGN section 2), within the same 2^n.

Pure functions of tensors; C is the number of channels, n the bit width, N = 2^(n-1).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from logart.grids.grid import Codebook, log_levels


def reassign_unused_codes(
    codebook: Codebook, w: Tensor, *, asymmetric: bool, zero_code: bool, terms: int = 0
) -> Codebook:
    """The same number of codes, some on other levels (DESIGN section 2, asymmetric codes and the zero code).

    Args:
        codebook: a symmetric log codebook of the rows of w.
        w: [C, K]; its extremes say which codes the shorter sign never reaches by rounding to nearest.
        asymmetric: those u codes, where there are two or more, become u // 2 small magnitudes of both signs, spaced as
            the smallest are, and zero if one is left. Where a sign has no weight at all, they all go to the other.
        zero_code: the smallest negative level becomes zero, where zero is no level yet.
        terms: as for `log_codebook`.
    """
    if asymmetric:
        codebook = move_codes(codebook, *_unused_codes(codebook, w), terms=terms)
    if zero_code:
        every = torch.ones(len(w), dtype=torch.bool, device=w.device)
        codebook = zero_smallest_negative(codebook, every, terms=terms)
    return codebook


def _unused_codes(codebook: Codebook, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many codes of each channel rounding never reaches, of which sign, and whether that has no weight; [C]."""
    assert codebook.signs is not None
    n_codes = codebook.levels.shape[1]
    low, high = w.double().amin(1, keepdim=True), w.double().amax(1, keepdim=True)
    below, above = _passed(codebook.borders, low), n_codes - 1 - _passed(codebook.borders, high)
    negative = below >= above
    free = torch.where(negative, below, above).clamp(max=n_codes // 2)
    free = torch.where((free >= 2) & (codebook.signs != 0).any(1, keepdim=True), free, 0)
    return free[:, 0], negative[:, 0], ((low >= 0) | (high <= 0))[:, 0]


def move_codes(codebook: Codebook, free: Tensor, negative: Tensor, one_sided: Tensor, *, terms: int = 0) -> Codebook:
    """The top codes of one sign become levels below the smallest, as `reassign_unused_codes` says.

    Args:
        codebook: a symmetric log codebook.
        free: [C] int64, how many: 0, or 2 to N.
        negative: [C] bool, whether they are the negative sign's.
        one_sided: [C] bool, whether they all go to the other sign.
    """
    half_steps, signs, k = codebook.half_steps, codebook.signs, codebook.n_base2
    assert half_steps is not None and signs is not None and k is not None
    free, negative, one_sided = free[:, None], negative[:, None], one_sided[:, None]
    n_codes = half_steps.shape[1]
    code = torch.arange(n_codes, device=free.device)[None]
    rank = torch.where(negative, code, n_codes - 1 - code)  # the free codes are those of rank < free
    smaller = half_steps.amin(1, keepdim=True) - torch.where(k > 0, 2, 1)[:, None] * (
        1 + torch.where(one_sided, rank, rank // 2)
    )
    longer = torch.where(negative, 1, -1)
    sign = torch.where(one_sided | (rank % 2 == 0), longer, -longer)
    sign = torch.where(~one_sided & (rank == free - 1) & (free % 2 == 1), 0, sign)
    half_steps, signs = torch.where(rank < free, smaller, half_steps), torch.where(rank < free, sign, signs)
    return _sorted(replace(codebook, half_steps=half_steps, signs=signs), terms)


def zero_smallest_negative(codebook: Codebook, channels: Tensor, *, terms: int = 0) -> Codebook:
    """The smallest negative level becomes zero in those channels, [C] bool, where zero is no level yet."""
    half_steps, signs = codebook.half_steps, codebook.signs
    assert half_steps is not None and signs is not None
    negative = (signs < 0) & channels[:, None]
    smallest = half_steps.where(negative, half_steps.amax() + 1).amin(1, keepdim=True)
    chosen = negative & (half_steps == smallest) & (signs != 0).all(1, keepdim=True)
    return _sorted(replace(codebook, signs=torch.where(chosen, 0, signs)), terms)


def _sorted(codebook: Codebook, terms: int) -> Codebook:
    """The levels of a codebook's half-steps and signs, ascending."""
    assert codebook.half_steps is not None and codebook.signs is not None
    levels = log_levels(codebook.half_steps, codebook.signs, codebook.scale, terms)
    order = levels.argsort(dim=1, stable=True)
    half_steps, signs = codebook.half_steps.gather(1, order), codebook.signs.gather(1, order)
    return replace(codebook, levels=levels.gather(1, order), half_steps=half_steps, signs=signs)


def _passed(borders: Tensor, value: Tensor) -> Tensor:
    """The code [C, 1] that each value [C, 1] rounds to; on a border away from zero."""
    return torch.where(value < 0, borders < value, borders <= value).sum(1, keepdim=True)
