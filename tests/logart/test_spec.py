"""Codebooks through their few integers and back, exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logart.grid import Codebook, ScaleMethod, Spacing, log_codebook
from logart.search import ScaleSearch, choose_codebook
from logart.spec import LINEAR_COLUMNS, LOG_COLUMNS, CodebookSpec


def weights(seed: int, channels: int = 12, size: int = 9) -> Tensor:
    """Channels of all sorts: lopsided, of one sign, of one value, all zero, denormal, huge."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(channels, size, generator=generator)
    w[1] = w[1].abs()
    w[2] = -w[2].abs()
    w[3] = 0
    w[4] = torch.where(w[4] > 0, w[4], 0.01 * w[4])
    w[5] = torch.where(w[5] < 0, w[5], 1e-3 * w[5])
    w[6] = 1e-43
    w[7, 0] = torch.finfo(torch.float32).max
    w[8] = -0.75
    w[9] *= 1e-30
    w[10] = -w[10].abs()
    w[11] = w[11].abs()
    w[10:, ::2] = 0  # pruned: 0 goes to the least positive level
    return w


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 10**6), st.integers(2, 8), st.sampled_from(ScaleMethod), st.sampled_from((0, 2, 3, 4)),
    st.sampled_from(ScaleSearch), st.booleans(), st.booleans(), st.sampled_from((torch.float32, torch.float64)),
)  # fmt: skip
def test_every_codebook_comes_back_from_its_bytes(
    seed: int, n_bits: int, method: ScaleMethod, terms: int, search: ScaleSearch, asymmetric: bool, zero: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if n_bits > 5 and search is ScaleSearch.GRID and method is ScaleMethod.DYNAMIC:
        search = ScaleSearch.HALF_STEP  # thousands of candidates otherwise
    w = weights(seed).to(dtype)
    book = choose_codebook(
        w, method, n_bits, terms=terms, scale_search=search, asymmetric=asymmetric, zero_code=zero
    )
    spec = CodebookSpec.of(book, dtype)
    data = spec.to_bytes()
    again = CodebookSpec.from_bytes(data, spec.stored, spec.terms, n_bits, dtype)
    found = again.codebook(n_bits, dtype)
    assert torch.equal(found.levels, book.levels) and found.spacing is book.spacing
    assert torch.equal(CodebookSpec.of(found, dtype).to_bytes(), data)  # canonical: saving again changes no byte
    if book.spacing is Spacing.LOG:
        assert found.n_base2 is not None and book.n_base2 is not None
        assert torch.equal(found.n_base2, book.n_base2)
        used = book.signs != 0  # type: ignore[operator]
        assert torch.equal(found.signs, book.signs)  # type: ignore[arg-type]
        assert torch.equal(found.half_steps[used], book.half_steps[used])  # type: ignore[index]
        extra = spec.columns["flags"].any(), "free" in spec.columns, search is ScaleSearch.GRID
        assert data.shape[1] == 3 + sum(map(bool, extra))
    else:
        assert data.shape[1] == 9


def test_a_plain_log_codebook_takes_three_bytes_a_channel() -> None:
    spec = CodebookSpec.of(log_codebook(torch.tensor([1.0, 0.0, 3.0]), 4, torch.tensor([0, 3, 8])))
    assert spec.to_bytes().tolist() == [[0, 0, 0, 0], [0, 0, 3, 1], [4, 0, 8, 0]]  # top 2^0, {0}, 2^2
    assert spec.stored == list(LOG_COLUMNS[:3]) == list(spec.columns) and spec.terms == 0
    negative = CodebookSpec.of(log_codebook(torch.tensor([2.0**-5]), 4, 0))
    assert negative.to_bytes().tolist() == [[246, 255, 0]]  # -10, little-endian; no flag, no column of them
    assert negative.stored == list(LOG_COLUMNS[:2])


def test_levels_that_are_no_grid_are_refused() -> None:
    book = log_codebook(torch.tensor([1.0]), 2, 1)
    levels = book.levels.clone()
    levels[0, 0] -= 0.25
    for wrong in (
        Codebook(levels, Spacing.LOG, book.half_steps, book.signs, book.n_base2),
        Codebook(book.levels, Spacing.LOG),
        Codebook(torch.tensor([[-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64), Spacing.LINEAR),
        book.scaled(1.01, 0),
    ):
        with pytest.raises(ValueError, match="none of the grids|without half-steps"):
            CodebookSpec.of(wrong)


@pytest.mark.parametrize(
    ("columns", "row", "said"),
    [
        (LOG_COLUMNS[:3], [0, 0, 9, 0], "channel 0: n_base2 9"),
        (LOG_COLUMNS[:3], [1, 0, 8, 0], "n_base2 8"),  # base 2 alone has no odd half-step
        (LOG_COLUMNS[:3], [0, 0, 0, 16], "flags 16"),
        (LOG_COLUMNS[:3], [0, 0, 0, 4], "flags 4"),
        (LOG_COLUMNS[:3], [255, 127, 0, 0], "top_half_step 32767"),
        (LOG_COLUMNS[:4], [0, 0, 0, 4, 9], "free 9"),
        (LOG_COLUMNS[:4], [0, 0, 0, 0, 1], "free 1"),
        (LOG_COLUMNS, [0, 0, 0, 0, 0, 0], "scale 0"),
        (LINEAR_COLUMNS, [0, 0, 0, 0, 0, 0, 240, 127, 0], "step inf"),
        (LINEAR_COLUMNS, [0, 0, 0, 0, 0, 0, 0, 0, 16], "zero_point 16"),
        (LOG_COLUMNS[:3], [0, 0, 0], "expected 4 bytes a channel"),
        (("top_half_step", "flags", "n_base2"), [0, 0, 0, 0], "unknown columns"),
        (("top_half_step", "n_base2", "flags", "free", "free"), [0] * 6, "unknown columns"),
    ],
)
def test_bytes_that_no_codebook_has_are_refused(columns: tuple[str, ...], row: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CodebookSpec.from_bytes(torch.tensor([row], dtype=torch.uint8), list(columns), 0, 4)
