"""Rules of loss functions, for losses that are part of the nudged map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn._reduction import legacy_get_string

from torchdeq_ep.holomorphic.elementwise import log1p, log1p_exp
from torchdeq_ep.holomorphic.linear import by_parts
from torchdeq_ep.holomorphic.normalization import log_softmax
from torchdeq_ep.holomorphic.registry import CannotContinueError, expanded, rule

_GROUP = "losses"


def _reduce(loss: Tensor, reduction: Any, size_average: bool | None = None, reduce: bool | None = None) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    if reduction in ("none", 0):
        return loss
    return loss.mean() if reduction in ("mean", 1) else loss.sum()


@rule("mse_loss", _GROUP, r"$(z - t)^2$")
def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    loss = (input - target) * (input - target)
    if weight is not None:
        if _is_mean(reduction, size_average, reduce):
            return (loss * weight).sum() / weight.expand_as(loss).sum()
        loss = loss * weight
    return _reduce(loss, reduction, size_average, reduce)


def _is_mean(reduction: str, size_average: bool | None, reduce: bool | None) -> bool:
    legacy = size_average is not None or reduce is not None
    return (legacy_get_string(size_average, reduce) if legacy else reduction) == "mean"


@rule("nll_loss", _GROUP, "on real and imaginary parts")
def _nll_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    return by_parts(lambda part: functional.nll_loss(part, target, weight, *args, **kwargs), input)


@rule("cross_entropy", _GROUP, "class or soft targets, on `log_softmax`")
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    dim = 0 if input.dim() == 1 else 1
    log_p = log_softmax(input, dim)
    n_classes = log_p.shape[dim]
    per_class = (1,) * dim + (n_classes,) + (1,) * (log_p.dim() - dim - 1)
    scaled = log_p if weight is None else log_p * weight.reshape(per_class)
    if target.is_floating_point() or target.is_complex():
        target = target * (1 - label_smoothing) + label_smoothing / n_classes
        loss = -(scaled * target).sum(dim)
        return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else _reduce(loss, reduction)
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0).unsqueeze(dim)
    loss = -(1 - label_smoothing) * scaled.gather(dim, index).squeeze(dim)
    if label_smoothing:
        loss = loss - label_smoothing / n_classes * scaled.sum(dim)
    loss = loss.masked_fill(ignored, 0)
    if reduction != "mean":
        return _reduce(loss, reduction)
    share = torch.ones_like(loss.real) if weight is None else weight.real[index.squeeze(dim)]
    return loss.sum() / share.masked_fill(ignored, 0).sum()


@rule("kl_div", _GROUP, r"$t (\log t - z)$")
def _kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Any = "mean",
    log_target: bool = False,
) -> Tensor:
    if target.is_complex() and not log_target:
        raise CannotContinueError("its target must be real, or given as a logarithm with log_target=True")
    loss = torch.exp(target) * (target - input) if log_target else torch.xlogy(target, target) - target * input
    return loss.sum() / input.shape[0] if reduction == "batchmean" else _reduce(loss, reduction, size_average, reduce)


@rule("binary_cross_entropy_with_logits", _GROUP, r"$(1 - t) z + (1 + (p - 1) t) \log(1 + e^{-z})$")
def _bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Any = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    soft = log1p_exp(-input) if input.is_complex() else functional.softplus(-input, threshold=1e30)
    loss = (1 - target) * input + (soft if pos_weight is None else (1 + (pos_weight - 1) * target) * soft)
    return _reduce(loss if weight is None else loss * weight, reduction, size_average, reduce)


@rule("binary_cross_entropy", _GROUP, r"$-t \log z - (1 - t) \log(1 - z)$; the cut-off at -100 is not kept")
def _bce(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    loss = -(target * torch.log(input) + (1 - target) * log1p(-input))
    return _reduce(loss if weight is None else loss * weight, reduction, size_average, reduce)


@rule("soft_margin_loss", _GROUP, r"$\log(1 + e^{-t z})$")
def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    return _reduce(log1p_exp(-target * input), reduction, size_average, reduce)


expanded("multilabel_soft_margin_loss", _GROUP, "`logsigmoid`")
