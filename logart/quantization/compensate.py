"""Compensated rounding: every weight of a layer at once, in closed form, in the metric of the layer's inputs.

With X the float network's inputs to a layer and X̂ those through the quantized prefix, both centred, the codes q of a
channel with float weights w shall keep ‖Xw - X̂q‖² + λ‖w - q‖² small. Up to a constant this is (q - T)ᵀA(q - T) with

    A = X̂ᵀX̂ + λI,   T = A⁻¹(X̂ᵀXw + λw) = w + A⁻¹X̂ᵀr,   r = Xw - X̂w:

T is the real weight that would undo the error made so far. `column_rounding` rounds it on any codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from logart.errors import NetworkError, NoRoomError
from logart.grids.grid import Codebook, Grid, GridOptions, Spacing
from logart.grids.measures import OutputMoments
from logart.grids.search import choose_codebook
from logart.quantization.blocks import Block
from logart.quantization.cache import Captured, free_bytes
from logart.quantization.column_rounding import Factor, quadratic_error, round_compensated
from logart.quantization.damping import Damping, choose_damping, metric, target
from logart.quantization.dbs import layer_moments, of_all_ranks, per_codebook
from logart.quantization.layers import get_weight
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.settings import Settings
from logart.quantization.surgery import quantized_layers

# Matrices [G, K, K] of float64 held at once: moments, centred moments, A, its factor and what reordering and factoring
# hold beside them. Choosing the damping, before, holds no more: moments of halves and of all, the former also centred.
MATRICES = 7  # measured at K = 3,000: 6.8


def check_room(layers: Mapping[str, QuantizedWeight]) -> None:
    """Raise NoRoomError, naming the layer, where second moments and factors do not fit into the memory that is free."""
    for name, layer in layers.items():
        groups, elements = layer.groups, layer.shape[1:].numel()
        need = MATRICES * groups * elements**2 * torch.float64.itemsize
        free = free_bytes(layer.rows.device)
        if need > free:
            raise NoRoomError(
                f"layer {name}: compensated rounding holds up to {need / 2**30:.1f} GiB of second moments of its "
                f"{elements} inputs, {free / 2**30:.1f} GiB are free on {layer.rows.device}; expected more memory, "
                "another rounding, or the layer skipped"
            )


@torch.no_grad()
def compensate_block(
    reference: nn.Module, quantized: nn.Module, block: Block, data: tuple[Captured, Captured], config: Settings
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
        layer, float_weight = quantized_layers(quantized)[name], get_weight(reference, name)
        arguments = (*blocks, float_weight, layer, *data)
        measure = partial(layer_moments, *arguments, batch_size=config.batch_size, shifted=True)
        estimate = estimate_layer(name, layer, partial(_of_all_ranks, measure), data[0].total, config)
        round_layer(layer, estimate, config.grid, config.grid_options)
        targets.append(estimate.target.to(layer.rows.dtype).reshape(layer.shape))
    return targets


def _of_all_ranks(measure: Callable[..., OutputMoments], **which: Any) -> OutputMoments:
    return of_all_ranks(measure(**which))


@dataclass(frozen=True)
class Estimate:
    """What the images say of one layer.

    Attributes:
        moments: not centred.
        a, factor: A [G, K, K] and its factor.
        target: T [C, K] float64.
        damping: how it was chosen, where it was.
    """

    moments: OutputMoments
    a: Tensor
    factor: Factor
    target: Tensor
    damping: Damping | None


def estimate_layer(
    name: str, layer: QuantizedWeight, measure: Callable[..., OutputMoments], images: int, config: Settings
) -> Estimate:
    """Moments, A and T of a layer that holds its float weight.

    Args:
        name: for messages.
        measure: the moments of its inputs; given `images`, a range, of these alone, and a `shift` of all rows.
        images: how many there are.

    Raises:
        NetworkError: the moments are not finite.
    """
    w = layer.rows.reshape(layer.shape[0], -1)
    if config.damping == "auto":
        middle = images // config.views // 2 * config.views
        first = measure(images=range(middle))
        second = measure(images=range(middle, images), shift=first.shift)
        moments = _checked(name, first + second, w.dtype)
        search = partial(
            choose_codebook, grid=config.grid, n_bits=layer.n_bits, options=config.grid_options, spacing=Spacing.LINEAR
        )
        share, chosen = choose_damping(w, (first, second), search)
        del first, second  # two matrices less beside the factor
    else:
        moments, chosen = _checked(name, measure(), w.dtype), None
        share = torch.tensor(config.damping, dtype=torch.float64, device=w.device)
    centred = moments.centred()
    a = metric(centred, share)
    factor = Factor.of(a)
    return Estimate(moments, a, factor, target(w, factor, centred), chosen)


def round_layer(layer: QuantizedWeight, estimate: Estimate, grid: Grid, options: GridOptions) -> None:
    """Give a layer its codebook, codes and bias."""
    layer.damping = estimate.damping
    w, t, a = layer.rows.reshape(layer.shape[0], -1), estimate.target, estimate.a
    real = t.reshape(layer.n_codebooks, -1).to(w.dtype)
    error = per_codebook(partial(quadratic_error, a=a), layer)
    codebook = choose_codebook(real, grid, layer.n_bits, error=error, options=options, spacing=Spacing.LINEAR)
    rows = torch.arange(len(w), device=w.device) * layer.n_codebooks // len(w)
    codes = round_compensated(t, a, codebook.select(rows), estimate.factor)
    if options.zero_code:
        _keep_zeros(codes, t, w == 0, codebook.select(rows))
    layer.set_codebook(codebook, codes.reshape(layer.n_codebooks, -1))
    if layer.bias_name is not None:
        bias = corrected_bias(layer.bias, estimate.moments, layer.current_rows.reshape(w.shape) - w)
        layer.set_bias(bias.to(w.dtype))


def _keep_zeros(codes: Tensor, t: Tensor, zero: Tensor, codebook: Codebook) -> None:
    """Let weights that are exactly zero, pruned ones say, have the code of zero, and T of LLR too; [C, K], in place."""
    is_zero = codebook.levels == 0
    kept = zero & is_zero.any(1)[:, None]
    codes[kept] = is_zero.to(torch.uint8).argmax(1).to(torch.uint8)[:, None].expand_as(codes)[kept]
    t[kept] = 0.0


def _checked(name: str, moments: OutputMoments, dtype: torch.dtype) -> OutputMoments:
    if not all(moment.isfinite().all() for moment in (moments.gram, moments.cross)):
        raise NetworkError(f"layer {name}: its inputs are so large that their products overflow {dtype}")
    return moments


def corrected_bias(bias: Tensor | None, moments: OutputMoments, delta: Tensor) -> Tensor:
    """The bias [C] that keeps the mean output: b + mean(Xw - X̂q), with δ = q - w [C, K] and moments not centred."""
    groups = len(moments.gram)
    n_changed_codes = (moments.mean_input[:, None] * delta.double().unflatten(0, (groups, -1))).sum(-1).flatten()
    shift = moments.residual_sum / moments.count - n_changed_codes
    return shift if bias is None else bias.double() + shift
