"""Scaled levels, asymmetric codes and the zero code against the oracle; the budget for every combination of options."""

from itertools import product
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from codebooks import choose_codebook, half_steps, reassign, scaled, signs
from codebooks import scale as scale_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logart.grids.grid import Codebook, GridOptions, ScaleSearch, Spacing
from logart.grids.logarithmic import DYNAMIC, LOG_2, LOG_SQRT2, SCALES, log_codebook
from logart.grids.rounding import dequantize, nearest

N_BITS = range(2, 9)
FLOAT32_MAX = float(np.finfo(np.float32).max)
SPENDINGS = [(True, False), (False, True), (True, True)]


def channels() -> Tensor:
    """Both signs alike, one shorter by little and by much, one alone, zeros, one value; [C, K] float32."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, 40, generator=generator).clamp(-3, 3)
    shorter = [1, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01, 1e-3, 1e-6]
    for c, factor in enumerate(shorter):
        side = w[c] > 0 if c % 2 else w[c] < 0
        w[c] = torch.where(side, factor * w[c] / w[c][side].abs().max(), w[c] / w[c][~side].abs().max())
    w[9], w[10] = w[9].abs(), -w[10].abs()
    w[11], w[12] = w[11].relu(), -w[12].relu()
    w[13], w[14], w[15] = 0.0, -0.37, 1e-40 * w[15]
    return w * torch.logspace(-3, 3, 16)[torch.randperm(16, generator=generator)][:, None]


def mixes(n_bits: int) -> list[int]:
    n = 2 ** (n_bits - 1)
    return sorted({0, 1, n // 2, n - 1, n})


def expected_levels(signed: list[tuple[int, int | None]], scale: float, terms: int) -> list[float]:
    return [0.0 if h is None else sign * scale * oracle.level(h, terms) for sign, h in signed]


def close(found: list[float], expected: list[float]) -> bool:
    """Equal but for one rounding of √2 and one of the scale."""
    return len(found) == len(expected) and all(
        abs(x - y) <= 4e-16 * abs(y) for x, y in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("scale", [1.0, 0.375, 1.25])
@pytest.mark.parametrize("terms", oracle.TERMS)
@pytest.mark.parametrize("n_bits", N_BITS)
def test_spent_codes_equal_the_oracle(n_bits: int, terms: int, scale: float) -> None:
    """Half-steps and signs exactly, levels but for rounding; also on levels of another √2 afterwards."""
    w, changed = channels(), 0
    ends = list(zip(w.amin(1).tolist(), w.amax(1).tolist(), strict=True))
    for k in mixes(n_bits):
        plain = scaled(log_codebook(w.abs().amax(1), n_bits, k, terms=terms), scale)
        for asymmetric, zero_code in SPENDINGS:
            book = reassign(plain, w, asymmetric=asymmetric, zero_code=zero_code)
            for name in ("n_base2", "scale"):
                assert torch.equal(book.spec.columns[name], plain.spec.columns[name])
            other = book.with_terms(3)
            for c, (low, high) in enumerate(ends):
                if low == high == 0:
                    assert not book.levels[c].any() and not other.levels[c].any()
                    continue
                steps = oracle.half_steps(max(-low, high), n_bits, k)
                options = {"asymmetric": asymmetric, "zero_code": zero_code, "scale": scale, "terms": terms}
                signed = oracle.reassign_unused_codes(steps, k, low, high, **options)  # type: ignore[arg-type]
                found = zip(signs(book)[c].tolist(), half_steps(book)[c].tolist(), strict=True)
                assert [(s, h if s else None) for s, h in found] == signed, (k, asymmetric, zero_code, c)
                assert len(signed) == 2**n_bits
                assert close(book.levels[c].tolist(), expected_levels(signed, scale, terms))
                assert close(other.levels[c].tolist(), expected_levels(signed, scale, 3))
                changed += not torch.equal(book.levels[c], plain.levels[c])
    assert changed > 16


def levels_of(w: list[float], n_bits: int, k: int, **options: bool) -> list[float]:
    rows = torch.tensor([w])
    book = log_codebook(rows.abs().amax(1), n_bits, k)
    return reassign(book, rows, **{"asymmetric": False, "zero_code": False, **options}).levels[0].tolist()  # type: ignore[no-any-return]


def test_by_hand() -> None:
    eighths = [1 / 8, 1 / 4, 1 / 2, 1.0]
    assert levels_of([-0.5, 1.0], 3, 4, zero_code=True) == [-1, -1 / 2, -1 / 4, 0, *eighths]
    assert levels_of([-0.5, 1.0], 3, 4, asymmetric=True) == [-1, -1 / 2, -1 / 4, -1 / 8, *eighths]  # one free code
    assert levels_of([-0.3, 1.0], 3, 4, asymmetric=True) == [-1 / 4, -1 / 8, -1 / 16, 1 / 16, *eighths]
    assert levels_of([-0.15, 1.0], 3, 4, asymmetric=True) == [-1 / 8, -1 / 16, 0, 1 / 16, *eighths]
    assert levels_of([-1.0, 0.15], 3, 4, asymmetric=True) == [-1, -1 / 2, -1 / 4, -1 / 8, -1 / 16, 0, 1 / 16, 1 / 8]
    assert levels_of([0.2, 1.0], 3, 4, asymmetric=True) == [1 / 128, 1 / 64, 1 / 32, 1 / 16, *eighths]
    assert levels_of([0.0, 1.0], 3, 4, asymmetric=True, zero_code=True) == [1 / 128, 1 / 64, 1 / 32, 1 / 16, *eighths]
    assert levels_of([-0.2, -1.0], 2, 2, asymmetric=True) == [-1, -1 / 2, -1 / 4, -1 / 8]
    assert levels_of([-0.2, -1.0], 2, 2, asymmetric=True, zero_code=True) == [-1, -1 / 2, -1 / 4, 0]
    # Zeros are weights too: of ±0's own code, the smallest positive one, and there it stays.
    assert levels_of([0.0, -1.0], 3, 4, asymmetric=True)[-2:] == [-1 / 64, 1 / 8]
    root2 = levels_of([0.2, 1.0], 2, 0, asymmetric=True)
    assert root2 == pytest.approx([2**-1.5, 2**-1, 2**-0.5, 1], rel=1e-15)


@pytest.mark.parametrize("n_bits", N_BITS)
def test_fewer_than_two_free_codes_change_nothing(n_bits: int) -> None:
    """The shorter sign reaches the top level, or the one below it."""
    for k in mixes(n_bits):
        book = log_codebook(torch.ones(1), n_bits, k)
        for reached, sign in product(book.levels[0, -2:].tolist(), (-1, 1)):
            w = sign * torch.tensor([[-reached, 1.0, 0.3]], dtype=torch.float64)
            spent = reassign(book, w, asymmetric=True, zero_code=False)
            assert torch.equal(book.levels, spent.levels)
            short = book.spec.short().columns, spent.spec.short().columns
            assert all(map(torch.equal, *(each.values() for each in short))) and short[0].keys() == short[1].keys()


def test_a_wide_gap_lowers_the_smallest_magnitude_alone() -> None:
    """Every mix with its smallest magnitude 0, 1 and 2 half-steps lower, base 2 by whole steps of 2; nothing else."""
    w = channels()
    for grid, n_bits in product((LOG_2, LOG_SQRT2, DYNAMIC), (2, 3, 4)):
        plain = list(grid.candidates(w, n_bits, GridOptions()))
        wide = list(grid.candidates(w, n_bits, GridOptions(wide_gap=True)))
        lowered = (2, 0) if grid is LOG_2 else (2, 1, 0)
        for book, (before, steps) in zip(wide, product(plain, lowered), strict=True):
            expected = before.levels.clone()
            middle = slice(2 ** (n_bits - 1) - 1, 2 ** (n_bits - 1) + 1)
            expected[:, middle] *= 2.0 ** (-steps / 2)
            assert torch.allclose(book.levels, expected, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize(("n_bits", "least", "near", "gain"), [(2, 0.1175, 1.05, 0.82), (3, 0.03454, 1.25, 0.97)])
def test_few_levels_come_near_the_best_for_normal_weights(n_bits: int, least: float, near: float, gain: float) -> None:
    """Mean squared errors of the best 4 and 8 levels for a normal distribution (Max 1960, table I)."""
    w = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))

    def error(**options: Any) -> float:
        book = choose_codebook(
            w, DYNAMIC, n_bits, scale_search=ScaleSearch.GRID, spacing=Spacing.LINEAR, **options
        )
        q = book.levels[0][torch.searchsorted((book.levels[0, 1:] + book.levels[0, :-1]) / 2, w[0].double())]
        return float((q - w[0]).square().mean() / w.square().mean())

    wide = error(wide_gap=True)
    assert least < wide < near * least
    assert wide < gain * min(error(), error(zero_code=True))


def every_combination(n_bits: int) -> list[tuple[str, Codebook]]:
    """The codebooks chosen for `channels` under every combination of options."""
    w, books = channels(), []
    n = 2 ** (n_bits - 1)
    searches = ScaleSearch if n_bits < 4 else [ScaleSearch.NONE, ScaleSearch.HALF_STEP]
    methods = [DYNAMIC] if n <= 8 else [LOG_2, LOG_SQRT2]
    switches = (False, True)
    wide = switches if n_bits < 5 else [False]
    for method, search, *on, terms in product(methods, searches, switches, switches, wide, oracle.TERMS):
        options = dict(zip(("asymmetric", "zero_code", "wide_gap"), on, strict=True))
        book = choose_codebook(w, method, n_bits, terms=terms, scale_search=search, **options)
        books.append((f"{method.name} {search.value} {options} terms={terms}", book))
    return books


@pytest.mark.parametrize("n_bits", N_BITS)
def test_the_budget_and_the_fixed_points_hold_for_every_combination(n_bits: int) -> None:
    w, all_codes = channels(), torch.arange(2**n_bits, dtype=torch.uint8)
    for name, chosen in every_combination(n_bits):
        for book in (chosen, chosen.with_terms(2)):
            assert book.levels.shape == (len(w), 2**n_bits), name
            assert bool((book.levels.diff(dim=1) >= 0).all()), name
            codes = nearest(w, book)
            q = dequantize(codes, book.levels)
            assert max(len(set(row)) for row in q.float().tolist()) <= 2**n_bits, name
            assert torch.equal(dequantize(nearest(q, book), book.levels), q), name
            distinct = (book.levels.diff(dim=1) > 0).all(1)
            assert torch.equal(nearest(book.levels, book)[distinct], all_codes.expand(int(distinct.sum()), -1)), name
            assert distinct.tolist() == [c != 13 for c in range(len(w))], name  # all but the channel of zeros
            assert not q[13].any(), name
            assert torch.isfinite(q.float()).all(), name


@pytest.mark.parametrize("n_bits", N_BITS)
def test_borders_beside_zero_are_half_the_next_level(n_bits: int) -> None:
    w = channels()
    for k, scale in product(mixes(n_bits), (1.0, 0.75)):
        plain = scaled(log_codebook(w.abs().amax(1), n_bits, k), scale)
        book = reassign(plain, w, asymmetric=False, zero_code=True)
        zero = 2 ** (n_bits - 1) - 1
        live = w.abs().amax(1) > 0
        assert torch.equal(signs(book)[live] == 0, (torch.arange(2**n_bits) == zero).expand(15, -1))
        beside = torch.stack([book.levels[:, zero - 1], book.levels[:, zero + 1]], 1) / 2
        assert torch.equal(book.borders[:, zero - 1 : zero + 1], beside)
        ulp = torch.tensor(np.spacing(beside.abs().numpy()))
        towards, away = beside - ulp * beside.sign(), beside
        assert nearest(towards, book)[live].tolist() == [[zero, zero]] * 15
        assert nearest(away, book)[live].tolist() == [[zero - 1, zero + 1]] * 15
        assert nearest(torch.tensor([[0.0, -0.0]]).expand(16, 2), book)[live].tolist() == [[zero, zero]] * 15
    both = reassign(plain, w, asymmetric=True, zero_code=False)
    inner = (both.levels[:, :-1] < 0) & (both.levels[:, 1:] > 0)
    assert inner.any() and not both.borders[inner].any()  # between both signs without zero: zero


def test_the_border_between_the_signs_is_zero_however_small_they_are() -> None:
    """Levels of unequal magnitude whose product vanishes in float64."""
    w = torch.tensor([[-1e-200, 0.0]], dtype=torch.float64)
    plain = log_codebook(w.abs().amax(1), 3, 4, dtype=w.dtype)
    book = reassign(plain, w, asymmetric=True, zero_code=False)
    assert int((book.levels > 0).sum()) == 1
    assert float(book.borders[0, -1]) == 0


@pytest.mark.parametrize("n_bits", N_BITS)
@pytest.mark.parametrize("terms", oracle.TERMS)
def test_scaling_and_approximating_keep_the_codes(n_bits: int, terms: int) -> None:
    w = channels()
    scale = torch.tensor(SCALES, dtype=torch.float64)[torch.arange(16) % len(SCALES)]
    for k in mixes(n_bits):
        plain = log_codebook(w.abs().amax(1), n_bits, k, terms=terms)
        larger = scaled(plain, scale)
        assert torch.equal(larger.levels, plain.levels * scale[:, None]) and torch.equal(scale_of(larger), scale)
        spent = reassign(larger, w, asymmetric=True, zero_code=True)
        for before in (plain, larger, spent):
            for other in oracle.TERMS:
                after = before.with_terms(other)
                assert torch.equal(after.levels.sign(), before.levels.sign())
                assert torch.equal(half_steps(after), half_steps(before))
                assert torch.equal(signs(after), signs(before))
                assert torch.equal(after.with_terms(terms).levels, before.levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_bits", N_BITS)
def test_no_scale_takes_the_largest_float_past_the_largest_float(n_bits: int, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    w = torch.tensor(
        [[largest, -1.0], [largest, -largest], [-largest, 1.0], [0.3 * largest, 0.0], [1.0, 2.0]], dtype=dtype
    )
    scales = (0.375, 1.0, 1.25, 2.0, 1000.0)[: 5 if dtype is torch.float32 else 3]
    for k, scale, terms in product(mixes(n_bits), scales, oracle.TERMS):
        book = scaled(log_codebook(w.abs().amax(1), n_bits, k, terms=terms, dtype=dtype), scale, dtype)
        assert float(scale_of(book, dtype)[-1]) == scale
        for spent in (book, reassign(book, w, asymmetric=True, zero_code=True)):
            assert torch.isfinite(spent.levels.to(dtype)).all() and torch.isfinite(spent.borders).all()
        if scale <= max(SCALES):  # those that are searched also survive the approximation at test time
            assert all(torch.isfinite(book.with_terms(t, dtype).levels.to(dtype)).all() for t in oracle.TERMS)
    for search in ScaleSearch:
        levels = choose_codebook(w, LOG_SQRT2, n_bits, scale_search=search, asymmetric=True).levels
        assert torch.isfinite(levels.to(dtype)).all()


WEIGHTS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(WEIGHTS, st.integers(2, 6), st.integers(0, 32), st.sampled_from(SCALES), st.sampled_from(SPENDINGS))
def test_any_weights_spend_their_codes_as_the_oracle_says(
    weights: list[float], n_bits: int, k: int, scale: float, spending: tuple[bool, bool]
) -> None:
    k, w = min(k, 2 ** (n_bits - 1)), torch.tensor([weights])
    low, high = float(w.min()), float(w.max())
    book = scaled(log_codebook(w.abs().amax(1), n_bits, k), scale)
    spent = reassign(book, w, asymmetric=spending[0], zero_code=spending[1])
    assert len(set(spent.levels[0].tolist())) <= 2**n_bits
    q = dequantize(nearest(w, spent), spent.levels)
    assert torch.equal(dequantize(nearest(q, spent), spent.levels), q)
    if low == high == 0:
        assert not spent.levels.any()
        return
    options = {"asymmetric": spending[0], "zero_code": spending[1], "scale": scale}
    steps = oracle.half_steps(max(-low, high), n_bits, k)
    signed = oracle.reassign_unused_codes(steps, k, low, high, **options)  # type: ignore[arg-type]
    if float(scale_of(book)[0]) == scale:  # else it was cut at the largest float
        assert close(spent.levels[0].tolist(), expected_levels(signed, scale, 0))
