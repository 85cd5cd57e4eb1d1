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
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    **more: Any,
) -> Any:
    """`F.multi_head_attention_forward` with its projections as linear operations of their own, given to `call`.

    What lies between them is the function itself with identities as projections, which are exact, or what `attend`
    makes of queries, keys and values [B, heads, N, width]: softmax(…)·v, and what softmax gives; masks are left out
    then (see `has_masks`). Where none of its projections is a weight looked for, the function runs as it is.
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
    if attend is not None:
        batched = (x if x.ndim == 3 else x[:, None] for x in (q, k, v))
        y, seen = attend(*(x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in batched))
        y, seen = y.permute(2, 0, 1, 3).flatten(2), seen.mean(1) if more.get("average_attn_weights", True) else seen
        y, seen = (y, seen) if q.ndim == 3 else (y[:, 0], seen[0])
        return linear(y, out_proj_weight, out_proj_bias), seen if need_weights else None
    eye = torch.eye(embed_dim_to_check, dtype=q.dtype, device=q.device)
    y, attention_weights = forward(q, k, v, torch.cat([eye] * 3), None, eye, None)
    return linear(y, out_proj_weight, out_proj_bias), attention_weights


def has_masks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    *args: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    **more: Any,
) -> bool:
    """Whether `F.multi_head_attention_forward` does more than softmax(q·kᵀ·scale)·v between its projections."""
    given = (bias_k, bias_v, key_padding_mask, attn_mask, static_k, static_v)
    return add_zero_attn or len(args) > 3 or any(tensor is not None for tensor in given)


def _same(a: Tensor, b: Tensor) -> bool:
    """By value too: one tensor that was captured as two arguments comes back as two."""
    return a is b or (a.shape == b.shape and torch.equal(a, b))
