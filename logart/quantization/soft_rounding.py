"""The soft rounding of one weight while LLR learns it (DESIGN section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from logart.grids.grid import Codebook
from logart.grids.rounding import rectified_sigmoid, soft_neighbours, soft_round


class SoftRounding(nn.Module):
    """The α of one weight and what turns them into soft values."""

    lower: Tensor
    lo: Tensor
    a: Tensor
    b: Tensor

    def __init__(self, w: Tensor, codebook: Codebook, codes: Tensor | None = None) -> None:
        """Start where the soft weights equal w [G, M], within the codebook's range, or near codes [G, M]."""
        super().__init__()
        lower, lo, a, b, alpha = soft_neighbours(w, codebook, codes)
        self.register_buffer("lower", lower)
        self.register_buffer("lo", lo)
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.alpha = nn.Parameter(alpha)

    def forward(self, beta: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Soft weights [G, M] and the rounding penalty (0 without `beta`)."""
        return soft_round(self.alpha, self.lo, self.a, self.b, beta)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Where learning ended: the upper neighbour's code where h ≥ 1/2, else the lower one's; [G, M] uint8."""
        return self.lower + (rectified_sigmoid(self.alpha) >= 0.5).to(torch.uint8)
