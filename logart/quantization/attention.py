"""The products of attention between quantized operands: of known classes the forward is spelled out.

A class of timm's is known where its forward is: a subclass of ours then gives the same outputs (which is tried), with
a quantizer at queries, keys, values and what softmax gives. Whatever else multiplies activations stays float and is
named.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from logart.errors import one_line
from logart.quantization.activation_quantizer import ActivationQuantizer
from logart.quantization.folding import same_outputs

OPERANDS = ("q_quantizer", "k_quantizer", "attn_quantizer", "v_quantizer")  # in the order they run
_PRODUCTS = {
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm, torch.einsum,
    F.scaled_dot_product_attention, F.multi_head_attention_forward,
}  # fmt: skip


class _QuantizedProducts(nn.Module):
    """What the subclasses share: softmax(q·kᵀ·scale + bias)·v of quantized operands."""

    scale: float
    attn_drop: nn.Module
    q_quantizer: ActivationQuantizer
    k_quantizer: ActivationQuantizer
    attn_quantizer: ActivationQuantizer
    v_quantizer: ActivationQuantizer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """All [B, heads, N, width] -> [B, N, heads·width]; `bias` of the scores [B or 1, heads, N, N]."""
        scores = self.q_quantizer(q) @ self.k_quantizer(k).transpose(-2, -1) * self.scale
        weights = self.attn_drop((scores if bias is None else scores + bias).softmax(-1))
        return (self.attn_quantizer(weights) @ self.v_quantizer(v)).transpose(1, 2).flatten(2)


class QuantAttention(_QuantizedProducts, Attention):  # type: ignore[misc]
    """timm's attention of vision transformers, without a mask."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:  # type: ignore[override]
        if attn_mask is not None or any(more.values()) or getattr(self, "gate", None) is not None:
            raise ValueError("it is called with a mask or gated")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.attend(self.q_norm(q), self.k_norm(k), v)
        x = self.norm(x) if hasattr(self, "norm") else x
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


class QuantWindowAttention(_QuantizedProducts, WindowAttention):  # type: ignore[misc]
    """Swin's attention in windows."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._get_rel_pos_bias()
        if mask is not None:  # of each window of an image
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        return self.proj_drop(self.proj(self.attend(q, k, v, bias)))  # type: ignore[no-any-return]


# Exact types: a subclass may do in its forward what it likes.
ATTENTION: dict[type[nn.Module], type[nn.Module]] = {Attention: QuantAttention, WindowAttention: QuantWindowAttention}


def spell_out(module: nn.Module, n_bits: int) -> None:
    """Make a module of one of the known types one with quantized operands."""
    qkv = module.get_submodule("qkv")
    device = next(iter((*qkv.parameters(), *qkv.buffers()))).device
    for name in OPERANDS:
        quantizer = ActivationQuantizer(n_bits, device, after_softmax=name == "attn_quantizer")
        module.add_module(name, quantizer.train(module.training))
    module.__class__ = ATTENTION[type(module)]


def _undo(module: nn.Module) -> None:
    module.__class__ = next(known for known, ours in ATTENTION.items() if type(module) is ours)
    for name in OPERANDS:
        delattr(module, name)


@torch.no_grad()
def quantize_products(model: nn.Module, n_bits: int, blocks: Iterable[str], example: Any) -> list[tuple[str, str]]:
    """Put quantizers, which pass on what they are given, at the operands of the products of attention.

    Args:
        blocks: the names of what is calibrated as one; only what runs inside one can be.
        example: images that the model can run on.

    Returns:
        (name, reason) of every module in which two activations are still multiplied in float.
    """
    prefixes = tuple(f"{name}." if name else "" for name in blocks)
    reasons: dict[str, str] = {}
    target = model(example.clone())
    eps = max(torch.finfo(leaf.dtype).eps for leaf in tree_leaves(target) if isinstance(leaf, Tensor))
    for name, module in list(model.named_modules()):
        if type(module) not in ATTENTION:
            continue
        if not f"{name}.".startswith(prefixes):
            reasons[name] = "it is in no block"
            continue
        spell_out(module, n_bits)
        try:
            if same_outputs(model(example.clone()), target, eps**0.5):
                continue
            reasons[name] = "with its products spelled out the network gave other outputs"
        except Exception as error:  # of any type: another release's forward
            reasons[name] = one_line(error)[:120]
        _undo(module)
    with _Products(model) as products:
        model(example.clone())
    return [
        (name, reasons.get(name, f"{kind} is none of the known attention modules"))
        for name, kind in products.found.items()
    ]


class _Products(TorchFunctionMode):
    """Notes in which modules two activations are multiplied with each other, quantized operands left out.

    Attributes:
        found: the module's class by its name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._model, self._inside = model, [("", model)]
        self._handles: list[RemovableHandle] = []
        self._fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def __enter__(self) -> _Products:
        for name, module in self._model.named_modules():
            enter = module.register_forward_pre_hook(partial(self._enter, name))
            self._handles += [enter, module.register_forward_hook(self._leave, always_call=True)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, _: Any) -> None:
        self._inside.append((name, module))

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, module = self._inside[-1]
        if func in _PRODUCTS and not isinstance(module, _QuantizedProducts):
            operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if sum(t.untyped_storage().data_ptr() not in self._fixed for t in operands) > 1:
                self.found[name] = type(module).__name__
        return func(*args, **(kwargs or {}))
