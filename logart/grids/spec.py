"""What a packed file keeps of a codebook: a few integers per channel, from which the levels come back exactly.

    log     top_half_step, n_base2; where any channel has them: flags, unused_codes (how many codes went from one sign
            to the small end) and scale (in 1/32)
    linear  step (float64), zero_point (the code of zero)

Flags: 1 the smallest negative level is zero, 2 the unused codes were the negative sign's, 4 they all went to the other
sign, 8 all-zero channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logart.grids.grid import Codebook, Spacing, affine_codebook, largest_half_step, mixed_codebook, mixed_half_steps
from logart.grids.packing import unpack
from logart.grids.reassigned_codes import move_codes, zero_smallest_negative
from logart.grids.rounding import dequantize

SCALE_UNIT = 32  # a scale of i is i / 32
ZERO, NEGATIVE, ONE_SIDED, EMPTY = 1, 2, 4, 8
LOG_COLUMNS = ("top_half_step", "n_base2", "flags", "unused_codes", "scale")  # the last three where needed
LINEAR_COLUMNS = ("step", "zero_point")
_CHUNK_SIZE = 2**18  # levels, weights or channels


@dataclass(frozen=True)
class CodebookSpec:
    """The integers of the codebooks of C channels.

    Attributes:
        columns: [C] each, by name: int64, or float64 for `step`.
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
        flags = c.get("flags", torch.zeros_like(c["n_base2"]))
        flag = {bit: flags & bit != 0 for bit in (EMPTY, ZERO, NEGATIVE, ONE_SIDED)}
        book = mixed_codebook(c["top_half_step"], c["n_base2"], n_bits, empty=flag[EMPTY], terms=self.terms)
        if "scale" in c:
            book = book.scaled(c["scale"].double() / SCALE_UNIT, self.terms, dtype)
        if "unused_codes" in c:
            book = move_codes(book, c["unused_codes"], flag[NEGATIVE], flag[ONE_SIDED], terms=self.terms)
        return zero_smallest_negative(book, flag[ZERO], terms=self.terms)

    @classmethod
    def checked(
        cls, columns: dict[str, Tensor], terms: int, shape: torch.Size, n_bits: int, dtype: torch.dtype
    ) -> CodebookSpec:
        """The spec of columns that a file claims; ValueError where no layer of such weights [*shape] has them."""
        names = [name for name in (*LOG_COLUMNS, *LINEAR_COLUMNS) if name in columns]
        of_log = [name for name in LOG_COLUMNS if name in columns or name in LOG_COLUMNS[:2]]
        if len(names) < len(columns) or names not in (of_log, list(LINEAR_COLUMNS)):
            raise ValueError(f"no grid has the integers {', '.join(columns):.80}")
        spec = cls({name: columns[name] for name in names}, terms)
        for name, column in spec.columns.items():
            if column.ndim != 1 or len(column) != spec.channels or column.is_floating_point() != (name == "step"):
                raise ValueError(f"{name} is {list(column.shape)} {column.dtype}")
        if not spec.channels or shape[0] % spec.channels:
            raise ValueError(f"{spec.channels} codebooks for {shape[0]} rows")
        for start in range(0, spec.channels, _CHUNK_SIZE):
            spec.select(slice(start, start + _CHUNK_SIZE))._check(start, n_bits, dtype)
        return spec

    def _check(self, first: int, n_bits: int, dtype: torch.dtype) -> None:
        c, n_levels = self.columns, 2 ** (n_bits - 1)
        if self.spacing is Spacing.LINEAR:
            wrong = {
                "step": ~(c["step"].isfinite() & (c["step"] >= 0)),
                "zero_point": (c["zero_point"] < 0) | (c["zero_point"] >= 2**n_bits),
            }
        else:
            n_base2, none = c["n_base2"], torch.zeros_like(c["n_base2"])
            flags, unused, scale = c.get("flags", none), c.get("unused_codes", none), c.get("scale", none + 1)
            odd = c["top_half_step"] % 2 != 0
            wrong = {
                "top_half_step": (c["top_half_step"] > largest_half_step(dtype)) | (c["top_half_step"] < -2200),
                "n_base2": (n_base2 < 0) | (n_base2 > n_levels) | ((n_base2 == n_levels) & odd),
                "flags": (flags & ~15 != 0) | ((unused == 0) & (flags & (NEGATIVE | ONE_SIDED) != 0)),
                "unused_codes": (unused < 0) | (unused > n_levels) | (unused == 1),
                "scale": (scale < 1) | (scale > 255),
            }
        for name, channels in wrong.items():
            if channels.any():
                channel = int(channels.nonzero()[0])
                raise ValueError(
                    f"channel {first + channel}: {name} {c[name][channel].item()} is out of range at {n_bits} bits"
                )


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
    unused = torch.where(empty, 0, (base > shorter[:, None]).sum(1))
    positives = (signs > 0).sum(1)
    # All unused codes are on the longer side; it lacks one where the shorter has a level left, as a weight of 0 needs.
    one_sided = (unused > 0) & (positives == n_levels + torch.where(negative, unused, -unused))
    from_moving = (unused % 2 == 1) & ~one_sided  # an odd number of unused codes leaves a zero by itself
    zero = (signs == 0).any(1) & ~empty & ~from_moving
    flags = EMPTY * empty + ZERO * zero + (unused > 0) * (NEGATIVE * negative + ONE_SIDED * one_sided)
    columns = {"top_half_step": top, "n_base2": n_base2}
    if flags.any():
        columns["flags"] = flags.long()
    if unused.any():
        columns["unused_codes"] = unused
    if codebook.scale is not None:
        columns["scale"] = (codebook.scale * SCALE_UNIT).round().long()
    return columns
