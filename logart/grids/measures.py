"""The measures of the search that look at outputs: layer-wise (LW) and block-wise (BW) errors (DESIGN section 3).

Both are quadratic in δ = q - w. They are read off second moments that are accumulated once, while the search images
stream by (`OutputMoments`), or off the layer's own outputs X̂δ (`OutputResidual`, `BlockSensitivity`), whichever is
cheaper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LEAST_HALF = 256  # of the rows of a product that is worth taking in parts


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
        precision: of the inputs.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    input_sum: Tensor
    residual_sum: Tensor
    count: int = 0
    shift: Tensor | None = None
    precision: torch.dtype = torch.float64
    _working_gram: Tensor | None = field(default=None, init=False)  # made at the first use

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
        if patches.dtype.itemsize < 4:  # products in half precision would leave no positive definite gram
            patches, residual = patches.float(), residual.float()
        if self.shift is not None:
            patches = patches - self.shift[:, None]
        _add_symmetric_product(self.gram, patches.mT)
        self.cross += (residual.mT @ patches).flatten(0, 1)
        self.energy += residual.double().square().sum(1).flatten()
        self.input_sum += patches.sum(1, dtype=torch.float64)
        self.residual_sum += residual.sum(1, dtype=torch.float64).flatten()
        self.count += patches.shape[1]
        self.precision, self._working_gram = patches.dtype, None

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
            self.precision,
        )

    def __add__(self, other: OutputMoments) -> OutputMoments:
        """The moments of both's rows; both have the same shift."""
        names = ("gram", "cross", "energy", "input_sum", "residual_sum", "count")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return OutputMoments(**sums, shift=self.shift, precision=self.precision)

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
            self._working_gram = self.gram.to(self.precision)
        quadratic = ((grouped.to(self.precision) @ self._working_gram) * grouped).sum(-1).flatten()
        return self.energy - 2 * (delta * self.cross).sum(1) + quadratic


def _add_symmetric_product(total: Tensor, x: Tensor) -> None:
    """total += x @ x.mT, total [G, K, K] and x [G, K, n]; what is above the diagonal is taken from below it."""
    half = x.shape[1] // 2
    if half < _LEAST_HALF:
        total += x @ x.mT
        return
    _add_symmetric_product(total[:, :half, :half], x[:, :half])
    _add_symmetric_product(total[:, half:, half:], x[:, half:])
    below = x[:, half:] @ x[:, :half].mT
    total[:, half:, :half] += below
    total[:, :half, half:] += below.mT


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
        vjp: [images, C, positions], Jᵀr.
        probes: [probes, images, C, positions], Jᵀv.
    """

    outputs: Callable[[Tensor], Tensor]
    vjp: Tensor
    probes: Tensor

    def error(self, delta: Tensor) -> Tensor:
        """The block error of each channel quantized alone, less the constant ‖r‖², [C, K] -> [C] float64."""
        outputs = self.outputs(delta)
        linear = (self.vjp * outputs).sum(dim=(0, 2), dtype=torch.float64)
        along_probes = torch.einsum("vicp,icp->vic", self.probes, outputs).double()
        return along_probes.square().sum(1).mean(0) - 2 * linear
