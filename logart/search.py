"""Choosing a codebook per channel: candidates × an error function, the least error wins (DESIGN section 3).

An error function takes δ = q - w [G, M], the rounding error of every weight under one candidate, and returns one
error per codebook, [G] float64. The measures differ only in how they weigh δ:

* tensor-wise (TW): Σ δ²;
* layer-wise (LW): the error of the layer's output, ‖X w - X̂ q‖²;
* block-wise (BW): the error of the block's output, to first order in δ.

LW and BW are quadratic in δ. They are read off second moments that are accumulated once, while the search images stream
by (`OutputMoments`), or off the layer's own outputs X̂δ (`OutputResidual`, `BlockSensitivity`), whichever is cheaper; no
candidate needs a forward pass of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from logart.grid import Codebook, ScaleMethod, linear_codebook, log_codebook, minmax_codebook
from logart.rounding import count_below, dequantize, nearest
from logart.spare_codes import spend_free_codes

ErrorFunction = Callable[[Tensor], Tensor]


# What scale search multiplies the levels with, 3/8 to 5/4 in steps of 1/32; below 1 the largest weights are clipped,
# for finer small levels. 1 comes last, which on equal errors wins.
SCALES = (*(i / 32 for i in range(12, 41) if i != 32), 1.0)
HALF_STEPS = (-4, -3, -2, -1, 1, 0)


class ScaleSearch(str, Enum):
    """Whether levels get a factor per channel: any of `SCALES`, or only whole half-steps 2^(j/2), j of `HALF_STEPS`."""

    NONE = "none"
    GRID = "grid"
    HALF_STEP = "half_step"


def log_candidates(
    absmax: Tensor,
    n_bits: int,
    n_base2: Sequence[int] | None = None,
    *,
    terms: int = 0,
    dtype: torch.dtype = torch.float32,
    scale_search: ScaleSearch = ScaleSearch.NONE,
) -> list[Codebook]:
    """The codebooks of every channel for each n_base2 (default: all, 0..N) and each scale; n_base2 ascends.

    Args:
        absmax: [C].
        n_bits, terms, dtype: as `log_codebook`.
        scale_search: which factors are tried; 1 always is.
    """
    steps = HALF_STEPS if scale_search is ScaleSearch.HALF_STEP else (0,)
    books = []
    for k in range(2 ** (n_bits - 1) + 1) if n_base2 is None else n_base2:
        for step in steps:
            top = (absmax.double() * 2 ** (step / 2)).clamp(max=torch.finfo(absmax.dtype).max)
            book = log_codebook(top if step else absmax, n_bits, k, terms=terms, dtype=dtype)
            scales = SCALES if scale_search is ScaleSearch.GRID else ()
            books += [book.scaled(scale, terms, dtype) for scale in scales] or [book]
    return books


def n_candidates(method: ScaleMethod, n_bits: int, scale_search: ScaleSearch) -> int:
    """How many codebooks a search looks at."""
    mixes = 2 ** (n_bits - 1) + 1 if method is ScaleMethod.DYNAMIC else 1
    scales = {ScaleSearch.NONE: 1, ScaleSearch.GRID: len(SCALES), ScaleSearch.HALF_STEP: len(HALF_STEPS)}
    return mixes * scales[scale_search]


def shrunk_candidates(w: Tensor, n_bits: int) -> list[Codebook]:
    """Linear codebooks over 21 %, 22 %, … 100 % of the range of w [C, K]."""
    low, high = w.double().amin(1), w.double().amax(1)
    return [linear_codebook(low * p / 100, high * p / 100, n_bits, dtype=w.dtype) for p in range(21, 101)]


def squared_error(delta: Tensor) -> Tensor:
    """TW: Σ δ² per codebook, [G, M] -> [G] float64."""
    return delta.double().square().sum(1)


def power_error(delta: Tensor) -> Tensor:
    """Σ |δ|^2.4 per codebook, the measure of `linear_mse`, [G, M] -> [G] float64."""
    return delta.double().abs().pow(2.4).sum(1)


def weight_error(w: Tensor, codebook: Codebook) -> Tensor:
    """Σ (w - q)² per channel of w [C, K] rounded to nearest, [C] float64."""
    return squared_error(rounding_error(w, codebook))


def rounding_error(w: Tensor, codebook: Codebook) -> Tensor:
    """δ = q - w [C, K] float64 of rounding w to nearest."""
    return dequantize(nearest(w, codebook), codebook.levels) - w.double()


def rounding_errors(w: Tensor, candidates: Sequence[Codebook]) -> Iterator[Tensor]:
    """`rounding_error` of every candidate in turn, for one search through the borders instead of one a candidate.

    All borders of all candidates cut a row into intervals; within one, every candidate has one code. So each weight's
    interval is found once, and a candidate only looks up its level there. With more intervals than weights that
    would cost more than it saves.
    """
    borders = [candidate.borders for candidate in candidates]
    if sum(b.shape[1] for b in borders) >= w.shape[1]:
        yield from (rounding_error(w, candidate) for candidate in candidates)
        return
    every = torch.cat(borders, dim=1).sort(dim=1).values
    interval = count_below(every, w)
    starts = torch.cat([torch.full_like(every[:, :1], -torch.inf), every], dim=1)
    for candidate, own in zip(candidates, borders, strict=True):
        codes = torch.searchsorted(own.contiguous(), starts, right=True)
        yield candidate.levels.gather(1, codes).gather(1, interval).sub_(w)


def least_error(w: Tensor, candidates: Sequence[Codebook], error: ErrorFunction) -> tuple[Codebook, Tensor]:
    """The best candidate of every channel.

    Args:
        w: [G, M] weights, one row per codebook.
        candidates: codebooks of G channels each; on equal error the later one wins.
        error: from δ [G, M] to [G].

    Returns:
        The chosen codebooks, and all errors [candidates, G] float64.
    """
    errors = torch.stack([error(delta) for delta in rounding_errors(w, candidates)])
    chosen = len(candidates) - 1 - errors.flip(0).argmin(0)
    return _pick(candidates, chosen), errors


def _pick(candidates: Sequence[Codebook], chosen: Tensor) -> Codebook:
    """Row g of the result is row g of candidates[chosen[g]]; all have the same tensors."""
    rows = torch.arange(len(chosen), device=chosen.device)
    each = {field.name: [getattr(c, field.name) for c in candidates] for field in fields(Codebook)}
    picked: dict[str, Any] = {
        name: torch.stack(values)[chosen, rows] if isinstance(values[0], Tensor) else values[0]
        for name, values in each.items()
    }
    return Codebook(**picked)


def mse_codebook(w: Tensor, n_bits: int) -> Codebook:
    """`linear_mse`: the linear codebook of w [C, K] whose range leaves the least Σ|w - q|^2.4."""
    return least_error(w, shrunk_candidates(w, n_bits), power_error)[0]


def choose_codebook(
    w: Tensor,
    method: ScaleMethod,
    n_bits: int,
    *,
    terms: int = 0,
    error: ErrorFunction = squared_error,
    scale_search: ScaleSearch = ScaleSearch.NONE,
    asymmetric: bool = False,
    zero_code: bool = False,
) -> Codebook:
    """The codebook of each row of w [G, M] by the grid asked for.

    `error` decides where there is more than one candidate: among the mixes of the dynamic grid, and among scales. The
    options after it act on log grids; see `log_candidates` and `spend_free_codes`.
    """
    if method is ScaleMethod.LINEAR_MINMAX:
        return minmax_codebook(w, n_bits)
    if method is ScaleMethod.LINEAR_MSE:
        return mse_codebook(w, n_bits)
    mixes = {ScaleMethod.LOG_2: (2 ** (n_bits - 1),), ScaleMethod.LOG_SQRT2: (0,)}.get(method)
    candidates = log_candidates(w.abs().amax(1), n_bits, mixes, terms=terms, dtype=w.dtype, scale_search=scale_search)
    if asymmetric or zero_code:
        candidates = [
            spend_free_codes(c, w, asymmetric=asymmetric, zero_code=zero_code, terms=terms) for c in candidates
        ]
    return candidates[0] if len(candidates) == 1 else least_error(w, candidates, error)[0]


@dataclass
class OutputMoments:
    """What LW and compensated rounding need to know of the images: moments of a layer's input and its output's error.

    With r = Xw - X̂w, the output error that the quantized prefix alone leaves, ‖Xw - X̂q‖² = ‖r‖² - 2 δ·X̂ᵀr + δᵀX̂ᵀX̂δ.
    Written in δ and r, both small, nothing cancels: the products may be taken in float32 and only summed in float64.

    Attributes:
        gram: [groups, K, K] float64, X̂ᵀX̂ of each group of a grouped convolution.
        cross: [C, K] float64, X̂ᵀr of each output channel.
        energy: [C] float64, ‖r‖².
        input_sum: [groups, K] float64, the sum of X̂'s rows.
        residual_sum: [C] float64, the sum of r.
        count: how many rows.
        shift: [groups, K], if given, is taken away from every row of X̂ first; near their mean, it keeps float32
            products of inputs with large means exact enough for a positive definite `centred` gram.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    input_sum: Tensor
    residual_sum: Tensor
    count: int = 0
    shift: Tensor | None = None
    _precision: torch.dtype = torch.float64
    _working_gram: Tensor | None = None  # in the inputs' precision, made at the first use

    @classmethod
    def zeros(cls, groups: int, channels: int, elements: int, device: torch.device) -> OutputMoments:
        """Nothing seen yet, of a layer with C = `channels` and K = `elements`."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        sums = zeros(groups, elements), zeros(channels)
        return cls(zeros(groups, elements, elements), zeros(channels, elements), zeros(channels), *sums)

    def add(self, patches: Tensor, residual: Tensor) -> None:
        """Accumulate one batch.

        Args:
            patches: [groups, n, K] rows of X̂.
            residual: [groups, n, C/groups], r at the same n positions.
        """
        if self.shift is not None:
            patches = patches - self.shift[:, None]
        self.gram += patches.mT @ patches
        self.cross += (residual.mT @ patches).flatten(0, 1)
        self.energy += residual.double().square().sum(1).flatten()
        self.input_sum += patches.sum(1, dtype=torch.float64)
        self.residual_sum += residual.sum(1, dtype=torch.float64).flatten()
        self.count += patches.shape[1]
        self._precision, self._working_gram = patches.dtype, None

    def centred(self) -> OutputMoments:
        """The moments about the means, of the same rows with both means taken away; its sums are zero."""
        inputs, residual = self.input_sum / self.count, self.residual_sum / self.count
        per_channel = self.input_sum.repeat_interleave(len(residual) // len(inputs), 0)
        return OutputMoments(
            self.gram - self.input_sum[:, :, None] * inputs[:, None],
            self.cross - per_channel * residual[:, None],
            self.energy - self.residual_sum * residual,
            torch.zeros_like(inputs),
            torch.zeros_like(residual),
            self.count,
            self.mean_input,
        )

    @property
    def mean_input(self) -> Tensor:
        """[groups, K] float64, the mean of X̂'s rows."""
        mean = self.input_sum / self.count
        return mean if self.shift is None else mean + self.shift

    def error(self, delta: Tensor) -> Tensor:
        """‖Xw - X̂(w + δ)‖² of every output channel, [C, K] -> [C] float64."""
        groups = self.gram.shape[0]
        grouped = delta.unflatten(0, (groups, -1))
        if self._working_gram is None:
            self._working_gram = self.gram.to(self._precision)
        quadratic = ((grouped.to(self._precision) @ self._working_gram) * grouped).sum(-1).flatten()
        return self.energy - 2 * (delta * self.cross).sum(1) + quadratic


@dataclass
class OutputResidual:
    """LW from the outputs themselves: the same error as `OutputMoments`, by one product X̂δ per candidate.

    Attributes:
        outputs: from δ [C, K] to X̂δ as [images, C, positions].
        residual: [images, C, positions], r.
    """

    outputs: Callable[[Tensor], Tensor]
    residual: Tensor

    def error(self, delta: Tensor) -> Tensor:
        """‖Xw - X̂(w + δ)‖² of every output channel, [C, K] -> [C] float64."""
        return (self.residual - self.outputs(delta)).square().sum(dim=(0, 2), dtype=torch.float64)


def moments_are_cheaper(candidates: int, rows: int, channels: int, elements: int) -> bool:
    """Whether LW costs fewer multiplications by `OutputMoments` than by `OutputResidual`.

    Per group of `channels` output channels with K = `elements` weights each and n = `rows` input rows: X̂ᵀX̂ and X̂ᵀr
    cost n·K·(K + C) once and C·K² a candidate, X̂δ costs n·K·C a candidate. Moments pay where there are many candidates
    or K is not much larger than C; a 3×3 convolution has K = 9·C and needs more than ten candidates.
    """
    by_moments = rows * (elements + channels) + candidates * channels * elements
    return by_moments < candidates * rows * channels


@dataclass
class BlockSensitivity:
    """What BW needs to know: how the block's output moves with this layer's output, to first order (Gauss-Newton).

    For one output channel, ‖z - ẑ(q)‖² ≈ ‖r‖² - 2⟨Jᵀr, X̂δ⟩ + ‖J X̂δ‖², with z the float block's output, r = z - ẑ(w) and
    J the derivative of ẑ with respect to the layer's output. ‖J y‖² is the mean over random sign vectors v of
    (vᵀJy)² = ⟨Jᵀv, y⟩² (Hutchinson), taken image by image because images do not mix.

    Attributes:
        outputs: from δ [C, K] to X̂δ as [images, C, positions].
        pull: [images, C, positions], Jᵀr.
        probes: [probes, images, C, positions], Jᵀv.
    """

    outputs: Callable[[Tensor], Tensor]
    pull: Tensor
    probes: Tensor

    def error(self, delta: Tensor) -> Tensor:
        """The block error of each channel quantized alone, less the constant ‖r‖², [C, K] -> [C] float64."""
        outputs = self.outputs(delta)
        linear = (self.pull * outputs).sum(dim=(0, 2), dtype=torch.float64)
        along_probes = torch.einsum("vicp,icp->vic", self.probes, outputs).double()
        return along_probes.square().sum(1).mean(0) - 2 * linear
