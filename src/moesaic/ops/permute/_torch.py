"""`permute` and `unpermute` in vectorised torch: any device, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(problem) -> str | None:
    return None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _live(row_order: Tensor, expert_offsets: Tensor) -> Tensor:
    """(R, 1) True for rows that hold a token."""
    rows = torch.arange(row_order.shape[0], dtype=torch.int32, device=row_order.device)
    return ((rows < expert_offsets[-1]) & (row_order >= 0))[:, None]


def permute(x: Tensor, row_order: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    if not x.shape[0]:  # padding for no token
        return x.new_zeros(row_order.shape[0], x.shape[1])
    rows = x.index_select(0, row_order.clamp_min(0) // top_k)
    return rows.masked_fill_(~_live(row_order, expert_offsets), 0)


def unpermute(rows: Tensor, weights: Tensor | None, row_index: Tensor, top_k: int) -> Tensor:
    T = row_index.shape[0] // top_k
    if not rows.shape[0]:  # a capacity of no rows
        return rows.new_zeros(T, rows.shape[1])
    index = row_index.view(T, top_k)
    y = torch.zeros(T, rows.shape[1], dtype=_wide(rows), device=rows.device)
    for k in range(top_k):
        part = rows.index_select(0, index[:, k].clamp_min(0)).to(y.dtype)
        if weights is not None:
            part = part * weights[:, k, None].to(y.dtype)
        y += part.masked_fill_((index[:, k] < 0)[:, None], 0)
    return y.to(rows.dtype)


def unpermute_backward(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    row_order: Tensor,
    row_index: Tensor,
    expert_offsets: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    wide = _wide(rows)
    if not grad.shape[0]:
        return rows.new_zeros(rows.shape), weights.new_zeros(weights.shape)
    dead = ~_live(row_order, expert_offsets)
    slots = row_order.clamp_min(0)
    g = grad.index_select(0, slots // top_k).to(wide)
    drows = g * weights.reshape(-1).index_select(0, slots)[:, None].to(wide)
    dots = (g * rows.to(wide)).sum(-1).masked_fill_(dead[:, 0], 0)
    # a slot has one row at most, so that adding zeros elsewhere leaves no order to chance
    dweights = dots.new_zeros(weights.numel()).index_add_(0, slots, dots)
    return drows.masked_fill_(dead, 0).to(rows.dtype), dweights.view(weights.shape).to(weights.dtype)
