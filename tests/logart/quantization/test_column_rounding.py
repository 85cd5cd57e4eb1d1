"""Error feedback and coordinate descent against explicit inverses, enumeration and plain loops, all in float64.

The compiled loops against torch's operations, bit for bit.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic import assert_no_worse, correlated, plain_error
from torch import Tensor

from logart.grids.grid import Codebook, Grid
from logart.grids.logarithmic import DYNAMIC, log_codebook
from logart.grids.registry import GRIDS
from logart.grids.rounding import dequantize, nearest
from logart.grids.search import choose_codebook
from logart.quantization import column_rounding, loops_plain
from logart.quantization.column_rounding import (
    Factor,
    coordinate_descent,
    error_feedback,
    quadratic_error,
    round_compensated,
)


def plain_feed_back(t: Tensor, a: Tensor, levels: list[float]) -> list[int]:
    """OBQ in a fixed order: one channel, the inverse of what is left of A taken afresh at every step."""
    left = sorted(range(len(t)), key=lambda j: (-float(a[j, j]), j))
    t, codes = t.clone(), [0] * len(t)
    while left:
        inverse = torch.linalg.inv(a[left][:, left])
        j = left[0]
        codes[j] = min(range(len(levels)), key=lambda i: abs(levels[i] - float(t[j])))
        error = (t[j] - levels[codes[j]]) / inverse[0, 0]
        t[left] -= error * inverse[0]
        left = left[1:]
    return codes


def plain_order(a: Tensor) -> list[int]:
    """From the most important column, always to the one left that is most correlated with the last."""
    order = [int(a.diagonal().argmax())]
    while len(order) < len(a):
        left = [k for k in range(len(a)) if k not in order]
        order.append(max(left, key=lambda k: abs(float(a[order[-1], k])) / float(a[k, k]) ** 0.5))
    return order


def plain_descend(codes: Tensor, t: Tensor, a: Tensor, levels: list[float]) -> list[int]:
    """One channel: each weight in turn tries its options on the whole objective, the next one all of its levels."""
    found, order = codes.tolist(), plain_order(a)
    q = torch.tensor([levels[i] for i in found], dtype=torch.float64)

    def objective(j: int, level: float) -> float:
        tried = q.clone()
        tried[j] = level
        return float((tried - t) @ a @ (tried - t))

    def after_answer(j: int, option: int, answering: int | None) -> float:
        if answering is None:
            return objective(j, levels[option])
        own, q[j] = float(q[j]), levels[option]
        least = min(objective(answering, level) for level in levels)
        q[j] = own
        return least

    n_changed_codes = True
    while n_changed_codes:
        n_changed_codes = False
        for place, j in enumerate(order):
            answering = None if place % 64 == 63 or place == len(order) - 1 else order[place + 1]
            best = min(range(len(levels)), key=lambda i: objective(j, levels[i]))  # noqa: B023
            own, top = found[j], len(levels) - 1
            options = [own, best, max(own - 1, 0), min(own + 1, top)]
            errors = [after_answer(j, i, answering) for i in options]
            k = min(range(4), key=errors.__getitem__)
            if errors[k] < errors[0] * (1 - 1e-12):
                found[j], n_changed_codes = options[k], True
            q[j] = levels[found[j]]
    return found


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 9), (3, 20), (1, 64), (1, 65), (2, 150)])
def test_feed_back_is_the_recursion_with_explicit_inverses(groups: int, size: int) -> None:
    """Also where the columns do not fill the last block."""
    t, a, codebook = correlated(groups, 2, size, seed=size)
    codes = error_feedback(t, Factor.of(a), codebook)
    assert codes.dtype == torch.uint8
    levels = codebook.levels.tolist()
    assert codes.tolist() == [plain_feed_back(row, a[c // 2], levels[c]) for c, row in enumerate(t)]
    assert size < 9 or not torch.equal(codes, nearest(t, codebook))


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 9), (1, 64), (1, 65), (2, 130)])
def test_descent_is_the_plain_one(groups: int, size: int) -> None:
    """Blocks of 64 columns: the last of a block has no next to answer."""
    t, a, codebook = correlated(groups, 2, size, seed=size)
    start = nearest(t, codebook)
    levels = codebook.levels.tolist()
    expected = [plain_descend(start[c], t[c], a[c // 2], levels[c]) for c in range(len(t))]
    assert coordinate_descent(start, t, a, codebook).tolist() == expected
    assert size < 9 or start.tolist() != expected


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("start", ["nearest", "fed back", "lowest", "random"])
def test_descent_never_rises_and_ends_where_no_weight_can_improve(
    start: str, n_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, a, codebook = correlated(2, 4, 40, seed=n_bits, n_bits=n_bits)
    random = torch.randint(0, 2**n_bits, t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    starts = {"nearest": nearest(t, codebook), "fed back": error_feedback(t, Factor.of(a), codebook), "random": random}
    codes = starts.get(start, torch.zeros_like(random))
    given, end = codes.clone(), coordinate_descent(codes, t, a, codebook)
    assert torch.equal(codes, given)
    monkeypatch.setattr(column_rounding, "SWEEPS", 1)
    sweeps = 0
    while not torch.equal(after := coordinate_descent(codes, t, a, codebook), codes):
        assert_no_worse(plain_error(after, t, a, codebook), plain_error(codes, t, a, codebook))
        codes, sweeps = after, sweeps + 1
    assert sweeps < 100 and torch.equal(codes, end)  # so the real one ended by itself
    delta = dequantize(end, codebook.levels) - t
    slope = (delta.unflatten(0, (2, -1)) @ a).flatten(0, 1)
    steps = codebook.levels[:, None] - dequantize(end, codebook.levels)[:, :, None]  # [C, K, levels]
    curvature = a.diagonal(dim1=1, dim2=2).repeat_interleave(4, 0)[:, :, None]
    changes = 2 * steps * slope[:, :, None] + steps.square() * curvature
    assert float(changes.amin()) > -1e-9 * float(curvature.amax())


def test_codes_follow_linear_distance_on_a_log_grid() -> None:
    """1.45 is nearer to 1 than to 2 by distance, not by ratio; A = I leaves nothing else to decide."""
    codebook = log_codebook(torch.tensor([2.0]), 3, 4)
    t, a = torch.tensor([[1.45, -1.45, 1.55, -2.95]], dtype=torch.float64), torch.eye(4, dtype=torch.float64)[None]
    for codes in (error_feedback(t, Factor.of(a), codebook), coordinate_descent(nearest(t, codebook), t, a, codebook)):
        assert dequantize(codes, codebook.levels).tolist() == [[1.0, -1.0, 2.0, -2.0]]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 20), st.integers(2, 8),
    st.sampled_from(list(GRIDS.values())),
)  # fmt: skip
def test_the_result_is_no_worse_than_feedback_or_nearest(
    seed: int, groups: int, size: int, n_bits: int, grid: Grid
) -> None:
    t, a, _ = correlated(groups, 3, size, seed)
    t[0] = 0
    codebook = choose_codebook(t, grid, n_bits)
    codes = round_compensated(t, a, codebook)
    reached = plain_error(codes, t, a, codebook)
    assert_no_worse(reached, plain_error(error_feedback(t, Factor.of(a), codebook), t, a, codebook))
    assert_no_worse(reached, plain_error(nearest(t, codebook), t, a, codebook))
    assert torch.equal(codes, coordinate_descent(codes, t, a, codebook))


TOYS: dict[str, Callable[[Callable[[int, int], Tensor]], Tensor]] = {
    "8 rows": lambda draw: draw(8, 3),
    "4 rows": lambda draw: draw(4, 3),
    "correlated": lambda draw: draw(50, 1) + 0.3 * draw(50, 3),
}


@pytest.mark.parametrize("inputs", TOYS)
def test_toy_problems_are_within_5_percent_of_the_optimum(inputs: str) -> None:
    """2×3 weights, 2 bits, all 64 assignments of each channel enumerated."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    every = torch.tensor(list(product(range(4), repeat=3)), dtype=torch.uint8)
    ratios, plainly = [], []
    for _ in range(300):
        t, x = draw(2, 3), TOYS[inputs](draw)
        a = (x.T @ x + 0.01 * x.square().sum(0).mean() * torch.eye(3))[None]
        codebook = choose_codebook(t, DYNAMIC, 2, error=lambda d, a=a: quadratic_error(d, a))  # type: ignore[misc]
        found = plain_error(round_compensated(t, a, codebook), t, a, codebook)
        rounded = plain_error(nearest(t, codebook), t, a, codebook)
        assert_no_worse(found, rounded)
        best = [min(plain_error(c.expand(2, 3), t, a, codebook)[row] for c in every) for row in range(2)]
        assert_no_worse(best, found)
        ratios += [x / y for x, y in zip(found, best, strict=True)]
        plainly += [x / y for x, y in zip(rounded, best, strict=True)]
    assert sum(ratios) / len(ratios) < 1.05
    assert sum(plainly) / len(plainly) > 1.05  # else nearest would pass as well


# ---------------------------------------------------------------- equally good choices


def equal_inputs() -> tuple[Tensor, Tensor, Codebook]:
    """T, A and codebook of two inputs that nothing tells apart: exchanging both codes leaves the error as it is."""
    t = torch.randn(200, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64).repeat(1, 2)
    a = torch.tensor([[[1.0, 0.7], [0.7, 1.0]]], dtype=torch.float64)
    return t, a, log_codebook(torch.full((200,), 3.0), 4, 0)


def test_equally_good_choices_do_not_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    t, a, codebook = equal_inputs()
    end = coordinate_descent(nearest(t, codebook), t, a, codebook)
    monkeypatch.setattr(column_rounding, "SWEEPS", 1)
    assert torch.equal(coordinate_descent(end, t, a, codebook), end)


def test_without_the_least_gain_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `LEAST_GAIN` could go: what tells one choice from its equal is then the rounding of sums alone."""
    t, a, codebook = equal_inputs()
    monkeypatch.setattr(column_rounding, "LEAST_GAIN", 0.0)
    end = coordinate_descent(nearest(t, codebook), t, a, codebook)
    monkeypatch.setattr(column_rounding, "SWEEPS", 1)
    again = coordinate_descent(end, t, a, codebook)
    assert not torch.equal(again, end)
    for first, second in zip(plain_error(again, t, a, codebook), plain_error(end, t, a, codebook), strict=True):
        assert first == pytest.approx(second, rel=1e-12)


# ---------------------------------------------------------------- compiled and plain loops


def compiled() -> ModuleType:
    return pytest.importorskip("logart.quantization.loops_compiled", reason="numba is not installed")


def blocks(seed: int, bits: int, groups: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Codebook, Tensor]:
    t, a, codebook = correlated(groups, rows, columns, seed, n_bits=bits)
    shape = (groups, rows, columns)
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return t.reshape(shape), a, codebook, codes


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 64), (5, 1, 9), (3, 40, 64), (2, 300, 33)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compiled_loops_give_the_plain_ones_bits(
    bits: int, shape: tuple[int, int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes and errors, not only near: a fused multiply-add or sums in another order would differ in the last bit."""
    loops = compiled()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    t, a, codebook, codes = blocks(bits, bits, *shape)
    grid = column_rounding.LinearLevels.of(codebook, shape[0])
    for way in ("error_feedback", "coordinate_descent"):
        results = []
        for module in (loops, loops_plain):
            if way == "error_feedback":
                results.append(module.error_feedback(t.clone(), a.triu() / 7, t, grid.levels, grid.borders))
            else:
                slope = (grid.levels.gather(2, codes.long()) - t) @ a
                results.append(module.coordinate_descent(slope, a, codes, grid.levels, grid.borders, 1e-12))
        for fast, plain in zip(*results, strict=True):
            assert torch.equal(fast, plain)
    assert torch.equal(loops.correlation_order(a), loops_plain.correlation_order(a))


@pytest.mark.parametrize("levels", [[-1.0, 0.0, 0.5], [0.0] * 4, [-2.0, -1.0, -1.0, 3.0], [1.0, 2.0, 4.0, 8.0, 9.0]])
def test_compiled_loops_find_the_nearest_of_any_levels(levels: list[float]) -> None:
    """Any number of levels, equal ones, values on borders and far outside."""
    grid = torch.tensor([[levels]], dtype=torch.float64)
    borders = (grid[..., 1:] + grid[..., :-1]) / 2
    values = torch.cat([grid[0], borders[0], grid[0] * 100, grid[0] - 1e9], 1)[None]
    factor = torch.eye(values.shape[2], dtype=torch.float64)[None]
    results = [m.error_feedback(values.clone(), factor, values, grid, borders)[0] for m in (compiled(), loops_plain)]
    assert torch.equal(*results)
    assert grid[0, 0][results[0][0, 0, : len(levels)].long()].tolist() == levels


def test_without_numba_codes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled()
    t, a, codebook = correlated(2, 6, 100, seed=5)
    fast = round_compensated(t, a, codebook)
    monkeypatch.setitem(sys.modules, "numba", None)  # so that importing it fails
    monkeypatch.delitem(sys.modules, "logart.quantization.loops_compiled", raising=False)
    monkeypatch.delattr("logart.quantization.loops_compiled", raising=False)
    column_rounding._compiled_loops.cache_clear()
    try:
        assert column_rounding._loops(t.device) is loops_plain
        assert torch.equal(round_compensated(t, a, codebook), fast)
    finally:
        column_rounding._compiled_loops.cache_clear()


def test_an_installation_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    """Neither the folder of the code nor a home to keep machine code in; then it is compiled in every process."""
    compiled()
    package = tmp_path / "read_only" / "logart"
    package.parent.mkdir()
    package.symlink_to(Path(column_rounding.__file__).parents[1])
    script = """
import os, tempfile
def refuse(*args, **kwargs): raise PermissionError("read-only")
tempfile.TemporaryFile = refuse  # what numba tries a folder with; root may write anywhere
import torch
from logart.quantization import loops_compiled
print(loops_compiled.correlation_order(torch.eye(3, dtype=torch.float64)[None]).tolist())
"""
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout == "[[0, 1, 2]]\n", result.stderr


# ---------------------------------------------------------------- loops on CUDA


TESTS = Path(__file__).parents[2]


def check_triton(device: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(TESTS / "loops_on_device.py"), device]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert len(found) == 18 and all(len(equal) == 3 for equal in found.values())
    assert [name for name, equal in found.items() if not all(equal.values())] == []


def test_triton_loops_give_the_plain_ones_bits() -> None:
    """In Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton", reason="torch brought no Triton")
    check_triton("cpu")


@pytest.mark.gpu
def test_triton_loops_give_the_plain_ones_bits_on_a_gpu() -> None:
    check_triton("cuda")


def test_triton_loops_compile_without_fused_products() -> None:
    """For a GPU that is not there: a fused multiply-add would round once where the others round twice."""
    triton = pytest.importorskip("triton", reason="torch brought no Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from logart.quantization import loops_triton

    real, codes, size = "*fp64", "*u8", "i32"
    sizes = {name: size for name in ("rows", "per_group", "size", "n_levels")}
    tile = {"ROWS": 4, "BLOCK": 64, "LEVELS": 16}
    for kernel in (loops_triton._error_feedback, loops_triton._coordinate_descent):
        types = {name: codes if name in ("codes", "chosen") else real for name in kernel.arg_names}
        source = ASTSource(kernel, {**types, **sizes, **dict.fromkeys(tile, "constexpr")}, tile)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=loops_triton._ALONE)
        assert "mul.rn.f64" in built.asm["ptx"] or "mul.f64" in built.asm["ptx"]
        assert "fma" not in built.asm["ptx"]


def test_a_gpu_without_triton_takes_torch_s_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no C compiler is found: the line says so, and the work goes on."""
    loops_triton = pytest.importorskip("logart.quantization.loops_triton", reason="torch brought no Triton")

    def refuse(*arguments: Tensor) -> Tensor:
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(loops_triton, "error_feedback", refuse)
    with pytest.warns(UserWarning, match=r"^no Triton on cpu \(no C compiler\): rounding takes torch's operations"):
        assert not loops_triton.works(torch.device("cpu"))
    for works, expected in ((False, loops_plain), (True, loops_triton)):
        monkeypatch.setattr(loops_triton, "works", lambda device, works=works: works)
        column_rounding._triton_loops.cache_clear()
        assert column_rounding._loops(torch.device("cuda")) is expected
    column_rounding._triton_loops.cache_clear()
