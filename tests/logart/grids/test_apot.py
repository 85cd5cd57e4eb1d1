"""APoT: levels against the paper's formula, its scale search, its shifts, its place behind every interface."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from codebooks import choose_codebook, same_spec
from hardware_folder import read_export
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.export.hardware import HardwareLevels
from logart.export.hardware_export import export_hardware
from logart.export.inputs import GoldenImages
from logart.grids.apot import APOT, SCALES, unit_levels
from logart.grids.grid import CodebookSpec
from logart.grids.plain import stored_spec
from logart.grids.rounding import dequantize, nearest
from logart.grids.search import squared_error
from logart.packed.file import PackedFile
from logart.packed.inspect import describe
from logart.quantization.surgery import quantized_layers

N_BITS = range(2, 9)


def paper(k: int, terms: int) -> list[Fraction]:
    """Eq. 5 of Li et al. (ICLR 2020) without γ: p_i is 0 or 2^-(i + j·terms), j = 0 … 2^k - 2."""
    choices = [[Fraction(0), *(Fraction(1, 2 ** (i + j * terms)) for j in range(2**k - 1))] for i in range(terms)]
    return sorted(sum(each, Fraction(0)) for each in itertools.product(*choices))


@pytest.mark.parametrize(("n_bits", "k", "terms"), [(2, 1, 1), (3, 2, 1), (5, 2, 2), (7, 3, 2)])
def test_even_widths_are_the_papers_levels(n_bits: int, k: int, terms: int) -> None:
    assert [Fraction(level) for level in unit_levels(n_bits).tolist()] == paper(k, terms)


def test_four_bits_by_hand() -> None:
    assert (8 * unit_levels(4)).tolist() == [0, 1, 2, 3, 4, 6, 8, 10]


@pytest.mark.parametrize("n_bits", N_BITS)
def test_a_magnitude_is_a_sum_of_two_powers_and_no_two_are_equal(n_bits: int) -> None:
    units = [Fraction(level) for level in unit_levels(n_bits).tolist()]
    assert len(set(units)) == len(units) == 2 ** (n_bits - 1) and units[0] == 0
    for unit in units:
        assert unit.numerator.bit_count() <= 2 and unit.denominator.bit_count() == 1


def weights() -> Tensor:
    """Channels of all sorts: of one sign, all zero, denormal, huge, of one value."""
    w = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 9)[:, None]
    w[1], w[2], w[3], w[4] = w[1].abs(), 0, 1e-43, -0.75
    w[5, 0], w[6] = torch.finfo(torch.float32).max, w[6] * 1e-30
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_bits", N_BITS)
def test_the_best_of_all_factors_is_chosen(n_bits: int, dtype: torch.dtype) -> None:
    """By a plain loop over exponents and numerators: the least squared error, then the largest factor."""
    w = weights()[[0, 1, 4, 7]].to(dtype)
    book = choose_codebook(w, APOT, n_bits)
    units = np.concatenate([-unit_levels(n_bits).numpy()[::-1], unit_levels(n_bits).numpy()])
    for row, levels in zip(w.double().numpy(), book.levels.numpy(), strict=True):
        best, top = [], np.abs(row).max() / units[-1]
        exponent = int(np.frexp(top)[1])
        for halvings, numerator in SCALES:
            factor = numerator / 32 * 2.0 ** (exponent - halvings)
            best.append((np.abs(row[:, None] - factor * units).min(1) ** 2).sum())
        found = (np.abs(row[:, None] - levels).min(1) ** 2).sum()
        assert found == pytest.approx(min(best), rel=1e-12)
    assert len(SCALES) == APOT.n_candidates(n_bits) == 48


@pytest.mark.parametrize("n_bits", N_BITS)
def test_the_budget_and_the_fixed_points(n_bits: int) -> None:
    w = weights()
    book = choose_codebook(w, APOT, n_bits)
    assert book.levels.shape == (9, 2**n_bits) and bool((book.levels.diff(dim=1) >= 0).all())
    assert all(len(set(row)) <= 2**n_bits - 1 for row in book.levels.tolist())
    assert torch.equal(book.levels, -book.levels.flip(1)) and not book.levels[2].any()
    q = dequantize(nearest(w, book), book.levels)
    assert torch.isfinite(q.float()).all() and torch.equal(dequantize(nearest(q, book), book.levels), q)
    assert not (q * w < 0).any()  # no weight changes its sign


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 8), st.integers(-100, 100), st.integers(17, 32))
def test_hardware_makes_the_levels_of_shifts_and_one_add(n_bits: int, exponent: int, numerator: int) -> None:
    columns = {"exponent": torch.tensor([exponent, 0]), "scale": torch.tensor([numerator, 0])}
    spec = CodebookSpec(APOT, columns)
    levels = HardwareLevels.of(spec, n_bits)
    assert np.array_equal(levels.values(), spec.codebook(n_bits).levels.numpy())
    assert levels.adds.shape[2] == (n_bits > 3) and not levels.signs[1].any()
    units, factor = APOT.units(spec, n_bits, torch.float32)
    assert torch.equal(units * factor[:, None] + 0.0, spec.codebook(n_bits).levels)


@pytest.mark.parametrize(("column", "value"), [("exponent", 129), ("exponent", -2201), ("scale", -1), ("scale", 33)])
def test_integers_that_no_codebook_has_are_refused(column: str, value: int) -> None:
    columns = {"exponent": torch.tensor([0, 0]), "scale": torch.tensor([32, 17])}
    assert CodebookSpec.checked(APOT, columns, 0, torch.Size((2, 3)), 4, torch.float32).channels == 2
    columns[column] = torch.tensor([columns[column][0], value])
    with pytest.raises(ValueError, match=f"channel 1: {column} {value} is out of range"):
        CodebookSpec.checked(APOT, columns, 0, torch.Size((2, 3)), 4, torch.float32)


ROUNDINGS = {
    "nearest": {"rounding": "nearest"},
    "layer-wise": {"rounding": "nearest", "search_method": "layer_wise", "search_samples": 8},
    "compensated": {"rounding": "compensated", "calib_samples": 16},
    "learned": {"rounding": "learned", "calib_samples": 16, "batch_size": 8, "iters": 20, "lr": 0.05},
    "both": {"rounding": "both", "calib_samples": 16, "batch_size": 8, "iters": 20, "lr": 0.05},
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("n_bits", [2, 4])
def test_from_quantizing_to_a_file_to_hardware(rounding: str, n_bits: int, tmp_path: Path) -> None:
    """Every rounding, the packed file, its inspection and the hardware export, bit for bit."""
    model, _ = networks.small_resnet()
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    config = QuantConfig(n_bits, scale_method="apot", **ROUNDINGS[rounding])  # type: ignore[arg-type]
    quantized, report = quantize_model(model, config, images)
    assert all(layer.error > 0 and not layer.base_mix for layer in report.layers)
    path = tmp_path / "packed.safetensors"
    save_packed(quantized, path)
    loaded = load_packed(path, model)
    assert torch.equal(loaded(images), quantized(images))
    for name, layer in quantized_layers(quantized).items():
        assert same_spec(quantized_layers(loaded)[name].packed()[1], stored_spec(layer.codebook))
    described = describe(PackedFile.read(path))
    assert {entry["grid"] for entry in described["layers"].values()} == {"apot"}
    manifest = export_hardware(path, tmp_path / "out", golden=GoldenImages(images[:2], images[:2], "mine"), model=model)
    assert manifest["cost"]["multiplications"] > 0
    for name, weight in read_export(tmp_path / "out").items():
        assert torch.equal(weight, quantized_layers(loaded)[name].weight), name
    for entry in json.loads((tmp_path / "out" / "manifest.json").read_text())["layers"]:
        assert entry["add_shifts"] == ([] if n_bits < 4 else None)
        own = tmp_path / "out" / entry["folder"] / "add_shifts.npy"
        assert own.is_file() == (n_bits >= 4)
        if own.is_file():
            assert np.array_equal(np.load(own), np.load(own.with_name("codebook.npy"))[..., 2:])


def test_learning_and_compensation_lower_the_error_of_the_output() -> None:
    model, _ = networks.small_resnet()
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected, errors = model(images), {}
    for rounding in ("nearest", "compensated", "learned"):
        settings = ROUNDINGS[rounding] | ({"iters": 200} if rounding == "learned" else {})
        quantized, _ = quantize_model(model, QuantConfig(3, scale_method="apot", **settings), images)  # type: ignore[arg-type]
        errors[rounding] = float(squared_error((quantized(images) - expected).detach().flatten(1)).sum())
    assert errors["compensated"] < 0.8 * errors["nearest"] and errors["learned"] < 0.8 * errors["nearest"]
