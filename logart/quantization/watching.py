"""Seeing the linear operations that weights enter, while a network runs, wherever they are called."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from logart.errors import NetworkError
from logart.quantization.capture import Call
from logart.quantization.input_quantized import on_levels
from logart.quantization.multihead import attention
from logart.quantization.operations import Use, use_of


class Places:
    """Tells which of some named tensors another one is, or is a view of."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._named = {id(t): (name, t) for name, t in named.items()}
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in named.items() if t.data_ptr())
        self._starts, self._spans = [span[0] for span in spans], spans

    def name_of(self, tensor: Any) -> str | None:
        """The name; None where it lies in none of them."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.numel():
            return None
        if id(tensor) in self._named:
            return self._named[id(tensor)][0]
        address = tensor.data_ptr()  # 0 where nobody can know it
        at = bisect_right(self._starts, address) - 1
        return self._spans[at][2] if at >= 0 and address < self._spans[at][1] else None


class Watch(TorchFunctionMode):
    """While it is active, each linear operation that a weight enters is shown.

    Args:
        weights: those looked for, by name.
        see: is given the name and the operation once it has run; what it gives, if anything, takes the output's place.
    """

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[str, Use], Tensor | None]) -> None:
        super().__init__()
        self._places, self._see = Places(weights), see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            return attention(self.call, self._within, *args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function gives, shown where it is such an operation."""
        args, kwargs = on_levels(func, args, kwargs)
        use = use_of(func, args, kwargs, self._within)
        result = func(*args, **kwargs)
        if use is None:
            return result
        use.y = result
        name = self._places.name_of(use.weight)
        assert name is not None
        seen = self._see(name, use)
        return result if seen is None else seen

    def _within(self, tensor: Any) -> bool:
        return self._places.name_of(tensor) is not None


class _Reached(Exception):
    """Raised to end a forward that has gone as far as needed."""


def uses_of(block: nn.Module, weight: Tensor, call: Call, count: int = 1) -> list[Use]:
    """The operations that a weight enters when a block is called, which runs no further than to one that is alone.

    Args:
        weight: as it is read now.
        count: how many operations there are for two images; of several there may be more for more images.

    Raises:
        NetworkError: there is none.
    """
    uses: list[Use] = []

    def see(_: str, use: Use) -> None:
        if count > 1:  # what follows may work in place
            use.x, use.y = use.x.clone(), use.y.clone()
        uses.append(use)
        if count == 1:
            raise _Reached

    try:
        with Watch({"": weight}, see):
            call.copy().on(block)
    except _Reached:
        pass
    if not uses:
        raise NetworkError("the forward pass reached no operation with a weight")
    return uses
