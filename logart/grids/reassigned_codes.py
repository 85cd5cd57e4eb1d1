"""Codes spent elsewhere: asymmetric codes and the zero code of log grids (DESIGN section 2), within the same 2^n.

* *asymmetric*: the u codes that the shorter sign of a channel never reaches, where there are two or more, become
  u // 2 small magnitudes of both signs, spaced as the smallest are, and zero if one is left. Where a sign has no weight
  at all, they all go to the other.
* *zero code*: the smallest negative level becomes zero, where zero is no level yet.

Pure functions of tensors; C is the number of channels, n the bit width, N = 2^(n-1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def unused_codes(borders: Tensor, w: Tensor, *, empty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many codes of each channel rounding never reaches, of which sign, and whether that has no weight; [C].

    Args:
        borders: [C, 2^n - 1], of a symmetric codebook.
        w: [C, K].
        empty: [C] bool, all-zero channels: none of their codes moves.
    """
    n_codes = borders.shape[1] + 1
    low, high = w.double().amin(1, keepdim=True), w.double().amax(1, keepdim=True)
    below, above = _passed(borders, low), n_codes - 1 - _passed(borders, high)
    negative = below >= above
    unused = torch.where(negative, below, above).clamp(max=n_codes // 2)
    unused = torch.where((unused >= 2) & ~empty[:, None], unused, 0)
    return unused[:, 0], negative[:, 0], ((low >= 0) | (high <= 0))[:, 0]


def move_codes(
    half_steps: Tensor, signs: Tensor, n_base2: Tensor, unused: Tensor, negative: Tensor, one_sided: Tensor
) -> tuple[Tensor, Tensor]:
    """The top codes of one sign become levels below the smallest.

    Args:
        half_steps, signs: [C, 2^n] int64, of a symmetric codebook, ascending.
        n_base2: [C] int64; with none, small levels are spaced by √2.
        unused: [C] int64, how many: 0, or 2 to N.
        negative: [C] bool, whether they are the negative sign's.
        one_sided: [C] bool, whether they all go to the other sign.

    Returns:
        Half-steps and signs by code, no longer in the order of the levels.
    """
    unused, negative, one_sided = unused[:, None], negative[:, None], one_sided[:, None]
    n_codes = half_steps.shape[1]
    code = torch.arange(n_codes, device=unused.device)[None]
    rank = torch.where(negative, code, n_codes - 1 - code)  # the unused codes are those of rank < unused
    smaller = half_steps.amin(1, keepdim=True) - torch.where(n_base2 > 0, 2, 1)[:, None] * (
        1 + torch.where(one_sided, rank, rank // 2)
    )
    longer = torch.where(negative, 1, -1)
    sign = torch.where(one_sided | (rank % 2 == 0), longer, -longer)
    sign = torch.where(~one_sided & (rank == unused - 1) & (unused % 2 == 1), 0, sign)
    return torch.where(rank < unused, smaller, half_steps), torch.where(rank < unused, sign, signs)


def zero_smallest_negative(half_steps: Tensor, signs: Tensor, channels: Tensor) -> Tensor:
    """The signs where the smallest negative level of those channels, [C] bool, is zero, if zero is no level yet."""
    negative = (signs < 0) & channels[:, None]
    smallest = half_steps.where(negative, half_steps.amax() + 1).amin(1, keepdim=True)
    chosen = negative & (half_steps == smallest) & (signs != 0).all(1, keepdim=True)
    return torch.where(chosen, 0, signs)


def _passed(borders: Tensor, value: Tensor) -> Tensor:
    """The code [C, 1] that each value [C, 1] rounds to; on a border away from zero."""
    return torch.where(value < 0, borders < value, borders <= value).sum(1, keepdim=True)
