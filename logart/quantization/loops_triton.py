"""The loops inside a block of columns as Triton kernels: on CUDA, some rows a program, one launch a block of columns.

The same operations in the same order as `loops_plain`, each rounded alone (no fused multiply-add), so codes are equal
bit for bit. A program holds its rows' part of the state in registers and goes through the columns; rows do not mix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 4  # of a program, which is one warp: 512 channels fill the 132 multiprocessors of a large GPU
_ALONE = {"num_warps": 1, "enable_fp_fusion": False}


def error_feedback(values: Tensor, factor: Tensor, t: Tensor, levels: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """See `loops_plain.error_feedback`."""
    codes, errors = torch.empty_like(values, dtype=torch.uint8), torch.empty_like(values)
    _over_rows(_error_feedback, values, levels, factor, t.contiguous(), levels, borders, codes, errors)
    return codes, errors


def coordinate_descent(
    slope: Tensor, a: Tensor, codes: Tensor, levels: Tensor, borders: Tensor, least_gain: float
) -> tuple[Tensor, Tensor]:
    """See `loops_plain.coordinate_descent`."""
    before = codes.contiguous()
    chosen, moved = torch.empty_like(before), torch.empty_like(slope)
    # In memory, since a Python number would come as float32.
    gain = torch.full((), least_gain, dtype=slope.dtype, device=slope.device)
    _over_rows(_coordinate_descent, slope, levels, a, before, levels, borders, chosen, moved, gain)
    return chosen, moved


def correlation_order(a: Tensor) -> Tensor:
    """See `loops_plain.correlation_order`."""
    importance = a.diagonal(dim1=1, dim2=2).contiguous()
    order = torch.empty(a.shape[:2], dtype=torch.int64, device=a.device)
    size = triton.next_power_of_2(a.shape[1])
    warps = max(1, min(32, size // 64))
    with torch.cuda.device_of(a):
        _correlation_order[(len(a),)](
            a.contiguous(), importance, importance.rsqrt(), order, a.shape[1], size, num_warps=warps
        )
    return order


def works(device: torch.device) -> bool:
    """Whether kernels can be built and run there: Triton needs a C compiler for what calls them, and a recent GPU."""
    matrix = torch.eye(2, dtype=torch.float64, device=device)[None]
    levels, borders = matrix.new_zeros(1, 2, 4), matrix.new_zeros(1, 2, 3)
    try:
        codes, _ = error_feedback(matrix.clone(), matrix, matrix, levels, borders)
        coordinate_descent(matrix.clone(), matrix, codes, levels, borders, 0.0)
        correlation_order(matrix)
    except Exception as error:  # the compiler, the driver, Python's headers: each fails in its own way
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"no Triton on {device} ({reason}): rounding takes torch's operations, which is slower", stacklevel=2
        )
        return False
    return True


def _over_rows(kernel: Any, state: Tensor, levels: Tensor, *arguments: Tensor) -> None:
    """Run a kernel on all rows of state [G, R, B]."""
    groups, per_group, columns = state.shape
    rows, n_levels = groups * per_group, levels.shape[2]
    sizes = (rows, per_group, columns, n_levels)
    tile = (_ROWS, triton.next_power_of_2(columns), triton.next_power_of_2(n_levels - 1))
    with torch.cuda.device_of(state):
        kernel[(triton.cdiv(rows, _ROWS),)](state, *arguments, *sizes, *tile, **_ALONE)


def _kernel(function: Callable[..., Any]) -> Any:
    return triton.jit(function)


@_kernel
def _nearest(value, borders):  # type: ignore[no-untyped-def]
    """How many of the borders [ROWS, LEVELS] are ≤ value [ROWS]."""
    return tl.sum((borders <= value[:, None]).to(tl.int32), axis=1)


@_kernel
def _column(tile, columns, j):  # type: ignore[no-untyped-def]
    """Column j of a tile [ROWS, BLOCK]; 0 where there is none."""
    return tl.sum(tl.where(columns[None, :] == j, tile, 0.0), axis=1)


@_kernel
def _error_feedback(  # type: ignore[no-untyped-def]
    values, factor, t, levels, borders, codes, errors, rows, per_group, size, n_levels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    group = row // per_group
    columns, border = tl.arange(0, BLOCK), tl.arange(0, LEVELS)
    inside = alive[:, None] & (columns < size)[None, :]
    state = tl.load(values + row[:, None] * size + columns[None, :], mask=inside, other=0.0)
    own = alive[:, None] & (border < n_levels - 1)[None, :]
    own_borders = tl.load(borders + row[:, None] * (n_levels - 1) + border[None, :], mask=own, other=float("nan"))
    for j in range(size):
        code = _nearest(_column(state, columns, j), own_borders)
        level = tl.load(levels + row * n_levels + code, mask=alive, other=0.0)
        error = level - tl.load(t + row * size + j, mask=alive, other=0.0)
        tl.store(codes + row * size + j, code.to(tl.uint8), mask=alive)
        tl.store(errors + row * size + j, error, mask=alive)
        moves = tl.load(factor + (group * size + j)[:, None] * size + columns[None, :], mask=inside, other=0.0)
        state -= error[:, None] * moves


@_kernel
def _coordinate_descent(  # type: ignore[no-untyped-def]
    slope, a, codes, levels, borders, chosen, moved, least_gain, rows, per_group, size, n_levels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    group = row // per_group
    columns, border = tl.arange(0, BLOCK), tl.arange(0, LEVELS)
    inside = alive[:, None] & (columns < size)[None, :]
    state = tl.load(slope + row[:, None] * size + columns[None, :], mask=inside, other=0.0)
    has_border = alive[:, None] & (border < n_levels - 1)[None, :]
    own_borders = tl.load(
        borders + row[:, None] * (n_levels - 1) + border[None, :], mask=has_border, other=float("inf")
    )
    gain, grid, matrix = tl.load(least_gain), levels + row * n_levels, a + group * size * size
    for j in range(size):
        answers = alive & (j + 1 < size)
        own = tl.load(codes + row * size + j, mask=alive, other=0).to(tl.int32)
        next_code = tl.load(codes + row * size + j + 1, mask=answers, other=0).to(tl.int32)
        q, next_q = tl.load(grid + own, mask=alive, other=0.0), tl.load(grid + next_code, mask=answers, other=0.0)
        line = tl.load(matrix[:, None] + j * size + columns[None, :], mask=inside, other=0.0)
        curvature, mixed = _column(line, columns, j), _column(line, columns, j + 1)
        curvature = tl.where(alive, curvature, 1.0)
        next_curvature = tl.load(matrix + (j + 1) * size + j + 1, mask=answers, other=1.0)
        own_slope, old_slope = _column(state, columns, j), _column(state, columns, j + 1)
        best = _nearest(q - own_slope / curvature, own_borders)
        code, step = own, tl.zeros_like(q)
        stay, least = tl.zeros_like(q), tl.zeros_like(q)
        for way in tl.static_range(4):  # to stay, the best alone, both neighbours
            option = own
            if way == 1:
                option = best
            elif way == 2:
                option = tl.maximum(own - 1, 0)
            elif way == 3:
                option = tl.minimum(own + 1, n_levels - 1)
            tried = tl.load(grid + option, mask=alive, other=0.0) - q
            change = tried * (2 * own_slope + tried * curvature)
            squares = curvature * (tried * tried)
            next_slope = old_slope + tried * mixed
            nearest = _nearest(next_q - next_slope / next_curvature, own_borders)
            answer = tl.load(grid + nearest, mask=answers, other=0.0) - next_q
            answer = tl.where(answers, answer, 0.0)
            change += answer * (2 * next_slope + answer * next_curvature)
            squares += next_curvature * (answer * answer)
            if way == 0:
                stay, least = change, change
            else:
                better = (change < stay - gain * squares) & (change < least)
                code, step = tl.where(better, option, code), tl.where(better, tried, step)
                least = tl.where(better, change, least)
        tl.store(chosen + row * size + j, code.to(tl.uint8), mask=alive)
        tl.store(moved + row * size + j, -step, mask=alive)
        state += step[:, None] * line


@_kernel
def _correlation_order(a, importance, scale, order, size, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    group, columns = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    exists = columns < size
    at = tl.argmax(tl.load(importance + group * size + columns, mask=exists, other=-1.0), axis=0)
    rest = tl.load(scale + group * size + columns, mask=exists, other=-float("inf"))
    tl.store(order + group * size, at.to(tl.int64))
    for place in range(1, size):
        rest = tl.where(columns == at, -float("inf"), rest)
        line = tl.load(a + (group * size + at) * size + columns, mask=exists, other=0.0)
        correlation = tl.where(exists, tl.where(rest > 0, tl.abs(line) * rest, -1.0), -2.0)
        at = tl.argmax(correlation, axis=0)
        tl.store(order + group * size + place, at.to(tl.int64))
