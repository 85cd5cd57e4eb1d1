"""Slow oracle of the grid's mathematics, written from DESIGN.md section 2 alone.

Everything is decided in exact rational arithmetic. A magnitude 2^(h/2) is irrational for odd h, but its
square never is, so a level is known by its square and a border (a geometric mean) by its fourth power.
"""

import math
from bisect import bisect_left
from fractions import Fraction
from functools import cache
from itertools import pairwise

SQUARE_OF_ROOT2 = {0: Fraction(2), 2: Fraction(3, 2) ** 2, 3: Fraction(23, 16) ** 2, 4: Fraction(91, 64) ** 2}
TERMS = tuple(SQUARE_OF_ROOT2)
TOP_EXPONENT = {"float16": 15, "float32": 127, "float64": 1023}  # the largest power of two that is finite
SHRINK_PERCENTS = tuple(range(100, 20, -1))


def power2(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


@cache
def top_half_step(a: float) -> int:
    """floor(2 log2 a + 1/2): the h with 2^((h - 1/2)/2) <= a < 2^((h + 1/2)/2)."""
    fourth, h = Fraction(a) ** 4, 2 * math.frexp(a)[1]
    while power2(2 * h - 1) > fourth:
        h -= 1
    return h


@cache
def top_exponent(a: float) -> int:
    """floor(log2 a + 1/2): the e with 2^(e - 1/2) <= a < 2^(e + 1/2)."""
    square, e = Fraction(a) ** 2, math.frexp(a)[1]
    while power2(2 * e - 1) > square:
        e -= 1
    return e


def half_steps(a: float, n_bits: int, n_base2: int, dtype: str = "float32") -> list[int]:
    """Ascending half-steps of the magnitudes of one channel whose largest magnitude is a > 0."""
    n_magnitudes, e_max = 2 ** (n_bits - 1), TOP_EXPONENT[dtype]
    if n_base2 == n_magnitudes:
        e = min(top_exponent(a), e_max)
        return [2 * (e - i) for i in reversed(range(n_magnitudes))]
    h = min(top_half_step(a), 2 * e_max + 1)
    n_root2 = n_magnitudes - n_base2
    e = (h - n_root2) // 2
    return [2 * (e - i) for i in reversed(range(n_base2))] + [h - i for i in reversed(range(n_root2))]


@cache
def level_square(half_step: int, terms: int) -> Fraction:
    whole, odd = divmod(half_step, 2)
    return power2(2 * whole) * (SQUARE_OF_ROOT2[terms] if odd else 1)


def root_as_float(x: Fraction, degree: int) -> float:
    """Correctly rounded float64 of x^(1/degree), degree 2 or 4, x > 0."""
    magnitude = (x.numerator.bit_length() - x.denominator.bit_length()) // degree
    shift = 100 - magnitude
    scaled = x * power2(degree * shift)
    root = math.isqrt(math.floor(scaled))
    if degree == 4:
        root = math.isqrt(root)
    sticky = 0 if Fraction(root) ** degree == scaled else 1
    return float(Fraction(2 * root + sticky) / power2(shift + 1))


@cache
def level(half_step: int, terms: int = 0) -> float:
    return root_as_float(level_square(half_step, terms), 2)


@cache
def border_fourth(lower: int, upper: int, terms: int = 0) -> Fraction:
    """Fourth power of the geometric mean of two magnitudes given by their half-steps."""
    return level_square(lower, terms) * level_square(upper, terms)


@cache
def border(lower: int, upper: int, terms: int = 0) -> float:
    return root_as_float(border_fourth(lower, upper, terms), 4)


def nearest_log_code(w: float | Fraction, steps: list[int], terms: int = 0) -> int:
    """Code of the nearest level in the log domain; ties away from zero, +-0 to the least positive level."""
    fourth, n = Fraction(w) ** 4, len(steps)
    passed = sum(fourth >= border_fourth(lo, hi, terms) for lo, hi in pairwise(steps))
    return n + passed if w >= 0 else n - 1 - passed


def linear_levels(low: float | Fraction, high: float | Fraction, n_bits: int) -> list[Fraction]:
    """2^n evenly spaced levels with zero among them; refuses a zero point on the edge between two choices."""
    low, high = min(Fraction(low), Fraction(0)), max(Fraction(high), Fraction(0))
    if low == high:
        return [Fraction(0)] * 2**n_bits
    scale = (high - low) / (2**n_bits - 1)
    position = -low / scale
    zero_point = math.floor(position + Fraction(1, 2))
    tie = abs(position - math.floor(position) - Fraction(1, 2))
    if tie < Fraction(1, 10**9) and not (tie == 0 and zero_point % 2 == 0):
        raise ValueError("the zero point depends on the rounding convention; choose other data")
    return [scale * (i - zero_point) for i in range(2**n_bits)]


def nearest_linear_code(w: float, levels: list[Fraction]) -> int:
    """Code of the nearest level, ties away from zero."""
    value = Fraction(w)
    return min(range(len(levels)), key=lambda i: (abs(value - levels[i]), -abs(levels[i])))


def shrink_errors(weights: list[float], n_bits: int) -> list[float]:
    """Sum of |w - q|^2.4 for the ranges 1.00, 0.99, ..., 0.21 of the least and the largest weight."""
    low, high = Fraction(min(weights)), Fraction(max(weights))
    errors = []
    for percent in SHRINK_PERCENTS:
        factor = Fraction(percent, 100)
        levels = [float(x) for x in linear_levels(factor * low, factor * high, n_bits)]
        errors.append(math.fsum(_distance(w, levels) ** 2.4 for w in weights))
    return errors


def _distance(w: float, ascending: list[float]) -> float:
    i = bisect_left(ascending, w)
    return min(abs(w - x) for x in ascending[max(i - 1, 0) : i + 1])


def reassign_unused_codes(
    steps: list[int], n_base2: int, low: float, high: float, *, asymmetric: bool, zero_code: bool,
    scale: float = 1.0, terms: int = 0,
) -> list[tuple[int, int | None]]:  # fmt: skip
    """Sign and half-step of each level, ascending, zero as (0, None), of a channel whose weights lie in [low, high].

    A channel of zeros alone is not asked about. Where both signs leave equally many codes, the negative one is shorter.
    """
    n, smallest, spacing = len(steps), steps[0], 2 if n_base2 else 1
    sides = {-1: list(steps), 1: list(steps)}
    has_zero = False
    if asymmetric:
        lowest, highest = (nearest_log_code(Fraction(x) / Fraction(scale), steps, terms) for x in (low, high))
        free = {-1: min(lowest, n), 1: min(2 * n - 1 - highest, n)}
        shorter = -1 if free[-1] >= free[1] else 1
        count = free[shorter] if free[shorter] >= 2 else 0
        sides[shorter] = sides[shorter][: n - count]
        one_sided = low >= 0 or high <= 0
        for i in range(1, 1 + (count if one_sided else count // 2)):
            for sign in (-shorter,) if one_sided else (-1, 1):
                sides[sign].insert(0, smallest - i * spacing)
        has_zero = count % 2 == 1 and not one_sided
    if zero_code and not has_zero and sides[-1]:
        del sides[-1][0]
        has_zero = True
    negative: list[tuple[int, int | None]] = [(-1, h) for h in reversed(sides[-1])]
    return negative + [(0, None)] * has_zero + [(1, h) for h in sides[1]]
