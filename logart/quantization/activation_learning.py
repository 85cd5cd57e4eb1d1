"""Learned steps of activation quantizers: what BRECQ and QDrop learn behind the rounding of a block's weights.

Learned is the logarithm of a step (TQT, Jain et al. 2020), so that one learning rate serves every scale; a step that is
to be a power of two is rounded to one in every forward, its gradient passing straight through. The gradient of the step
is LSQ's (`grids.activations.quantize_even`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from logart.grids.activations import ActScale, EvenGrid
from logart.quantization.activation_quantizer import ActivationQuantizer, block_quantizers
from logart.quantization.best_codes import block_error
from logart.quantization.block_loss import Loss
from logart.quantization.cache import Captured
from logart.quantization.capture import Call, only_tensor
from logart.quantization.dbs import wide
from logart.quantization.reconstruct import Batches, gradients
from logart.quantization.recorded import Recorded
from logart.quantization.settings import Settings

LEARNING_RATE = 0.01  # of log2 of a step, cosine-annealed to 0: 500 steps may halve or double it


@contextmanager
def _learning(found: Sequence[ActivationQuantizer], pow2: bool) -> Iterator[list[Tensor]]:
    """While the context lasts, steps are made of the tensors that are given: log2 of each, leaves of the gradient."""
    try:
        for quantizer in found:
            assert quantizer.step is not None
            quantizer.log_step, quantizer.pow2 = quantizer.step.log2().requires_grad_(), pow2
        yield [quantizer.log_step for quantizer in found if quantizer.log_step is not None]
    finally:
        for quantizer in found:
            quantizer.log_step = None


def learn_steps(
    block: nn.Module,
    inputs: Captured,
    targets: Captured,
    config: Settings,
    loss: Loss,
    progress: Callable[[int, float], None] = lambda step, value: None,
    float_inputs: Captured | None = None,
) -> bool:
    """Learn the steps of a block's activation quantizers, by the error of its output.

    Args:
        block: with quantizers that hold levels.
        inputs, targets, loss, progress, float_inputs: as for `reconstruct.learn_rounding`.

    Returns:
        Whether they stay: the error over all captured images is smaller than before.
    """
    found = [quantizer for quantizer in block_quantizers(block).values() if quantizer.step is not None]
    if not found:
        return False
    undo = [quantizer.snapshot() for quantizer in found]
    before = block_error(block, inputs, targets, loss, config.batch_size)
    batches = Batches(inputs, float_inputs, config)
    with _learning(found, config.actual_act_scale is ActScale.POW2) as logarithms, batches.mixing(block):
        optimizer = torch.optim.Adam(logarithms, lr=LEARNING_RATE)

        def slope(call: Call, target: Tensor) -> tuple[Tensor, list[Tensor]]:
            value = logarithms[0].new_zeros(())
            if len(target):  # a rank may have none
                output = wide(only_tensor(call.on(block), block))
                value = loss(output, wide(target)) * (len(target) / config.batch_size)
            return value.detach(), gradients(value, logarithms, half=False)

        recorded = Recorded(slope, logarithms[0].device, batches.generators)
        for step in range(config.iters_a):
            chosen, call = batches.draw()
            value, slopes = recorded(call, targets[chosen])
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / config.iters_a)) / 2
            for each, of_loss in zip(logarithms, slopes, strict=True):
                each.grad = of_loss
            optimizer.step()
            progress(step + 1, value.item())
        steps = [float(quantizer.current_step().detach()) for quantizer in found]
    for quantizer, learned in zip(found, steps, strict=True):
        grid = quantizer.even_grid
        if grid is not None and 0 < learned < math.inf:
            quantizer.set_even(EvenGrid(learned, grid.low, grid.high))
    after = block_error(block, inputs, targets, loss, config.batch_size)
    if not after < before:
        for restore in undo:
            restore()
    return after < before
