"""Search: each measure against its definition, the least error wins, ties go to the larger k."""

import math
from fractions import Fraction
from typing import Any

import oracle
import pytest
import torch
from codebooks import LOG_GRIDS, candidate_books, choose_codebook, half_steps, n_base2, reassign, scale, scaled, signs
from torch import Tensor

import logart.grids.search
from logart.grids.grid import Codebook, Grid, GridOptions, ScaleSearch, Spacing
from logart.grids.logarithmic import DYNAMIC, HALF_STEPS, LOG_2, LOG_SQRT2, SCALES, distinct_n_base2
from logart.grids.measures import BlockSensitivity, OutputMoments, OutputResidual, moments_are_cheaper
from logart.grids.registry import GRIDS
from logart.grids.search import least_error, rounding_error, rounding_errors, squared_error


def weights(channels: int, elements: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(channels, elements, dtype=torch.float64) * torch.logspace(-2, 1, channels).double()[:, None]


def oracle_error(row: list[float], n_bits: int, k: int, terms: int, scale: float = 1.0, shift: int = 0) -> float:
    """Σ(w - q)² of one channel, level by level; `shift` moves the top by half-steps."""
    steps = oracle.half_steps(max(map(abs, row)) * 2 ** (shift / 2), n_bits, k, "float64")
    magnitudes = [scale * oracle.level(h, terms) for h in steps]
    levels = [-m for m in reversed(magnitudes)] + magnitudes
    codes = [oracle.nearest_log_code(Fraction(w) / Fraction(scale), steps, terms) for w in row]
    return math.fsum((w - levels[code]) ** 2 for w, code in zip(row, codes, strict=True))


@pytest.mark.parametrize("n_bits", [2, 3, 4, 5])
@pytest.mark.parametrize("terms", [0, 2])
def test_tensor_wise_errors_and_choice_equal_the_oracle(n_bits: int, terms: int) -> None:
    w = weights(6, 30, seed=n_bits)
    n_levels = 2 ** (n_bits - 1)
    candidates = candidate_books(w.abs().amax(1), n_bits, range(n_levels + 1), terms=terms, dtype=w.dtype)
    assert [n_base2(c).unique().tolist() for c in candidates] == [[k] for k in range(n_levels + 1)]
    expected = torch.tensor(
        [[oracle_error(row, n_bits, k, terms) for row in w.tolist()] for k in range(n_levels + 1)], dtype=torch.float64
    )
    chosen, errors = least_error(w, candidates, squared_error)
    torch.testing.assert_close(errors, expected, rtol=1e-9, atol=0)
    best = [max(range(n_levels + 1), key=lambda k, c=c: (-float(expected[k, c]), k)) for c in range(6)]  # type: ignore[misc]
    assert n_base2(chosen).tolist() == best
    assert len(set(best)) > 1 or n_bits == 2  # else a search that always says the same would pass
    for c, k in enumerate(best):
        assert torch.equal(chosen.levels[c], candidates[k].levels[c])
        assert torch.equal(half_steps(chosen)[c], half_steps(candidates[k])[c])


def test_ties_go_to_the_larger_k() -> None:
    """1 is a level of every mix; √2 of every mix but the last; the zero channel has one codebook only."""
    root2 = math.sqrt(2)
    w = torch.tensor([[1.0, -1.0, 1.0], [root2, -root2, root2], [0.0, -0.0, 0.0]], dtype=torch.float64)
    chosen = choose_codebook(w, DYNAMIC, 4)
    assert n_base2(chosen).tolist() == [8, 7, 8]


def test_any_error_function_decides() -> None:
    """The candidate that the function likes wins, channel by channel."""
    w = weights(5, 12)
    candidates = candidate_books(w.abs().amax(1), 4, range(9), dtype=w.dtype)
    wanted = torch.tensor([3, 0, 8, 5, 1])
    liked = torch.stack([rounding_error(w, candidates[int(k)])[c] for c, k in enumerate(wanted)])
    error = lambda delta: (delta - liked).square().sum(1)  # noqa: E731
    chosen = choose_codebook(w, DYNAMIC, 4, error=error)
    reached = (rounding_error(w, chosen) - liked).abs().amax()
    assert reached == 0
    assert bool((n_base2(chosen) >= wanted).all())


@pytest.mark.parametrize("method", [g for g in GRIDS.values() if g.own_error or g.n_candidates(4) == 1])
def test_fixed_grids_ignore_the_error_function(method: Grid) -> None:
    def unwanted(delta: Tensor) -> Tensor:
        raise AssertionError("a fixed grid has nothing to search")

    w = weights(3, 20)
    codebook = choose_codebook(w, method, 4, error=unwanted)
    assert codebook.spacing is (Spacing.LINEAR if method.name.startswith("linear") else Spacing.LOG)
    if method in LOG_GRIDS:
        assert n_base2(codebook).tolist() == [8 if method is LOG_2 else 0] * 3


# ---------------------------------------------------------------- scale search


@pytest.mark.parametrize("n_bits", [2, 3])
@pytest.mark.parametrize("search", [ScaleSearch.GRID, ScaleSearch.HALF_STEP])
def test_tensor_wise_scale_search_equals_the_oracle(search: ScaleSearch, n_bits: int) -> None:
    w = weights(5, 20, seed=n_bits)
    mixes = range(2 ** (n_bits - 1) + 1)
    candidates = candidate_books(w.abs().amax(1), n_bits, mixes, dtype=w.dtype, scale_search=search)
    factors = [(s, 0) for s in SCALES] if search is ScaleSearch.GRID else [(1.0, j) for j in HALF_STEPS]
    expected = torch.tensor(
        [[oracle_error(row, n_bits, k, 0, *f) for row in w.tolist()] for k in mixes for f in factors],
        dtype=torch.float64,
    )
    chosen, errors = least_error(w, candidates, squared_error)
    torch.testing.assert_close(errors, expected, rtol=1e-9, atol=0)
    found = choose_codebook(w, DYNAMIC, n_bits, scale_search=search)
    best = [max(range(len(expected)), key=lambda i, c=c: (-float(expected[i, c]), i)) for c in range(5)]  # type: ignore[misc]
    for c, index in enumerate(best):
        k, factor = divmod(index, len(factors))
        assert torch.equal(found.levels[c], candidates[index].levels[c])
        assert int(n_base2(found)[c]) == k
        assert search is ScaleSearch.HALF_STEP or float(scale(found)[c]) == SCALES[factor]
    plain = choose_codebook(w, DYNAMIC, n_bits)
    reached, unscaled = (squared_error(rounding_error(w, book)) for book in (found, plain))
    assert bool((reached <= unscaled).all()) and bool((reached < unscaled).any())


def test_scales_multiply_the_plain_levels_and_one_is_among_them() -> None:
    absmax = torch.tensor([0.3, 1.0, 1e-30])
    plain = candidate_books(absmax, 3, range(5), terms=2)
    larger = candidate_books(absmax, 3, range(5), terms=2, scale_search=ScaleSearch.GRID)
    assert len(SCALES) == len(set(SCALES)) and SCALES[-1] == 1.0
    assert sorted(SCALES) == [i / 32 for i in range(12, 41)]
    for i, book in enumerate(larger):
        k, factor = i // len(SCALES), SCALES[i % len(SCALES)]
        assert torch.equal(book.levels, plain[k].levels * factor)
        assert scale(book).tolist() == [factor] * 3


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_half_steps_shift_the_top_and_nothing_else(n_bits: int) -> None:
    """Levels stay whole half-steps, without a factor; base-2 tops, all even, take the nearest."""
    absmax = torch.tensor([0.3, 0.9, 1.4e-30], dtype=torch.float64)
    mixes = range(2 ** (n_bits - 1) + 1)
    plain = candidate_books(absmax, n_bits, mixes, dtype=absmax.dtype)
    shifted = candidate_books(absmax, n_bits, mixes, dtype=absmax.dtype, scale_search=ScaleSearch.HALF_STEP)
    assert sorted(HALF_STEPS) == [-4, -3, -2, -1, 0, 1] and HALF_STEPS[-1] == 0
    for i, book in enumerate(shifted):
        k, step = i // len(HALF_STEPS), HALF_STEPS[i % len(HALF_STEPS)]
        assert "scale" not in book.spec.columns
        truth = [[oracle.level(h) for h in row] for row in half_steps(book).tolist()]
        torch.testing.assert_close(book.levels.abs(), torch.tensor(truth, dtype=torch.float64), rtol=3e-16, atol=0)
        tops = (half_steps(book) - half_steps(plain[k]))[:, -1]
        if k < 2 ** (n_bits - 1):
            assert tops.tolist() == [step] * 3
        else:
            assert bool(((tops - step).abs() <= 1).all()) and not (tops % 2).any()


@pytest.mark.parametrize("search", ScaleSearch)
@pytest.mark.parametrize("method", [DYNAMIC, LOG_2, LOG_SQRT2])
def test_equal_errors_prefer_the_plain_grid(method: Grid, search: ScaleSearch) -> None:
    """Scale 1 and shift 0 come last within a mix; also for a channel of zeros, where all errors are zero."""
    w = weights(3, 10)
    w[1] = 0
    indifferent = lambda delta: delta.new_zeros(len(delta))  # noqa: E731
    found = choose_codebook(w, method, 3, error=indifferent, scale_search=search)
    plain = choose_codebook(w, method, 3, error=indifferent)
    assert torch.equal(found.levels, plain.levels)
    by_weight = choose_codebook(w, method, 3, scale_search=search)
    if search is ScaleSearch.GRID:
        assert scale(found).tolist() == [1.0] * 3 and float(scale(by_weight)[1]) == 1.0
    assert ("scale" in found.spec.columns) == (search is ScaleSearch.GRID)


@pytest.mark.parametrize("n_bits", [2, 5])
@pytest.mark.parametrize("search", ScaleSearch)
@pytest.mark.parametrize("wide_gap", [False, True])
@pytest.mark.parametrize("method", [LOG_2, LOG_SQRT2, DYNAMIC])
def test_candidates_are_counted(method: Grid, wide_gap: bool, search: ScaleSearch, n_bits: int) -> None:
    options = GridOptions(scale_search=search, wide_gap=wide_gap)
    assert method.n_candidates(n_bits, options) == len(list(method.candidates(torch.ones(1, 2), n_bits, options)))


@pytest.mark.parametrize("search", ScaleSearch)
def test_candidates_can_be_judged_by_the_nearest_levels(search: ScaleSearch) -> None:
    """As compensated rounding has it: no candidate's nearest levels are nearer than those of the one chosen."""
    w = weights(6, 50)

    def distance(book: Codebook) -> Tensor:
        return (w[:, :, None] - book.levels[:, None]).abs().amin(2).square().sum(1)

    found = choose_codebook(w, DYNAMIC, 3, scale_search=search, spacing=Spacing.LINEAR)
    least = torch.stack(
        [distance(each) for each in candidate_books(w.abs().amax(1), 3, scale_search=search, dtype=w.dtype)]
    )
    assert torch.allclose(distance(found), least.amin(0), rtol=1e-12)
    if search is ScaleSearch.GRID:  # the ratio's borders like other scales
        assert bool((distance(found) < distance(choose_codebook(w, DYNAMIC, 3, scale_search=search))).any())


def test_a_fixed_log_grid_is_searched_for_its_scale_only() -> None:
    w = weights(4, 30)
    wanted = [0.375, 0.5, 1.25, 31 / 32]
    (plain,) = candidate_books(w.abs().amax(1), 3, (4,), dtype=w.dtype)
    liked = torch.stack([rounding_error(w, scaled(plain, factor))[c] for c, factor in enumerate(wanted)])
    error = lambda delta: (delta - liked).square().sum(1)  # noqa: E731
    found = choose_codebook(w, LOG_2, 3, error=error, scale_search=ScaleSearch.GRID)
    assert n_base2(found).tolist() == [4] * 4
    assert scale(found).tolist() == wanted


# ---------------------------------------------------------------- moments, residuals, sensitivities


def layer_wise_data(groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, x̂ [groups, n, K]; w, δ [C, K]; and ‖Xw - X̂(w + δ)‖² [C] computed plainly."""
    torch.manual_seed(groups)
    n, k, per_group = 40, 9, 4
    x = torch.randn(groups, n, k, dtype=torch.float64)
    x_hat = x + 0.3 * torch.randn_like(x)
    w = torch.randn(groups * per_group, k, dtype=torch.float64)
    delta = 0.1 * torch.randn_like(w)
    expected = torch.stack(
        [(x[c // per_group] @ w[c] - x_hat[c // per_group] @ (w + delta)[c]).square().sum() for c in range(len(w))]
    )
    return x, x_hat, w, delta, expected


@pytest.mark.parametrize("groups", [1, 3])
def test_output_moments_are_the_layer_error_however_batched(groups: int) -> None:
    x, x_hat, w, delta, expected = layer_wise_data(groups)
    grouped = w.unflatten(0, (groups, -1)).mT
    residual = x @ grouped - x_hat @ grouped
    moments = OutputMoments.zeros(groups, len(w), w.shape[1], w.device)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 40)):
        moments.add(x_hat[:, rows], residual[:, rows])
    torch.testing.assert_close(moments.error(delta), expected, rtol=1e-10, atol=0)
    with_zero = moments.error(torch.zeros_like(delta))
    torch.testing.assert_close(with_zero, residual.square().sum(1).flatten(), rtol=1e-12, atol=0)


def test_output_moments_take_more_data_after_an_error_was_read() -> None:
    """In float32, where the moments are kept in two precisions."""
    x, x_hat, w, delta, expected = layer_wise_data(1)
    residual = ((x - x_hat) @ w.mT).float()
    moments = OutputMoments.zeros(1, len(w), w.shape[1], w.device)
    moments.add(x_hat[:, :20].float(), residual[:, :20])
    early = moments.error(delta)
    moments.add(x_hat[:, 20:].float(), residual[:, 20:])
    assert bool((early < 0.9 * expected).all())
    torch.testing.assert_close(moments.error(delta), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shifted", [True, False])
def test_centred_moments_are_those_of_centred_rows(groups: int, shifted: bool) -> None:
    x, x_hat, w, _, _ = layer_wise_data(groups)
    x_hat = x_hat + 5
    grouped = w.unflatten(0, (groups, -1)).mT
    residual = x @ grouped - x_hat @ grouped
    moments = OutputMoments.zeros(groups, len(w), w.shape[1], w.device)
    if shifted:
        moments.shift = x_hat[:, :7].mean(1)
    for rows in (slice(0, 7), slice(7, 40)):
        moments.add(x_hat[:, rows], residual[:, rows])
    plain = OutputMoments.zeros(groups, len(w), w.shape[1], w.device)
    plain.add(x_hat - x_hat.mean(1, keepdim=True), residual - residual.mean(1, keepdim=True))
    centred = moments.centred()
    for name in ("gram", "cross", "energy", "input_sum", "residual_sum"):
        torch.testing.assert_close(getattr(centred, name), getattr(plain, name), rtol=1e-9, atol=1e-9)
    assert centred.count == 40
    torch.testing.assert_close(moments.mean_input, x_hat.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(centred.mean_input, x_hat.mean(1), rtol=1e-12, atol=0)


def test_output_residual_is_the_layer_error() -> None:
    x, x_hat, w, delta, expected = layer_wise_data(1)
    images = 4  # the 40 rows are 10 positions of 4 images
    as_images = lambda y: y[0].reshape(images, -1, y.shape[-1]).mT  # noqa: E731
    residual = OutputResidual(lambda d: as_images(x_hat @ d.mT), as_images((x - x_hat) @ w.mT))
    torch.testing.assert_close(residual.error(delta), expected, rtol=1e-12, atol=0)


def test_moments_are_cheaper_counts_multiplications() -> None:
    """Candidates decide for a 3×3 convolution; a 1×1 convolution profits early, a depthwise one late."""
    assert not moments_are_cheaper(candidates=9, rows=100_000, channels=64, elements=576)
    assert moments_are_cheaper(candidates=17, rows=100_000, channels=64, elements=576)
    assert moments_are_cheaper(candidates=3, rows=100_000, channels=64, elements=64)
    assert not moments_are_cheaper(candidates=9, rows=100_000, channels=1, elements=9)
    assert not moments_are_cheaper(candidates=129, rows=10, channels=64, elements=576)


def test_block_sensitivity_is_exact_for_a_linear_block_seen_along_all_directions() -> None:
    """Over the rows of a Hadamard matrix the mean of ⟨v, u⟩² is ‖u‖² itself, not only on average."""
    torch.manual_seed(0)
    images, channels, positions, elements, outputs = 3, 4, 5, 6, 8
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < outputs:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    patches = torch.randn(images, positions, elements, dtype=torch.float64)
    jacobian = torch.randn(images, outputs, channels, positions, dtype=torch.float64)
    residual = torch.randn(images, outputs, dtype=torch.float64)
    delta = torch.randn(channels, elements, dtype=torch.float64)
    sensitivity = BlockSensitivity(
        lambda d: torch.einsum("ipk,ck->icp", patches, d),
        torch.einsum("iocp,io->icp", jacobian, residual),
        torch.einsum("iocp,vo->vicp", jacobian, hadamard),
    )
    n_changed_codes = torch.einsum("iocp,ipk,ck->cio", jacobian, patches, delta)
    expected = (residual - n_changed_codes).square().sum((1, 2)) - residual.square().sum()
    torch.testing.assert_close(sensitivity.error(delta), expected, rtol=1e-10, atol=1e-10)


def test_one_search_through_all_borders_rounds_as_each_candidate_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(6, 400, generator=generator) * torch.logspace(-40, 30, 6)[:, None]
    w[:, :8] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, -1.0])
    w[2], w[3] = 0.0, -0.7
    absmax = w.abs().amax(1)
    for candidates in (candidate_books(absmax, 4, range(9)), candidate_books(absmax, 3, range(5), terms=2)):
        borders = torch.cat([candidate.borders for candidate in candidates], dim=1)
        assert borders.shape[1] < w.shape[1], "the case would not take the short way"
        on_borders = torch.cat([w.double(), borders], dim=1)  # ties are decided alike
        for weights in (w, on_borders):
            together = list(rounding_errors(weights, candidates))
            assert len(together) == len(candidates)
            for delta, candidate in zip(together, candidates, strict=True):
                assert torch.equal(delta, rounding_error(weights, candidate))


@pytest.mark.parametrize("zero_code", [False, True])
@pytest.mark.parametrize("method", [DYNAMIC, LOG_2])
@pytest.mark.parametrize("search", ScaleSearch)
def test_how_many_candidates_are_held_together_changes_nothing(
    search: ScaleSearch, method: Grid, zero_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.cat([weights(6, 30, seed=1), torch.zeros(1, 30, dtype=torch.float64)])  # equal errors: the last one wins
    expected = choose_codebook(w, method, 4, scale_search=search, zero_code=zero_code)
    for at_once in (1, 2, 4, 7):
        monkeypatch.setattr(logart.grids.search, "_LEVELS_PER_CHUNK", at_once * len(w) * 2**4)
        found = choose_codebook(w, method, 4, scale_search=search, zero_code=zero_code)
        assert torch.equal(found.levels, expected.levels)
        for part in (n_base2, half_steps, signs):
            assert torch.equal(part(found), part(expected))


# ---------------------------------------------------------------- mixes that name the same levels


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n_bits", range(2, 9))
def test_every_mix_is_searched_once_by_its_largest_k(n_bits: int, dtype: torch.dtype) -> None:
    """Against the oracle's levels of every k; tops at borders, the largest floats and the smallest included."""
    limits = torch.finfo(dtype)
    near = torch.tensor([2.0 ** (i / 8) for i in range(-16, 17)], dtype=dtype)
    absmax = torch.cat([near, near.nextafter(near + 1), torch.tensor([limits.max, limits.tiny], dtype=dtype)])
    found = distinct_n_base2(absmax, n_bits, dtype)
    named = str(dtype).removeprefix("torch.")
    for channel, top in enumerate(absmax.tolist()):
        largest_k: dict[tuple[int, ...], int] = {}
        for k in range(2 ** (n_bits - 1) + 1):
            largest_k[tuple(oracle.half_steps(top, n_bits, k, named))] = k
        assert found[:, channel].tolist() == sorted(largest_k.values()), top


@pytest.mark.parametrize("options", [{}, {"zero_code": True}, {"asymmetric": True}, {"asymmetric": True, "terms": 2}])
@pytest.mark.parametrize("search", ScaleSearch)
def test_what_the_search_leaves_out_could_not_have_won(search: ScaleSearch, options: dict[str, Any]) -> None:
    """The choice among all mixes, of which about half repeat another's levels; channels of both signs and of one."""
    w = weights(24, 40, seed=5)
    w[::3] = w[::3].abs() + w[::3] / 4
    terms = options.get("terms", 0)
    books = candidate_books(w.abs().amax(1), 3, range(5), terms=terms, dtype=w.dtype, scale_search=search)
    spending = {name: options.get(name, False) for name in ("asymmetric", "zero_code")}
    every = [reassign(book, w, **spending) for book in books]
    expected = least_error(w, every, squared_error)[0]
    found = choose_codebook(w, DYNAMIC, 3, scale_search=search, **options)
    assert torch.equal(found.levels, expected.levels)
    assert torch.equal(n_base2(found), n_base2(expected))
    if options.get("asymmetric"):
        assert 0 in n_base2(found).tolist()  # else k = 0 could be left out
