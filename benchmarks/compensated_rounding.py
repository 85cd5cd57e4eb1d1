"""Compensated rounding of a 512→512 3×3 convolution and a 3072→768 linear layer, against plain per-column loops.

    python benchmarks/compensated_rounding.py [--device cpu] [--bits 4] [--runs 2]

The reference ("plain") is the same recursion with the same float64 factor of A⁻¹, without blocks: after every column it
corrects all the columns that follow, and it measures the distance to every level. Between both stand the project's own
blocks with loops of torch operations ("torch"), which run where numba cannot. Error feedback and one sweep of descent
are timed apart; the factorisation, the order of the descent and its first slope, which all ways need once, are left out
of one line and in the next. The codes are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from logart.grids.grid import Codebook
from logart.grids.logarithmic import DYNAMIC
from logart.grids.rounding import dequantize
from logart.grids.search import choose_codebook
from logart.quantization import column_rounding, loops_plain
from logart.quantization.column_rounding import BLOCK, Factor, coordinate_descent, error_feedback, quadratic_error

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
        path = loops_plain.correlation_order(a)[0]
        plain, expected = timed(lambda: plain_feed_back(t, order, factor, codebook), args.runs)  # noqa: B023
        compare("error feedback", lambda: error_feedback(t, Factor.of(a), codebook), plain, expected, args.runs)  # noqa: B023
        with patch.object(column_rounding, "SWEEPS", 1):
            plain, swept = timed(lambda: plain_sweep(expected, t, a, codebook, path), args.runs)  # noqa: B023
            descend = partial(coordinate_descent, expected, t, a, codebook)
            compare("one sweep of descent", descend, plain, swept, args.runs)


def compare(name: str, function: Callable[[], Tensor], plain: float, expected: Tensor, runs: int) -> None:
    """Print how long the function takes, compiled and not, beside the plain way's seconds."""
    seconds = {}
    update = column_rounding._blocked_update
    for way in ("compiled", "torch"):
        inside: list[float] = []

        def watched(*arguments: Any, inside: list[float] = inside) -> None:
            inside.append(timed(lambda: update(*arguments), 1)[0])

        chosen = column_rounding._loops if way == "compiled" else plain_loops
        with patch.object(column_rounding, "_loops", chosen), patch.object(column_rounding, "_blocked_update", watched):
            function()  # compiled here
            whole, codes = timed(function, runs)
        seconds[way] = min(inside)
        equal = float((codes == expected).double().mean())
        print(
            f"  {name:<22} {way:<9} {seconds[way]:7.2f} s (whole {whole:6.2f} s)   plain {plain:6.2f} s"
            f"   ratio {plain / seconds[way]:5.1f}   equal codes {equal:.2%}"
        )
    print(f"  {name:<22} torch / compiled {seconds['torch'] / seconds['compiled']:.1f}")


def plain_loops(device: torch.device) -> ModuleType:
    return loops_plain


def layer(channels: int, elements: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Codebook]:
    """T, A of inputs with a low-rank part and noise, and the best codebook of every channel."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2 * elements, DIRECTIONS, generator=generator)
    x = shared @ torch.randn(DIRECTIONS, elements, generator=generator) / DIRECTIONS**0.5
    x += 0.5 * torch.randn(x.shape, generator=generator)
    gram = (x.T @ x).double()
    a = (gram + 0.01 * gram.diagonal().mean() * torch.eye(elements))[None].to(device)
    t = (torch.randn(channels, elements, generator=generator, dtype=torch.float64) / elements**0.5).to(device)
    return t, a, choose_codebook(t, DYNAMIC, bits, error=lambda delta: quadratic_error(delta, a))


def timed(function: Callable[[], Tensor], runs: int) -> tuple[float, Tensor]:
    """The least seconds of some runs, and the result: of all threads together on the CPU, which other jobs share."""
    cuda, seconds = torch.cuda.is_available(), []
    clock = time.perf_counter if cuda else time.process_time
    for _ in range(runs):
        synchronise()
        start = clock()
        result = function()
        synchronise()
        seconds.append(clock() - start)
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
            if (place + 1) % BLOCK and place + 1 < len(path):
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


if __name__ == "__main__":
    main()
