"""`route` in vectorised torch: any device, no host synchronisation but the id check on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def why_not(problem) -> str | None:
    return None


def _scores(logits: Tensor, score: str) -> Tensor:
    return torch.softmax(logits, -1) if score == "softmax" else torch.sigmoid(logits)


def _compute(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _topk(values: Tensor, k: int) -> Tensor:
    """The k largest per row, ties to the lowest index, NaN last (`torch.topk` promises neither)."""
    values = torch.where(values.isnan(), float("-inf"), values)
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]


def route(logits: Tensor, bias: Tensor | None, config):
    x = _compute(logits)
    T, E = x.shape
    scores = x if config.order == "post" else _scores(x, config.score)
    choice = scores if bias is None else scores + bias.to(x.dtype)
    if config.num_groups > 1:
        grouped = choice.view(T, config.num_groups, E // config.num_groups)
        best = grouped.topk(1 if config.group_score == "max" else 2, -1).values.sum(-1)
        keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _topk(best, config.topk_groups), True)
        choice = grouped.masked_fill(~keep[..., None], config.group_mask_value).view(T, E)
    ids = _topk(choice, config.top_k)
    weights = scores.gather(1, ids)
    if config.order == "post":
        weights = _scores(weights, config.score)
    elif config.order == "pre_renorm":
        weights = weights / (weights.sum(-1, keepdim=True) + config.norm_eps)
    if config.scale != 1.0:
        weights = weights * config.scale
    return (weights, *expert_index(ids, E))


def expert_index(topk_ids: Tensor, num_experts: int):
    if topk_ids.device.type == "cpu":
        return _cpu_tables(topk_ids, num_experts)
    bad = (topk_ids < -1) | (topk_ids >= num_experts)  # raising would have to wait for the device
    return _tables(topk_ids.masked_fill(bad, -1).int(), num_experts)


def _cpu_tables(topk_ids: Tensor, num_experts: int):
    """The tables through numpy, whose small operations cost a quarter of torch's: decode feels it."""
    ids = topk_ids.numpy().astype(np.int32, copy=True, order="C")
    flat = ids.reshape(-1)
    if flat.size and (flat.min() < -1 or flat.max() >= num_experts):
        t, k = np.argwhere((ids < -1) | (ids >= num_experts))[0].tolist()
        raise ValueError(
            f"Routing.from_topk: topk_ids must lie in [-1, {num_experts}), got {ids[t, k]} at token {t}, choice {k}; "
            "use -1 to drop a slot."
        )
    key = flat % (num_experts + 1)  # -1 becomes E: dropped slots sort last
    order = key.astype(np.int16).argsort(kind="stable") if num_experts < 2**15 else key.argsort(kind="stable")
    counts = np.bincount(key, minlength=num_experts + 1)[:num_experts]
    offsets = np.zeros(num_experts + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    live = int(offsets[-1])
    index = np.full(flat.size, -1, np.int32)
    index[order[:live]] = np.arange(live, dtype=np.int32)
    tables = (ids, counts.astype(np.int32), offsets, order.astype(np.int32), index)
    return tuple(torch.from_numpy(t) for t in tables)


def _tables(ids: Tensor, num_experts: int):
    flat = ids.reshape(-1)
    key = torch.where(flat < 0, num_experts, flat)
    by_expert, order = torch.sort(key, stable=True)
    bounds = torch.arange(num_experts + 1, dtype=key.dtype, device=key.device)
    offsets = torch.searchsorted(by_expert, bounds, out_int32=True)
    index = torch.empty_like(flat)
    index[order] = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    index = torch.where(flat < 0, -1, index)
    return ids.contiguous(), offsets.diff(), offsets, order.int(), index


def route_backward(grad: Tensor, logits: Tensor, ids: Tensor, config) -> Tensor:
    x = _compute(logits)
    index = ids.long()
    grad = grad.to(x.dtype) * config.scale
    if config.order == "post":
        chosen = x.gather(1, index)
        w = _scores(chosen, config.score)
        inner = grad * w * (1 - w) if config.score == "sigmoid" else w * (grad - (grad * w).sum(-1, keepdim=True))
        return torch.zeros_like(x).scatter_(1, index, inner).to(logits.dtype)
    s = _scores(x, config.score)
    chosen = s.gather(1, index)
    if config.order == "pre_renorm":
        total = chosen.sum(-1, keepdim=True) + config.norm_eps
        grad = (grad - (grad * chosen).sum(-1, keepdim=True) / total) / total
    ds = torch.zeros_like(x).scatter_(1, index, grad)
    if config.score == "sigmoid":
        return (ds * s * (1 - s)).to(logits.dtype)
    return (s * (ds - (ds * s).sum(-1, keepdim=True))).to(logits.dtype)
