"""Dynamic base search (DBS) over the layers of one block: builds each measure from data and lets `search` choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from logart import ranks
from logart.errors import NetworkError
from logart.grids.grid import ErrorFunction
from logart.grids.measures import BlockSensitivity, OutputMoments, OutputResidual, moments_are_cheaper
from logart.grids.search import choose_codebook, squared_error
from logart.quantization.blocks import Block
from logart.quantization.cache import Captured
from logart.quantization.capture import Call, only_tensor
from logart.quantization.layers import get_weight
from logart.quantization.operations import Use
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.settings import SearchMethod, Settings
from logart.quantization.signs import BatchSigns
from logart.quantization.surgery import quantized_layers
from logart.quantization.watching import Watch, uses_of

PROBES = 32  # random sign vectors of BW; with 32 images 1,024 samples, about 4 % of standard error
# Of unfolded patches held at once, 8 MB in float32: they stay in a processor's cache. Twice K rows at least, so that
# adding a product of theirs to the others costs little beside it.
_PATCH_ELEMENTS = 1 << 21


def search_block(
    reference: nn.Module, quantized: nn.Module, block: Block, data: tuple[Captured, ...] | None, config: Settings
) -> None:
    """Give every layer of a block its codebook, in the order they run, and round it to nearest.

    Args:
        reference, quantized: the float network and the one being quantized; only the block inside is run.
        data: the block's calls in both networks, in this order; None when the measure needs none. Where the block is
            the whole network, BW is LW.
    """
    options = config.grid_options
    for name in block.layers:
        layer = quantized_layers(quantized)[name]
        error: ErrorFunction = squared_error
        if data is not None:
            size = config.search_batch_size
            blocks = reference.get_submodule(block.name), quantized.get_submodule(block.name)
            float_weight = get_weight(reference, name)
            measured: ErrorFunction
            if block.whole:
                measured = of_all_ranks(layer_moments(*blocks, float_weight, layer, *data, batch_size=size)).error
            elif config.search_method is SearchMethod.LAYER_WISE:
                count = config.grid.n_candidates(layer.n_bits, options)
                measured = layer_error(*blocks, float_weight, layer, *data, candidates=count, batch_size=size)
            else:
                try:
                    sensitivity = block_sensitivity(*blocks, layer, *data, batch_size=size, seed=config.seed)
                except NetworkError as error_seen:
                    raise NetworkError(f"block {block.name or name}, layer {name}: {error_seen}") from error_seen
                measured = summed(sensitivity.error)
            error = per_codebook(measured, layer)
        watched = FiniteErrors(name, error)
        codebook = choose_codebook(layer.rows, config.grid, layer.n_bits, error=watched, options=options)
        watched.check()
        layer.set_codebook(codebook)


def round_without_data(layers: Sequence[QuantizedWeight], config: Settings) -> None:
    """Give weights the codebooks of least error of themselves, and round them to nearest."""
    for layer in layers:
        layer.set_codebook(choose_codebook(layer.rows, config.grid, layer.n_bits, options=config.grid_options))


class FiniteErrors:
    """An error function whose errors must be finite for one candidate at least of each codebook."""

    def __init__(self, name: str, error: ErrorFunction) -> None:
        self._name, self._error = name, error
        self._least: Tensor | None = None

    def __call__(self, delta: Tensor) -> Tensor:
        """The errors, infinite where they are no numbers: such a candidate is never chosen before another."""
        errors = self._error(delta).nan_to_num(nan=torch.inf, posinf=torch.inf)
        self._least = errors if self._least is None else torch.minimum(self._least, errors)
        return errors

    def check(self) -> None:
        """Raise NetworkError where there was nothing to choose by."""
        if self._least is not None and not self._least.isfinite().all():
            raise NetworkError(f"layer {self._name}: the errors of all its grids overflow; its inputs are too large")


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: products and sums overflow half precision."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def summed(error: ErrorFunction) -> ErrorFunction:
    """The error over the images of all ranks, from that over this one's."""
    return lambda delta: ranks.all_sum(error(delta))


def of_all_ranks(moments: OutputMoments) -> OutputMoments:
    """The moments over the images of all ranks, from those over this one's, with the same shift."""
    for tensor in (moments.gram, moments.cross, moments.energy, moments.input_sum, moments.residual_sum):
        ranks.all_sum(tensor)
    moments.count = int(ranks.all_sum(torch.tensor(moments.count)))
    return moments


def per_codebook(error: ErrorFunction, layer: QuantizedWeight) -> ErrorFunction:
    """An error per output channel, [C, K] -> [C], as an error per codebook, [G, M] -> [G]."""
    channels = layer.shape[0]

    def grouped(delta: Tensor) -> Tensor:
        return error(delta.reshape(channels, -1)).reshape(layer.n_codebooks, -1).sum(1)

    return grouped


@torch.no_grad()
def layer_error(
    float_block: nn.Module,
    block: nn.Module,
    float_weight: Tensor,
    layer: QuantizedWeight,
    float_inputs: Captured,
    inputs: Captured,
    *,
    candidates: int,
    batch_size: int = 32,
) -> ErrorFunction:
    """The LW measure of one layer, from δ [C, K] to [C], for so many candidates; other arguments as `layer_moments`."""
    arguments = (float_block, block, float_weight, layer, float_inputs, inputs)
    uses = uses_of(block, layer.weight, inputs[:1], layer.n_uses)
    rows = inputs.total * sum(use.y.numel() for use in uses) // layer.shape[0]
    sizes = layer.shape[0] // layer.groups, layer.shape[1:].numel()
    if len(uses) != layer.n_uses or moments_are_cheaper(candidates, rows, *sizes):
        return of_all_ranks(layer_moments(*arguments, batch_size=batch_size)).error
    return summed(layer_residual(*arguments, batch_size=batch_size).error)


@torch.no_grad()
def layer_residual(
    float_block: nn.Module,
    block: nn.Module,
    float_weight: Tensor,
    layer: QuantizedWeight,
    float_inputs: Captured,
    inputs: Captured,
    *,
    batch_size: int = 32,
) -> OutputResidual:
    """The LW measure of one layer through its outputs; arguments as `layer_moments`."""
    seen = _Seen(layer.n_uses)
    residuals = []
    for start in range(0, len(inputs), batch_size):
        batch = slice(start, start + batch_size)
        float_uses = uses_of(float_block, float_weight, float_inputs[batch], layer.n_uses)
        quantized_uses = uses_of(block, layer.weight, inputs[batch], layer.n_uses)
        seen.take(quantized_uses)
        pairs = _pairs(float_uses, quantized_uses)
        residuals.append([use.positions_last(wide(exact.y) - wide(use.y)) for exact, use in pairs])
    return OutputResidual(seen.outputs, seen.joined(residuals))


def _pairs(exact: Sequence[Use], uses: Sequence[Use]) -> list[tuple[Use, Use]]:
    """The operations of both networks."""
    shapes = [[use.y.shape for use in of] for of in (exact, uses)]
    if shapes[0] != shapes[1]:
        raise NetworkError("a weight enters other operations in the quantized network than in the float one")
    return list(zip(exact, uses, strict=True))


class _Seen:
    """What a weight was multiplied with in its operations, batch by batch."""

    def __init__(self, n_uses: int) -> None:
        self._n_uses = n_uses
        self._inputs: list[list[Tensor]] = [[] for _ in range(n_uses)]
        self._uses: list[Use] = []

    def take(self, uses: Sequence[Use]) -> None:
        """Keep a batch.

        Raises:
            NetworkError: there are more operations, or fewer, than for other images.
        """
        if len(uses) != self._n_uses:
            message = f"its weight enters {len(uses)} operations for a batch and {self._n_uses} for two images"
            raise NetworkError(f"{message}; expected as many for any, layer-wise search or compensated rounding")
        self._uses = list(uses)
        for batches, use in zip(self._inputs, uses, strict=True):
            batches.append(wide(use.x.detach()))

    def outputs(self, delta: Tensor) -> Tensor:
        """X̂δ for a weight δ [C, K], [B, C, positions of all operations]."""
        if len(self._inputs[0]) > 1:
            self._inputs = [[torch.cat(batches)] for batches in self._inputs]
        outputs = []
        for (x,), use in zip(self._inputs, self._uses, strict=True):
            x = x.to(torch.promote_types(x.dtype, use.weight.dtype))
            outputs.append(use.apply(x, delta.to(x.dtype)))
        return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]

    def joined(self, batches: Sequence[Sequence[Tensor]], dim: int = 0) -> Tensor:
        """Tensors [..., C, positions] of each operation of each batch, batches in `dim`, as one."""
        return torch.cat([torch.cat(list(of_uses), -1) if self._n_uses > 1 else of_uses[0] for of_uses in batches], dim)


@torch.no_grad()
def layer_moments(
    float_block: nn.Module,
    block: nn.Module,
    float_weight: Tensor,
    layer: QuantizedWeight,
    float_inputs: Captured,
    inputs: Captured,
    *,
    batch_size: int = 32,
    shifted: bool = False,
    images: range | None = None,
    shift: Tensor | None = None,
) -> OutputMoments:
    """The LW measure of one layer, which must still hold its float weight, over this rank's images.

    Args:
        float_block, block: where the weight is used in the float network and in the one being quantized.
        float_weight, layer: the weight in both.
        float_inputs, inputs: the calls of both, for n images.
        shifted: take `shift` or, without it, the first rows' mean away from all; for moments that are to be `centred`.
        images: which of the images of all ranks; None is all.
    """
    channels, elements = layer.shape[0], layer.shape[1:].numel()
    moments = OutputMoments.zeros(layer.groups, channels, elements, layer.weight.device)
    moments.shift = shift
    own = inputs.own(range(inputs.total) if images is None else images)
    for start in own[::batch_size]:
        batch = slice(start, min(start + batch_size, own.stop))
        float_uses = uses_of(float_block, float_weight, float_inputs[batch], layer.n_uses)
        quantized_uses = uses_of(block, layer.weight, inputs[batch], layer.n_uses)
        for exact, use in _pairs(float_uses, quantized_uses):
            _add(moments, use, use.positions_last(wide(exact.y) - wide(use.y)), shifted)
    if shifted and moments.shift is None:  # this rank has none of these images
        moments.shift = ranks.from_first(None).to(layer.weight.device)
    return moments


def _add(moments: OutputMoments, use: Use, residual: Tensor, shifted: bool) -> None:
    x, groups, elements = use.x, use.groups, use.elements
    step = max(1, max(_PATCH_ELEMENTS // (groups * elements), 2 * elements) // residual.shape[2])
    for first in range(0, len(x), step):
        patches = use.rows(wide(x[first : first + step]))
        if shifted and moments.shift is None:
            mean = patches.mean(1, dtype=torch.float64).to(patches)
            moments.shift = ranks.from_first(mean.cpu()).to(patches)
        part = residual[first : first + step].unflatten(1, (groups, -1))
        moments.add(patches, part.permute(1, 2, 0, 3).flatten(2).mT)


def block_sensitivity(
    float_block: nn.Module,
    block: nn.Module,
    layer: QuantizedWeight,
    float_inputs: Captured,
    inputs: Captured,
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> BlockSensitivity:
    """The BW measure of one layer, which must still hold its float weight; arguments as `layer_moments`."""
    signs = BatchSigns(seed, inputs.total, batch_size)
    seen, vjps, probes = _Seen(layer.n_uses), [], []
    for images in ranks.own_batches(inputs.total, batch_size):
        own = inputs.own(images)
        batch, draw = slice(own.start, own.stop), partial(signs.of, images, draws=PROBES)
        uses, vjp, along = _vjps(float_block, block, layer, float_inputs[batch], inputs[batch], draw)
        seen.take(uses)
        vjps.append([wide(each) for each in vjp])
        probes.append([wide(each) for each in along])
    return BlockSensitivity(seen.outputs, seen.joined(vjps), seen.joined(probes, 1))


def _vjps(
    float_block: nn.Module,
    block: nn.Module,
    layer: QuantizedWeight,
    float_inputs: Call,
    inputs: Call,
    draw: Callable[[Tensor], list[Tensor]],
) -> tuple[list[Use], list[Tensor], list[Tensor]]:
    """One batch: a weight's operations, and of each Jᵀr [B, C, positions] and the probes' Jᵀv [probes, B, C, ...]."""
    uses: list[Use] = []

    def watch(_: str, use: Use) -> Tensor:
        uses.append(use)
        if layer.n_uses > 1:  # each may be behind another
            use.x, y = use.x.detach().clone(), use.y
            use.y = torch.zeros_like(y).requires_grad_()
            return y + use.y
        use.x, use.y = use.x.detach(), use.y.detach().requires_grad_()
        return use.y.clone()  # autograd forbids an in-place activation on a leaf

    with torch.enable_grad(), Watch({"": layer.weight}, watch):
        z = only_tensor(inputs.copy().on(block), block)
    with torch.no_grad():
        residual = only_tensor(float_inputs.copy().on(float_block), float_block) - z
    if not z.requires_grad:
        raise NetworkError("no gradient reaches it from its block's output, under no_grad or a checkpoint, say")
    outputs = [use.y for use in uses]
    vjps = [torch.autograd.grad(z, outputs, v, retain_graph=True) for v in [residual, *draw(z)]]
    each = [[use.positions_last(vjp) for vjp in own] for use, own in zip(uses, zip(*vjps, strict=True), strict=True)]
    return uses, [own[0] for own in each], [torch.stack(own[1:]) for own in each]
