"""Levels as shifts and adds, and the integer reference: against fractions and float64, on integers that refuse `*`."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from codebooks import choose_codebook, scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import logart.export.integer_layer
from logart.export.hardware import (
    Cost,
    FixedPoint,
    HardwareLevels,
    signed_powers,
)
from logart.export.integer_layer import Geometry, IntegerLayer
from logart.grids.grid import Grid, ScaleSearch
from logart.grids.linear import linear_codebook
from logart.grids.logarithmic import DYNAMIC, LOG_2, LOG_SQRT2, log_codebook
from logart.grids.plain import stored_spec
from logart.grids.root2 import ROOT2_TEXT, ExactRoot2Error

LOG_METHODS = (LOG_2, LOG_SQRT2, DYNAMIC)


class Shifts:
    """A 64-bit integer that can be shifted, added and subtracted, and counts its adds; anything else raises."""

    adds = 0

    def __init__(self, value: int) -> None:
        assert -(2**63) <= value < 2**63, "overflow"
        self.value = value

    def __lshift__(self, places: int) -> Shifts:
        return Shifts(self.value << int(places))

    def __rshift__(self, places: int) -> Shifts:
        return Shifts(self.value >> int(places))

    def __add__(self, other: Any) -> Shifts:
        Shifts.adds += 1
        return Shifts(self.value + int(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Shifts:
        Shifts.adds += 1
        return Shifts(self.value - int(other))

    def __rsub__(self, other: Any) -> Shifts:
        Shifts.adds += 1
        return Shifts(int(other) - self.value)

    def __int__(self) -> int:
        return self.value

    def __mul__(self, other: Any) -> Shifts:
        raise TypeError("a multiplication")

    __rmul__ = __matmul__ = __rmatmul__ = __pow__ = __truediv__ = __floordiv__ = __mul__


def refusing(x: np.ndarray) -> np.ndarray:
    """The same integers, none of which can be multiplied."""
    result = np.empty(x.shape, object)
    result.ravel()[:] = [Shifts(int(value)) for value in x.ravel()]
    return result


def levels_of(w: torch.Tensor, n_bits: int, method: Grid = DYNAMIC, terms: int = 2, **options: Any) -> HardwareLevels:
    book = choose_codebook(w, method, n_bits, terms=terms, **options)
    return HardwareLevels.of(stored_spec(book, w.dtype), n_bits, w.dtype)


def random_layer(
    shape: tuple[int, ...], n_bits: int = 4, terms: int = 2, *, scale: bool = False, seed: int = 0, **options: Any
) -> tuple[HardwareLevels, np.ndarray, np.ndarray]:
    """Levels for random weights, random codes of them, and the float64 weights by fractions."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape[0], math.prod(shape[1:]), generator=generator) * 0.3
    search = ScaleSearch.GRID if scale else ScaleSearch.NONE
    levels = levels_of(w, n_bits, terms=terms, scale_search=search, **options)
    codes = torch.randint(2**n_bits, shape, generator=generator, dtype=torch.uint8).numpy()
    values = np.array([[float(level(levels, g, code)) for code in range(2**n_bits)] for g in range(shape[0])])
    weight = values[np.arange(shape[0])[:, None], codes.reshape(shape[0], -1)].reshape(shape)
    return levels, codes, weight


def level(levels: HardwareLevels, channel: int, code: int) -> Fraction:
    """A level by its definition, scale included."""
    adds = (k for k in levels.adds[channel, code].tolist() if k)
    factor = 1 + sum(Fraction(1 if k > 0 else -1, 2 ** abs(k)) for k in adds)
    value = int(levels.signs[channel, code]) * Fraction(2) ** int(levels.shifts[channel, code]) * factor
    return value if levels.numerators is None else value * int(levels.numerators[channel]) / 32


# ---------------------------------------------------------------- levels


def test_the_approximations_are_shifts_and_adds() -> None:
    assert signed_powers(1.5) == [(1, 0), (1, -1)]
    assert signed_powers(1.4375) == [(1, 0), (1, -1), (-1, -4)]
    assert signed_powers(1.421875) == [(1, 0), (1, -1), (-1, -4), (-1, -6)]


def test_numerators_are_the_shortest_sums() -> None:
    reached, size = {0: 0}, 0
    while not all(i in reached for i in range(1, 256)):  # breadth first over sums of ±2^e
        size += 1
        sums = {old + sign * 2**e for old in reached for sign in (1, -1) for e in range(10)}
        reached |= {value: size for value in sums if value not in reached}
    for i in range(1, 256):
        powers = signed_powers(i)
        assert sum(sign * 2**e for sign, e in powers) == i
        assert len(powers) == reached[i]
        assert [e for _, e in powers] == sorted({e for _, e in powers}, reverse=True)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 10**6), st.integers(2, 8), st.sampled_from(LOG_METHODS), st.sampled_from((2, 3, 4)),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from((torch.float32, torch.float64)),
)  # fmt: skip
def test_levels_are_those_of_the_codebook(
    seed: int, n_bits: int, method: Grid, terms: int, scale: bool, asymmetric: bool, zero: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    w = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)).to(dtype)
    w[1] = w[1].abs()
    w[2] = 0
    w[3] *= 1e-30
    w[4] = torch.where(w[4] > 0, w[4], 0.01 * w[4])
    search = ScaleSearch.GRID if scale and n_bits < 5 else ScaleSearch.NONE
    book = choose_codebook(w, method, n_bits, terms=terms, scale_search=search, asymmetric=asymmetric, zero_code=zero)
    levels = HardwareLevels.of(stored_spec(book, dtype), n_bits, dtype)
    exact = [[level(levels, g, code) for code in range(2**n_bits)] for g in range(len(w))]
    assert exact == [[Fraction(value) for value in row] for row in book.levels.tolist()]
    assert np.array_equal(levels.values(), book.levels.numpy())
    assert (levels.numerators is not None) == (search is ScaleSearch.GRID)
    tails = {tuple(a) for row in levels.adds.tolist() for a in row if any(a)}
    assert tails <= {{2: (1,), 3: (1, -4), 4: (1, -4, -6)}[terms]}


def test_an_exact_root_or_a_linear_grid_has_no_shifts() -> None:
    a = torch.tensor([1.0, 2.0])
    with pytest.raises(ExactRoot2Error, match="exact √2"):
        HardwareLevels.of(stored_spec(log_codebook(a, 3, 2)), 3)
    base2 = HardwareLevels.of(stored_spec(log_codebook(a, 3, 4)), 3)
    assert base2.shifts.tolist()[0] == [0, -1, -2, -3, -3, -2, -1, 0]
    assert not HardwareLevels.of(stored_spec(log_codebook(torch.zeros(2), 3, 0)), 3).signs.any()
    with pytest.raises(ValueError, match="linear_minmax have no shifts"):
        HardwareLevels.of(stored_spec(linear_codebook(-a, a, 3)), 3)


def test_a_scale_that_the_type_cuts_is_refused() -> None:
    book = log_codebook(torch.tensor([torch.finfo(torch.float32).max]), 3, 4, terms=2)
    spec = scaled(book, 1.0).spec
    assert HardwareLevels.of(spec, 3).numerators.tolist() == [32]  # type: ignore[union-attr]
    cut = replace(spec, columns={**spec.columns, "scale": torch.tensor([255])})
    with pytest.raises(ValueError, match="scale"):
        HardwareLevels.of(cut, 3)


def test_rows_share_the_codebooks_in_order() -> None:
    levels = levels_of(torch.tensor([[1.0, -0.5], [8.0, 4.0]]), 3, LOG_2)
    powers = levels.powers(np.full((6, 2), 7, np.uint8))  # the largest level of each
    assert powers.exponents[0].tolist() == [[0, 0]] * 3 + [[3, 3]] * 3


# ---------------------------------------------------------------- fixed point


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=6), st.integers(2, 24))
def test_a_format_is_the_finest_without_saturation(values: list[float], bits: int) -> None:
    x = np.array(values)
    fixed = FixedPoint.holding(x, bits)
    assert np.all(np.abs(np.ldexp(fixed.quantize(x).astype(float), -fixed.fraction) - x) <= fixed.half_unit)
    if x.any():
        largest = max(abs(round(Fraction(v) * Fraction(2) ** (fixed.fraction + 1))) for v in values)
        assert largest >= 2 ** (bits - 1)  # one more fraction bit and it saturates


def test_rounding_and_saturation() -> None:
    fixed = FixedPoint(4, 1)
    x = np.array([0.25, 0.75, -0.25, -0.75, 0.3, 3.5, 3.74, 100.0, -4.0, -100.0])
    assert fixed.quantize(x).tolist() == [0, 2, 0, -2, 1, 7, 7, 7, -8, -8]
    assert FixedPoint(4, 1).saturated(x) == 2 and FixedPoint(8, 0).saturated(x) == 0
    assert FixedPoint.holding(np.zeros(3)) == FixedPoint(16, 15)


# ---------------------------------------------------------------- the reference

SAME = ((1, 1), (1, 1))
LAYERS: dict[str, tuple[tuple[int, ...], Geometry | None, tuple[int, ...]]] = {
    "linear": ((5, 7), None, (3, 7)),
    "tokens": ((5, 7), None, (2, 3, 7)),
    "windows": ((4, 3), None, (2, 2, 2, 3)),
    "conv": ((4, 3, 3, 3), Geometry((3, 3), (1, 1), SAME, (1, 1), 1), (2, 3, 5, 6)),
    "strided": ((4, 2, 3, 2), Geometry((3, 2), (2, 3), ((0, 1), (2, 0)), (1, 1), 1), (2, 2, 8, 7)),
    "grouped": ((6, 2, 3, 3), Geometry((3, 3), (1, 2), SAME, (1, 1), 3), (2, 6, 5, 5)),
    "depthwise": ((6, 1, 3, 3), Geometry((3, 3), (1, 1), SAME, (1, 1), 3), (1, 3, 4, 4)),
    "dilated": ((3, 2, 2, 3), Geometry((2, 3), (1, 1), ((2, 1), (0, 3)), (3, 2), 1), (2, 2, 7, 8)),
    "reflected": ((3, 2, 3, 3), Geometry((3, 3), (1, 1), SAME, (1, 1), 1, "reflect"), (1, 2, 5, 4)),
    "replicated": ((3, 2, 3, 3), Geometry((3, 3), (1, 1), SAME, (1, 1), 1, "replicate"), (1, 2, 5, 4)),
    "circular": ((3, 2, 3, 3), Geometry((3, 3), (1, 1), SAME, (1, 1), 1, "circular"), (1, 2, 5, 4)),
}


def in_float64(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, geometry: Geometry | None) -> np.ndarray:
    tensors = [None if t is None else torch.from_numpy(t) for t in (x, weight, bias)]
    if geometry is None:
        return F.linear(*tensors).numpy()  # type: ignore[arg-type]
    (top, bottom), (left, right) = geometry.padding
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    assert tensors[0] is not None
    padded = F.pad(tensors[0], (left, right, top, bottom), mode=mode)
    return F.conv2d(  # type: ignore[no-any-return]
        padded,
        tensors[1],
        tensors[2],
        geometry.stride,
        0,
        geometry.dilation,
        geometry.groups,  # type: ignore[arg-type]
    ).numpy()


@pytest.mark.parametrize("terms", [2, 3, 4])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_reference_is_the_float_layer(name: str, scale: bool, terms: int) -> None:
    shape, geometry, inputs = LAYERS[name]
    levels, codes, weight = random_layer(shape, 3, terms, scale=scale, zero_code=terms == 3)
    rng = np.random.default_rng(terms)
    x, bias = rng.normal(size=inputs), rng.normal(size=shape[0]) if terms != 4 else None
    layer = IntegerLayer.plan(levels, codes, FixedPoint.holding(x), geometry=geometry, bias=bias)
    integers = layer.input.quantize(x)
    y = layer.run(integers)
    # Exactly the float64 layer of the rounded input and bias: nothing is lost in between.
    assert layer.output.bits <= 53 and not layer.rounded_terms.any()
    rounded = None if bias is None else np.rint(bias * 2.0**layer.output.fraction) / 2.0**layer.output.fraction
    exact = in_float64(integers * 2.0**-layer.input.fraction, weight, rounded, geometry)
    assert y.dtype == np.int64 and np.array_equal(y, exact * 2.0**layer.output.fraction)
    assert layer.output.fraction == layer.accumulator.fraction + 5 * scale
    # And within the bound of the float64 layer of the input as it was.
    distance = np.abs(y * 2.0**-layer.output.fraction - in_float64(x, weight, bias, geometry))
    axis = 1 if geometry is not None else -1
    bound = layer.error_bound()
    assert np.all(np.moveaxis(distance, axis, -1) <= bound * (1 + 1e-9))
    # It multiplies nowhere, and stays in 64 bits.
    slow = layer.run(refusing(integers))
    assert slow.dtype == object and np.array_equal(np.vectorize(int)(slow), y)


def test_the_refusing_integer_refuses() -> None:
    x = refusing(np.arange(4).reshape(2, 2))
    for wrong in (lambda: x * 2, lambda: 2 * x, lambda: x @ x, lambda: x * x, lambda: np.einsum("ij,jk", x, x),
                  lambda: x**2, lambda: x / 2):  # fmt: skip
        with pytest.raises(TypeError, match="a multiplication"):
            wrong()
    with pytest.raises(AssertionError, match="overflow"):
        x << 63


def test_the_bound_is_reached() -> None:
    levels, codes, weight = random_layer((4, 9), 4)
    layer = IntegerLayer.plan(levels, codes, FixedPoint(16, 8), bias=np.full(4, 0.37))
    for row in range(4):
        # Half a unit off, to the side that every weight of the row makes worse.
        units = np.arange(9) * 2 + 1000
        x = (units + 0.49999 * np.sign(weight[row])) * 2.0**-8
        y = layer.run(layer.input.quantize(x)[None])[0, row] * 2.0**-layer.output.fraction
        distance = abs(y - (weight[row] @ x + 0.37))
        bias_part = layer.output.half_unit
        assert layer.error_bound()[row] - 2 * bias_part <= distance * 1.001 <= layer.error_bound()[row] * 1.001


@pytest.mark.parametrize("scale", [False, True])
def test_a_grid_too_wide_for_64_bits_is_rounded_within_its_bound(scale: bool) -> None:
    top, k = torch.tensor([4, -9, 0]), torch.tensor([128, 0, 40])  # over 127, 64 and 84 octaves
    book = DYNAMIC.codebook({"top_half_step": top, "n_base2": k}, 8, 2, torch.float32)
    book = scaled(book, torch.tensor([27 / 32, 1.0, 13 / 32])) if scale else book
    levels = HardwareLevels.of(stored_spec(book), 8)
    rng = np.random.default_rng(3)
    codes, x, bias = rng.integers(0, 256, (3, 40)).astype(np.uint8), rng.normal(size=(2, 40)), rng.normal(size=3)
    layer = IntegerLayer.plan(levels, codes, FixedPoint.holding(x), bias=bias)
    assert layer.output.bits <= 63 and layer.rounded_terms.all()
    y = layer.run(layer.input.quantize(x))
    assert np.array_equal(np.vectorize(int)(layer.run(refusing(layer.input.quantize(x)))), y)
    without_input = layer.error_bound() - [
        float(sum(abs(level(levels, c, i)) for i in codes[c].tolist())) * layer.input.half_unit for c in range(3)
    ]
    for n in range(2):
        for c in range(3):
            weights = [level(levels, c, i) for i in codes[c].tolist()]
            got = Fraction(int(y[n, c])) / Fraction(2) ** layer.output.fraction
            true = sum((w * Fraction(v) for w, v in zip(weights, x[n].tolist(), strict=True)), Fraction(bias[c]))
            assert abs(got - true) <= layer.error_bound()[c]
            kept = [Fraction(v) / Fraction(2) ** layer.input.fraction for v in layer.input.quantize(x)[n].tolist()]
            rounded = sum((w * v for w, v in zip(weights, kept, strict=True)), Fraction(bias[c]))
            assert 0 < abs(got - rounded) <= without_input[c] * (1 + 1e-3) + 2.0**-60


def test_a_term_that_shifts_right_is_rounded_by_itself() -> None:
    shifts = np.array([[0, -60]], np.int16)
    levels = HardwareLevels(np.ones((1, 2), np.int16), shifts, np.zeros((1, 2, 1), np.int16), None)
    layer = IntegerLayer.plan(levels, np.array([[0, 1, 1]], np.uint8), FixedPoint(16, 0))
    places = 60 - layer.guard
    assert 0 < places < 15
    half = 1 << (places - 1)
    x = np.array([[0, half, half], [0, half - 1, half - 1], [0, -half, -half], [0, -half - 1, 3 * half]])
    assert layer.run(x)[:, 0].tolist() == [2, 0, 0, -1 + 2]
    assert layer.rounded_terms.tolist() == [2]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_no_input_overflows_the_widths_and_they_waste_no_bit(name: str, scale: bool) -> None:
    shape, geometry, inputs = LAYERS[name]
    levels, codes, weight = random_layer(shape, 4, scale=scale)
    bias = np.full(shape[0], 0.01)
    layer = IntegerLayer.plan(levels, codes, FixedPoint(16, 10), geometry=geometry, bias=bias)
    low, high = -(2**15), 2**15 - 1
    largest = 0
    for row in range(shape[0]):
        for sign in (1, -1):
            x = np.where(sign * weight[row] > 0, high, low)
            if geometry is None:
                y = layer.run(x[None])
            else:  # the window in the middle of the group's channels
                whole = np.zeros((1, *inputs[1:]), np.int64)
                group = row // (shape[0] // geometry.groups)
                whole[0, group * shape[1] : (group + 1) * shape[1], 1:4, 1:4] = x
                y = layer.run(whole)
            largest = max(largest, int(np.abs(y).max()))
    assert 2 ** (layer.output.bits - 2) * 0.9 < largest < 2 ** (layer.output.bits - 1)
    assert layer.accumulator.bits <= layer.output.bits <= layer.accumulator.bits + 7


def test_extreme_inputs_and_biases() -> None:
    levels, codes, weight = random_layer((3, 4), 3)
    for size in (1e-200, 1e-30, 1e30):
        for bias in (np.zeros(3), np.array([1e-20, -1e20, 3.0])):
            x = np.array([[1.0, -0.3, 0.2, 0.7]]) * size
            layer = IntegerLayer.plan(levels, codes, FixedPoint.holding(x), bias=bias)
            integers = layer.run(layer.input.quantize(x))
            assert np.abs(integers).max() < 2 ** (layer.output.bits - 1) <= 2**62
            y = np.ldexp(integers.astype(float), -layer.output.fraction)
            assert np.all(np.abs(y - (x @ weight.T + bias)) <= layer.error_bound() * (1 + 1e-6))
            assert np.all(layer.error_bound() <= 1e-3 * max(size, np.abs(bias).max()))


def test_images_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, geometry, _ = LAYERS["strided"]
    levels, codes, _ = random_layer(shape, 3)
    layer = IntegerLayer.plan(levels, codes, FixedPoint(16, 8), geometry=geometry)
    x = np.random.default_rng(0).integers(-999, 999, (5, 2, 8, 7))
    whole = layer.run(x)
    monkeypatch.setattr(logart.export.integer_layer, "_ELEMENTS_AT_ONCE", 2 * whole.size // 5 // 4 * 12)  # two images
    assert np.array_equal(layer.run(x), whole)


def test_a_layer_of_zeros() -> None:
    levels = levels_of(torch.zeros(2, 3), 4)
    layer = IntegerLayer.plan(levels, np.zeros((2, 3), np.uint8), FixedPoint(16, 4), bias=np.array([1.5, 0.0]))
    assert (layer.run(np.full((1, 3), 999)) * 2.0**-layer.output.fraction).tolist() == [[1.5, 0.0]]
    assert not layer.powers.used and layer.guard == 0


# ---------------------------------------------------------------- costs


def test_counts_by_hand() -> None:
    # zero, 2^0, 2^0 · (1 + 1/2), -2^-1 · (1 + 1/2 - 1/16)
    levels = HardwareLevels(
        np.array([[0, 1, 1, -1]], np.int16), np.array([[0, 0, 0, -1]], np.int16),
        np.array([[[0, 0], [0, 0], [1, 0], [1, -4]]], np.int16), None,
    )  # fmt: skip
    codes = np.array([[0, 1, 2], [3, 3, 0]], np.uint8)
    cost = Cost.of(levels, codes, 2, codebook_bytes=4, positions=10)
    assert cost == Cost(60, 10 * (0 + 1 + 2 + 3 + 3 + 0), 90, 6 * 2 + 32, 6 * 2 + 32 + 2)
    scaled = HardwareLevels(levels.signs, levels.shifts, levels.adds, np.array([27], np.int16))  # 32 - 4 - 1
    assert Cost.of(scaled, codes, 2, 5, 10) == Cost(60, 90 + 10 * 2 * 3, 90 + 10 * 2 * 2, 52, 46)
    assert Cost.total([cost, cost]) == Cost(120, 180, 180, 88, 92)
    assert Cost.total([]) == Cost(0, 0, 0, 0, 0)


@pytest.mark.parametrize("terms", ROOT2_TEXT)
@pytest.mark.parametrize("scale", [False, True])
def test_the_reference_adds_as_often_as_is_counted(scale: bool, terms: int) -> None:
    levels, codes, _ = random_layer((5, 8), 3, terms, scale=scale, zero_code=True, seed=4)
    layer = IntegerLayer.plan(levels, codes, FixedPoint(16, 8))
    Shifts.adds = 0
    layer.run(refusing(np.arange(24).reshape(3, 8)))
    assert Shifts.adds == Cost.of(levels, codes, 3, 0, positions=3).adds
