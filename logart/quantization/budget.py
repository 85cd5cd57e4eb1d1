"""Bits of each layer under a budget: one width a layer, the least total effect, solved exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from logart.errors import SettingError
from logart.grids.packing import packed_bytes

_LARGEST = 1e6  # what the largest effect becomes: HiGHS stops within 1e-6 of the least sum


@dataclass(frozen=True)
class Budget:
    """What the codes of all layers may take; one of the two limits is given.

    Attributes:
        weights: how many weights each layer has.
        mean_bits: at most so many bits a weight, averaged over all.
        n_bytes: at most so many bytes of packed codes: of each layer weights·bits / 8, rounded up.
    """

    weights: Mapping[str, int]
    mean_bits: float | None = None
    n_bytes: int | None = None

    @property
    def limit(self) -> float:
        """What all sizes may sum to."""
        if self.mean_bits is None:
            assert self.n_bytes is not None
            return self.n_bytes
        return self.mean_bits * sum(self.weights.values())

    def size(self, layer: str, bits: int) -> int:
        """Bits of a layer's codes, or bytes under a limit of bytes."""
        count = self.weights[layer]
        return packed_bytes(count, bits) if self.mean_bits is None else count * bits

    def check(self, widths: Mapping[str, Iterable[int]]) -> None:
        """Raise SettingError where even the smallest of the widths that each layer may take exceed it."""
        least = sum(self.size(name, min(bits)) for name, bits in widths.items())
        if least <= self.limit:
            return
        if self.mean_bits is None:
            raise SettingError(f"size_budget: {self.n_bytes} bytes of codes; the least possible is {least}")
        least_mean = least / sum(self.weights.values())
        raise SettingError(f"bits_budget: {self.mean_bits:g} bits a weight; the least possible is {least_mean:.4g}")


def choose_one_each(effects: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: float) -> list[int]:
    """Of each row one choice: sizes sum to at most `limit`, effects to the least (a multiple-choice knapsack).

    Args:
        effects, sizes: of each choice; each row of both is as long, rows may differ.
        limit: not below the sum of each row's smallest size.
    """
    cost, size = (np.concatenate([np.asarray(row, float) for row in rows]) for rows in (effects, sizes))
    rows = np.repeat(np.arange(len(effects)), [len(row) for row in effects])
    one_each = (rows == np.arange(len(effects))[:, None]).astype(float)
    cost *= _LARGEST / max(cost.max(), 1e-300)
    room, unit = limit, size.max()
    while True:
        constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / unit, -np.inf, room / unit)]
        found = milp(cost, constraints=constraints, integrality=1, bounds=Bounds(0, 1), options={"mip_rel_gap": 0})
        assert found.x is not None, found.message
        picked = found.x > 0.5
        if size[picked].sum() <= limit:
            break
        room -= size[picked].sum() - limit  # the solver takes a constraint as held within a tolerance
    starts = np.searchsorted(rows, np.arange(len(effects)))
    return [int(place) for place in np.flatnonzero(picked) - starts]


def allocate_bits(effects: Mapping[str, Mapping[int, float]], budget: Budget) -> dict[str, int]:
    """The width of each layer with the least sum of effects.

    Args:
        effects: of each layer at each width that it may take.
        budget: for these layers.

    Raises:
        SettingError: the smallest widths exceed the budget.
    """
    budget.check(effects)
    sizes = [[budget.size(name, bits) for bits in widths] for name, widths in effects.items()]
    chosen = choose_one_each([list(widths.values()) for widths in effects.values()], sizes, budget.limit)
    return {name: list(widths)[place] for (name, widths), place in zip(effects.items(), chosen, strict=True)}
