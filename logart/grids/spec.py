"""What a packed file keeps of a codebook: a few integers per channel, from which the levels come back exactly.

A log codebook is its top half-step, n_base2, how many codes went from one sign to the small end, four flags and, where
it was searched, a scale in 1/32. A linear one is its step, as the integer of the same 64 bits as that float64, and the
code of zero. As bytes, a channel is one row (`packing.pack_rows`): of each integer how far it lies above the least one
of its column, in as many bits as that column needs. Both are a whole file's, whose layers are much alike in them.

    log     top half-step, n_base2, then flags where the file has any, free codes and scale where the layer has any
    linear  step, zero point

Flags: 1 the smallest negative level is zero, 2 the free codes were the negative sign's, 4 they all went to the other
sign, 8 all-zero channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from logart.grids.grid import Codebook, Spacing, affine_codebook, largest_half_step, mixed_codebook, mixed_half_steps
from logart.grids.packing import pack_rows, unpack, unpack_rows
from logart.grids.reassigned_codes import move_codes, zero_smallest_negative
from logart.grids.rounding import dequantize

SCALE_UNIT = 32  # a scale of i is i / 32
ZERO, NEGATIVE, ONE_SIDED, EMPTY = 1, 2, 4, 8  # the rarest last: a range of 0 to 3 takes 2 bits
LOG_COLUMNS = ("top_half_step", "n_base2", "flags", "free", "scale")  # the last three where needed
LINEAR_COLUMNS = ("step", "zero_point")
COLUMNS = (*LOG_COLUMNS, *LINEAR_COLUMNS)
Ranges: TypeAlias = Mapping[str, tuple[int, int]]  # column: its least integer, bits of what the others are above it
_CHUNK_SIZE = 2**18  # levels, weights or channels
_WHOLE_BYTES = {"top_half_step": 2, "step": 8}  # the others take one


@dataclass(frozen=True)
class CodebookSpec:
    """The integers of the codebooks of C channels.

    Attributes:
        columns: [C] each, by name: int64, or float64 for `step`. Flags are always among those of a log codebook.
        terms: how √2 is approximated (`grid.root2`); 0 for linear codebooks.
    """

    columns: dict[str, Tensor]
    terms: int = 0

    @property
    def spacing(self) -> Spacing:
        return Spacing.LINEAR if "step" in self.columns else Spacing.LOG

    @property
    def channels(self) -> int:
        """C."""
        return len(next(iter(self.columns.values())))

    def select(self, channels: slice) -> CodebookSpec:
        """The spec of some channels."""
        return CodebookSpec({name: column[channels] for name, column in self.columns.items()}, self.terms)

    @classmethod
    def of(cls, codebook: Codebook, dtype: torch.dtype = torch.float32) -> CodebookSpec:
        """The spec that gives this codebook back.

        Args:
            codebook: as made by `search.choose_codebook`, with √2 in any number of terms.
            dtype: the weights' type.

        Raises:
            ValueError: a codebook that no spec describes.
        """
        n_bits = codebook.levels.shape[1].bit_length() - 1
        if codebook.spacing is Spacing.LINEAR:
            spec = cls(_linear_columns(codebook))
            if torch.equal(spec.codebook(n_bits, dtype).levels, codebook.levels):
                return spec
        else:
            columns = _log_columns(codebook)
            for terms in (0, 2, 3, 4):
                spec = cls(columns, terms)
                if torch.equal(spec.codebook(n_bits, dtype).levels, codebook.levels):
                    return spec
        raise ValueError("these levels are none of the grids that a packed file describes")

    def codebook(self, n_bits: int, dtype: torch.dtype = torch.float32) -> Codebook:
        """The codebooks, with 2^n levels a channel."""
        c = self.columns
        if self.spacing is Spacing.LINEAR:
            return affine_codebook(c["step"], c["zero_point"], n_bits, dtype=dtype)
        flag = {bit: c["flags"] & bit != 0 for bit in (EMPTY, ZERO, NEGATIVE, ONE_SIDED)}
        book = mixed_codebook(c["top_half_step"], c["n_base2"], n_bits, empty=flag[EMPTY], terms=self.terms)
        if "scale" in c:
            book = book.scaled(c["scale"].double() / SCALE_UNIT, self.terms, dtype)
        if "free" in c:
            book = move_codes(book, c["free"], flag[NEGATIVE], flag[ONE_SIDED], terms=self.terms)
        return zero_smallest_negative(book, flag[ZERO], terms=self.terms)

    @property
    def row_bytes(self) -> int:
        """How many whole bytes the integers of a channel take unpacked; flags only where one is set."""
        names = [name for name, column in self.columns.items() if name != "flags" or column.any()]
        return sum(_WHOLE_BYTES.get(name, 1) for name in names)

    def stored(self, ranges: Ranges) -> list[str]:
        """The columns that a file of these ranges keeps."""
        return [name for name in ranges if name in self.columns]

    def to_bytes(self, ranges: Ranges) -> Tensor:
        """The channels' rows; the ranges are those of several specs, this one among them."""
        names = self.stored(ranges)
        return pack_rows([self._integers(name) for name in names], [ranges[name] for name in names])

    @classmethod
    def from_bytes(
        cls,
        data: Tensor,
        channels: int,
        columns: list[str],
        ranges: Ranges,
        terms: int,
        n_bits: int,
        dtype: torch.dtype = torch.float32,
    ) -> CodebookSpec:
        """The inverse of `to_bytes`, checked.

        Args:
            data: C rows of as many bits as `row_bits` says, in whole bytes.
            channels: C.
            columns: the stored ones.
            ranges: of all the file's columns.
            terms, n_bits, dtype: the layer's.

        Raises:
            ValueError: a value that no codebook of `n_bits` bits and weights of `dtype` has.
        """
        values = dict(zip(columns, unpack_rows(data, [ranges[name] for name in columns], channels), strict=True))
        if "step" in values:
            values["step"] = values["step"].view(torch.float64)
        else:
            values.setdefault("flags", torch.zeros(1, dtype=torch.int64).expand(channels))
            values = {name: values[name] for name in LOG_COLUMNS if name in values}
        spec = cls(values, terms)
        for start in range(0, channels, _CHUNK_SIZE):
            spec.select(slice(start, start + _CHUNK_SIZE))._check(start, n_bits, dtype)
        return spec

    def _integers(self, name: str) -> Tensor:
        column = self.columns[name]
        return column.view(torch.int64) if name == "step" else column

    def _check(self, first: int, n_bits: int, dtype: torch.dtype) -> None:
        c, n_levels = self.columns, 2 ** (n_bits - 1)
        if self.spacing is Spacing.LINEAR:
            wrong = {
                "step": ~(c["step"].isfinite() & (c["step"] >= 0)),
                "zero_point": (c["zero_point"] < 0) | (c["zero_point"] >= 2**n_bits),
            }
        else:
            free, n_base2 = c.get("free", torch.zeros_like(c["flags"])), c["n_base2"]
            scale = c.get("scale", torch.ones_like(free))
            odd = c["top_half_step"] % 2 != 0
            wrong = {
                "top_half_step": (c["top_half_step"] > largest_half_step(dtype)) | (c["top_half_step"] < -2200),
                "n_base2": (n_base2 < 0) | (n_base2 > n_levels) | ((n_base2 == n_levels) & odd),
                "flags": (c["flags"] & ~15 != 0) | ((free == 0) & (c["flags"] & (NEGATIVE | ONE_SIDED) != 0)),
                "free": (free < 0) | (free > n_levels) | (free == 1),
                "scale": (scale < 1) | (scale > 255),
            }
        for name, channels in wrong.items():
            if channels.any():
                channel = int(channels.nonzero()[0])
                raise ValueError(
                    f"channel {first + channel}: {name} {c[name][channel].item()} is out of range at {n_bits} bits"
                )


def column_ranges(specs: Iterable[CodebookSpec]) -> Ranges:
    """The ranges of all columns that some specs have, without flags where none is set."""
    ranges, specs = {}, list(specs)
    for name in COLUMNS:
        columns = [spec._integers(name) for spec in specs if name in spec.columns]
        if columns and (name != "flags" or any(column.any() for column in columns)):
            least, most = min(int(c.min()) for c in columns), max(int(c.max()) for c in columns)
            ranges[name] = least, (most - least).bit_length()
    return ranges


def read_ranges(value: Any) -> Ranges:
    """Ranges as JSON says them; ValueError where no columns have them."""
    if not isinstance(value, dict) or not set(value) <= set(COLUMNS):
        raise ValueError(f"columns {value!r:.80}")
    for name, numbers in value.items():
        if not isinstance(numbers, list) or [type(number) for number in numbers] != [int, int]:
            raise ValueError(f"{name} {numbers!r:.40}")
        if not (abs(numbers[0]) < 2**63 and 0 <= numbers[1] < 64):
            raise ValueError(f"{name} {numbers!r:.40} is out of range")
    return {name: tuple(value[name]) for name in COLUMNS if name in value}


def row_bits(columns: list[str], ranges: Ranges) -> int:
    """How many bits a channel of these columns takes; ValueError where no codebook has them."""
    known = [name for name in LOG_COLUMNS if name in (*LOG_COLUMNS[:2], *columns)]
    if columns not in (known, list(LINEAR_COLUMNS)) or not set(columns) <= set(ranges):
        raise ValueError(f"unknown columns {columns!r:.80}")
    return sum(ranges[name][1] for name in columns)


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


def _linear_columns(codebook: Codebook) -> dict[str, Tensor]:
    """Zero falls on a level; its neighbour is a step away."""
    levels = codebook.levels
    point = (levels == 0).long().argmax(1)
    inner = torch.where(point < levels.shape[1] - 1, point + 1, point - 1)
    return {"step": levels.gather(1, inner[:, None])[:, 0].abs(), "zero_point": point}


def _log_columns(codebook: Codebook) -> dict[str, Tensor]:
    """The longer sign keeps its top; the shorter one's top says how many codes it gave away."""
    half_steps, signs, n_base2 = codebook.half_steps, codebook.signs, codebook.n_base2
    if half_steps is None or signs is None or n_base2 is None:
        raise ValueError("a log codebook without half-steps")
    n_levels = half_steps.shape[1] // 2
    lowest = torch.iinfo(torch.int64).min
    tops = {sign: half_steps.where(signs == sign, lowest).amax(1) for sign in (-1, 1)}
    empty = (signs == 0).all(1)
    top = torch.where(empty, 0, torch.maximum(tops[-1], tops[1]))
    base = mixed_half_steps(top, n_base2, n_levels)
    negative = tops[-1] < tops[1]
    shorter = torch.where(negative, tops[-1], tops[1])
    free = torch.where(empty, 0, (base > shorter[:, None]).sum(1))
    positives = (signs > 0).sum(1)
    # All free codes are on the longer side; it lacks one where the shorter has a level left, as a weight of 0 needs.
    one_sided = (free > 0) & (positives == n_levels + torch.where(negative, free, -free))
    from_moving = (free % 2 == 1) & ~one_sided  # an odd number of free codes leaves a zero by itself
    zero = (signs == 0).any(1) & ~empty & ~from_moving
    flags = EMPTY * empty + ZERO * zero + (free > 0) * (NEGATIVE * negative + ONE_SIDED * one_sided)
    columns = {"top_half_step": top, "n_base2": n_base2, "flags": flags.long()}
    if free.any():
        columns["free"] = free
    if codebook.scale is not None:
        columns["scale"] = (codebook.scale * SCALE_UNIT).round().long()
    return columns
