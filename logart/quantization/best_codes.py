"""Of several roundings of one block, the one with the least error on some images."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from logart import ranks
from logart.quantization.block_loss import Loss
from logart.quantization.cache import Captured
from logart.quantization.capture import only_tensor
from logart.quantization.dbs import wide
from logart.quantization.quantized_weight import QuantizedWeight


@torch.no_grad()
def block_error(block: nn.Module, inputs: Captured, targets: Captured, loss: Loss, batch_size: int) -> float:
    """The mean loss of the block, as it rounds now, over the captured images of all ranks."""
    total = 0.0
    for start in range(0, len(inputs), batch_size):
        batch = slice(start, min(start + batch_size, len(inputs)))
        output = only_tensor(inputs[batch].copy().on(block), block)
        total += float(loss(wide(output), wide(targets[batch]))) * (batch.stop - batch.start)
    total, count = ranks.all_sum(torch.tensor([total, len(inputs)], dtype=torch.float64)).tolist()
    return total / count


class BestCodes:
    """The codes and biases, among those looked at, with which the block has the least error on some images."""

    def __init__(
        self, block: nn.Module, layers: list[QuantizedWeight], judged: tuple[Captured, Captured], loss: Loss, size: int
    ) -> None:
        self._layers = layers
        self._measure = partial(block_error, block, *judged, loss, size)
        self.error_before, self.error, self.kept = self._measure(), math.inf, "before"
        self._held = self._now()

    @torch.no_grad()
    def look(self) -> None:
        """Compare the layers as they would round now with the best so far; of equals the later counts."""
        for layer in self._layers:
            layer.harden_soft_weight()
        error = self._measure()
        if error <= min(self.error, self.error_before):
            self._held, self.kept = self._now(), "learned"
        self.error = min(self.error, error)

    def _now(self) -> list[tuple[Tensor, Tensor | None]]:
        biases = [None if layer.bias is None else layer.bias.detach().clone() for layer in self._layers]
        return list(zip([layer.codes_now() for layer in self._layers], biases, strict=True))

    def restore(self) -> None:
        """Give the layers the best."""
        for layer, (codes, bias) in zip(self._layers, self._held, strict=True):
            layer.set_codes(codes)
            if layer.bias is not None and bias is not None and not torch.equal(layer.bias, bias):
                layer.set_bias(bias)
