"""Bits of each layer under a budget, against trying all allocations."""

import itertools
import math
import random

import pytest

from logart.errors import SettingError
from logart.quantization.budget import Budget, allocate_bits

WIDTHS = range(2, 9)


def random_case(seed: int, layers: int) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    """Effects over nine orders of magnitude, not always falling with the bits."""
    draw = random.Random(seed)
    effects = {
        str(i): {bits: 10 ** draw.uniform(-6, 3) * 4.0**-bits * draw.choice([1, 1, 1, 9]) for bits in WIDTHS}
        for i in range(layers)
    }
    return effects, {name: draw.randint(1, 5000) for name in effects}


def every(effects: dict[str, dict[int, float]]) -> list[dict[str, int]]:
    return [dict(zip(effects, bits, strict=True)) for bits in itertools.product(WIDTHS, repeat=len(effects))]


def effect(effects: dict[str, dict[int, float]], bits: dict[str, int]) -> float:
    return math.fsum(effects[name][width] for name, width in bits.items())


@pytest.mark.parametrize("seed", range(12))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    effects, weights = random_case(seed, layers=4)
    total = sum(weights.values())
    mean = random.Random(seed).uniform(2, 8)
    bits = allocate_bits(effects, Budget(weights, mean_bits=mean))
    allowed = [b for b in every(effects) if sum(weights[n] * b[n] for n in b) <= mean * total]
    assert bits in allowed
    assert effect(effects, bits) == pytest.approx(min(effect(effects, b) for b in allowed), rel=1e-9, abs=0)

    n_bytes = sum(math.ceil(weights[n] * b / 8) for n, b in random.Random(seed).choice(every(effects)).items())
    bits = allocate_bits(effects, Budget(weights, n_bytes=n_bytes))
    allowed = [b for b in every(effects) if sum(math.ceil(weights[n] * b[n] / 8) for n in b) <= n_bytes]
    assert bits in allowed
    assert effect(effects, bits) == pytest.approx(min(effect(effects, b) for b in allowed), rel=1e-9, abs=0)


def test_a_larger_budget_is_never_worse_and_none_is_exceeded() -> None:
    effects, weights = random_case(0, layers=60)
    weights = {name: count * 4001 for name, count in weights.items()}  # of their sums 1e-6 is many weights
    least = math.inf
    for mean in (2, 2.25, 2.5, 3, 3.7, 5, 8):
        bits = allocate_bits(effects, Budget(weights, mean_bits=mean))
        assert sum(weights[n] * b for n, b in bits.items()) <= mean * sum(weights.values())
        assert effect(effects, bits) <= least
        least = effect(effects, bits)
    assert least == pytest.approx(math.fsum(min(widths.values()) for widths in effects.values()))


def test_a_layer_with_one_width_keeps_it_and_counts() -> None:
    effects = {"a": {8: 0.0}, "b": {2: 1.0, 3: 0.0}}
    assert allocate_bits(effects, Budget({"a": 10, "b": 10}, mean_bits=5.4)) == {"a": 8, "b": 2}
    assert allocate_bits(effects, Budget({"a": 10, "b": 10}, mean_bits=5.5)) == {"a": 8, "b": 3}
    assert allocate_bits(effects, Budget({"a": 10, "b": 10}, n_bytes=10 + 3)) == {"a": 8, "b": 2}
    assert allocate_bits(effects, Budget({"a": 10, "b": 10}, n_bytes=10 + 4)) == {"a": 8, "b": 3}


def test_a_budget_below_the_smallest_widths_is_an_error() -> None:
    effects, weights = {"a": {8: 0.0}, "b": {2: 1.0, 3: 0.0}}, {"a": 10, "b": 10}
    with pytest.raises(SettingError, match="^bits_budget: 4.9 bits a weight; the least possible is 5$"):
        allocate_bits(effects, Budget(weights, mean_bits=4.9))
    with pytest.raises(SettingError, match="^size_budget: 12 bytes of codes; the least possible is 13$"):
        allocate_bits(effects, Budget(weights, n_bytes=12))


def test_without_any_effect_any_allocation_within_the_budget_will_do() -> None:
    effects = {name: dict.fromkeys(WIDTHS, 0.0) for name in "abc"}
    bits = allocate_bits(effects, Budget(dict.fromkeys("abc", 7), mean_bits=3))
    assert sum(bits.values()) <= 9
