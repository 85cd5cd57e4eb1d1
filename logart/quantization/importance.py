"""The perturbation Hessian: how much the network's decision minds a change of each element of a block's output.

At the float network the KL divergence to its own decision is zero and so is its gradient. Moved by εv, the output sees
the gradient ε·Hv, H the Hessian; the importance is the absolute value of that, averaged over images (APHQ-ViT, Wu et
al. 2025, by the difference of two gradients, of which one is zero here). Two things decide whether it means anything:

* v is a random sign for every element. With v = 1, all elements moved alike, a transformer has Hv = 0 but for rounding:
  the layer norm that reads the output subtracts just that shift.
* At ε = 1e-6 the gradient drowns in the rounding of float32, so the network runs in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from logart.errors import NetworkError
from logart.quantization.capture import only_tensor
from logart.quantization.clone import clone_sharing
from logart.quantization.signs import BatchSigns
from logart.ranks import all_sum, own_batches

PERTURBATION = 1e-6
IMPORTANCE_IMAGES = 256  # an average over images settles long before LLR's 1,024 (docs/experiments.md)


class PerturbationImportance:
    """Importances of the outputs of a network's blocks, one block at a time.

    One pass over the images in all for the float decision, and one, with a backward from the logits to the block, for
    every block asked for: a block's v has its own way to the logits and back. Held are the network in float64 and the
    logits, no block's outputs.

    Args:
        model: the float network, in eval mode; it is not changed.
        images: [n, C, H, W].
        temperature: T of the softmax.
        batch_size, device: of each forward.
        seed: of the signs v.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, temperature: float, batch_size: int, device: torch.device, seed: int = 0
    ) -> None:
        self._model = clone_sharing(model).double()
        self._images, self._batch_size, self._device = images, batch_size, device
        self._temperature, self._seed = temperature, seed
        self._own = own_batches(len(images), batch_size)
        with torch.no_grad():
            logits = [self._model(images[own.start : own.stop].to(device).double()) for own in self._own]
        self._decisions = [F.log_softmax(of / temperature, dim=1) for of in logits]

    def of(self, name: str) -> Tensor:
        """The importance of each element of the output of the module called `name`: [1, ...] float32, of mean 1.

        Raises:
            ValueError: the gradients are not finite.
        """
        block = self._model.get_submodule(name)
        signs = BatchSigns(self._seed, len(self._images), self._batch_size)
        total: Tensor | None = None
        for own, decision in zip(self._own, self._decisions, strict=True):
            x = self._images[own.start : own.stop].to(self._device).double()
            change = self._gradient(block, x, decision, partial(signs.of, own)).abs().sum(0, keepdim=True)
            total = change if total is None else total + change
        assert total is not None
        total = all_sum(total)
        mean = total.mean()
        if not torch.isfinite(mean):
            raise NetworkError(f"block {name}: the gradients behind its importance are not finite")
        # Nothing downstream minds this output: then every element counts the same.
        return (total / mean if mean > 0 else torch.ones_like(total)).float()

    def _gradient(
        self, block: nn.Module, x: Tensor, decision: Tensor, draw: Callable[[Tensor], list[Tensor]]
    ) -> Tensor:
        """The gradient of ΣKL by the block's output [B, ...] at +εv; `draw` gives [v] for an output."""
        seen: list[Tensor] = []

        def perturb(_: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
            output = only_tensor(outputs, block)
            seen.append((output + PERTURBATION * draw(output)[0]).detach().requires_grad_())
            # Clones: autograd forbids an operation in place on a leaf.
            return tree_map_only(Tensor, lambda _: seen[0].clone(), outputs)

        handle = block.register_forward_hook(perturb)
        try:
            with torch.enable_grad():
                outputs = F.log_softmax(self._model(x.clone()) / self._temperature, dim=1)
        finally:
            handle.remove()
        divergence = F.kl_div(outputs, decision, reduction="sum", log_target=True)
        found = torch.autograd.grad(divergence, seen[0], allow_unused=True)[0] if divergence.requires_grad else None
        if found is None:
            name = next(name for name, module in self._model.named_modules() if module is block)
            raise NetworkError(f"block {name}: its output does not reach the network's by a gradient")
        return found
