"""What a packed file keeps of a codebook: a grid's name and a few integers per channel, which rebuild it exactly.

Which integers, and what they may be, is in the grid's own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logart.grids.grid import Codebook, Grid
from logart.grids.packing import unpack
from logart.grids.rounding import dequantize

_CHUNK_SIZE = 2**18  # levels, weights or channels


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
        for start in range(0, spec.channels, _CHUNK_SIZE):
            spec.select(slice(start, start + _CHUNK_SIZE))._check(start, n_bits, dtype)
        return spec

    def _check(self, first: int, n_bits: int, dtype: torch.dtype) -> None:
        for name, channels in self.grid.wrong(self.columns, n_bits, dtype).items():
            if channels.any():
                channel = int(channels.nonzero()[0])
                value = self.columns[name][channel].tolist()
                raise ValueError(f"channel {first + channel}: {name} {value!s:.60} is out of range at {n_bits} bits")


def dequantize_packed(packed: Tensor, spec: CodebookSpec, shape: torch.Size, n_bits: int, dtype: torch.dtype) -> Tensor:
    """The weight [*shape] that packed codes stand for, of G codebooks that share its rows evenly.

    Some channels, and of a channel some weights, at a time: all levels, or the indices of all weights, would take far
    more memory than the weights.
    """
    codes = unpack(packed, n_bits, shape.numel()).reshape(spec.channels, -1)
    weight = torch.empty(codes.shape, dtype=dtype, device=packed.device)
    size = max(1, _CHUNK_SIZE // max(2**n_bits, codes.shape[1]))
    for start in range(0, spec.channels, size):
        part = slice(start, start + size)
        levels = spec.select(part).codebook(n_bits, dtype).levels.to(packed.device)
        for first in range(0, codes.shape[1], _CHUNK_SIZE):
            columns = slice(first, first + _CHUNK_SIZE)
            weight[part, columns] = dequantize(codes[part, columns], levels).to(dtype)
    return weight.reshape(shape)
