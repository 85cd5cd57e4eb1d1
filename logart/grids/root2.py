"""How √2 is approximated: 2^(h/2) of an odd h as a few shifted copies, added, for a multiplier-less product.

A product with √2·2^s is x << s, plus or minus copies of it shifted to the right. The more of them, the nearer to √2:

    terms  √2 ≈                              relative error
    2      1 + 1/2               = 1.5       +6.1 %
    3      1 + 1/2 - 1/16        = 1.4375    +1.6 %
    4      1 + 1/2 - 1/16 - 1/64 = 1.421875  +0.5 %

`terms` 0 is the exact √2, which no such sum reaches.
"""

from __future__ import annotations

import math

# The add-shifts of each number of terms: k stands for + 2^-k, -k for - 2^-k; the 1 in front is the first term.
ADD_SHIFTS: dict[int, tuple[int, ...]] = {2: (1,), 3: (1, -4), 4: (1, -4, -6)}
ROOT2_TEXT = {
    terms: " ".join(["1", *(f"{'+' if k > 0 else '-'} 1/{2 ** abs(k)}" for k in shifts)])
    for terms, shifts in ADD_SHIFTS.items()
}


class ExactRoot2Error(ValueError):
    """Levels with an exact √2, where shifts and adds are needed."""


def root2(terms: int) -> float:
    """√2, exact (`terms` 0) or as a sum of 2, 3 or 4 powers of two: 1.5, 1.4375, 1.421875.

    Raises:
        ValueError: any other number of terms.
    """
    if terms == 0:
        return math.sqrt(2.0)
    if terms not in ADD_SHIFTS:
        raise ValueError(f"terms must be one of {[0, *ADD_SHIFTS]} (0 is the exact square root), got {terms}")
    return 1 + sum(math.copysign(2.0 ** -abs(k), k) for k in ADD_SHIFTS[terms])
