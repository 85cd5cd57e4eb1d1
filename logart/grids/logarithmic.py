"""The logarithmic grids: powers of 2 (`log_2`), of √2 (`log_sqrt2`), and both in one channel (`dynamic`).

Magnitudes are counted in *half-steps*: the integer h stands for 2^(h/2). Even half-steps are powers of two, odd ones
carry a factor √2, exact or a sum of powers of two (`root2`). Of the N = 2^(n-1) magnitudes of one sign, the k =
`n_base2` smallest are base 2 and the others base √2: k = N is `log_2`, k = 0 `log_sqrt2`, and `dynamic` chooses k for
each channel. With a *wide gap* the smallest magnitude may lie one or two half-steps lower than that: of few levels the
best for bell-shaped weights are wider apart around zero than anywhere else (for four of them the largest and a third
of it, Max 1960).

A codebook is its top half-step and k; where asked for, a scale, how far the smallest magnitude was lowered, codes that
were reassigned, and flags.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from logart.grids.grid import (
    NO_OPTIONS,
    SCALE_UNIT,
    Codebook,
    CodebookSpec,
    Grid,
    GridOptions,
    ScaleSearch,
    Shifts,
    Spacing,
    check_bits,
)
from logart.grids.reassigned_codes import move_codes, unused_codes, zero_smallest_negative
from logart.grids.root2 import ADD_SHIFTS, ExactRoot2Error, root2

# What scale search multiplies the levels with, 3/8 to 5/4 in steps of 1/32; below 1 the largest weights are clipped,
# for finer small levels. 1 comes last, which on equal errors wins.
SCALES = (*(i / SCALE_UNIT for i in range(12, 41) if i != SCALE_UNIT), 1.0)
HALF_STEPS = (-4, -3, -2, -1, 1, 0)
LOWERED = (2, 1, 0)  # half-steps that a wide gap adds, the largest first: on equal errors the fewest win
ZERO, NEGATIVE, ONE_SIDED, EMPTY = 1, 2, 4, 8


@dataclass(frozen=True)
class LogGrid(Grid):
    """Magnitudes of half-steps.

    Columns: `top_half_step`, of the largest magnitude; `n_base2`; `lowered`, how many half-steps the smallest lies
    lower, and with it the codes that `reassigned_codes` moves below it; `scale`, over `SCALE_UNIT`; `unused_codes`, how
    many codes went from one sign to the small end; `flags`: 1 the smallest negative level is zero, 2 the unused codes
    were the negative sign's, 4 they all went to the other sign, 8 all-zero channel.

    Attributes:
        base2_share: which share of the magnitudes is base 2; None chooses.
    """

    base2_share: int | None = None

    def candidates(self, w: Tensor, n_bits: int, options: GridOptions) -> Iterator[Codebook]:
        absmax, search = w.abs().amax(1), options.scale_search
        mixes = None if self.base2_share is None else (self.base2_share * 2 ** (n_bits - 1),)
        lowered = self._lowered(options)
        columns = partial(log_candidates, absmax, n_bits, dtype=w.dtype, scale_search=search, lowered=lowered)
        every = columns(mixes)
        if options.asymmetric and mixes is None:
            # Below equal levels, k = 0 spaces the codes that move by √2, k = 1 by 2.
            every = chain(columns((0,)), every)
        for each in every:
            book = self.codebook(each, n_bits, options.terms, w.dtype)
            if options.asymmetric or options.zero_code:
                book = reassigned(book, w, asymmetric=options.asymmetric, zero_code=options.zero_code)
            yield book

    def n_candidates(self, n_bits: int, options: GridOptions = NO_OPTIONS) -> int:
        mixes = 2 ** (n_bits - 2) + 1 if self.base2_share is None else 1
        scales = {ScaleSearch.NONE: 1, ScaleSearch.GRID: len(SCALES), ScaleSearch.HALF_STEP: len(HALF_STEPS)}
        return mixes * scales[options.scale_search] * len(self._lowered(options))

    def _lowered(self, options: GridOptions) -> tuple[int, ...]:
        if not options.wide_gap:
            return (0,)
        return tuple(step for step in LOWERED if self.base2_share != 1 or step % 2 == 0)

    def codebook(self, columns: Mapping[str, Tensor], n_bits: int, terms: int, dtype: torch.dtype) -> Codebook:
        half_steps, signs = half_steps_and_signs(columns, n_bits)
        levels = log_levels(half_steps, signs, actual_scale(columns, terms, dtype), terms)
        return Codebook(levels, CodebookSpec(self, dict(columns), terms))

    def wrong(self, columns: Mapping[str, Tensor], n_bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
        top, n_base2, none = columns["top_half_step"], columns["n_base2"], torch.zeros_like(columns["n_base2"])
        flags, unused = columns.get("flags", none), columns.get("unused_codes", none)
        n_levels, scale, lowered = 2 ** (n_bits - 1), columns.get("scale", none + 1), columns.get("lowered", none)
        return {
            "top_half_step": (top > largest_half_step(dtype)) | (top < -2200),
            "n_base2": (n_base2 < 0) | (n_base2 > n_levels) | ((n_base2 == n_levels) & (top % 2 != 0)),
            "lowered": ~torch.isin(lowered, lowered.new_tensor(self._lowered(GridOptions(wide_gap=True)))),
            "flags": (flags & ~15 != 0) | ((unused == 0) & (flags & (NEGATIVE | ONE_SIDED) != 0)),
            "unused_codes": (unused < 0) | (unused > n_levels) | (unused == 1),
            "scale": (scale < 1) | (scale > 255),
        }

    def shifts(self, spec: CodebookSpec, n_bits: int, dtype: torch.dtype) -> Shifts:
        half_steps, signs = half_steps_and_signs(spec.columns, n_bits)
        odd = (half_steps % 2 != 0) & (signs != 0)
        if spec.terms == 0 and odd.any():
            raise ExactRoot2Error("an exact √2 is no sum of a few shifts")
        scale, numerators = actual_scale(spec.columns, spec.terms, dtype), spec.columns.get("scale")
        if numerators is not None and scale is not None and not torch.equal(scale * SCALE_UNIT, numerators.double()):
            raise ValueError("a scale takes the largest level out of its type's range")
        tail = torch.tensor(ADD_SHIFTS[spec.terms] if odd.any() else (), dtype=torch.int64)
        return Shifts(signs, torch.where(signs != 0, half_steps // 2, 0), odd[..., None] * tail, numerators)

    def units(self, spec: CodebookSpec, n_bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        unscaled = log_levels(*half_steps_and_signs(spec.columns, n_bits), None, spec.terms)
        exponent = spec.columns["top_half_step"].div(2, rounding_mode="floor").int().numpy()
        factor = torch.from_numpy(np.ldexp(1.0, exponent))
        units = torch.from_numpy(np.ldexp(unscaled.numpy(), -exponent[:, None]))
        scale = actual_scale(spec.columns, spec.terms, dtype)
        return units, factor if scale is None else factor * scale


def log_columns(absmax: Tensor, n_bits: int, n_base2: int | Tensor, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """What makes the logarithmic codebook of DESIGN section 2: k = n_base2 base-2 levels below, N - k base-√2 on top.

    Args:
        absmax: [C], largest magnitude of each channel's weights; 0 gives the codebook {0}.
        n_bits: 2 to 8.
        n_base2: k in 0..N, one for all channels or an integer tensor [C].
        dtype: the weights' type; the top level is lowered where it would overflow that type.

    Raises:
        ValueError: a bit width or n_base2 out of range, or an absmax that is not finite.
    """
    check_bits(n_bits)
    n_levels = 2 ** (n_bits - 1)
    if not torch.isfinite(absmax).all():
        raise ValueError("absmax must be finite")
    k = torch.as_tensor(n_base2, device=absmax.device).expand(absmax.shape).long()
    if k.numel() and not (0 <= int(k.min()) and int(k.max()) <= n_levels):
        raise ValueError(f"n_base2 must be 0 to {n_levels} at {n_bits} bits, got {int(k.min())} to {int(k.max())}")
    top_exponent, top_half_step = _top_levels(absmax.double(), dtype)
    empty = absmax == 0
    top = torch.where(k == n_levels, 2 * top_exponent, top_half_step).where(~empty, 0)
    return {"top_half_step": top, "n_base2": k, "flags": EMPTY * empty.long()}


def log_codebook(
    absmax: Tensor, n_bits: int, n_base2: int | Tensor, *, terms: int = 0, dtype: torch.dtype = torch.float32
) -> Codebook:
    """The codebook of `log_columns`: both signs of N magnitudes, no zero, so exactly 2^n levels."""
    return DYNAMIC.codebook(log_columns(absmax, n_bits, n_base2, dtype=dtype), n_bits, terms, dtype)


def log_candidates(
    absmax: Tensor,
    n_bits: int,
    n_base2: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    scale_search: ScaleSearch = ScaleSearch.NONE,
    lowered: Sequence[int] = (0,),
) -> Iterator[dict[str, Tensor]]:
    """The columns of every channel for each n_base2, wide gap and scale, one after the other; n_base2 ascends.

    Args:
        absmax: [C].
        n_bits, dtype: as `log_columns`.
        n_base2: the mixes; default: every one that has levels of its own, see `distinct_n_base2`.
        scale_search: which factors are tried; 1 always is.
        lowered: how far the smallest magnitude lies lower, in half-steps.
    """
    steps = HALF_STEPS if scale_search is ScaleSearch.HALF_STEP else (0,)
    largest = torch.finfo(absmax.dtype).max
    tops = [(absmax.double() * 2 ** (step / 2)).clamp(max=largest) if step else absmax for step in steps]
    each: list[Sequence[int] | Tensor]
    each = [distinct_n_base2(top, n_bits, dtype) if n_base2 is None else n_base2 for top in tops]
    for mixes in zip(*each, strict=True):
        for top, k in zip(tops, mixes, strict=True):
            plain = log_columns(top, n_bits, k, dtype=dtype)
            scales = SCALES if scale_search is ScaleSearch.GRID else ()
            for steps_lower in lowered:
                lower = {"lowered": torch.full_like(plain["n_base2"], steps_lower)} if len(lowered) > 1 else {}
                columns = {**plain, **lower}
                yield from [scaled(columns, scale) for scale in scales] or [columns]


def scaled(columns: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The same levels times a factor, a whole number of 1/`SCALE_UNIT`."""
    return {**columns, "scale": torch.full_like(columns["n_base2"], round(scale * SCALE_UNIT))}


def actual_scale(columns: Mapping[str, Tensor], terms: int, dtype: torch.dtype) -> Tensor | None:
    """The factor [C] float64 of each channel's levels, no further than `dtype` holds; None where nothing is scaled."""
    if "scale" not in columns:
        return None
    top = columns["top_half_step"][:, None]
    largest = log_levels(top, torch.ones_like(top), None, terms)[:, 0].clamp(min=1.0)
    return (columns["scale"].double() / SCALE_UNIT).minimum(torch.finfo(dtype).max / largest)


def reassigned(book: Codebook, w: Tensor, *, asymmetric: bool, zero_code: bool) -> Codebook:
    """The same number of codes of a symmetric log codebook, some on other levels; see `reassigned_codes`.

    Args:
        w: [C, K]; its extremes say which codes the shorter sign never reaches by rounding to nearest.
    """
    columns = dict(book.spec.columns)
    flags = columns["flags"]
    if asymmetric:
        unused, negative, one_sided = unused_codes(book.borders, w, empty=flags & EMPTY != 0)
        columns["unused_codes"] = unused
        flags = flags + (unused > 0) * (NEGATIVE * negative + ONE_SIDED * one_sided)
    if zero_code:
        _, signs = half_steps_and_signs({**columns, "flags": flags}, book.n_bits)
        flags = flags + ZERO * (signs != 0).all(1)
    return replace(book.spec, columns={**columns, "flags": flags}).codebook(book.n_bits, w.dtype)


def half_steps_and_signs(columns: Mapping[str, Tensor], n_bits: int) -> tuple[Tensor, Tensor]:
    """Of each level [C, 2^n] int64, in ascending order, its half-step and its sign: -1, 0 or 1."""
    top, k, n_levels = columns["top_half_step"], columns["n_base2"], 2 ** (n_bits - 1)
    magnitudes = mixed_half_steps(top, k, n_levels)
    if "lowered" in columns:
        magnitudes = torch.cat([magnitudes[:, :1] - columns["lowered"][:, None], magnitudes[:, 1:]], dim=1)
    half_steps = torch.cat([magnitudes.flip(1), magnitudes], dim=1)
    signs = torch.ones_like(half_steps)
    signs[:, :n_levels] = -1
    flags = columns.get("flags", torch.zeros_like(k))
    flag = {bit: flags & bit != 0 for bit in (EMPTY, ZERO, NEGATIVE, ONE_SIDED)}
    if "unused_codes" in columns:
        moved = columns["unused_codes"], flag[NEGATIVE], flag[ONE_SIDED]
        half_steps, signs = move_codes(half_steps, signs, k, *moved)
    if flag[ZERO].any():
        signs = zero_smallest_negative(half_steps, signs, flag[ZERO])
    if "unused_codes" in columns or flag[ZERO].any():
        order = (signs * (half_steps - half_steps.amin(1, keepdim=True) + 1)).argsort(dim=1, stable=True)
        half_steps, signs = half_steps.gather(1, order), signs.gather(1, order)
    return half_steps, signs * ~flag[EMPTY][:, None]


def mixed_half_steps(top: Tensor, n_base2: Tensor, n_levels: int) -> Tensor:
    """Half-steps [C, N] of the N magnitudes, ascending.

    Args:
        top: [C] int64, the half-step of the largest magnitude; even where all magnitudes are base 2.
        n_base2: [C] int64, 0..N.
    """
    top, k = top[:, None], n_base2[:, None]
    exponent = torch.div(top - (n_levels - k), 2, rounding_mode="floor")
    position = torch.arange(n_levels, device=top.device)[None]
    base2 = 2 * (exponent - (k - 1 - position))
    sqrt2 = top - (n_levels - 1 - position)
    return torch.where(position < k, base2, sqrt2)


def log_levels(half_steps: Tensor, signs: Tensor, scale: Tensor | None, terms: int) -> Tensor:
    """Levels [C, L] float64 from half-steps and signs [C, L] and scales [C]; exact where the half-step is even."""
    odd = half_steps % 2
    factor = torch.tensor([1.0, root2(terms)], dtype=torch.float64)[odd.cpu()]
    # NumPy's ldexp is exact everywhere; a GPU's may go through a power function that rounds.
    magnitudes = torch.from_numpy(np.ldexp(factor.numpy(), ((half_steps - odd) // 2).cpu().int().numpy()))
    levels = magnitudes.to(half_steps.device) * signs
    return (levels if scale is None else levels * scale[:, None]) + 0.0  # + 0.0 turns -0 into 0


def distinct_n_base2(absmax: Tensor, n_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mixes that have levels of their own, about half of all; of those with equal levels the largest k.

    Where h + k is odd, h the channel's top half-step, the lowest √2-spaced level lies where a base-2 one would: k + 1
    has the same levels.

    Args:
        absmax: [C], of weights of `dtype`.

    Returns:
        [N / 2 + 1, C] int64, ascending along the first dimension up to N.
    """
    n_levels = 2 ** (n_bits - 1)
    _, top_half_step = _top_levels(absmax.double(), dtype)
    even = torch.arange(0, n_levels + 1, 2, device=absmax.device)
    return (even[:, None] + top_half_step % 2).clamp(max=n_levels)


def _top_levels(absmax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """floor(log2 a + 1/2) and floor(2·log2 a + 1/2), each [C] int64, no larger than `dtype` can hold.

    From the mantissa, not from a logarithm: log2 rounds, and a weight one ulp below a border would cross it. The
    floats 2**-0.25 and 2**-0.75 lie just below the true borders, 2**-0.5 just above its own, hence <= and <.
    """
    mantissa, exponent = torch.frexp(absmax)  # a = mantissa · 2^exponent with mantissa in [1/2, 1)
    exponent = exponent.long()
    top_exponent = exponent - (mantissa < 2**-0.5).long()
    top_half_step = 2 * exponent - (mantissa <= 2**-0.25).long() - (mantissa <= 2**-0.75).long()
    largest = largest_half_step(dtype)
    return top_exponent.clamp(max=largest // 2), top_half_step.clamp(max=largest)


def largest_half_step(dtype: torch.dtype) -> int:
    """Of the largest magnitude that a type holds: an odd one, 2^(h/2) with h = 2·exponent + 1."""
    return 2 * (math.frexp(torch.finfo(dtype).max)[1] - 1) + 1


_COLUMNS = {
    "top_half_step": None, "n_base2": None, "flags": 0, "unused_codes": 0, "scale": SCALE_UNIT, "lowered": 0,
}  # fmt: skip
_OPTIONS = frozenset(("scale_search", "asymmetric", "zero_code", "wide_gap"))
_ROOT2 = _OPTIONS | {"terms"}
LOG_2 = LogGrid("log_2", "base 2", Spacing.LOG, _COLUMNS, options=_OPTIONS, base2_share=1)
LOG_SQRT2 = LogGrid("log_sqrt2", "base √2", Spacing.LOG, _COLUMNS, options=_ROOT2, base2_share=0)
DYNAMIC = LogGrid("dynamic", "dynamic", Spacing.LOG, _COLUMNS, options=_ROOT2)


def base_mix(spec: CodebookSpec) -> dict[int, int]:
    """How many codebooks have each n_base2; empty on grids without."""
    n_base2 = spec.columns.get("n_base2")
    return {} if n_base2 is None else dict(sorted(Counter(n_base2.tolist()).items()))
