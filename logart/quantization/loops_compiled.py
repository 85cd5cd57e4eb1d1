"""The loops inside a block of columns, compiled by numba: row by row, on the CPU.

The same operations in the same order as `loops_plain`, each rounded alone (no fast math, no fused multiply-add), so
codes are equal bit for bit; rows do not mix, so they may be shared out among threads. Numba brings its own compiler;
what it made is kept beside this file or, where that cannot be written, in the user's cache folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

_WEIGHTS_PER_THREAD = 1 << 13  # about a millisecond: fewer are not worth another thread


def error_feedback(values: Tensor, factor: Tensor, t: Tensor, levels: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """See `loops_plain.error_feedback`."""
    codes, errors = torch.empty_like(values, dtype=torch.uint8), torch.empty_like(values)
    _over_rows(_error_feedback, values, factor, t.contiguous(), levels, borders, codes, errors)
    return codes, errors


def coordinate_descent(
    slope: Tensor, a: Tensor, codes: Tensor, levels: Tensor, borders: Tensor, least_gain: float
) -> tuple[Tensor, Tensor]:
    """See `loops_plain.coordinate_descent`."""
    chosen, moved = codes.clone(memory_format=torch.contiguous_format), torch.empty_like(slope)
    _over_rows(_coordinate_descent, slope, a, levels, borders, chosen, moved, least_gain)
    return chosen, moved


def correlation_order(a: Tensor) -> Tensor:
    """See `loops_plain.correlation_order`."""
    order = torch.empty(a.shape[:2], dtype=torch.int64)
    rest = a.diagonal(dim1=1, dim2=2).rsqrt().contiguous()
    _correlation_order(a.contiguous().numpy(), rest.numpy(), order.numpy())
    return order


def _over_rows(kernel: Callable[..., None], state: Tensor, matrix: Tensor, *arguments: Tensor | float) -> None:
    """Run a kernel on all rows of state [G, R, B], shared out among as many threads as torch may use."""
    groups, per_group, columns = state.shape
    rows = groups * per_group
    arrays = [x.flatten(0, 1).numpy() if isinstance(x, Tensor) else x for x in arguments]
    whole = (state.flatten(0, 1).numpy(), matrix.numpy(), *arrays)
    threads = min(torch.get_num_threads(), rows, 1 + rows * columns // _WEIGHTS_PER_THREAD)
    if threads == 1:
        kernel(0, rows, per_group, *whole)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first, last: kernel(first, last, per_group, *whole), bounds[:-1], bounds[1:]))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # numba found no folder that it may write to
        return njit(nogil=True)(function)  # type: ignore[no-any-return]


@_compiled
def _nearest(borders: np.ndarray, value: float) -> int:
    """How many of the ascending borders are ≤ value; without branches, which no processor could foresee."""
    below, left = 0, len(borders)
    while left > 0:
        half = (left + 1) // 2
        below += half if borders[below + half - 1] <= value else 0
        left -= half
    return below


@_compiled
def _error_feedback(first, last, per_group, values, factor, t, levels, borders, codes, errors):  # type: ignore[no-untyped-def]
    for n in range(first, last):
        g = n // per_group
        for j in range(values.shape[1]):
            code = _nearest(borders[n], values[n, j])
            error = levels[n, code] - t[n, j]
            codes[n, j], errors[n, j] = code, error
            for k in range(j + 1, values.shape[1]):
                values[n, k] -= error * factor[g, j, k]


@_compiled
def _coordinate_descent(first, last, per_group, slope, a, levels, borders, codes, moved, least_gain):  # type: ignore[no-untyped-def]
    top, end = levels.shape[1] - 1, slope.shape[1] - 1
    for n in range(first, last):
        g = n // per_group
        for j in range(end + 1):
            own = np.int64(codes[n, j])
            q, curvature = levels[n, own], a[g, j, j]
            best = _nearest(borders[n], q - slope[n, j] / curvature)
            chosen, chosen_step, least, stay = own, 0.0, 0.0, 0.0
            for way in range(4):
                option = own if way == 0 else best if way == 1 else max(own - 1, 0) if way == 2 else min(own + 1, top)
                if way > 0 and (option == own or (way > 1 and option == best)):
                    continue
                step = levels[n, option] - q
                change = step * (2 * slope[n, j] + step * curvature)
                squares = curvature * (step * step)
                if j < end:
                    next_q, next_curvature = levels[n, codes[n, j + 1]], a[g, j + 1, j + 1]
                    next_slope = slope[n, j + 1] + step * a[g, j, j + 1]
                    answer = levels[n, _nearest(borders[n], next_q - next_slope / next_curvature)] - next_q
                    change += answer * (2 * next_slope + answer * next_curvature)
                    squares += next_curvature * (answer * answer)
                if way == 0:
                    stay = least = change
                elif change < stay - least_gain * squares and change < least:
                    chosen, chosen_step, least = option, step, change
            codes[n, j], moved[n, j] = chosen, -chosen_step
            if chosen_step != 0.0:
                for k in range(j + 1, end + 1):
                    slope[n, k] += chosen_step * a[g, j, k]


@_compiled
def _correlation_order(a, rest, order):  # type: ignore[no-untyped-def]
    for g in range(a.shape[0]):
        at = 0
        for k in range(a.shape[1]):
            at = k if a[g, k, k] > a[g, at, at] else at
        order[g, 0] = at
        for place in range(1, a.shape[1]):
            rest[g, at] = -math.inf
            best, largest = 0, -2.0
            for k in range(a.shape[1]):
                correlation = abs(a[g, at, k]) * rest[g, k] if rest[g, k] > 0 else -1.0
                if correlation > largest:
                    best, largest = k, correlation
            order[g, place], at = best, best
