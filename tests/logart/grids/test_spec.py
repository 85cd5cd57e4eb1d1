"""Codebooks through their few integers and back, exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logart.grids import spec as spec_module
from logart.grids.grid import Codebook, ScaleMethod, Spacing, log_codebook
from logart.grids.packing import pack_rows
from logart.grids.search import ScaleSearch, choose_codebook
from logart.grids.spec import LINEAR_COLUMNS, LOG_COLUMNS, CodebookSpec, column_ranges, read_ranges, row_bits


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
    book = choose_codebook(w, method, n_bits, terms=terms, scale_search=search, asymmetric=asymmetric, zero_code=zero)
    spec = CodebookSpec.of(book, dtype)
    ranges = column_ranges([spec])
    data, names = spec.to_bytes(ranges), spec.stored(ranges)
    again = CodebookSpec.from_bytes(data, len(w), names, ranges, spec.terms, n_bits, dtype)
    found = again.codebook(n_bits, dtype)
    assert torch.equal(found.levels, book.levels) and found.spacing is book.spacing
    once_more = CodebookSpec.of(found, dtype)  # canonical: saving again changes no byte
    assert column_ranges([once_more]) == ranges and torch.equal(once_more.to_bytes(ranges), data)
    assert len(data) == (len(w) * row_bits(names, ranges) + 7) // 8
    for name, (least, bits) in ranges.items():
        column = spec.columns[name].view(torch.int64).tolist()
        assert min(column) == least and max(column) - least < 2**bits <= 2 * max(1, max(column) - least)
    if book.spacing is Spacing.LOG:
        assert found.n_base2 is not None and book.n_base2 is not None
        assert torch.equal(found.n_base2, book.n_base2)
        used = book.signs != 0  # type: ignore[operator]
        assert torch.equal(found.signs, book.signs)  # type: ignore[arg-type]
        assert torch.equal(found.half_steps[used], book.half_steps[used])  # type: ignore[index]
        extra = spec.columns["flags"].any(), "free" in spec.columns, search is ScaleSearch.GRID
        assert spec.row_bytes == 3 + sum(map(bool, extra)) and len(names) == 2 + sum(map(bool, extra))
    else:
        assert spec.row_bytes == 9


def test_each_integer_takes_the_bits_of_its_column() -> None:
    spec = CodebookSpec.of(log_codebook(torch.tensor([1.0, 0.0, 3.0]), 4, torch.tensor([0, 3, 8])))
    assert {name: column.tolist() for name, column in spec.columns.items()} == {
        "top_half_step": [0, 0, 4], "n_base2": [0, 3, 8], "flags": [0, 8, 0]  # top 2^0, {0}, 2^2
    }  # fmt: skip
    other = CodebookSpec.of(log_codebook(torch.tensor([2.0**-5]), 4, 2))
    ranges = column_ranges([spec, other])
    assert ranges == {"top_half_step": (-10, 4), "n_base2": (0, 4), "flags": (0, 4)} and spec.terms == 0
    assert spec.stored(ranges) == other.stored(ranges) == list(LOG_COLUMNS[:3]) == list(spec.columns)
    assert other.to_bytes(ranges).tolist() == [0x20, 0]  # -10, 2, no flag: 12 bits
    assert spec.to_bytes(ranges).tolist() == [0x0A, 0xA0, 0x83, 0x8E, 0]
    assert column_ranges([other]) == {"top_half_step": (-10, 0), "n_base2": (2, 0)}  # no flag, no column of them
    assert other.to_bytes(column_ranges([other])).tolist() == [] and other.row_bytes == 3 and spec.row_bytes == 4


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
        (LOG_COLUMNS[:3], [0, 9, 0], "n_base2 9"),
        (LOG_COLUMNS[:3], [0, -1, 0], "n_base2 -1"),
        (LOG_COLUMNS[:3], [1, 8, 0], "n_base2 8"),  # base 2 alone has no odd half-step
        (LOG_COLUMNS[:3], [0, 0, 16], "flags 16"),
        (LOG_COLUMNS[:3], [0, 0, -1], "flags -1"),
        (LOG_COLUMNS[:3], [0, 0, 2], "flags 2"),
        (LOG_COLUMNS[:3], [32767, 0, 0], "top_half_step 32767"),
        (LOG_COLUMNS[:3], [-2201, 0, 0], "top_half_step -2201"),
        (LOG_COLUMNS[:4], [0, 0, 2, 9], "free 9"),
        (LOG_COLUMNS[:4], [0, 0, 0, -2], "free -2"),
        (LOG_COLUMNS[:4], [0, 0, 0, 1], "free 1"),
        (LOG_COLUMNS, [0, 0, 0, 0, 0], "scale 0"),
        (LOG_COLUMNS, [0, 0, 0, 0, 256], "scale 256"),
        (LINEAR_COLUMNS, [0x7FF0 << 48, 0], "step inf"),
        (LINEAR_COLUMNS, [-1, 0], "step nan"),
        (LINEAR_COLUMNS, [0, 16], "zero_point 16"),
        (LINEAR_COLUMNS, [0, -1], "zero_point -1"),
    ],
)
def test_integers_that_no_codebook_has_are_refused(columns: tuple[str, ...], row: list[int], said: str) -> None:
    fine = {"scale": 32}
    data = [torch.tensor([fine.get(name, 0), number]) for name, number in zip(columns, row, strict=True)]
    ranges = {name: (int(column.min()), 63) for name, column in zip(columns, data, strict=True)}
    packed = pack_rows(data, list(ranges.values()))
    with pytest.raises(ValueError, match=f"channel 1: {said} is out of range"):
        CodebookSpec.from_bytes(packed, 2, list(columns), ranges, 0, 4)


def test_channels_are_named_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "_CHUNK_SIZE", 3)
    columns = [torch.zeros(8, dtype=torch.int64), torch.tensor([0, 0, 0, 0, 0, 0, 0, 9])]
    ranges = {"top_half_step": (0, 0), "n_base2": (0, 4)}
    with pytest.raises(ValueError, match="channel 7: n_base2 9 is out of range at 4 bits"):
        CodebookSpec.from_bytes(pack_rows(columns, list(ranges.values())), 8, list(ranges), ranges, 0, 4)


@pytest.mark.parametrize(
    "columns",
    [("top_half_step",), ("top_half_step", "flags", "n_base2"), ("top_half_step", "n_base2", "free", "free"),
     ("step",), (*LOG_COLUMNS, *LINEAR_COLUMNS), ("top_half_step", "n_base2", "scale")],
)  # fmt: skip
def test_columns_that_no_codebook_has_are_refused(columns: tuple[str, ...]) -> None:
    ranges = dict.fromkeys((*LOG_COLUMNS[:4], *LINEAR_COLUMNS), (0, 1))
    assert row_bits(list(LOG_COLUMNS[:4]), ranges) == 4 and row_bits(list(LINEAR_COLUMNS), ranges) == 2
    with pytest.raises(ValueError, match="unknown columns"):
        row_bits(list(columns), ranges)


@pytest.mark.parametrize(
    "value",
    [None, [], {"x": [0, 1]}, {"scale": 3}, {"scale": [1]}, {"scale": [1, 2, 3]}, {"scale": [1.0, 2]},
     {"scale": [1, True]}, {"scale": [0, 64]}, {"scale": [0, -1]}, {"scale": [2**63, 1]}, {"scale": [-(2**63), 1]}],
)  # fmt: skip
def test_ranges_that_no_file_has_are_refused(value: object) -> None:
    assert read_ranges({"scale": [1, 2], "n_base2": [0, 63]}) == {"n_base2": (0, 63), "scale": (1, 2)}
    with pytest.raises(ValueError, match="columns|scale"):
        read_ranges(value)
