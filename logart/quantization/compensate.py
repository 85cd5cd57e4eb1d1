"""Compensated rounding: every weight of a layer at once, in closed form, in the metric of the layer's inputs.

With X the float network's inputs to a layer and X̂ those through the quantized prefix, both centred, the codes q of a
channel with float weights w shall keep ‖Xw - X̂q‖² + λ‖w - q‖² small. Up to a constant this is (q - T)ᵀA(q - T) with

    A = X̂ᵀX̂ + λI,   T = A⁻¹(X̂ᵀXw + λw) = w + A⁻¹X̂ᵀr,   r = Xw - X̂w:

T is the real weight that would undo the error made so far. T is rounded with error feedback (Frantar et al. 2022, OBQ
and GPTQ, here on any codebook), then improved one weight at a time.

Rows of weights come as [G, R, K]: R output channels of each of G groups, which share the group's A [G, K, K].
Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from logart.errors import NetworkError
from logart.grids.grid import Codebook, Spacing
from logart.grids.measures import OutputMoments
from logart.grids.rounding import dequantize, nearest
from logart.grids.search import choose_codebook
from logart.quantization.cache import Captured
from logart.quantization.config import QuantConfig
from logart.quantization.dbs import layer_moments, per_codebook
from logart.quantization.layers import QuantizedLayer
from logart.quantization.surgery import Block

DAMPING = 0.01  # λ as a share of the mean diagonal of X̂ᵀX̂
RIDGE_FLOOR = 1e-12  # λ per row where inputs are dead, and per row and squared mean: float32 knows no input any better
SWEEPS = 200  # far more than descent was ever seen to need: 3 to 8 from error feedback, 52 from random codes
_BLOCK = 64  # columns worked on before the others hear of it


@torch.no_grad()
def compensate_block(
    reference: nn.Module, quantized: nn.Module, block: Block, data: tuple[Captured, Captured], config: QuantConfig
) -> list[Tensor]:
    """Give every layer of a block its codebook, codes and bias, in the order they run; they hold float weights before.

    Args:
        reference, quantized: the float network and the one being quantized; only the block inside is run.
        data: the block's inputs [n, ...] in both networks, in this order.

    Returns:
        T of each layer, in the weight's shape and type.

    Raises:
        NetworkError: a layer's inputs are finite, but their second moments are not.
    """
    targets = []
    blocks = reference.get_submodule(block.name), quantized.get_submodule(block.name)
    for name in block.layers:
        layer, float_layer = quantized.get_submodule(name), reference.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        moments = layer_moments(*blocks, float_layer, layer, *data, batch_size=config.batch_size, shifted=True)
        if not all(moment.isfinite().all() for moment in (moments.gram, moments.cross)):
            raise NetworkError(
                f"layer {name}: its inputs are so large that their products overflow {layer.weight.dtype}"
            )
        w, centred = layer.rows.reshape(layer.shape[0], -1), moments.centred()
        a = metric(centred)
        t = target(w, a, centred)
        wanted = t.reshape(layer.n_codebooks, -1).to(w.dtype)
        error = per_codebook(partial(quadratic_error, a=a), layer)
        codebook = choose_codebook(wanted, config.scale_method, layer.n_bits, error=error, **config.grid_options)
        rows = torch.arange(len(w), device=w.device) * layer.n_codebooks // len(w)
        codes = round_compensated(t, a, codebook.select(rows))
        layer.set_codebook(codebook, codes.reshape(layer.n_codebooks, -1))
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        bias = corrected_bias(bias, moments, layer.weight.reshape(w.shape) - w)
        layer.bias = nn.Parameter(bias.to(w.dtype), requires_grad=False)
        targets.append(t.to(w.dtype).reshape(layer.shape))
    return targets


def metric(moments: OutputMoments, ridge: float = DAMPING) -> Tensor:
    """A [G, K, K] float64 of centred moments."""
    gram = moments.gram
    diagonal = gram.diagonal(dim1=1, dim2=2)
    strength = ridge * diagonal.mean(1) + RIDGE_FLOOR * moments.count * (1 + moments.mean_input.square().mean(1))
    return gram + torch.diag_embed(strength[:, None].expand_as(diagonal))


def target(w: Tensor, a: Tensor, moments: OutputMoments) -> Tensor:
    """T [C, K] float64 for weights w [C, K], of centred moments."""
    cross = moments.cross.unflatten(0, (len(a), -1))
    factor = torch.linalg.cholesky(a)
    return w.double() + torch.cholesky_solve(cross.mT, factor).mT.flatten(0, 1)


def quadratic_error(delta: Tensor, a: Tensor) -> Tensor:
    """δᵀAδ of every channel, δ [C, K] and A [G, K, K] -> [C] float64."""
    grouped = delta.double().unflatten(0, (len(a), -1))
    return ((grouped @ a) * grouped).sum(-1).flatten()


def round_compensated(t: Tensor, a: Tensor, codebook: Codebook) -> Tensor:
    """Codes near the least (q - T)ᵀA(q - T), never worse than rounding to nearest.

    Args:
        t: [C, K] float64.
        a: [G, K, K] float64, positive definite; C is a multiple of G.
        codebook: of the C rows.

    Returns:
        [C, K] uint8 codes.
    """
    plain, fed_back = nearest(t, codebook), error_feedback(t, a, codebook)
    better = _error(fed_back, t, a, codebook) < _error(plain, t, a, codebook)
    return coordinate_descent(torch.where(better[:, None], fed_back, plain), t, a, codebook)


def error_feedback(t: Tensor, a: Tensor, codebook: Codebook) -> Tensor:
    """Round column by column, in order of falling diagonal of A, and let the columns to come make up for each error.

    The recursion through the Cholesky factor U of A⁻¹ = UᵀU: after column j, the columns behind it move by
    -(t_j - q_j)·U[j, :]/U[j, j]. Arguments and result as `round_compensated`.
    """
    grid, groups = _Linear(codebook), len(a)
    order = a.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_reordered(a, order)))
    factor = torch.linalg.cholesky(inverse, upper=True).contiguous()
    diagonal = factor.diagonal(dim1=1, dim2=2)
    columns = order[:, None].expand(-1, t.shape[0] // groups, -1)
    state = t.double().unflatten(0, (groups, -1)).gather(2, columns)
    codes = torch.empty_like(state, dtype=torch.uint8)

    def decide(j: int, lookahead: Tensor) -> Tensor:
        codes[:, :, j], rounded = grid.nearest(lookahead[:, :, 0])
        return (lookahead[:, :, 0] - rounded) / diagonal[:, j, None]

    _blocked_update(state, factor, decide)
    return torch.empty_like(codes).scatter_(2, columns, codes).flatten(0, 1)


def coordinate_descent(codes: Tensor, t: Tensor, a: Tensor, codebook: Codebook) -> Tensor:
    """Cyclic coordinate descent that looks one weight ahead, until no weight moves.

    Each weight in turn stays or takes the level nearest to q_j - [A(q - T)]_j / A_jj, which is best given all others,
    or a neighbour of its own: whichever is best once the weight that comes next has answered with its best level. So
    two weights move together where neither gains alone, which are those of correlated inputs; hence the order of
    `_correlation_order`. No sweep makes the error larger. Arguments and result as `round_compensated`.
    """
    groups = len(a)
    order = _correlation_order(a)
    columns = order[:, None].expand(-1, t.shape[0] // groups, -1)
    a, t = _reordered(a, order), t.double().unflatten(0, (groups, -1)).gather(2, columns)
    codes = codes.unflatten(0, (groups, -1)).gather(2, columns)
    first = torch.arange(groups, device=a.device)[:, None] * codes.shape[1]
    moving = torch.arange(codes.shape[1], device=a.device).expand(groups, -1)  # a row that rests once rests for ever
    for _ in range(SWEEPS):
        rows = moving[:, :, None].expand(-1, -1, codes.shape[2])
        before = codes.gather(1, rows)
        after = _descend_once(before, t.gather(1, rows), a, codebook.select((first + moving).flatten()))
        codes.scatter_(1, rows, after)
        n_changed_codes = (after != before).any(2)
        moving = moving.gather(
            1, n_changed_codes.sort(dim=1, descending=True, stable=True).indices[:, : int(n_changed_codes.sum(1).max())]
        )
        if not moving.numel():
            break
    return torch.empty_like(codes).scatter_(2, columns, codes).flatten(0, 1)


def _descend_once(codes: Tensor, t: Tensor, a: Tensor, codebook: Codebook) -> Tensor:
    """Codes [G, R, K] after one sweep over all columns, codes and t [G, R, K]."""
    grid, levels = _Linear(codebook), codebook.levels.unflatten(0, (len(a), -1))
    chosen, q = codes.clone(), levels.gather(2, codes.long())
    diagonal = a.diagonal(dim1=1, dim2=2)[:, None, None]

    def decide(j: int, lookahead: Tensor) -> Tensor:
        slope, curvature = lookahead[:, :, :1], diagonal[..., j]
        own = codes[:, :, j].long()
        best, _ = grid.nearest(q[:, :, j] - slope[..., 0] / curvature[..., 0])
        options = torch.stack([own, best.long(), own - 1, own + 1], -1).clamp(0, levels.shape[2] - 1)
        steps = levels.gather(2, options) - q[:, :, j, None]
        change = steps * (2 * slope + steps * curvature)
        least = curvature * steps.square()
        if lookahead.shape[2] > 1:
            slope, curvature = lookahead[:, :, 1:] + steps * a[:, j, j + 1, None, None], diagonal[..., j + 1]
            next_q = q[:, :, j + 1, None]
            answers = grid.nearest(next_q - slope / curvature)[1] - next_q
            change += answers * (2 * slope + answers * curvature)
            least += curvature * answers.square()
        # What a step must gain to be told from rounding; otherwise two equal levels could alternate for ever.
        possible = change < change[..., :1] - 1e-12 * least
        possible[..., 0] = True  # to stay
        choice = change.where(possible, torch.inf).argmin(-1, keepdim=True)
        chosen[:, :, j] = options.gather(2, choice)[..., 0].to(torch.uint8)
        return -steps.gather(2, choice)[..., 0]

    _blocked_update((q - t) @ a, a, decide)  # the slope afresh in each sweep: no error piles up
    return chosen


def _correlation_order(a: Tensor) -> Tensor:
    """An order [G, K] of the columns: after each one that of the rest whose input is most correlated with its own."""
    importance = a.diagonal(dim1=1, dim2=2)
    group, at = torch.arange(len(a), device=a.device), importance.argmax(1)
    order, rest = [at], importance.rsqrt()
    for _ in range(a.shape[2] - 1):
        rest[group, at] = -torch.inf
        at = torch.where(rest > 0, a[group, at].abs() * rest, -1.0).argmax(1)
        order.append(at)
    return torch.stack(order, 1)


def _reordered(a: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of a [G, K, K] in an order [G, K]."""
    rows = order[:, :, None].expand_as(a)
    return a.gather(1, rows).gather(2, rows.mT)


def _blocked_update(state: Tensor, matrix: Tensor, decide: Callable[[int, Tensor], Tensor]) -> None:
    """state -= e·matrix[j] for every column j in turn, e = decide(j, state's column j and, in a block, j + 1).

    Blocks of columns at a time. Only columns not yet decided are sure to be right: nothing reads the others again.

    Args:
        state: [G, R, K], changed in place.
        matrix: [G, K, K].
        decide: from j and [G, R, 2], or [G, R, 1] at the end of a block, to [G, R].
    """
    size = state.shape[2]
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        block, inner = state[:, :, start:end], matrix[:, start:end, start:end]
        n_changed_codes = torch.empty_like(block)
        for j in range(end - start):
            n_changed_codes[:, :, j] = decide(start + j, block[:, :, j : j + 2])
            block -= n_changed_codes[:, :, j, None] * inner[:, j, None]
        state[:, :, end:] -= n_changed_codes @ matrix[:, start:end, end:]


class _Linear:
    """Nearest by distance, not by ratio: what a quadratic error asks of the same levels."""

    def __init__(self, codebook: Codebook) -> None:
        self._levels = codebook.levels
        self._borders = replace(codebook, spacing=Spacing.LINEAR).borders.contiguous()

    def nearest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and levels of some values [G, R, ...] of every channel."""
        codes = torch.searchsorted(self._borders, values.reshape(len(self._levels), -1).contiguous(), right=True)
        levels = self._levels.gather(1, codes)
        return codes.to(torch.uint8).reshape(values.shape), levels.reshape(values.shape)


def _error(codes: Tensor, t: Tensor, a: Tensor, codebook: Codebook) -> Tensor:
    return quadratic_error(dequantize(codes, codebook.levels) - t, a)


def corrected_bias(bias: Tensor | None, moments: OutputMoments, delta: Tensor) -> Tensor:
    """The bias [C] that keeps the mean output: b + mean(Xw - X̂q), with δ = q - w [C, K] and moments not centred."""
    groups = len(moments.gram)
    n_changed_codes = (moments.mean_input[:, None] * delta.double().unflatten(0, (groups, -1))).sum(-1).flatten()
    shift = moments.residual_sum / moments.count - n_changed_codes
    return shift if bias is None else bias.double() + shift
