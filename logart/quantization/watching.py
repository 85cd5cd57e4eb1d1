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


def attention(
    call: Callable[..., Any],
    is_weight: Callable[[Any], bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    **more: Any,
) -> Any:
    """`F.multi_head_attention_forward` with its projections as linear operations of their own, given to `call`.

    What lies between them is the function itself with identities as projections, which are exact. Where none of its
    projections is a weight looked for, the function runs as it is.
    """
    packed = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else (in_proj_weight,)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, weight: Any, bias: Any, out_weight: Any, out_bias: Any, **own: Any
    ) -> Any:
        return F.multi_head_attention_forward(
            q, k, v, embed_dim_to_check, num_heads, weight, bias, bias_k, bias_v, add_zero_attn, dropout_p,
            out_weight, out_bias, training=training, key_padding_mask=key_padding_mask, need_weights=need_weights,
            attn_mask=attn_mask, **own, **more,
        )  # fmt: skip

    if not any(map(is_weight, (*packed, out_proj_weight))):
        own = {"q_proj_weight": q_proj_weight, "k_proj_weight": k_proj_weight, "v_proj_weight": v_proj_weight}
        own["use_separate_proj_weight"] = use_separate_proj_weight  # type: ignore[assignment]
        return forward(query, key, value, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, **own)

    def linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        images_first = x.transpose(0, 1) if x.ndim == 3 else x
        y: Tensor = call(F.linear, (images_first, weight, bias), {})
        return y.transpose(0, 1) if x.ndim == 3 else y

    if in_proj_weight is not None and not use_separate_proj_weight and _same(query, key) and _same(key, value):
        q, k, v = linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        weights = packed if use_separate_proj_weight or in_proj_weight is None else in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    eye = torch.eye(embed_dim_to_check, dtype=q.dtype, device=q.device)
    y, attention_weights = forward(q, k, v, torch.cat([eye] * 3), None, eye, None)
    return linear(y, out_proj_weight, out_proj_bias), attention_weights


def _same(a: Tensor, b: Tensor) -> bool:
    """By value too: one tensor that was captured as two arguments comes back as two."""
    return a is b or (a.shape == b.shape and torch.equal(a, b))


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
