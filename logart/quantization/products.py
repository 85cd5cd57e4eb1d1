"""Products of two activations, attention's say, between quantized operands, whichever module multiplies them.

A module in whose forward activations are multiplied with each other runs this forward under a function mode (its class
sees to that, see `layers`). The mode counts products and puts the operands of those that have quantizers on levels;
attention's fused functions are done as the two products that they are. `product_quantizers` finds such modules.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from logart.quantization.multihead import attention, has_masks

Place = tuple[int, int]  # which product of a module's forward, and whether the left (0) or the right (1) operand
_MATMULS = {
    torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul, torch.bmm, Tensor.bmm, torch.baddbmm,
    Tensor.baddbmm, torch.einsum,
}  # fmt: skip
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
# Where what softmax gives is the left operand of the second product.
_IN_ATTENTION: dict[Place, str] = {(0, 0): "q", (0, 1): "k", (1, 0): "attn", (1, 1): "v"}
_PLACES = {name: place for place, name in _IN_ATTENTION.items()}


def operand_name(place: Place, in_attention: bool) -> str:
    """What the quantizer of an operand is called in its module."""
    plain = f"{('left', 'right')[place[1]]}{place[0]}"
    return f"{_IN_ATTENTION.get(place, plain) if in_attention else plain}_quantizer"


def operand_place(name: str) -> Place | None:
    """The place of a name that `operand_name` gives; None for any other."""
    own = name.removesuffix("_quantizer")
    if own == name:
        return None
    found = re.fullmatch("(left|right)([0-9]{1,4})", own)
    return _PLACES.get(own) if found is None else (int(found[2]), int(found[1] == "right"))


class Products(TorchFunctionMode):
    """Sees the products of two tensors one by one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MATMULS:
            return self.multiply(func, args, kwargs)
        if func in _SOFTMAX:
            return self.softmax(partial(func, *args, **kwargs))
        if func is F.scaled_dot_product_attention and not kwargs.get("enable_gqa"):
            return self._attend(*args, **kwargs)[0]
        if func is F.multi_head_attention_forward and not has_masks(*args, **kwargs):
            return attention(_plainly, lambda _: True, *args, **kwargs, attend=self._attend)  # type: ignore[misc]
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            self.refuse("attention is called with masks or groups that are not spelled out")
        return func(*args, **kwargs)

    def multiply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a product gives."""
        raise NotImplementedError

    def softmax(self, of: Callable[[], Any]) -> Any:
        """What softmax gives."""
        return of()

    def refuse(self, why: str) -> None:
        """A product is not seen."""

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """softmax(q·kᵀ·scale + mask)·v [..., N, width], and what softmax gives."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = self.multiply(torch.matmul, (query, key.transpose(-2, -1)), {}) * scale
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = self.softmax(partial(torch.softmax, scores, -1))
        return self.multiply(torch.matmul, (F.dropout(weights, dropout_p), value), {}), weights


def _plainly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def operands(leaves: list[Any]) -> list[int]:
    """Which of a product's arguments are multiplied: the last two tensors, by index."""
    return [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)][-2:]


class OnLevels(Products):
    """While a module runs, the operands of its products are put on the levels of its quantizers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        found = {operand_place(name): quantizer for name, quantizer in module._modules.items()}
        self._quantizers = {place: q for place, q in found.items() if place is not None and q is not None}
        self._count = 0

    def multiply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, how = tree_flatten((args, kwargs))
        at = operands(leaves)
        for side, index in enumerate(at):
            quantizer = self._quantizers.get((self._count, side))
            leaves[index] = leaves[index] if quantizer is None else quantizer(leaves[index])
        self._count += len(at) == 2
        args, kwargs = tree_unflatten(leaves, how)
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raise ValueError where there were fewer products than have quantizers: another release's, or torch.fx's."""
        expected = 1 + max(product for product, _ in self._quantizers)
        if self._count < expected:
            raise ValueError(f"{self._count} products of two tensors were seen; expected {expected} to be quantized")
