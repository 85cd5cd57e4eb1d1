"""What a packed file keeps of a codebook: a few integers per channel, from which the levels come back exactly.

A log codebook is its top half-step, n_base2, how many codes went from one sign to the small end, four flags and, where
it was searched, a scale in 1/32. A linear one is its step and the code of zero. As bytes, a channel is one row:

    log     top half-step (int16, little-endian), n_base2, then flags, free codes and scale where the layer has any
    linear  step (float64, little-endian), zero point

Flags: 1 all-zero channel, 2 the smallest negative level is zero, 4 the free codes were the negative sign's, 8 they all
went to the other sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logart.grid import Codebook, Spacing, affine_codebook, largest_half_step, mixed_codebook, mixed_half_steps
from logart.packing import unpack
from logart.rounding import dequantize
from logart.spare_codes import move_codes, zero_smallest_negative

SCALE_UNIT = 32  # a scale of i is i / 32
EMPTY, ZERO, NEGATIVE, ONE_SIDED = 1, 2, 4, 8
LOG_COLUMNS = ("top_half_step", "n_base2", "flags", "free", "scale")  # the last three where needed
LINEAR_COLUMNS = ("step", "zero_point")
_AT_ONCE = 2**18  # levels, or weights
_DTYPES: dict[str, np.dtype[Any]] = {"top_half_step": np.dtype("<i2"), "step": np.dtype("<f8")}  # the others are uint8


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
    def stored(self) -> list[str]:
        """The columns that a file keeps: flags only where one is set."""
        return [name for name, column in self.columns.items() if name != "flags" or column.any()]

    def to_bytes(self) -> Tensor:
        """[C, width] uint8, the stored columns side by side."""
        parts = [
            np.ascontiguousarray(self.columns[name].cpu().numpy().astype(_type(name))).view(np.uint8)
            for name in self.stored
        ]
        return torch.from_numpy(np.concatenate([part.reshape(self.channels, -1) for part in parts], axis=1))

    @classmethod
    def from_bytes(
        cls, data: Tensor, columns: list[str], terms: int, n_bits: int, dtype: torch.dtype = torch.float32
    ) -> CodebookSpec:
        """The inverse of `to_bytes`, checked.

        Raises:
            ValueError: columns, a width or a value that no codebook of `n_bits` bits and weights of `dtype` has.
        """
        width = row_bytes(columns)
        if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] != width:
            raise ValueError(f"expected {width} bytes a channel, got {data.dtype} {list(data.shape)}")
        raw, values, start = data.cpu().numpy(), {}, 0
        for name in columns:
            stored = _type(name)
            part = np.ascontiguousarray(raw[:, start : start + stored.itemsize]).view(stored)[:, 0]
            values[name] = torch.from_numpy(part.astype(np.float64 if name == "step" else np.int64))
            start += stored.itemsize
        if columns != list(LINEAR_COLUMNS):
            values.setdefault("flags", torch.zeros_like(values["n_base2"]))
            values = {name: values[name] for name in LOG_COLUMNS if name in values}
        spec = cls(values, terms)
        spec._check(n_bits, dtype)
        return spec

    def _check(self, n_bits: int, dtype: torch.dtype) -> None:
        c, n_levels = self.columns, 2 ** (n_bits - 1)
        if self.spacing is Spacing.LINEAR:
            wrong = {
                "step": ~(c["step"].isfinite() & (c["step"] >= 0)),
                "zero_point": c["zero_point"] >= 2**n_bits,
            }
        else:
            free = c.get("free", torch.zeros_like(c["flags"]))
            wrong = {
                "top_half_step": (c["top_half_step"] > largest_half_step(dtype)) | (c["top_half_step"] < -2200),
                "n_base2": (c["n_base2"] > n_levels) | ((c["n_base2"] == n_levels) & (c["top_half_step"] % 2 != 0)),
                "flags": (c["flags"] > 15) | ((free == 0) & (c["flags"] & (NEGATIVE | ONE_SIDED) != 0)),
                "free": (free > n_levels) | (free == 1),
                "scale": c.get("scale", torch.ones_like(free)) == 0,
            }
        for name, channels in wrong.items():
            if channels.any():
                channel = int(channels.nonzero()[0])
                raise ValueError(
                    f"channel {channel}: {name} {c[name][channel].item()} is out of range at {n_bits} bits"
                )


def row_bytes(columns: list[str]) -> int:
    """How many bytes a channel of these columns takes; ValueError where no codebook has them."""
    known = [name for name in LOG_COLUMNS if name in (*LOG_COLUMNS[:2], *columns)]
    if columns not in (known, list(LINEAR_COLUMNS)):
        raise ValueError(f"unknown columns {columns!r:.80}")
    return sum(_type(name).itemsize for name in columns)


def _type(column: str) -> np.dtype[Any]:
    return _DTYPES.get(column, np.dtype(np.uint8))


def expand(packed: Tensor, spec: CodebookSpec, shape: torch.Size, n_bits: int, dtype: torch.dtype) -> Tensor:
    """The weight [*shape] that packed codes stand for, of G codebooks that share its rows evenly.

    Some channels, and of a channel some weights, at a time: all levels, or the indices of all weights, would take far
    more memory than the weights.
    """
    codes = unpack(packed, n_bits, shape.numel()).reshape(spec.channels, -1)
    weight = torch.empty(codes.shape, dtype=dtype, device=packed.device)
    size = max(1, _AT_ONCE // max(2**n_bits, codes.shape[1]))
    for start in range(0, spec.channels, size):
        part = slice(start, start + size)
        levels = spec.select(part).codebook(n_bits, dtype).levels.to(packed.device)
        for first in range(0, codes.shape[1], _AT_ONCE):
            columns = slice(first, first + _AT_ONCE)
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
