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
from dataclasses import dataclass

import torch
from torch import Tensor

from logart.grid import Codebook, ScaleMethod, Spacing, linear_codebook, log_codebook, minmax_codebook
from logart.rounding import count_below, dequantize, nearest

ErrorFunction = Callable[[Tensor], Tensor]


def log_candidates(
    absmax: Tensor, n_bits: int, *, terms: int = 0, dtype: torch.dtype = torch.float32
) -> list[Codebook]:
    """The N + 1 codebooks k = 0..N of every channel, `absmax` [C]; arguments as `log_codebook`."""
    return [log_codebook(absmax, n_bits, k, terms=terms, dtype=dtype) for k in range(2 ** (n_bits - 1) + 1)]


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
    """Row g of the result is row g of candidates[chosen[g]]."""
    rows = torch.arange(len(chosen), device=chosen.device)

    def pick(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors)[chosen, rows]

    levels = pick([c.levels for c in candidates])
    half_steps = [c.half_steps for c in candidates if c.half_steps is not None]
    n_base2 = [c.n_base2 for c in candidates if c.n_base2 is not None]
    if not half_steps:
        return Codebook(levels, Spacing.LINEAR)
    return Codebook(levels, Spacing.LOG, pick(half_steps), pick(n_base2))


def mse_codebook(w: Tensor, n_bits: int) -> Codebook:
    """`linear_mse`: the linear codebook of w [C, K] whose range leaves the least Σ|w - q|^2.4."""
    return least_error(w, shrunk_candidates(w, n_bits), power_error)[0]


def choose_codebook(
    w: Tensor, method: ScaleMethod, n_bits: int, *, terms: int = 0, error: ErrorFunction = squared_error
) -> Codebook:
    """The codebook of each row of w [G, M] by the grid asked for; `error` decides only for `dynamic`."""
    if method is ScaleMethod.LINEAR_MINMAX:
        return minmax_codebook(w, n_bits)
    if method is ScaleMethod.LINEAR_MSE:
        return mse_codebook(w, n_bits)
    absmax = w.abs().amax(1)
    if method is ScaleMethod.DYNAMIC:
        return least_error(w, log_candidates(absmax, n_bits, terms=terms, dtype=w.dtype), error)[0]
    k = 2 ** (n_bits - 1) if method is ScaleMethod.LOG_2 else 0
    return log_codebook(absmax, n_bits, k, terms=terms, dtype=w.dtype)


@dataclass
class OutputMoments:
    """What LW needs to know of the search images: second moments of a layer's input and of its output's error.

    With r = Xw - X̂w, the output error that the quantized prefix alone leaves, ‖Xw - X̂q‖² = ‖r‖² - 2 δ·X̂ᵀr + δᵀX̂ᵀX̂δ.
    Written in δ and r, both small, nothing cancels: the products may be taken in float32 and only summed in float64.

    Attributes:
        gram: [groups, K, K] float64, X̂ᵀX̂ of each group of a grouped convolution.
        cross: [C, K] float64, X̂ᵀr of each output channel.
        energy: [C] float64, ‖r‖².
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    _precision: torch.dtype = torch.float64
    _working_gram: Tensor | None = None  # in the inputs' precision, made at the first use

    @classmethod
    def zeros(cls, groups: int, channels: int, elements: int, device: torch.device) -> OutputMoments:
        """Nothing seen yet, of a layer with C = `channels` and K = `elements`."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(groups, elements, elements), zeros(channels, elements), zeros(channels))

    def add(self, patches: Tensor, residual: Tensor) -> None:
        """Accumulate one batch.

        Args:
            patches: [groups, n, K] rows of X̂.
            residual: [groups, n, C/groups], r at the same n positions.
        """
        self.gram += patches.mT @ patches
        self.cross += (residual.mT @ patches).flatten(0, 1)
        self.energy += residual.double().square().sum(1).flatten()
        self._precision, self._working_gram = patches.dtype, None

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
