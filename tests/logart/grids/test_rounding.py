"""Rounding to the nearest level: every level, every border +- one ulp, degenerate channels, properties."""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from codebooks import minmax_codebook, mse_codebook, reassign, scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from logart.grids.grid import Codebook, Spacing
from logart.grids.linear import linear_codebook
from logart.grids.logarithmic import log_codebook
from logart.grids.rounding import dequantize, lower_neighbour, nearest, rectified_sigmoid, soft_neighbours

N_BITS = range(2, 9)
FLOAT32_MAX = float(np.finfo(np.float32).max)
MAGNITUDES = [1.0, 1.3, 1.45, 1e-200, 3e-39, 1e200]


def log_books(n_bits: int, magnitudes: list[float] = MAGNITUDES) -> list[tuple[str, Codebook]]:
    """All log codebooks of a bit width: every mix, every approximation of root two."""
    absmax = torch.tensor(magnitudes, dtype=torch.float64)
    return [
        (f"k={k} terms={terms}", log_codebook(absmax, n_bits, k, terms=terms, dtype=torch.float64))
        for k in range(2 ** (n_bits - 1) + 1)
        for terms in oracle.TERMS
    ]


def linear_books(n_bits: int) -> list[tuple[str, Codebook]]:
    low = torch.tensor([-1.0, -0.2, 0.0, -3.0, -1e-40, -2e30], dtype=torch.float64)
    high = torch.tensor([1.1, 1.0, 0.7, 0.0, 2.3e-40, 1e30], dtype=torch.float64)
    return [("linear", linear_codebook(low, high, n_bits))]


def step_up(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def step_down(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.full_like(x, -torch.inf))


@pytest.mark.parametrize("n_bits", N_BITS)
def test_every_level_is_a_fixed_point(n_bits: int) -> None:
    for name, book in log_books(n_bits) + linear_books(n_bits):
        expected = torch.arange(2**n_bits, dtype=torch.uint8).expand(book.levels.shape)
        found = nearest(book.levels, book)
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected), name
        assert torch.equal(dequantize(found, book.levels), book.levels), name


@pytest.mark.parametrize("n_bits", N_BITS)
def test_borders_and_one_ulp_beside_them_and_zero(n_bits: int) -> None:
    """A tie goes away from zero; +-0 takes the smallest positive level."""
    lower = torch.arange(2**n_bits - 1, dtype=torch.uint8)
    for name, book in log_books(n_bits) + linear_books(n_bits):
        below, above = nearest(step_down(book.borders), book), nearest(step_up(book.borders), book)
        assert torch.equal(below, lower.expand(below.shape)), name
        assert torch.equal(above, (lower + 1).expand(above.shape)), name
        assert torch.equal(nearest(book.borders, book), torch.where(book.borders < 0, lower, lower + 1)), name
    for name, book in log_books(n_bits):
        zeros = torch.tensor([0.0, -0.0]).expand(len(MAGNITUDES), 2)
        assert torch.all(nearest(zeros, book) == 2 ** (n_bits - 1)), name


@pytest.mark.parametrize("n_bits", N_BITS)
def test_log_borders_lie_where_exact_arithmetic_puts_them(n_bits: int) -> None:
    """Three ulps beside the true geometric mean in float64: the levels themselves are rounded."""
    n = 2 ** (n_bits - 1)
    for name, book in log_books(n_bits):
        truth = torch.tensor(_true_borders(n_bits, name), dtype=torch.float64)
        beside = 3 * torch.tensor(np.spacing(truth.numpy()))
        upper = torch.arange(n + 1, 2 * n, dtype=torch.uint8).expand(truth.shape)
        assert torch.equal(nearest(truth + beside, book), upper), name
        assert torch.equal(nearest(truth - beside, book), upper - 1), name
        assert torch.equal(nearest(-truth - beside, book), 2 * n - 1 - upper), name
        assert torch.equal(nearest(beside - truth, book), 2 * n - upper), name


def _true_borders(n_bits: int, name: str) -> list[list[float]]:
    k, terms = (int(part.split("=")[1]) for part in name.split())
    rows = [oracle.half_steps(a, n_bits, k, "float64") for a in MAGNITUDES]
    return [[oracle.border(lo, hi, terms) for lo, hi in pairwise(row)] for row in rows]


@pytest.mark.parametrize("n_bits", N_BITS)
def test_float32_weights_beside_a_border_are_decided_exactly(n_bits: int) -> None:
    magnitudes, n = [float(np.float32(a)) for a in (1.0, 1.45, 0.019, 3e38)], 2 ** (n_bits - 1)
    for k in sorted({0, 1, n // 2, n - 1, n}):
        for terms in oracle.TERMS:
            book = log_codebook(torch.tensor(magnitudes), n_bits, k, terms=terms)
            for c, a in enumerate(magnitudes):
                steps = oracle.half_steps(a, n_bits, k)
                below, above = zip(*(_float32_around(lo, hi, terms) for lo, hi in pairwise(steps)), strict=True)
                w = torch.tensor([below, above])[:, None].expand(2, len(magnitudes), n - 1)
                upper = torch.arange(n + 1, 2 * n, dtype=torch.uint8)
                assert torch.equal(nearest(w[0], book)[c], upper - 1)
                assert torch.equal(nearest(w[1], book)[c], upper)
                assert torch.equal(nearest(-w[1], book)[c], 2 * n - 1 - upper)


def _float32_around(lower: int, upper: int, terms: int) -> tuple[float, float]:
    """The two neighbouring float32 values that enclose the true border, proved so by its fourth power."""
    guess = np.float32(oracle.border(lower, upper, terms))
    fourth = oracle.border_fourth(lower, upper, terms)
    if Fraction(float(guess)) ** 4 > fourth:
        guess = np.nextafter(guess, np.float32(0))
    below, above = float(guess), float(np.nextafter(guess, np.float32(np.inf)))
    assert Fraction(below) ** 4 < fourth < Fraction(above) ** 4
    return below, above


@pytest.mark.parametrize("n_bits", N_BITS)
def test_weights_past_the_ends_take_the_end_levels(n_bits: int) -> None:
    for name, book in log_books(n_bits) + linear_books(n_bits):
        first, last = book.levels[:, :1], book.levels[:, -1:]
        huge = torch.full_like(first, torch.finfo(torch.float64).max)
        w = torch.cat([-huge, step_down(first), step_up(last), huge], 1)
        assert nearest(w, book).tolist() == [[0, 0, 2**n_bits - 1, 2**n_bits - 1]] * len(w), name


def test_linear_ties_by_hand() -> None:
    book = linear_codebook(torch.tensor([-8.0]), torch.tensor([7.0]), 4)
    w = torch.tensor([[-7.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5, 6.5, -0.49999997, 0.49999997, 1.4999999]])
    q = dequantize(nearest(w, book), book.levels)
    assert q.tolist() == [[-8.0, -2.0, -1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 7.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("spread", [0.3, 6.0])
def test_many_channels_and_elements_match_the_oracle(spread: float) -> None:
    """Channels of different mixes side by side, more elements than any chunk a careful loop would take."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(7, 700, generator=generator) * torch.exp2(spread * torch.randn(7, 1, generator=generator))
    w[:, ::5] *= torch.exp2(-8 * torch.rand(7, 140, generator=generator))
    mix = [0, 1, 3, 5, 6, 7, 8]
    for terms in oracle.TERMS:
        absmax = w.abs().amax(1)
        found = nearest(w, log_codebook(absmax, 4, torch.tensor(mix), terms=terms))
        steps = [oracle.half_steps(a, 4, k) for a, k in zip(absmax.tolist(), mix, strict=True)]
        for row, channel_codes, s in zip(w.tolist(), found.tolist(), steps, strict=True):
            assert channel_codes == [oracle.nearest_log_code(x, s, terms) for x in row]


def test_float64_and_strided_weights_give_the_same_codes() -> None:
    w = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).T
    for book in (log_codebook(w.abs().amax(1), 4, 3), mse_codebook(w, 4)):
        expected = nearest(w.contiguous(), book)
        assert torch.equal(nearest(w, book), expected)
        assert torch.equal(nearest(w.double(), book), expected)
        assert torch.equal(lower_neighbour(w, book), lower_neighbour(w.contiguous().double(), book))


def degenerate_float32() -> torch.Tensor:
    tiny, least = 2.0**-126, 2.0**-149
    rows = [
        [0.0, -0.0, 0.0, 0.0, -0.0, 0.0],
        [0.37, 0.37, 0.37, 0.37, 0.37, 0.37],
        [-1e-5, -1e-5, -1e-5, -1e-5, -1e-5, -1e-5],
        [least, -least, 0.0, -0.0, least, 0.0],
        [7 * least, -3 * least, least, 0.0, -least, 5 * least],
        [tiny, tiny - least, -tiny, least, -3 * least, 0.0],
        [1.0, least, -least, -0.5, 0.0, tiny],
        [FLOAT32_MAX] * 6,
        [-FLOAT32_MAX] * 6,
        [FLOAT32_MAX, -FLOAT32_MAX, 0.0, 1.0, -least, FLOAT32_MAX / 2],
        [FLOAT32_MAX, -0.3 * FLOAT32_MAX, 0.0, 1.0, -1.0, 1e30],
        [0.3 * FLOAT32_MAX, -FLOAT32_MAX, -0.0, 2.0**100, -1.0, 1e-30],
    ]
    return torch.tensor(rows, dtype=torch.float64).float()


@pytest.mark.parametrize("n_bits", N_BITS)
def test_degenerate_channels_survive_a_round_trip_in_float32(n_bits: int) -> None:
    w, n = degenerate_float32(), 2 ** (n_bits - 1)
    grids = [(k, terms) for k in range(n + 1) for terms in oracle.TERMS]
    books = [(f"k={k} terms={t}", log_codebook(w.abs().amax(1), n_bits, k, terms=t)) for k, t in grids]
    books += [("minmax", minmax_codebook(w, n_bits)), ("mse", mse_codebook(w, n_bits))]
    for name, book in books:
        q = dequantize(nearest(w, book), book.levels).float()
        assert torch.isfinite(q).all(), name
        assert torch.equal(dequantize(nearest(q, book), book.levels).float(), q), name
        assert torch.equal(q[0], torch.zeros(6)), name
        assert torch.all(torch.isfinite(book.levels.float())), name
        if book.spacing is Spacing.LOG:
            ratio = q[1:3] / w[1:3]
            assert torch.all((ratio > 0.7) & (ratio < 1.42)), name
        else:
            torch.testing.assert_close(q[1:3], w[1:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_bits", N_BITS)
def test_float64_denormals_survive_a_round_trip(n_bits: int) -> None:
    """Levels below the least denormal vanish, and a border is no finer than it."""
    least = 5e-324
    w = torch.tensor([[least, -2 * least, 0.0, 3e-310], [least, -least, 0.0, 0.0]], dtype=torch.float64)
    for k in (0, 1, 2 ** (n_bits - 1)):
        book = log_codebook(w.abs().amax(1), n_bits, k, dtype=torch.float64)
        assert torch.isfinite(book.levels).all() and torch.all(book.levels.diff(dim=1) >= 0)
        q = dequantize(nearest(w, book), book.levels)
        again = dequantize(nearest(q, book), book.levels)
        assert torch.all((again - q).abs() <= least)
        assert torch.equal(q[1, :2], w[1, :2])


def test_dequantize_picks_the_levels_of_its_own_channel() -> None:
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.float64):
        levels = torch.randn(3, 256, generator=generator, dtype=dtype)
        chosen = torch.randint(0, 256, (3, 50), generator=generator, dtype=torch.uint8)
        q = dequantize(chosen, levels)
        assert q.dtype == dtype
        assert q.tolist() == [[levels[c, i].item() for i in chosen[c].tolist()] for c in range(3)]


@pytest.mark.parametrize("n_bits", N_BITS)
def test_lower_neighbour_encloses_the_weight(n_bits: int) -> None:
    for name, book in log_books(n_bits) + linear_books(n_bits):
        levels, top = book.levels, 2**n_bits - 2
        inside = torch.cat([book.borders, step_up(levels[:, :-1]), step_down(levels[:, 1:])], 1)
        expected = torch.arange(top + 1, dtype=torch.uint8).repeat(3).expand(inside.shape)
        found = lower_neighbour(inside, book)
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected), name
        exact = lower_neighbour(levels, book).long()
        assert torch.all(exact <= top), name
        assert torch.all((levels == levels.gather(1, exact)) | (levels == levels.gather(1, exact + 1))), name
        beyond = torch.cat([2 * levels[:, :1] - 1e-300, 2 * levels[:, -1:] + 1e-300], 1)
        assert lower_neighbour(beyond, book).tolist() == [[0, top]] * len(levels), name


# ---------------------------------------------------------------- learning that starts from codes


def start_books(n_bits: int) -> list[tuple[str, Codebook]]:
    """Grids of two channels of each kind, a zero code and a scale among them."""
    w = torch.tensor([[1.0, -0.9, 0.2], [-0.01, 3.0, 0.3]], dtype=torch.float64)
    plain = log_codebook(w.abs().amax(1), n_bits, 1, dtype=w.dtype)
    spent = reassign(scaled(plain, 0.75), w, asymmetric=True, zero_code=True)
    return [("log", plain), ("spent", spent), ("linear", minmax_codebook(w, n_bits))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_bits", [2, 3, 5, 8])
def test_learning_from_codes_starts_at_the_codes_and_can_move_towards_the_weight(
    n_bits: int, dtype: torch.dtype
) -> None:
    """Every code with weights on, beside and far from its level, past both ends and at zero."""
    last = 2**n_bits - 1
    codes = torch.arange(last + 1).repeat(2, 1)
    for name, book in start_books(n_bits):
        ends = torch.cat([2 * book.levels[:, :1], 2 * book.levels[:, -1:], torch.zeros(2, 1)], 1)
        points = torch.cat([book.levels, book.borders, ends], 1).to(dtype)
        for w in (points, step_up(points), step_down(points)):
            every_w = w.repeat_interleave(last + 1, 1)
            every_code = codes.repeat(1, w.shape[1]).to(torch.uint8)
            lower, lo, a, b, alpha = soft_neighbours(every_w, book, every_code)
            assert lower.dtype == torch.uint8 and alpha.dtype == dtype
            h = rectified_sigmoid(alpha)
            assert torch.equal(lower + (h >= 0.5).to(torch.uint8), every_code), name
            assert bool((alpha.abs() < 2.5).all())  # where h is clipped, it has not left the slope
            below = every_w.double() < dequantize(every_code, book.levels)
            expected = (every_code.long() - below.long()).clamp(0, last - 1)
            assert torch.equal(lower.long(), expected), name
            hi = torch.where(b != 0, lo + b, lo * a.exp())
            torch.testing.assert_close(lo, dequantize(lower, book.levels).to(dtype), rtol=0, atol=0)
            torch.testing.assert_close(hi, dequantize(lower + 1, book.levels).to(dtype), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("n_bits", [2, 4])
def test_learning_from_the_nearest_codes_starts_at_the_weight_where_rounding_agrees(n_bits: int) -> None:
    """Within 0.1 of the code α is the one that gives w; past it, it stops there."""
    for name, book in start_books(n_bits):
        w = torch.linspace(-4, 4, 997, dtype=torch.float64).expand(2, -1)
        plain, from_codes = soft_neighbours(w, book), soft_neighbours(w, book, nearest(w, book))
        exact = (w != dequantize(nearest(w, book), book.levels)) & (w > book.levels[:, :1]) & (w < book.levels[:, -1:])
        assert torch.equal(plain[0][exact], from_codes[0][exact]), name
        h = rectified_sigmoid(plain[4])
        nearest_is_lower = nearest(w, book) == plain[0]
        expected = torch.where(nearest_is_lower, h.clamp(max=0.1), h.clamp(min=0.9))
        torch.testing.assert_close(rectified_sigmoid(from_codes[4])[exact], expected[exact], rtol=1e-9, atol=1e-9)


WEIGHTS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12)
MODERATE = st.lists(st.floats(-100, 100).filter(lambda x: abs(x) > 1e-30), min_size=1, max_size=12)
GRIDS = st.integers(2, 8).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, 2 ** (n - 1)), st.sampled_from(oracle.TERMS))
)
LinearBuilder = Callable[[torch.Tensor, int], Codebook]
Grid = tuple[int, int, int]
thorough = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@thorough
@given(WEIGHTS, GRIDS)
def test_every_weight_gets_the_level_the_oracle_calls_nearest(weights: list[float], grid: Grid) -> None:
    (n_bits, k, terms), w = grid, torch.tensor([weights])
    a = max(abs(x) for x in weights)
    book = log_codebook(torch.tensor([a]), n_bits, k, terms=terms)
    found = nearest(w, book)
    if a > 0:
        steps = oracle.half_steps(a, n_bits, k)
        assert found[0].tolist() == [oracle.nearest_log_code(x, steps, terms) for x in weights]
    q = dequantize(found, book.levels)
    assert torch.equal(dequantize(nearest(q, book), book.levels), q)
    assert len(set(q[0].tolist())) <= 2**n_bits


@thorough
@given(WEIGHTS, GRIDS)
def test_log_rounding_is_monotone_odd_and_between_neighbours(weights: list[float], grid: Grid) -> None:
    (n_bits, k, terms), w = grid, torch.tensor([sorted(weights)])
    book = log_codebook(w.abs().amax(1), n_bits, k, terms=terms)
    q = dequantize(nearest(w, book), book.levels)
    assert torch.all(q.diff(dim=1) >= 0)
    mirrored = dequantize(nearest(-w, book), book.levels)
    assert torch.equal(mirrored[w != 0], -q[w != 0])
    assert torch.all(q[w > 0] >= 0) and torch.all(q[w < 0] <= 0)
    lower = lower_neighbour(w, book)
    below, above = dequantize(lower, book.levels), dequantize(lower + 1, book.levels)
    assert torch.all((q == below) | (q == above))


@thorough
@given(MODERATE, GRIDS, st.integers(-60, 60))
def test_scaling_by_a_power_of_two_scales_the_result(weights: list[float], grid: Grid, j: int) -> None:
    (n_bits, k, terms), w = grid, torch.tensor([weights], dtype=torch.float64)
    pairs = []
    for x in (w, w * 2.0**j):
        log = log_codebook(x.abs().amax(1), n_bits, k, terms=terms, dtype=torch.float64)
        books = (log, minmax_codebook(x, n_bits))
        pairs.append([dequantize(nearest(x, book), book.levels) for book in books])
    for plain, larger in zip(*pairs, strict=True):
        assert torch.equal(plain * 2.0**j, larger)


@thorough
@given(WEIGHTS, st.integers(2, 8), st.sampled_from([minmax_codebook, mse_codebook]))
def test_linear_rounding_is_nearest_monotone_and_idempotent(
    weights: list[float], n_bits: int, build: LinearBuilder
) -> None:
    w = torch.tensor([sorted(weights)])
    book = build(w, n_bits)
    found = nearest(w, book)
    q = dequantize(found, book.levels)
    assert torch.all(q.diff(dim=1) >= 0)
    assert torch.equal(dequantize(nearest(q, book), book.levels), q)
    assert len(set(q[0].tolist())) <= 2**n_bits
    levels = [Fraction(x) for x in book.levels[0].tolist()]
    slack = (levels[-1] - levels[0]) / 10**14
    for x, y in zip(w[0].tolist(), q[0].tolist(), strict=True):
        best = levels[oracle.nearest_linear_code(x, levels)]
        assert abs(Fraction(x) - Fraction(y)) <= abs(Fraction(x) - best) + slack
