"""Rules of attention: the fused kernels are real, so the quotients of exponentials are written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from torchdeq_ep.holomorphic.linear import matmul
from torchdeq_ep.holomorphic.normalization import softmax
from torchdeq_ep.holomorphic.registry import expanded, rule


@rule(
    "scaled_dot_product_attention", "attention", r"$\mathrm{softmax}(q k^T s + m)\,v$ with a transpose, not an adjoint"
)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = _product(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-2, -1))
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_bool else scores + attn_mask
    weights = softmax(scores, -1) if scores.is_complex() else functional.softmax(scores, -1)
    if dropout_p > 0:
        weights = weights * functional.dropout(torch.ones_like(weights.real), dropout_p)
    return _product(weights, value)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return matmul(a, b) if a.is_complex() or b.is_complex() else torch.matmul(a, b)


expanded("multi_head_attention_forward", "attention", "projections, and `scaled_dot_product_attention` or `softmax`")
