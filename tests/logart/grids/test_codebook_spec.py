"""Codebooks through their few integers and back, exactly."""

from math import inf, nan

import pytest
import torch
from codebooks import choose_codebook, same_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logart.grids import grid as grid_module
from logart.grids.grid import Codebook, CodebookSpec, Grid, ScaleSearch, Spacing
from logart.grids.linear import LINEAR_MINMAX
from logart.grids.logarithmic import DYNAMIC, log_codebook
from logart.grids.plain import PLAIN_LINEAR, PLAIN_LOG, plain_codebook, stored_spec
from logart.grids.registry import GRIDS

LOG_COLUMNS, LINEAR_COLUMNS = tuple(DYNAMIC.integers), tuple(LINEAR_MINMAX.integers)


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
    st.integers(0, 10**6), st.integers(2, 8), st.sampled_from(list(GRIDS.values())), st.sampled_from((0, 2, 3, 4)),
    st.sampled_from(ScaleSearch), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from((torch.float32, torch.float64)),
)  # fmt: skip
def test_every_codebook_comes_back_from_its_bytes(
    seed: int, n_bits: int, grid: Grid, terms: int, search: ScaleSearch, asymmetric: bool, zero: bool,
    wide: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    if n_bits > 5 and search is ScaleSearch.GRID and grid is DYNAMIC:
        search = ScaleSearch.HALF_STEP  # thousands of candidates otherwise
    w = weights(seed).to(dtype)
    options = {"asymmetric": asymmetric, "zero_code": zero, "wide_gap": wide}
    book = choose_codebook(w, grid, n_bits, terms=terms, scale_search=search, **options)
    spec = stored_spec(book, dtype)
    assert spec.grid is grid
    again = CodebookSpec.checked(grid, dict(reversed(spec.columns.items())), spec.terms, w.shape, n_bits, dtype)
    assert list(again.columns) == list(spec.columns)
    found = again.codebook(n_bits, dtype)
    assert torch.equal(found.levels, book.levels) and found.spacing is book.spacing
    once_more = stored_spec(found, dtype)  # canonical: saving again changes no byte
    assert same_spec(once_more, spec)
    for name, absent in grid.integers.items():  # nothing is stored that says nothing
        assert absent is None or name not in spec.columns or bool((spec.columns[name] != absent).any())


def test_a_log_codebook_is_its_top_its_mix_and_what_else_it_has() -> None:
    spec = stored_spec(log_codebook(torch.tensor([1.0, 0.0, 3.0]), 4, torch.tensor([0, 3, 8])))
    assert {name: column.tolist() for name, column in spec.columns.items()} == {
        "top_half_step": [0, 0, 4], "n_base2": [0, 3, 8], "flags": [0, 8, 0]  # top 2^0, {0}, 2^2
    }  # fmt: skip
    other = stored_spec(log_codebook(torch.tensor([2.0**-5]), 4, 2))
    assert {name: column.tolist() for name, column in other.columns.items()} == {"top_half_step": [-10], "n_base2": [2]}


@pytest.mark.parametrize("w", [[-1.0, 0.3], [1.0, -0.3], [-1.0, -0.5], [1.0, 0.5]])
def test_a_single_lopsided_channel_comes_back(w: list[float]) -> None:
    """Whichever flags its codes leave, none among them."""
    book = choose_codebook(torch.tensor([w]), DYNAMIC, 3, asymmetric=True)
    spec = stored_spec(book)
    assert spec.grid is DYNAMIC and "unused_codes" in spec.columns
    assert torch.equal(spec.codebook(3).levels, book.levels)


def test_levels_that_are_no_grid_are_stored_as_they_are() -> None:
    book = log_codebook(torch.tensor([1.0, 3.0]), 2, 1)
    levels = book.levels.clone()
    levels[0, 0] -= 0.25
    own = torch.tensor([[-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    for other, grid in (
        (Codebook(levels, book.spec), PLAIN_LOG),
        (plain_codebook(own, Spacing.LINEAR), PLAIN_LINEAR),
    ):
        spec = stored_spec(other)
        assert spec.grid is grid and list(spec.columns) == ["levels"]
        again = CodebookSpec.checked(grid, spec.columns, 0, torch.Size((4, 3)), 2, torch.float32)
        found = again.codebook(2)
        assert torch.equal(found.levels, other.levels) and found.spacing is other.spacing
        with pytest.raises(ValueError, match="plain_.* have no shifts"):
            grid.shifts(spec, 2, torch.float32)


@pytest.mark.parametrize(
    "levels", [[[0.0, 1.0, 2.0]], [[0.0, 2.0, 1.0, 3.0]], [[0.0, 1.0, 2.0, inf]], [[nan, 0.0, 1.0, 2.0]], [0.0, 1.0]]
)
def test_levels_that_are_no_codebook_are_refused(levels: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="levels"):
        plain_codebook(torch.tensor(levels), Spacing.LOG)


def test_base_2_has_no_gap_of_odd_half_steps() -> None:
    columns = {"top_half_step": torch.tensor([0]), "n_base2": torch.tensor([8])}
    for lowered, fits in ((2, True), (1, False)):
        claimed = {**columns, "lowered": torch.tensor([lowered])}
        wrong = [bool(GRIDS[name].wrong(claimed, 4, torch.float32)["lowered"]) for name in ("log_2", "dynamic")]
        assert wrong == [not fits, False]


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
        (LOG_COLUMNS[:4], [0, 0, 2, 9], "unused_codes 9"),
        (LOG_COLUMNS[:4], [0, 0, 0, -2], "unused_codes -2"),
        (LOG_COLUMNS[:4], [0, 0, 0, 1], "unused_codes 1"),
        (LOG_COLUMNS, [0, 0, 0, 0, 0, 0], "scale 0"),
        (LOG_COLUMNS, [0, 0, 0, 0, 256, 0], "scale 256"),
        (LOG_COLUMNS, [0, 0, 0, 0, 32, 3], "lowered 3"),
        (LOG_COLUMNS, [0, 0, 0, 0, 32, -1], "lowered -1"),
        (LINEAR_COLUMNS, [inf, 0], "step inf"),
        (LINEAR_COLUMNS, [nan, 0], "step nan"),
        (LINEAR_COLUMNS, [-0.5, 0], "step -0.5"),
        (LINEAR_COLUMNS, [0, 16], "zero_point 16"),
        (LINEAR_COLUMNS, [0, -1], "zero_point -1"),
    ],
)
def test_integers_that_no_codebook_has_are_refused(columns: tuple[str, ...], row: list[float], said: str) -> None:
    fine = {"scale": 32, "step": 1.0}
    claimed = {name: torch.tensor([fine.get(name, 0), number]) for name, number in zip(columns, row, strict=True)}
    if "step" in claimed:
        claimed["step"] = claimed["step"].double()
    with pytest.raises(ValueError, match=f"channel 1: {said} is out of range at 4 bits"):
        checked(claimed)


def checked(claimed: dict[str, Tensor], rows: int = 2) -> CodebookSpec:
    grid = LINEAR_MINMAX if "step" in claimed else DYNAMIC
    return CodebookSpec.checked(grid, claimed, 0, torch.Size((rows, 3)), 4, torch.float32)


def test_channels_are_named_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "_CHECKED_AT_ONCE", 3)
    claimed = {"top_half_step": torch.zeros(8).long(), "n_base2": torch.tensor([0, 0, 0, 0, 0, 0, 0, 9])}
    with pytest.raises(ValueError, match="channel 7: n_base2 9 is out of range at 4 bits"):
        checked(claimed, rows=8)


@pytest.mark.parametrize(
    "names",
    [(), ("top_half_step",), ("top_half_step", "n_base2", "free"), ("step",), ("step", "zero_point", "scale"),
     (*LOG_COLUMNS, *LINEAR_COLUMNS), ("top_half_step", "scale")],
)  # fmt: skip
def test_columns_that_no_codebook_has_are_refused(names: tuple[str, ...]) -> None:
    assert checked(dict.fromkeys(LOG_COLUMNS[:3], torch.zeros(2).long())).channels == 2
    with pytest.raises(ValueError, match="has other integers than"):
        checked(dict.fromkeys(names, torch.zeros(2).long()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_base2": torch.zeros(3).long()}, r"n_base2 is \[3\] torch.int64"),
        ({"n_base2": torch.zeros(2, 1).long()}, r"n_base2 is \[2, 1\] torch.int64"),
        ({"n_base2": torch.zeros(2)}, r"n_base2 is \[2\] torch.float32"),
        ({"top_half_step": torch.tensor(0)}, r"top_half_step is \[\] torch.int64"),
        (dict.fromkeys(LOG_COLUMNS[:2], torch.zeros(0).long()), "0 codebooks for 6 rows"),
        (dict.fromkeys(LOG_COLUMNS[:2], torch.zeros(4).long()), "4 codebooks for 6 rows"),
    ],
)
def test_columns_of_other_shapes_and_types_are_refused(change: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked({**dict.fromkeys(LOG_COLUMNS[:2], torch.zeros(2).long()), **change}, rows=6)
