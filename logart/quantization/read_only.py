"""A weight that is made anew whenever it is read: writing into it would be lost, and is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_IN_PLACE = ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
_WRITES = [
    "__setitem__",
    *(f"__i{name}__" for name in _IN_PLACE),
    *(name for name in dir(Tensor) if name.endswith("_") and name[0] != "_" and name != "requires_grad_"),
]
_VIEWS = (
    "__getitem__", "as_strided", "chunk", "detach", "diagonal", "expand", "expand_as", "flatten", "movedim", "narrow",
    "permute", "reshape", "select", "split", "squeeze", "swapaxes", "t", "tensor_split", "transpose", "unbind",
    "unflatten", "unsqueeze", "view", "view_as",
)  # fmt: skip
_VIEWS_AS_PROPERTIES = ("T", "mT", "data")


class ReadOnlyWeight(Tensor):
    """A tensor whose methods do not write, nor those of its views; all that is computed of it is plain.

    It has no `__torch_function__` of its own, which torch's fused attention would not run with.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        'a weight of a network loaded with dequantize="on-the-fly" cannot be written to, its codes are all there is; '
        'expected a change of to_float(network), or dequantize="once"'
    )


def _viewing(get: Callable[..., Any]) -> Callable[..., Any]:
    def view(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = get(self, *args, **kwargs)
        if isinstance(result, tuple | list):
            return type(result)(each.as_subclass(ReadOnlyWeight) for each in result)
        return result.as_subclass(ReadOnlyWeight) if _shares_memory(self, result) else result

    return view


def _shares_memory(tensor: Tensor, other: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


for _name in _WRITES:
    setattr(ReadOnlyWeight, _name, _refuse)
for _name in _VIEWS:
    setattr(ReadOnlyWeight, _name, _viewing(getattr(Tensor, _name)))
for _name in _VIEWS_AS_PROPERTIES:
    setattr(ReadOnlyWeight, _name, property(_viewing(getattr(Tensor, _name).__get__), _refuse))
