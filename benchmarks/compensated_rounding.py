"""Compensated rounding of a 512→512 3×3 convolution and a 3072→768 linear layer, against plain per-column loops.

    python benchmarks/compensated_rounding.py [--device cpu] [--bits 4] [--runs 2]

The reference is the same recursion with the same float64 factor of A⁻¹, without blocks: after every column it corrects
all the columns that follow, and it measures the distance to every level. Error feedback and one sweep of descent are
timed apart; the factorisation and the order of the descent, which both ways need once and alike, are left out of one
line and in the next. The codes are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from logart.grids.grid import Codebook, ScaleMethod
from logart.grids.rounding import dequantize
from logart.grids.search import choose_codebook
from logart.quantization import compensate
from logart.quantization.compensate import _correlation_order, coordinate_descent, error_feedback, quadratic_error

LAYERS = {"512→512 3×3 convolution": (512, 4608), "3072→768 linear": (768, 3072)}
DIRECTIONS = 64  # that the inputs share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    for name, (channels, elements) in LAYERS.items():
        t, a, codebook = layer(channels, elements, args.bits, torch.device(args.device))
        print(f"{name}, K = {elements}, {args.bits} bits, {args.device}, {torch.get_num_threads()} threads")
        order, factor = factorise(a)
        whole, codes = timed(lambda: error_feedback(t, a, codebook), args.runs)  # noqa: B023
        with patch.object(compensate, "_blocked_update", lambda *args, **kwargs: None):
            lookahead, _ = timed(lambda: error_feedback(t, a, codebook), args.runs)  # noqa: B023
        plain, expected = timed(lambda: plain_feed_back(t, order, factor, codebook), args.runs)  # noqa: B023
        report("error feedback, less factorisation", whole - lookahead, plain, codes, expected)
        report("error feedback, whole", whole, plain + lookahead, codes, expected)
        with patch.object(compensate, "SWEEPS", 1):
            whole, swept = timed(lambda: coordinate_descent(codes, t, a, codebook), args.runs)  # noqa: B023
            with patch.object(compensate, "_blocked_update", lambda *args, **kwargs: None):
                lookahead, _ = timed(lambda: coordinate_descent(codes, t, a, codebook), args.runs)  # noqa: B023
        plain, expected = timed(lambda: plain_sweep(codes, t, a, codebook, _correlation_order(a)[0]), args.runs)  # noqa: B023
        report("one sweep of descent, less its order", whole - lookahead, plain, swept, expected)
        report("one sweep of descent, whole", whole, plain + lookahead, swept, expected)


def layer(channels: int, elements: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Codebook]:
    """T, A of inputs with a low-rank part and noise, and the best codebook of every channel."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2 * elements, DIRECTIONS, generator=generator)
    x = shared @ torch.randn(DIRECTIONS, elements, generator=generator) / DIRECTIONS**0.5
    x += 0.5 * torch.randn(x.shape, generator=generator)
    gram = (x.T @ x).double()
    a = (gram + 0.01 * gram.diagonal().mean() * torch.eye(elements))[None].to(device)
    t = (torch.randn(channels, elements, generator=generator, dtype=torch.float64) / elements**0.5).to(device)
    return t, a, choose_codebook(t, ScaleMethod.DYNAMIC, bits, error=lambda delta: quadratic_error(delta, a))


def timed(function: Callable[[], Tensor], runs: int) -> tuple[float, Tensor]:
    """The least seconds of some runs, and the result."""
    seconds = []
    for _ in range(runs):
        synchronise()
        start = time.perf_counter()
        result = function()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def factorise(a: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the columns [K], and U [K, K] of A⁻¹ = UᵀU in that order."""
    order = a[0].diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(a[0][order][:, order]))
    return order, torch.linalg.cholesky(inverse, upper=True).contiguous()  # rows are what the plain loop reads


def closest(column: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and levels [C] nearest to a column [C]."""
    codes = (levels - column[:, None]).abs().argmin(1, keepdim=True)
    return codes[:, 0].to(torch.uint8), levels.gather(1, codes)[:, 0]


def plain_feed_back(t: Tensor, order: Tensor, factor: Tensor, codebook: Codebook) -> Tensor:
    """Column by column; all columns to come are corrected at once."""
    state, codes = t[:, order], torch.empty_like(t, dtype=torch.uint8)
    for j, column in enumerate(order.tolist()):
        codes[:, column], rounded = closest(state[:, j], codebook.levels)
        error = (state[:, j] - rounded) / factor[j, j]
        state[:, j:] -= error[:, None] * factor[j, j:]
    return codes


def plain_sweep(codes: Tensor, t: Tensor, a: Tensor, codebook: Codebook, order: Tensor) -> Tensor:
    """Weight by weight, option by option; the slope of all weights is kept up to date."""
    codes, q, levels = codes.clone(), dequantize(codes, codebook.levels), codebook.levels
    slope, top = (q - t) @ a[0], levels.shape[1] - 1
    path = order.tolist()
    for place, j in enumerate(path):
        own = codes[:, j].long()
        best, _ = closest(q[:, j] - slope[:, j] / a[0, j, j], levels)
        changes, steps, options = [], [], [own, best.long(), (own - 1).clamp(min=0), (own + 1).clamp(max=top)]
        for option in options:
            step = levels.gather(1, option[:, None])[:, 0] - q[:, j]
            change = step * (2 * slope[:, j] + step * a[0, j, j])
            if (place + 1) % compensate._BLOCK and place + 1 < len(path):
                k = path[place + 1]
                n_changed_codes = slope[:, k] + step * a[0, j, k]
                answer = closest(q[:, k] - n_changed_codes / a[0, k, k], levels)[1] - q[:, k]
                change = change + answer * (2 * n_changed_codes + answer * a[0, k, k])
            changes.append(change if not changes else change.where(change < changes[0], torch.inf))
            steps.append(step)
        choice = torch.stack(changes).argmin(0, keepdim=True)
        codes[:, j] = torch.stack(options).gather(0, choice)[0].to(torch.uint8)
        step = torch.stack(steps).gather(0, choice)[0]
        slope += step[:, None] * a[0, j]
        q[:, j] += step
    return codes


def report(name: str, fast: float, plain: float, codes: Tensor, expected: Tensor) -> None:
    equal = float((codes == expected).double().mean())
    print(f"  {name:<38} {fast:8.2f} s   plain {plain:8.2f} s   ratio {plain / fast:5.1f}   equal codes {equal:.2%}")


if __name__ == "__main__":
    main()
