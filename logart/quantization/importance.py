"""The perturbation Hessian: how much the network's decision minds a change of each element of a block's output.

At the float network the KL divergence to its own decision is zero and so is its gradient. Moved by ±εv, the output sees
gradients that differ by 2ε·Hv, H the Hessian; the importance is the absolute value of that, averaged over images
(APHQ-ViT, Wu et al. 2025). Two things decide whether it means anything:

* v is a random sign for every element. With v = 1, all elements moved alike, a transformer has Hv = 0 but for rounding:
  the layer norm that reads the output subtracts just that shift.
* At ε = 1e-6 the difference drowns in the rounding of float32, so the network runs in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from logart.errors import NetworkError
from logart.quantization.capture import only_tensor
from logart.quantization.clone import clone_sharing

PERTURBATION = 1e-6
IMPORTANCE_IMAGES = 256  # an average over images settles long before LLR's 1,024 (docs/experiments.md)


class PerturbationImportance:
    """Importances of the outputs of a network's blocks, one block at a time.

    One pass over the images in all for the float decision, and two passes, each with a backward from the logits to the
    block, for every block asked for. Held are the network in float64 and the logits, no block's outputs.

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
        with torch.no_grad():
            logits = torch.cat([self._model(x.to(device).double()) for x in images.split(batch_size)])
        self._decision = F.log_softmax(logits / temperature, dim=1)

    def of(self, name: str) -> Tensor:
        """The importance of each element of the output of the module called `name`: [1, ...] float32, of mean 1.

        Raises:
            ValueError: the gradients are not finite.
        """
        block = self._model.get_submodule(name)
        signs = torch.Generator().manual_seed(self._seed)
        total: Tensor | None = None
        for start in range(0, len(self._images), self._batch_size):
            batch = slice(start, start + self._batch_size)
            x = self._images[batch].to(self._device).double()
            n_changed_codes = self._difference(block, x, self._decision[batch], signs).abs().sum(0, keepdim=True)
            total = n_changed_codes if total is None else total + n_changed_codes
        assert total is not None
        mean = total.mean()
        if not torch.isfinite(mean):
            raise NetworkError(f"block {name}: the gradients behind its importance are not finite")
        # Nothing downstream minds this output: then every element counts the same.
        return (total / mean if mean > 0 else torch.ones_like(total)).float()

    def _difference(self, block: nn.Module, x: Tensor, decision: Tensor, signs: torch.Generator) -> Tensor:
        """The gradient of ΣKL by the block's output [B, ...] at +εv less that at -εv."""
        state = signs.get_state()
        up = self._gradient(block, x, decision, PERTURBATION, signs)
        signs.set_state(state)
        return up - self._gradient(block, x, decision, -PERTURBATION, signs)

    def _gradient(
        self, block: nn.Module, x: Tensor, decision: Tensor, perturbation: float, signs: torch.Generator
    ) -> Tensor:
        seen: list[Tensor] = []

        def perturb(_: nn.Module, args: tuple[Any, ...], given: Any) -> Any:
            output = only_tensor(given, block)
            v = torch.randint(0, 2, output.shape, generator=signs).mul_(2).sub_(1).to(output)
            seen.append((output + perturbation * v).detach().requires_grad_())
            # Clones: autograd forbids an operation in place on a leaf.
            return tree_map_only(Tensor, lambda _: seen[0].clone(), given)

        handle = block.register_forward_hook(perturb)
        try:
            with torch.enable_grad():
                given = F.log_softmax(self._model(x.clone()) / self._temperature, dim=1)
        finally:
            handle.remove()
        divergence = F.kl_div(given, decision, reduction="sum", log_target=True)
        found = torch.autograd.grad(divergence, seen[0], allow_unused=True)[0] if divergence.requires_grad else None
        if found is None:
            name = next(name for name, module in self._model.named_modules() if module is block)
            raise NetworkError(f"block {name}: its output does not reach the network's by a gradient")
        return found
