"""The oracle for `permute` and `unpermute`: loops, fp64 accumulation."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(problem) -> str | None:
    return None


def permute(x: Tensor, row_order: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    rows = torch.zeros(row_order.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    for r in range(int(expert_offsets[-1])):
        if row_order[r] >= 0:
            rows[r] = x[int(row_order[r]) // top_k]
    return rows


def unpermute(rows: Tensor, weights: Tensor | None, row_index: Tensor, top_k: int) -> Tensor:
    T = row_index.shape[0] // top_k
    y = torch.zeros(T, rows.shape[1], dtype=torch.float64, device=rows.device)
    for t in range(T):
        for k in range(top_k):
            r = int(row_index[t * top_k + k])
            if r >= 0:
                w = 1.0 if weights is None else weights[t, k].double()
                y[t] += w * rows[r].double()
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
    drows, dweights = torch.zeros_like(rows), torch.zeros_like(weights)
    for r in range(int(expert_offsets[-1])):
        slot = int(row_order[r])
        if slot < 0:
            continue
        t, k = divmod(slot, top_k)
        drows[r] = (weights[t, k].double() * grad[t].double()).to(rows.dtype)
        dweights[t, k] = (grad[t].double() * rows[r].double()).sum().to(weights.dtype)
    return drows, dweights
