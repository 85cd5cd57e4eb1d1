"""A weight that puts what it is multiplied with onto the levels of a quantizer, whichever function multiplies them.

Layers of torch's own that are run as modules quantize their input in a hook (`activation_quantizer.attach`). Any other
weight is a parameter that some function is given: reading it gives a tensor that knows its quantizer, as does what is
computed of it alone, a view say; a product with it, of the kinds that `operations` understands, is one with the levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from logart.grids.packing import is_exporting
from logart.quantization.multihead import attention
from logart.quantization.operations import is_wrapped, use_of

Quantize = Callable[[Tensor], Tensor]
_plainly = torch._C.DisableTorchFunction  # modes come before classes: here none is active any more


class InputQuantized(Tensor):
    """A weight that knows what quantizes the other operand of its products."""

    quantize: Quantize

    @staticmethod
    def of(weight: Tensor, quantize: Quantize) -> InputQuantized:
        """The weight, in the same memory; the quantizer may be one of several weights, and may see several products."""
        if is_exporting() and not torch.compiler.is_dynamo_compiling():  # whose tensors can be of no other class
            raise ValueError(
                "torch.export: inputs of weights that functions use are quantized; expected strict=True, or torch.jit"
            )
        with _plainly():
            marked = weight.as_subclass(InputQuantized)
        marked.quantize = quantize
        return marked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return attention(_call, _is_marked, *args, **kwargs)
        return _call(func, args, kwargs)


def _is_marked(tensor: Any) -> bool:
    return isinstance(tensor, InputQuantized)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = on_levels(func, args, kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with _plainly():
        result = func(*args, **kwargs)
    if len(tensors) == 1 and isinstance(tensors[0], InputQuantized):  # a view, or the weight in another type
        quantize = tensors[0].quantize
        return tree_map_only(Tensor, lambda tensor: InputQuantized.of(tensor, quantize), result)
    return result


def on_levels(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, in which what is multiplied with such a weight, if anything, is on levels."""
    marked = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, InputQuantized)]
    if len(marked) != 1:
        return args, kwargs
    with _plainly():
        use = use_of(func, args, kwargs, _is_marked)
        compiling = torch.compiler.is_compiling()  # which follows neither of these
        if use is None or (not compiling and is_wrapped(use.given)):
            return args, kwargs
        weight = marked[0] if compiling else marked[0].as_subclass(Tensor)
    x = marked[0].quantize(use.given)
    put: Callable[[Tensor], Tensor] = lambda t: x if t is use.given else weight if t is marked[0] else t  # noqa: E731
    return tree_map_only(Tensor, put, (args, kwargs))  # type: ignore[no-any-return]
