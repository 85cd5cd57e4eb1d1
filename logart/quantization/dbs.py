"""Dynamic base search (DBS) over the layers of one block: builds each measure from data and lets `search` choose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from logart import ranks
from logart.errors import NetworkError
from logart.grids.grid import ErrorFunction
from logart.grids.measures import BlockSensitivity, OutputMoments, OutputResidual, moments_are_cheaper
from logart.grids.search import choose_codebook, squared_error
from logart.quantization.blocks import Block
from logart.quantization.cache import Captured
from logart.quantization.capture import Call, only_tensor, run_to
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.settings import SearchMethod, Settings
from logart.quantization.signs import BatchSigns
from logart.quantization.surgery import quantized_layers

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
        data: the block's calls in both networks, in this order; None when the measure needs none.
    """
    options = config.grid_options
    for name in block.layers:
        layer = quantized_layers(quantized)[name]
        error: ErrorFunction = squared_error
        if data is not None:
            size = config.search_batch_size
            blocks = reference.get_submodule(block.name), quantized.get_submodule(block.name)
            float_layer = reference.get_submodule(name)
            if config.search_method is SearchMethod.LAYER_WISE:
                count = config.grid.n_candidates(layer.n_bits, options.scale_search)
                measured = layer_error(*blocks, float_layer, layer, *data, candidates=count, batch_size=size)
            else:
                try:
                    sensitivity = block_sensitivity(*blocks, layer, *data, batch_size=size, seed=config.seed)
                except NetworkError as error_seen:
                    raise NetworkError(f"block {block.name}, layer {name}: {error_seen}") from error_seen
                measured = summed(sensitivity.error)
            error = per_codebook(measured, layer)
        watched = FiniteErrors(name, error)
        codebook = choose_codebook(layer.rows, config.grid, layer.n_bits, error=watched, options=options)
        watched.check()
        layer.set_codebook(codebook)


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
    float_layer: nn.Module,
    layer: QuantizedWeight,
    float_inputs: Captured,
    inputs: Captured,
    *,
    candidates: int,
    batch_size: int = 32,
) -> ErrorFunction:
    """The LW measure of one layer, from δ [C, K] to [C], for so many candidates; other arguments as `layer_moments`."""
    arguments = (float_block, block, float_layer, layer, float_inputs, inputs)
    groups, shape = getattr(layer.module, "groups", 1), layer.shape
    _, given = run_to(block, layer.module, inputs[:1])
    rows = inputs.total * given.numel() // shape[0]
    if moments_are_cheaper(candidates, rows, shape[0] // groups, shape[1:].numel()):
        return of_all_ranks(layer_moments(*arguments, batch_size=batch_size)).error
    return summed(layer_residual(*arguments, batch_size=batch_size).error)


@torch.no_grad()
def layer_residual(
    float_block: nn.Module,
    block: nn.Module,
    float_layer: nn.Module,
    layer: QuantizedWeight,
    float_inputs: Captured,
    inputs: Captured,
    *,
    batch_size: int = 32,
) -> OutputResidual:
    """The LW measure of one layer through its outputs; arguments as `layer_moments`."""
    fed, residual = [], []
    for start in range(0, len(inputs), batch_size):
        batch = slice(start, start + batch_size)
        _, wanted = run_to(float_block, float_layer, float_inputs[batch])
        x, given = run_to(block, layer.module, inputs[batch])
        fed.append(wide(x))
        residual.append(_positions_last(layer.module, wide(wanted) - wide(given)))
    x = torch.cat(fed)
    return OutputResidual(lambda delta: _apply(layer.module, x, delta), torch.cat(residual))


@torch.no_grad()
def layer_moments(
    float_block: nn.Module,
    block: nn.Module,
    float_layer: nn.Module,
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
        float_block, block: what holds the layer in the float network and in the one being quantized.
        float_inputs, inputs: the calls of both, for n images.
        shifted: take `shift` or, without it, the first rows' mean away from all; for moments that are to be `centred`.
        images: which of the images of all ranks; None is all.
    """
    module, weight = layer.module, layer.weight
    groups, elements = getattr(module, "groups", 1), weight[0].numel()
    moments = OutputMoments.zeros(groups, weight.shape[0], elements, weight.device)
    moments.shift = shift
    own = inputs.own(range(inputs.total) if images is None else images)
    for start in own[::batch_size]:
        batch = slice(start, min(start + batch_size, own.stop))
        _, wanted = run_to(float_block, float_layer, float_inputs[batch])
        x, given = run_to(block, module, inputs[batch])
        residual = _positions_last(module, wide(wanted) - wide(given))
        step = max(1, max(_PATCH_ELEMENTS // (groups * elements), 2 * elements) // residual.shape[2])
        for first in range(0, len(x), step):
            patches = unfold(module, wide(x[first : first + step]))
            if shifted and moments.shift is None:
                mean = patches.mean(1, dtype=torch.float64).to(patches)
                moments.shift = ranks.from_first(mean.cpu()).to(patches)
            part = residual[first : first + step].unflatten(1, (groups, -1))
            moments.add(patches, part.permute(1, 2, 0, 3).flatten(2).mT)
    if shifted and moments.shift is None:  # this rank has none of these images
        moments.shift = ranks.from_first(None).to(weight.device)
    return moments


def unfold(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows that a layer's weight is multiplied with.

    Args:
        layer: a Conv2d (any stride, padding, padding mode, dilation, groups) or Linear.
        x: its input, [B, Cin, H, W] or [B, ..., Cin].

    Returns:
        [groups, n, K], n = B·positions, K = the weight's elements per output channel.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    x = _padded(layer, x).contiguous()
    images, channels, *size = x.shape
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    positions = [(n - r - 1) // s + 1 for n, r, s in zip(size, reach, layer.stride, strict=True)]
    *strides, row, column = x.stride()
    windows = x.as_strided(
        (channels, *layer.kernel_size, images, *positions),
        (strides[1], layer.dilation[0] * row, layer.dilation[1] * column, strides[0])
        + (layer.stride[0] * row, layer.stride[1] * column),
        x.storage_offset(),
    )
    return windows.reshape(layer.groups, channels // layer.groups * prod(layer.kernel_size), -1).mT


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution's input with its padding made explicit."""
    if isinstance(layer, Conv2dSame):
        return pad_same(x, layer.kernel_size, layer.stride, layer.dilation)  # type: ignore[arg-type]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _positions_last(layer: nn.Module, y: Tensor) -> Tensor:
    """A layer's output as [B, C, positions]: channels are dimension 1 of a convolution's, the last of a linear's."""
    if isinstance(layer, nn.Conv2d):
        return y.flatten(2)
    return y.reshape(len(y), -1, y.shape[-1]).mT


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
    x, pulls, probes = [], [], []
    for images in ranks.own_batches(inputs.total, batch_size):
        own = inputs.own(images)
        batch, draw = slice(own.start, own.stop), partial(signs.of, images, draws=PROBES)
        seen, vjp, *along = _vjps(float_block, block, layer.module, float_inputs[batch], inputs[batch], draw)
        x.append(wide(seen))
        pulls.append(wide(vjp))
        probes.append(wide(torch.stack(along)))
    fed = torch.cat(x)
    return BlockSensitivity(lambda delta: _apply(layer.module, fed, delta), torch.cat(pulls), torch.cat(probes, dim=1))


def _vjps(
    float_block: nn.Module,
    block: nn.Module,
    layer: nn.Module,
    float_inputs: Call,
    inputs: Call,
    draw: Callable[[Tensor], list[Tensor]],
) -> list[Tensor]:
    """One batch: the layer's input, then Jᵀr and each probe's Jᵀv as [B, C, positions]; `draw` gives v."""
    seen: list[Tensor] = []

    def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.extend((args[0].detach(), output.detach().requires_grad_()))
        return seen[1].clone()  # autograd forbids an in-place activation on a leaf

    handle = layer.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            z = only_tensor(inputs.copy().on(block), block)
    finally:
        handle.remove()
    with torch.no_grad():
        residual = only_tensor(float_inputs.copy().on(float_block), float_block) - z
    if not z.requires_grad:
        raise NetworkError("no gradient reaches it from its block's output, under no_grad or a checkpoint, say")
    x, y = seen
    along = [residual, *draw(z)]
    pulls = [_positions_last(layer, torch.autograd.grad(z, y, v, retain_graph=True)[0]) for v in along]
    return [x, *pulls]


@torch.no_grad()
def _apply(layer: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """X̂δ: the layer's output for the weight δ [C, K] and no bias, [B, C, positions]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    x = x.to(torch.promote_types(x.dtype, weight.dtype))
    delta = delta.to(x.dtype).reshape(weight.shape)
    if isinstance(layer, nn.Conv2d):
        y = F.conv2d(_padded(layer, x), delta, None, layer.stride, 0, layer.dilation, layer.groups)
        return _positions_last(layer, y)
    return _positions_last(layer, F.linear(x, delta))
