"""What a grid and a codebook are: which levels an n-bit weight may take.

One idea carries the whole project: a grid is a way to fill a sorted codebook of at most 2^n levels per channel.
`logarithmic`, `linear` and `apot` are files of grids, `registry` has them all, one line each. Everything behind
(rounding, search, learning, packing, exporting) sees only the codebook, and asks the grid for what only it knows.

A codebook is its levels and its `spec`: the grid and the few integers per channel that rebuild the levels exactly.
Levels are float64, so that comparing a float32 weight with the border between two levels is exact.

Everything here is a pure function of tensors; C is the number of channels (of codebooks), n the bit width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8
_CHECKED_AT_ONCE = 2**18  # channels of a file
SCALE_UNIT = 32  # a scale of i is i / 32: five shifts of a fraction, no multiplier

ErrorFunction = Callable[[Tensor], Tensor]


class Spacing(str, Enum):
    """How neighbouring levels are spaced, which decides the mean that separates them."""

    LOG = "log"
    LINEAR = "linear"


class ScaleSearch(str, Enum):
    """Whether a log grid's levels get a factor per channel, of `logarithmic.SCALES`, or half-steps 2^(j/2) only."""

    NONE = "none"
    GRID = "grid"
    HALF_STEP = "half_step"


@dataclass(frozen=True)
class GridOptions:
    """What a user can ask of a grid beside its name; a grid lists in `Grid.options` those that act on it.

    Attributes:
        terms: how √2 is approximated, see `root2`.
        scale_search: which factors of the levels are tried, per channel.
        asymmetric, zero_code: how codes are spent, see `reassigned_codes`.
        wide_gap: whether a channel's smallest magnitude may lie lower, see `logarithmic`.
    """

    terms: int = 0
    scale_search: ScaleSearch = ScaleSearch.NONE
    asymmetric: bool = False
    zero_code: bool = False
    wide_gap: bool = False


NO_OPTIONS = GridOptions()


@dataclass(frozen=True)
class CodebookSpec:
    """What rebuilds the codebooks of C channels.

    Attributes:
        grid: whose they are.
        columns: by name, `grid.integers` says which: [C] int64, or [C, ...] float64 for `grid.floats`.
        terms: how √2 is approximated (`root2`); 0 where there is none, or it is exact.
    """

    grid: Grid
    columns: Mapping[str, Tensor]
    terms: int = 0

    @property
    def channels(self) -> int:
        """C."""
        first = next(iter(self.columns.values()))
        return len(first) if first.ndim else 0

    def select(self, channels: slice | Tensor) -> CodebookSpec:
        """The spec of some channels."""
        return replace(self, columns={name: column[channels] for name, column in self.columns.items()})

    def to(self, device: torch.device) -> CodebookSpec:
        """The same on a device."""
        return replace(self, columns={name: column.to(device) for name, column in self.columns.items()})

    def codebook(self, n_bits: int, dtype: torch.dtype = torch.float32) -> Codebook:
        """The codebooks, with 2^n levels a channel, for weights of `dtype`."""
        return self.grid.codebook(self.columns, n_bits, self.terms, dtype)

    def short(self) -> CodebookSpec:
        """The same in the grid's order, without columns whose channels all have the value of an absent one."""
        kept = {}
        for name, absent in self.grid.integers.items():
            column = self.columns.get(name)
            if column is not None and (absent is None or bool((column != absent).any())):
                kept[name] = column
        return replace(self, columns=kept)

    @classmethod
    def checked(
        cls, grid: Grid, columns: Mapping[str, Tensor], terms: int, shape: torch.Size, n_bits: int, dtype: torch.dtype
    ) -> CodebookSpec:
        """The spec of columns that a file claims; ValueError where no layer of such weights [*shape] has them."""
        required = {name for name, absent in grid.integers.items() if absent is None}
        if not required <= set(columns) <= set(grid.integers):
            raise ValueError(f"the grid {grid.name} has other integers than {', '.join(columns):.80}")
        spec = cls(grid, {name: columns[name] for name in grid.integers if name in columns}, terms)
        for name, column in spec.columns.items():
            floats = name in grid.floats
            fits = column.dtype == (torch.float64 if floats else torch.int64) and (floats or column.ndim == 1)
            if not fits or column.ndim == 0 or len(column) != spec.channels:
                raise ValueError(f"{name} is {list(column.shape)} {column.dtype}")
        if not spec.channels or shape[0] % spec.channels:
            raise ValueError(f"{spec.channels} codebooks for {shape[0]} rows")
        for start in range(0, spec.channels, _CHECKED_AT_ONCE):
            spec.select(slice(start, start + _CHECKED_AT_ONCE))._check(start, n_bits, dtype)
        return spec

    def _check(self, first: int, n_bits: int, dtype: torch.dtype) -> None:
        for name, channels in self.grid.wrong(self.columns, n_bits, dtype).items():
            if channels.any():
                channel = int(channels.nonzero()[0])
                value = self.columns[name][channel].tolist()
                raise ValueError(f"channel {first + channel}: {name} {value!s:.60} is out of range at {n_bits} bits")


@dataclass(frozen=True)
class Codebook:
    """The levels of C channels.

    Attributes:
        levels: [C, 2^n] float64, ascending. A channel that needs fewer levels repeats one (all-zero: 2^n zeros).
        spec: the grid, and what rebuilds the levels.
    """

    levels: Tensor
    spec: CodebookSpec

    @property
    def spacing(self) -> Spacing:
        """Of the grid."""
        return self.spec.grid.spacing

    @property
    def borders(self) -> Tensor:
        """`borders_between` the levels, [C, 2^n - 1]."""
        return borders_between(self.levels, self.spacing)

    @property
    def n_bits(self) -> int:
        """n."""
        return self.levels.shape[1].bit_length() - 1

    def select(self, rows: Tensor) -> Codebook:
        """The codebooks of some channels; `rows` is an index [C'] of integers."""
        return Codebook(self.levels[rows], self.spec.select(rows))

    def to(self, device: torch.device) -> Codebook:
        """The same on a device."""
        return Codebook(self.levels.to(device), self.spec.to(device))

    def with_terms(self, terms: int, dtype: torch.dtype = torch.float32) -> Codebook:
        """The same codes on levels whose √2 is approximated by `terms` terms; without √2, the codebook itself."""
        if "terms" not in self.spec.grid.options:
            return self
        return replace(self.spec, terms=terms).codebook(self.n_bits, dtype)


def borders_between(levels: Tensor, spacing: Spacing) -> Tensor:
    """[C, L - 1] float64: a weight at or past border i, seen from zero, belongs to the level beyond it.

    The arithmetic mean of two neighbours, on log grids the geometric one; 0 between both signs; half the other level
    where one is zero.
    """
    lower, upper = levels[:, :-1], levels[:, 1:]
    if spacing is Spacing.LINEAR:
        return lower + (upper - lower) / 2
    geometric = lower.sign() * lower.abs().sqrt() * upper.abs().sqrt()
    signs = lower.sign() * upper.sign()  # the product of the levels themselves may vanish
    return torch.where(signs > 0, geometric, torch.where(signs == 0, (lower + upper) / 2, 0.0))


class Shifts(NamedTuple):
    """Levels as hardware without a multiplier makes them: sign · 2^shift · (1 + Σ ± 2^-k), times the scale.

    Attributes:
        signs: [C, 2^n] int64, -1, 0 or 1; a zero level has neither shift nor adds.
        shifts: [C, 2^n] int64.
        adds: [C, 2^n, A] int64, the add-shifts: k for + 2^-k, -k for - 2^-k, 0 for none.
        numerators: [C] int64, what the channel's sums are multiplied by, over `SCALE_UNIT`; None where nothing is.
    """

    signs: Tensor
    shifts: Tensor
    adds: Tensor
    numerators: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """A way to fill codebooks; everything that only this grid knows. Subclasses override the methods.

    Attributes:
        name: what `--scale_method` and a packed file call it.
        label: what a report calls it.
        spacing: decides rounding to nearest and the interpolation of learning.
        integers: the columns that rebuild a codebook, by name: the value of one that is absent, None where it must
            not be.
        floats: those of them that are float64.
        options: the fields of `GridOptions` that act on it.
        own_error: the measure that its candidates are compared by, if not the search's.
    """

    name: str
    label: str
    spacing: Spacing
    integers: Mapping[str, int | None]
    floats: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()
    own_error: ErrorFunction | None = None

    def candidates(self, w: Tensor, n_bits: int, options: GridOptions) -> Iterator[Codebook]:
        """The codebooks of the channels of w [C, K] to choose from, one after the other; on equal error a later wins.

        All have the same columns.
        """
        raise NotImplementedError

    def n_candidates(self, n_bits: int, options: GridOptions = NO_OPTIONS) -> int:
        """How many there are, codes reassigned or not."""
        raise NotImplementedError

    def codebook(self, columns: Mapping[str, Tensor], n_bits: int, terms: int, dtype: torch.dtype) -> Codebook:
        """The codebooks [C, 2^n] that columns make, for weights of `dtype`, which no level exceeds."""
        raise NotImplementedError

    def wrong(self, columns: Mapping[str, Tensor], n_bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Of each column, which channels [C] bool have a value that no codebook of this grid has."""
        raise NotImplementedError

    def shifts(self, spec: CodebookSpec, n_bits: int, dtype: torch.dtype) -> Shifts:
        """How hardware computes each level.

        Raises:
            ValueError: a level is no short sum of powers of two.
        """
        raise ValueError(f"levels of the grid {self.name} have no shifts; a multiplier-less export needs powers of two")

    def units(self, spec: CodebookSpec, n_bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Levels as products: units [C, 2^n] float64, of which few rows should differ, and factors [C] float64.

        Cut to what `dtype` holds, the products in float64 round to the very levels of `codebook`.
        """
        levels = spec.codebook(n_bits, dtype).levels
        return levels, torch.ones_like(levels[:, 0])


def check_bits(n_bits: int) -> None:
    """Raise ValueError unless a code of `n_bits` bits is one this project can pack."""
    if not MIN_BITS <= n_bits <= MAX_BITS:
        raise ValueError(f"bit width must be {MIN_BITS} to {MAX_BITS}, got {n_bits}")
