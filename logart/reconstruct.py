"""Learnable logarithmic rounding (LLR): the loop over one block (DESIGN section 4).

Of everything in the block only α is learned. A step softens every layer's weight, runs the block on some of the
captured inputs and compares with the float block's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from logart.config import QuantConfig
from logart.layers import QuantizedLayer
from logart.runtime import NetworkError

Loss = Callable[[Tensor, Tensor], Tensor]
LEARNING_RATE_FLOOR = 0.3  # of its start, where the cosine ends


@dataclass(frozen=True)
class BlockReport:
    """How one block's learning went.

    Attributes:
        name: the block's name in the network.
        error_nearest, error_learned: reconstruction error over all captured images, by plain rounding and by LLR.
        kept: "learned", or "nearest" where learning ended worse and was undone.
        losses: reconstruction loss of some steps, evenly spaced, without the penalty.
    """

    name: str
    error_nearest: float
    error_learned: float
    kept: str
    losses: tuple[float, ...]


def penalty_exponent(step: int, config: QuantConfig) -> float | None:
    """β of one step: None (no penalty) during the warm-up, then linear from b_start to b_end."""
    start = config.warmup * config.iters
    if step < start or config.rrweight == 0:
        return None
    progress = (step - start) / max(config.iters - 1 - start, 1)
    return config.b_start + (config.b_end - config.b_start) * progress


def learning_rate(step: int, config: QuantConfig) -> float:
    """Cosine from lr down to 0.3·lr."""
    cosine = (1 + math.cos(math.pi * step / max(config.iters, 1))) / 2
    return config.lr * (LEARNING_RATE_FLOOR + (1 - LEARNING_RATE_FLOOR) * cosine)


@torch.no_grad()
def block_error(block: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, batch_size: int) -> float:
    """The mean loss of the block, as it rounds now, over all captured images."""
    total = 0.0
    for start in range(0, len(inputs), batch_size):
        batch = slice(start, start + batch_size)
        # a clone: an in-place operation at the block's start must not reach the captured inputs
        total += float(loss(block(inputs[batch].clone()), targets[batch])) * len(inputs[batch])
    return total / len(inputs)


def learn_rounding(
    name: str,
    block: nn.Module,
    layers: list[QuantizedLayer],
    inputs: Tensor,
    targets: Tensor,
    config: QuantConfig,
    loss: Loss,
    progress: Callable[[int, float], None] = lambda step, value: None,
) -> BlockReport:
    """Learn the rounding of one block's layers; they hold codes before and after.

    Args:
        name: the block's name, for messages.
        block: runs on a batch of `inputs`; its parameters need no gradient.
        layers: the quantized layers inside, with codebooks and codes of plain rounding.
        inputs: [n, ...] what the block is fed.
        targets: [n, ...] what the float block gave.
        loss: from (output, target) to a scalar.
        progress: called after each step with the step's number and its reconstruction loss.

    Raises:
        ValueError: the loss is not finite; the message names the block and the step.
    """
    nearest_codes = [layer.codes for layer in layers]
    error_nearest = block_error(block, inputs, targets, loss, config.batch_size)
    losses = _learn(name, block, layers, inputs, targets, config, loss, progress)
    error_learned = block_error(block, inputs, targets, loss, config.batch_size)
    kept = "learned" if error_learned <= error_nearest else "nearest"
    if kept == "nearest":
        for layer, codes in zip(layers, nearest_codes, strict=True):
            assert codes is not None
            layer.set_codes(codes.reshape(layer.n_codebooks, -1))
    return BlockReport(name, error_nearest, error_learned, kept, losses)


def _learn(
    name: str,
    block: nn.Module,
    layers: list[QuantizedLayer],
    inputs: Tensor,
    targets: Tensor,
    config: QuantConfig,
    loss: Loss,
    progress: Callable[[int, float], None],
) -> tuple[float, ...]:
    alphas = [layer.start_learning().alpha for layer in layers]
    optimizer = torch.optim.Adam(alphas, lr=config.lr, fused=True)
    order = torch.Generator().manual_seed(config.seed)
    losses = []
    every = max(config.iters // 100, 1)
    try:
        for step in range(config.iters):
            chosen = torch.randint(len(inputs), (config.batch_size,), generator=order).to(inputs.device)
            beta = penalty_exponent(step, config)
            penalty = torch.stack([layer.soften(beta) for layer in layers]).sum()
            reconstruction = loss(block(inputs[chosen]), targets[chosen])
            optimizer.param_groups[0]["lr"] = learning_rate(step, config)
            optimizer.zero_grad()
            (reconstruction + config.rrweight * penalty).backward()
            optimizer.step()
            if step % every == 0 or step == config.iters - 1:
                losses.append(reconstruction.item())
                if not math.isfinite(losses[-1]):
                    raise NetworkError(f"block {name}: the loss at step {step} is {losses[-1]}")
                progress(step + 1, losses[-1])
    finally:
        for layer in layers:
            layer.finish_learning()
    return tuple(losses)
