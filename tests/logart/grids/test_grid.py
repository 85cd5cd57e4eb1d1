"""Codebooks against the oracle: half-steps and levels, exactly; degenerate channels; refusals."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from codebooks import half_steps, minmax_codebook, mse_codebook, n_base2, signs

from logart.grids.grid import Codebook, Spacing
from logart.grids.linear import linear_codebook
from logart.grids.logarithmic import log_codebook
from logart.grids.root2 import root2

N_BITS = range(2, 9)
FLOAT32_MAX, FLOAT64_MAX = (float(np.finfo(t).max) for t in (np.float32, np.float64))


def around(value: float, dtype: type = np.float32) -> list[float]:
    """The value rounded to dtype and its two neighbours there, as far as they are finite and positive."""
    middle = dtype(min(value, float(np.finfo(dtype).max)))
    with np.errstate(over="ignore", under="ignore"):
        three = [np.nextafter(middle, dtype(-np.inf)), middle, np.nextafter(middle, dtype(np.inf))]
    return [float(x) for x in three if 0 < x <= np.finfo(dtype).max]


def float32_magnitudes() -> list[float]:
    """Largest magnitudes of many channels: random, powers of two, borders of both tops, extremes."""
    rng = np.random.default_rng(0)
    values = [float(np.float32(x)) for x in np.ldexp(rng.uniform(0.5, 1, 60), rng.integers(-140, 127, 60))]
    for e in (-149, -148, -127, -126, -20, -1, 0, 1, 64, 127):
        values += around(2.0**e)
    for h in (*range(-297, 256, 29), -297, -252, -9, -4, -3, -2, -1, 0, 1, 2, 3, 253, 254, 255):
        values += around(oracle.border(h, h + 1))  # 2^(h/2 + 1/4): the next half-step is top
    for e in (*range(-149, 128, 31), -149, -126, -2, -1, 0, 1, 126, 127):
        values += around(oracle.border(2 * e, 2 * e + 2))  # 2^(e + 1/2): the next power is top
    return sorted({*values, *around(FLOAT32_MAX), 3 * 2.0**-149})


def level_table(steps: np.ndarray, terms: int) -> np.ndarray:
    """The oracle's magnitudes of an array of half-steps."""
    least = int(steps.min())
    table = np.array([oracle.level(h, terms) for h in range(least, int(steps.max()) + 1)])
    return table[steps - least]


@pytest.mark.parametrize("n_bits", N_BITS)
def test_log_codebooks_equal_the_oracle_for_every_mix(n_bits: int) -> None:
    magnitudes = float32_magnitudes()
    absmax, n = torch.tensor(magnitudes), 2 ** (n_bits - 1)
    for k in range(n + 1):
        expected = np.array([oracle.half_steps(a, n_bits, k) for a in magnitudes])
        for terms in oracle.TERMS:
            book = log_codebook(absmax, n_bits, k, terms=terms)
            assert book.spacing is Spacing.LOG
            assert half_steps(book).dtype == torch.int64 and n_base2(book).dtype == torch.int64
            assert book.levels.dtype == torch.float64 and book.levels.shape == (len(magnitudes), 2 * n)
            np.testing.assert_array_equal(half_steps(book)[:, n:].numpy(), expected, err_msg=f"k={k} terms={terms}")
            np.testing.assert_array_equal(half_steps(book)[:, :n].numpy(), expected[:, ::-1])
            assert signs(book).tolist() == [[-1] * n + [1] * n] * len(magnitudes)
            assert n_base2(book).tolist() == [k] * len(magnitudes)
            _check_levels(book.levels.numpy(), expected, terms)


def _check_levels(levels: np.ndarray, steps: np.ndarray, terms: int) -> None:
    n = steps.shape[1]
    positive, truth = levels[:, n:], level_table(steps, terms)
    inexact = (steps % 2 != 0) & (terms == 0)
    np.testing.assert_array_equal(positive[~inexact], truth[~inexact])
    assert np.all(np.abs(positive - truth) <= np.where(inexact, np.spacing(truth), 0))
    np.testing.assert_array_equal(levels[:, :n], -positive[:, ::-1])
    assert np.all(np.diff(levels, axis=1) > 0)


@pytest.mark.parametrize("n_bits", N_BITS)
def test_float64_magnitudes_are_decided_to_the_last_bit(n_bits: int) -> None:
    magnitudes = [2.0**-1000, 2.0**700, FLOAT64_MAX, 1e-290, 1e-200, 1e200]
    for h in (-1500, -1499, -7, -2, -1, 0, 1, 2, 401, 402, 2046):
        even = 2 * (h // 2)
        magnitudes += around(oracle.border(h, h + 1), np.float64)
        magnitudes += around(oracle.border(even, even + 2), np.float64)
    absmax, n = torch.tensor(magnitudes, dtype=torch.float64), 2 ** (n_bits - 1)
    for k in sorted({0, 1, n // 2, n - 1, n}):
        steps = half_steps(log_codebook(absmax, n_bits, k, dtype=torch.float64))
        expected = [oracle.half_steps(a, n_bits, k, "float64") for a in magnitudes]
        np.testing.assert_array_equal(steps[:, n:].numpy(), np.array(expected), err_msg=f"k={k}")


@pytest.mark.parametrize("n_bits", N_BITS)
def test_channels_may_differ_in_n_base2(n_bits: int) -> None:
    n = 2 ** (n_bits - 1)
    generator = torch.Generator().manual_seed(n_bits)
    absmax = torch.exp2(20 * torch.rand(n + 3, generator=generator) - 10)
    mix = torch.cat([torch.arange(n + 1), torch.tensor([0, n])])[torch.randperm(n + 3, generator=generator)]
    for terms in (0, 3):
        book = log_codebook(absmax, n_bits, mix, terms=terms)
        assert torch.equal(n_base2(book), mix)
        for c, k in enumerate(mix.tolist()):
            alone = log_codebook(absmax[c : c + 1], n_bits, k, terms=terms)
            assert torch.equal(book.levels[c], alone.levels[0])
            assert torch.equal(half_steps(book)[c], half_steps(alone)[0])


@pytest.mark.parametrize(("dtype", "top_root2"), [(torch.float32, 255), (torch.float64, 2047)])
def test_the_top_level_of_the_largest_finite_float_is_finite(dtype: torch.dtype, top_root2: int) -> None:
    absmax = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    for n_bits in N_BITS:
        n = 2 ** (n_bits - 1)
        for k in range(n + 1):
            for terms in oracle.TERMS:
                book = log_codebook(absmax, n_bits, k, terms=terms, dtype=dtype)
                assert int(half_steps(book)[0, -1]) == top_root2 - (k == n)
                assert torch.isfinite(book.levels.to(dtype)).all() and torch.isfinite(book.borders).all()


def test_the_top_follows_the_dtype_of_the_weights_not_of_the_magnitudes() -> None:
    book = log_codebook(torch.tensor([FLOAT32_MAX]), 4, 0, dtype=torch.float64)
    assert int(half_steps(book)[0, -1]) == 256


@pytest.mark.parametrize("terms", oracle.TERMS)
def test_all_zero_channels_know_only_zero_and_disturb_no_other(terms: int) -> None:
    for n_bits in N_BITS:
        n = 2 ** (n_bits - 1)
        for k in (0, 1, n):
            book = log_codebook(torch.tensor([0.0, 0.7, 0.0]), n_bits, k, terms=terms)
            assert torch.equal(book.levels[[0, 2]], torch.zeros(2, 2 * n, dtype=torch.float64))
            alone = log_codebook(torch.tensor([0.7]), n_bits, k, terms=terms)
            assert torch.equal(book.levels[1:2], alone.levels)
            assert torch.equal(book.borders[0], torch.zeros(2 * n - 1, dtype=torch.float64))


@pytest.mark.parametrize("n_bits", N_BITS)
def test_log_borders_are_geometric_means(n_bits: int) -> None:
    magnitudes, n = [1.0, 1.3, 1.45, 1e-200, 1e200], 2 ** (n_bits - 1)
    absmax = torch.tensor(magnitudes, dtype=torch.float64)
    for k in range(n + 1):
        for terms in oracle.TERMS:
            borders = log_codebook(absmax, n_bits, k, terms=terms, dtype=torch.float64).borders.numpy()
            assert borders.shape == (len(magnitudes), 2 * n - 1) and borders.dtype == np.float64
            rows = [oracle.half_steps(a, n_bits, k, "float64") for a in magnitudes]
            truth = np.array([[oracle.border(lo, hi, terms) for lo, hi in pairwise(r)] for r in rows])
            assert np.all(np.abs(borders[:, n:] - truth) <= 2 * np.spacing(truth)), (k, terms)
            np.testing.assert_array_equal(borders[:, : n - 1], -borders[:, : n - 1 : -1])
            np.testing.assert_array_equal(borders[:, n - 1], 0.0)


def test_root2_counts_its_terms() -> None:
    assert [root2(t) for t in (0, 2, 3, 4)] == [math.sqrt(2), 1.5, 1.4375, 1.421875]


@pytest.mark.parametrize("terms", [-1, 1, 5])
def test_other_counts_of_terms_are_refused(terms: int) -> None:
    with pytest.raises(ValueError, match=str(terms)):
        root2(terms)
    with pytest.raises(ValueError, match=str(terms)):
        log_codebook(torch.ones(2), 4, 0, terms=terms)


@pytest.mark.parametrize("n_bits", [-1, 0, 1, 9, 16])
def test_bit_widths_outside_2_to_8_are_refused(n_bits: int) -> None:
    w = torch.linspace(-1, 1, 8).reshape(2, 4)
    with pytest.raises(ValueError):
        log_codebook(torch.ones(2), n_bits, 0)
    with pytest.raises(ValueError):
        linear_codebook(-torch.ones(2), torch.ones(2), n_bits)
    with pytest.raises(ValueError):
        minmax_codebook(w, n_bits)
    with pytest.raises(ValueError):
        mse_codebook(w, n_bits)


@pytest.mark.parametrize("n_bits", N_BITS)
def test_n_base2_outside_the_magnitudes_is_refused(n_bits: int) -> None:
    n = 2 ** (n_bits - 1)
    for bad in (-1, n + 1):
        with pytest.raises(ValueError):
            log_codebook(torch.ones(2), n_bits, bad)
        with pytest.raises(ValueError):
            log_codebook(torch.ones(2), n_bits, torch.tensor([0, bad]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_magnitudes_are_refused(bad: float) -> None:
    with pytest.raises(ValueError):
        log_codebook(torch.tensor([1.0, bad]), 4, 2)
    with pytest.raises(ValueError):
        linear_codebook(torch.tensor([-1.0, -1.0]), torch.tensor([1.0, bad]), 4)
    with pytest.raises(ValueError):
        linear_codebook(torch.tensor([-1.0, -bad]), torch.tensor([1.0, 1.0]), 4)
    for build in (minmax_codebook, mse_codebook):
        with pytest.raises(ValueError):
            build(torch.tensor([[1.0, 2.0], [bad, 0.5]]), 4)


RANGES = [(-1.0, 1.7), (-0.9, 1.0), (-3.0, 0.01), (-0.013, 3.0), (0.0, 1.0), (-1.0, 0.0)]
RANGES += [(0.4, 1.1), (-2.0, -0.3), (1e-40, 3e-40), (-1e30, 2.1e30)]


def assert_levels(book: Codebook, expected: list[list[float]]) -> None:
    """Linear levels equal up to float64 rounding; zero must be exact."""
    truth = np.array(expected)
    assert book.levels.dtype == torch.float64
    assert book.spacing is Spacing.LINEAR
    tolerance = np.where(truth == 0, 0, 4 * np.spacing(np.abs(truth)))
    assert np.all(np.abs(book.levels.numpy() - truth) <= tolerance)


@pytest.mark.parametrize("n_bits", N_BITS)
def test_linear_codebooks_equal_the_oracle(n_bits: int) -> None:
    low, high = (torch.tensor(x, dtype=torch.float64) for x in zip(*RANGES, strict=True))
    book = linear_codebook(low, high, n_bits)
    truth = [[float(x) for x in oracle.linear_levels(a, b, n_bits)] for a, b in RANGES]
    assert_levels(book, truth)
    levels = book.levels.numpy()
    assert levels.shape == (len(RANGES), 2**n_bits)
    assert np.all((levels == 0).sum(axis=1) == 1) and np.all(np.diff(levels, axis=1) > 0)
    np.testing.assert_array_equal(book.borders.numpy(), (levels[:, 1:] + levels[:, :-1]) / 2)


@pytest.mark.parametrize("n_bits", N_BITS)
def test_a_symmetric_range_gives_the_odd_level_to_the_negative_side(n_bits: int) -> None:
    half = (2**n_bits - 1) / 2
    book = linear_codebook(torch.tensor([-half]), torch.tensor([half]), n_bits)
    assert book.levels[0].tolist() == [float(i) for i in range(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1))]


def linear_weights() -> torch.Tensor:
    """Channels with outliers, of one sign, skewed, narrow and wide: their best ranges differ."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(9, 31))
    w[1] = rng.standard_t(2, 31)
    w[2] = np.abs(w[2])
    w[3] = -np.abs(w[3]) - 0.2
    w[4] = np.where(np.arange(31) == 7, 9.0, 0.3 * w[4])
    w[5] = np.where(np.arange(31) == 7, -40.0, w[5])
    w[6] = np.round(w[6])
    w[7] *= 1e-41
    w[8] *= 1e37
    return torch.tensor(w.astype(np.float32))


@pytest.mark.parametrize("n_bits", N_BITS)
def test_minmax_spans_the_weights(n_bits: int) -> None:
    w = linear_weights()
    truth = [[float(x) for x in oracle.linear_levels(min(row), max(row), n_bits)] for row in w.tolist()]
    assert_levels(minmax_codebook(w, n_bits), truth)


@pytest.mark.parametrize("n_bits", N_BITS)
def test_mse_takes_the_range_of_least_error(n_bits: int) -> None:
    w, truth, chosen = linear_weights(), [], set()
    for row in w.tolist():
        errors = oracle.shrink_errors(row, n_bits)
        best = min(range(len(errors)), key=errors.__getitem__)
        runner_up = min(e for i, e in enumerate(errors) if i != best)
        assert runner_up > errors[best] * (1 + 1e-9), "the data must decide clearly"
        percent = oracle.SHRINK_PERCENTS[best]
        chosen.add(percent)
        low, high = (Fraction(percent, 100) * Fraction(x) for x in (min(row), max(row)))
        levels = oracle.linear_levels(low, high, n_bits)
        truth.append([float(x) for x in levels])
    assert len(chosen) > 3 or n_bits > 4, "several ranges must win, or the search is not tested"
    assert_levels(mse_codebook(w, n_bits), truth)


CROWDS = [(2, 20, 21), (2, 21, 21), (2, 22, 22), (2, 57, 57), (2, 99, 99), (2, 100, 100)]
CROWDS += [(3, 45, 45), (4, 75, 75), (5, 86, 86), (6, 94, 94), (7, 97, 97), (8, 98, 98), (8, 99, 99)]


@pytest.mark.parametrize(("n_bits", "wanted", "taken"), CROWDS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_mse_shrinks_in_steps_of_one_percent_down_to_21(sign: int, n_bits: int, wanted: int, taken: int) -> None:
    """A crowd on every non-zero level of one range outvotes the lonely weight that spans all."""
    top = 2**n_bits - 1
    crowd = torch.arange(1, top + 1, dtype=torch.float64).repeat(9000 // top) * wanted / (100 * top)
    w = sign * torch.cat([torch.ones(1, dtype=torch.float64), crowd])
    levels = mse_codebook(w[None], n_bits).levels[0]
    assert float((sign * levels).max()) == pytest.approx(taken / 100, rel=1e-12)


@pytest.mark.parametrize("n_bits", N_BITS)
@pytest.mark.parametrize("build", [minmax_codebook, mse_codebook])
def test_linear_codebooks_of_degenerate_channels(build: Callable[[torch.Tensor, int], Codebook], n_bits: int) -> None:
    w = torch.tensor([[0.0, -0.0, 0.0], [0.3, 0.3, 0.3], [-0.3, -0.3, -0.3], [2.0**-149, 2.0**-149, 0.0]])
    levels = build(w, n_bits).levels
    assert torch.equal(levels[0], torch.zeros(2**n_bits, dtype=torch.float64))
    for c in (1, 2, 3):
        assert torch.isfinite(levels[c]).all() and bool((levels[c] == 0).any())
        assert float(w[c, 0]) in levels[c].float().tolist()


def test_mse_prefers_the_larger_range_among_equals() -> None:
    """Errors of 1e-152 to the power 2.4 all vanish in float64."""
    levels = mse_codebook(torch.full((1, 3), 1e-150, dtype=torch.float64), 4).levels
    assert float(levels[0, -1]) == pytest.approx(1e-150, rel=1e-12, abs=0)
