"""Attention's fused function as the linear operations that its projections are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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
