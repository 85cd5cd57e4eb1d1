"""Quadratic errors to round in: made-up problems, and the error computed plainly."""

import torch
from torch import Tensor

from logart.grids.grid import Codebook
from logart.grids.logarithmic import DYNAMIC
from logart.grids.rounding import dequantize
from logart.grids.search import choose_codebook
from logart.quantization.column_rounding import quadratic_error


def correlated(groups: int, rows: int, size: int, seed: int, n_bits: int = 3) -> tuple[Tensor, Tensor, Codebook]:
    """T, A of inputs that share a few directions, and a codebook of the best mixes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(groups, 2 * size + 3, 3) @ draw(groups, 3, size) + 0.5 * draw(groups, 2 * size + 3, size)
    a = x.mT @ x + torch.eye(size, dtype=torch.float64)
    t = draw(groups * rows, size)
    return t, a, choose_codebook(t, DYNAMIC, n_bits, error=lambda d: quadratic_error(d, a))


def plain_error(codes: Tensor, t: Tensor, a: Tensor, codebook: Codebook) -> list[float]:
    """(q - T)ᵀA(q - T), channel by channel."""
    delta, rows = dequantize(codes, codebook.levels) - t, len(t) // len(a)
    return [float(d @ a[c // rows] @ d) for c, d in enumerate(delta)]


def assert_no_worse(first: list[float], second: list[float]) -> None:
    """First ≤ second, but for the rounding of the sums."""
    assert all(x <= y * (1 + 1e-9) for x, y in zip(first, second, strict=True)), (first, second)
