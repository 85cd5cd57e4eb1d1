"""Learnable logarithmic rounding (LLR): the loop over one block (DESIGN section 4).

Of everything in the block only α is learned, and biases where images are kept back to judge them by. A step softens
every layer's weight, runs the block on some of the captured inputs and compares with the float block's outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from logart import ranks
from logart.errors import NetworkError, NonFiniteError
from logart.quantization.activation_quantizer import quantizers
from logart.quantization.best_codes import BestCodes
from logart.quantization.block_loss import Loss
from logart.quantization.cache import Captured
from logart.quantization.capture import Call, only_tensor
from logart.quantization.dbs import wide
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.recorded import Recorded
from logart.quantization.settings import Settings

LEARNING_RATE_FLOOR = 0.3  # of its start, where the cosine ends
LOOKS = 10  # at the error on images kept back, evenly spaced
BIAS_RATE = 0.1  # learning rate of a layer's biases over that of α, as a share of their root mean square


@dataclass(frozen=True)
class BlockReport:
    """How one block's learning went.

    Attributes:
        name: the block's name in the network.
        error_before, error_learned: reconstruction error before and after LLR, over all captured images or, behind
            the closed form, over those held out of both.
        kept: "learned", or "before" where learning brought no improvement and was reverted.
        losses: reconstruction loss of some steps, evenly spaced, without the penalty.
        capture_seconds: time to capture inputs and targets, importance included.
        learning_seconds: time to learn from them.
    """

    name: str
    error_before: float
    error_learned: float
    kept: str
    losses: tuple[float, ...]
    capture_seconds: float = 0.0
    learning_seconds: float = 0.0


def penalty_exponent(step: int, config: Settings) -> float | None:
    """β of one step: None (no penalty) during the warm-up, then linear from b_start to b_end."""
    start = config.warmup * config.iters
    if step < start or config.rrweight == 0:
        return None
    progress = (step - start) / max(config.iters - 1 - start, 1)
    return config.b_start + (config.b_end - config.b_start) * progress


def learning_rate(step: int, config: Settings) -> float:
    """Cosine from lr down to 0.3·lr."""
    cosine = (1 + math.cos(math.pi * step / max(config.iters, 1))) / 2
    return config.lr * (LEARNING_RATE_FLOOR + (1 - LEARNING_RATE_FLOOR) * cosine)


def learn_rounding(
    name: str,
    block: nn.Module,
    layers: list[QuantizedWeight],
    inputs: Captured,
    targets: Captured,
    config: Settings,
    loss: Loss,
    progress: Callable[[int, float], None] = lambda step, value: None,
    float_inputs: Captured | None = None,
    starts: list[Tensor] | None = None,
    judge: tuple[Captured, Captured] | None = None,
) -> BlockReport:
    """Learn the rounding of one block's layers; they hold codes before and after.

    Args:
        name: the block's name, for messages.
        block: is called with batches of `inputs`; its parameters need no gradient.
        layers: the quantized layers inside, with codebooks and codes.
        inputs: the block's calls for n images, on which its error is measured.
        targets: [n, ...] what the float block gave.
        loss: from (output, target) to a scalar.
        progress: called after each step with the step's number and its reconstruction loss.
        float_inputs: the float block's. If given, each element of a step's input is drawn: from
            `inputs` with probability `config.drop_prob`, else from here (QDrop, Wei et al. 2022).
        starts: the layers' targets, see `QuantizedWeight.start_learning`; if given, learning goes on from the codes.
        judge: inputs and targets of other images. If given, biases are learned too, and of `LOOKS` moments the one
            stands whose codes and biases have the least error on these, if it is no larger than before. Without it,
            the codes at the end stand if their error on the images learned from is no larger than before.

    Raises:
        NetworkError: the loss is not finite; the message names the block, the step and the image.
    """
    best = BestCodes(block, layers, judge or (inputs, targets), loss, config.batch_size)
    draw = Batches(inputs, float_inputs, config)
    for layer, start in zip(layers, starts or itertools.repeat(None), strict=False):
        layer.start_learning(start)
    look = None if judge is None else best.look
    losses = _learn(name, block, layers, draw, targets, config, loss, progress, look)
    best.look()
    best.restore()
    return BlockReport(name, best.error_before, best.error, best.kept, losses)


class Batches:
    """Random batches of a block's captured inputs, mixed element by element where there are float ones.

    All ranks draw the same images; each works on those that it has.
    """

    def __init__(self, inputs: Captured, float_inputs: Captured | None, config: Settings) -> None:
        self._inputs, self._float_inputs, self._config = inputs, float_inputs, config
        self._order = torch.Generator().manual_seed(config.seed)
        self._mix = torch.Generator(inputs.device).manual_seed(config.seed)

        self.images = inputs.images
        self._place = {image: place for place, image in enumerate(inputs.images)}

    def draw(self) -> tuple[Tensor, Call]:
        """Where those of the images drawn lie that this rank has, [≤ B] int64, and what the block is called with."""
        drawn = torch.randint(self._inputs.total, (self._config.batch_size,), generator=self._order).tolist()
        places = [place for place, image in enumerate(drawn) if image in self._place]
        chosen = torch.tensor([self._place[drawn[place]] for place in places], dtype=torch.int64)
        call = self._inputs[chosen] if places else self._inputs[:0]
        if self._float_inputs is None:
            return chosen, call
        exact = self._float_inputs[chosen] if places else self._float_inputs[:0]
        return chosen, tree_map(partial(self._mixed, places, iter(self._inputs.rows)), call, exact)

    @contextmanager
    def mixing(self, block: nn.Module) -> Iterator[None]:
        """While the context lasts, quantizers of activations in the block mix as its inputs do (QDrop)."""
        found = [] if self._float_inputs is None else list(quantizers(block).values())
        try:
            for quantizer in found:
                quantizer.mix = self._config.drop_prob, self._mix
            yield
        finally:
            for quantizer in found:
                quantizer.mix = None

    @property
    def generators(self) -> list[torch.Generator]:
        """What quantizers of activations draw from while they mix."""
        return [self._mix] if self._float_inputs is not None else []

    def some(self, call: Call, places: slice) -> Call:
        """What was drawn, for some of the images drawn."""
        return self._inputs.of_images(call, places)  # type: ignore[no-any-return]

    def _mixed(self, places: list[int], rows: Iterator[int], quantized: Any, exact: Any) -> Any:
        if not isinstance(quantized, Tensor):
            return quantized
        each, shape = next(rows), list(quantized.shape)
        if each:
            shape[0] = each * self._config.batch_size
        uniform = torch.rand(shape, generator=self._mix, device=quantized.device)
        if each and len(places) < self._config.batch_size:
            uniform = uniform.unflatten(0, (-1, each))[places].flatten(0, 1)
        return torch.where(uniform < self._config.drop_prob, quantized, exact)


def _learn(
    name: str,
    block: nn.Module,
    layers: list[QuantizedWeight],
    batches: Batches,
    targets: Captured,
    config: Settings,
    loss: Loss,
    progress: Callable[[int, float], None],
    look: Callable[[], None] | None,
) -> tuple[float, ...]:
    alphas = [layer.soft.alpha for layer in layers if layer.soft is not None]
    half = any(layer.rows.dtype.itemsize < 4 for layer in layers)
    biases = [] if half or look is None else _own_biases(layers)
    rates = [1.0, *(BIAS_RATE * float(bias.detach().square().mean().sqrt()) for bias in biases)]
    groups: list[dict[str, Any]] = [{"params": alphas}, *({"params": [bias]} for bias in biases)]
    optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True)
    losses: list[float] = []
    every, looks = max(config.iters // 100, 1), max(config.iters // LOOKS, 1)

    def part_loss(call: Call, target: Tensor) -> Tensor:
        """The part of a batch's loss, a mean over its images, that some of them make."""
        if not len(target):  # a rank may have none
            return alphas[0].new_zeros(())
        share = len(target) / config.batch_size
        with batches.mixing(block):
            output = only_tensor(call.on(block), block)
        return loss(wide(output), wide(target)) * share

    def slope(call: Call, target: Tensor, beta: float | None) -> tuple[Tensor, list[Tensor]]:
        """The part of a batch's loss, and the gradients of what is learned, penalty included, of all of it."""
        penalty = torch.stack([layer.update_soft_weight(beta) for layer in layers]).sum()
        reconstruction = part_loss(call, target)
        if not losses and len(target):
            _check_gradients(name, layers, alphas, reconstruction)
        whole = reconstruction + config.rrweight / ranks.size() * penalty
        found = gradients(whole, [*alphas, *biases], half)
        for layer in layers:  # no autograd graph of this step may be there when the next is recorded
            layer.soft_weight = layer.soft_weight.detach()
        return reconstruction.detach(), found

    recorded = Recorded(slope, alphas[0].device, batches.generators)
    try:
        for step in range(config.iters):
            chosen, call = batches.draw()
            target = targets[chosen]
            reconstruction, slopes = recorded(call, target, penalty_exponent(step, config))
            value = float(ranks.all_sum(reconstruction.clone()))
            if not math.isfinite(value):  # found before it spoils α, while one image can be told from the others
                drawn = [batches.images[place] for place in chosen.tolist()]
                raise _non_finite(name, step, value, lambda i: part_loss(batches.some(call, i), target[i]), drawn)  # noqa: B023
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(step, config)
            for each, of_loss in zip([*alphas, *biases], slopes, strict=True):
                each.grad = of_loss
            optimizer.step()
            if look is not None and (step + 1) % looks == 0 and step + 1 < config.iters:
                look()
            if step % every == 0 or step == config.iters - 1:
                losses.append(value)
                progress(step + 1, value)
    finally:
        for layer in layers:
            layer.finish_learning()
        for bias in biases:
            bias.requires_grad_(False).grad = None
    return tuple(losses)


def _own_biases(layers: list[QuantizedWeight]) -> list[Tensor]:
    """Of each layer that has one a bias to be learned, no longer shared with the float network."""
    learned: list[Tensor] = []
    for layer in layers:
        if layer.bias is not None:
            layer.set_bias(layer.bias.detach().clone())
            learned.append(layer.bias.requires_grad_())
    return learned


def gradients(loss: Tensor, learned: Sequence[Tensor], half: bool) -> list[Tensor]:
    """The gradients of what is learned, of a loss that is summed over ranks; where they overflow half precision on
    their way, of a smaller loss, made larger again.
    """
    for scale in (1.0, 2.0**-8, 2.0**-16) if half else (1.0,):
        found: Sequence[Tensor] = [torch.zeros_like(each) for each in learned]
        if loss.requires_grad:
            found = torch.autograd.grad(loss * scale, learned, retain_graph=half, materialize_grads=True)
        found = [ranks.all_sum(gradient) for gradient in found]
        if not half or all(gradient.isfinite().all() for gradient in found):
            break
    return [gradient / scale for gradient in found]


def _check_gradients(name: str, layers: list[QuantizedWeight], alphas: Sequence[Tensor], loss: Tensor) -> None:
    """Raise where the block's forward cuts the gradient, so that nothing would be learned."""
    found: Sequence[Tensor | None] = [None] * len(alphas)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, alphas, retain_graph=True, allow_unused=True)
    cut = [i for i, gradient in enumerate(found) if gradient is None]
    if cut:
        shapes = " and ".join(str(list(layers[i].shape)) for i in cut[:2])
        raise NetworkError(
            f"block {name}: no gradient reaches {len(cut)} of its {len(layers)} layers (weights {shapes}), under"
            " no_grad or a reentrant checkpoint, say; expected --rounding compensated or a forward that keeps gradients"
        )


def _non_finite(name: str, step: int, value: float, loss: Callable[[slice], Tensor], drawn: list[int]) -> NetworkError:
    """What to raise when a batch's loss is not finite; `loss` gives that of a part of the images `drawn`."""
    message = f"block {name}: the loss at step {step} is {value}"
    bad = [image for place, image in enumerate(drawn) if not loss(slice(place, place + 1)).isfinite()]
    for image in (image for of_rank in ranks.gather(bad[:1]) for image in of_rank):
        return NonFiniteError(f"{message}, because of calibration image {image}", image)
    return NetworkError(message)
