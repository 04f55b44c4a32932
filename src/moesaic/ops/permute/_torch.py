"""`permute` and `unpermute` in vectorised torch: any device, no host synchronisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def why_not(problem: Any) -> str | None:
    return None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _live(row_order: Tensor, expert_offsets: Tensor) -> Tensor:
    """(R, 1) True for rows that hold a token."""
    rows = torch.arange(row_order.shape[0], dtype=torch.int32, device=row_order.device)
    return ((rows < expert_offsets[-1]) & (row_order >= 0))[:, None]


def permute(o: Any, problem: Any) -> tuple[tuple[Tensor], None]:
    return (_permuted(o.x, o, problem.top_k),), None


def _permuted(x: Tensor, o: Any, top_k: int) -> Tensor:
    if not x.shape[0]:  # padding for no token
        return x.new_zeros(o.row_order.shape[0], x.shape[1])
    rows = x.index_select(0, o.row_order.clamp_min(0) // top_k)
    return rows.masked_fill_(~_live(o.row_order, o.expert_offsets), 0)


def unpermute(o: Any, problem: Any) -> tuple[tuple[Tensor], None]:
    rows, top_k = o.rows, problem.top_k
    T = o.row_index.shape[0] // top_k
    if not rows.shape[0]:  # a capacity of no rows
        return (rows.new_zeros(T, rows.shape[1]),), None
    index = o.row_index.view(T, top_k)
    y = torch.zeros(T, rows.shape[1], dtype=_wide(rows), device=rows.device)
    for k in range(top_k):
        part = rows.index_select(0, index[:, k].clamp_min(0)).to(y.dtype)
        if o.weights is not None:
            part = part * o.weights[:, k, None].to(y.dtype)
        y += part.masked_fill_((index[:, k] < 0)[:, None], 0)
    return (y.to(rows.dtype),), None


def unpermute_backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    grad, rows, weights, wide = grads.y, o.rows, o.weights, _wide(o.rows)
    if weights is None:
        return {"rows": _permuted(grad, o, problem.top_k)}
    if not grad.shape[0]:
        return {"rows": rows.new_zeros(rows.shape), "weights": weights.new_zeros(weights.shape)}
    dead = ~_live(o.row_order, o.expert_offsets)
    slots = o.row_order.clamp_min(0)
    g = grad.index_select(0, slots // problem.top_k).to(wide)
    drows = g * weights.reshape(-1).index_select(0, slots)[:, None].to(wide)
    dots = (g * rows.to(wide)).sum(-1).masked_fill_(dead[:, 0], 0)
    # a slot has one row at most, so that adding zeros elsewhere leaves no order to chance
    dweights = dots.new_zeros(weights.numel()).index_add_(0, slots, dots)
    drows = drows.masked_fill_(dead, 0).to(rows.dtype)
    return {"rows": drows, "weights": dweights.view(weights.shape).to(weights.dtype)}
