"""The oracle for `permute` and `unpermute`: loops, fp64 accumulation."""

from __future__ import annotations

import torch


def why_not(problem) -> str | None:
    return None


def permute(o, problem):
    rows = torch.zeros(o.row_order.shape[0], o.x.shape[1], dtype=o.x.dtype, device=o.x.device)
    for r in range(int(o.expert_offsets[-1])):
        if o.row_order[r] >= 0:
            rows[r] = o.x[int(o.row_order[r]) // problem.top_k]
    return (rows,), None


def unpermute(o, problem):
    top_k = problem.top_k
    T = o.row_index.shape[0] // top_k
    y = torch.zeros(T, o.rows.shape[1], dtype=torch.float64, device=o.rows.device)
    for t in range(T):
        for k in range(top_k):
            r = int(o.row_index[t * top_k + k])
            if r >= 0:
                w = 1.0 if o.weights is None else o.weights[t, k].double()
                y[t] += w * o.rows[r].double()
    return (y.to(o.rows.dtype),), None


def unpermute_backward(grads, o, saved, problem, needs):
    out = {name: torch.zeros_like(t) for name, t in o._asdict().items() if getattr(needs, name)}
    for r in range(int(o.expert_offsets[-1])):
        slot = int(o.row_order[r])
        if slot < 0:
            continue
        t, k = divmod(slot, problem.top_k)
        if needs.rows:
            w = 1.0 if o.weights is None else o.weights[t, k].double()
            out["rows"][r] = (w * grads.y[t].double()).to(o.rows.dtype)
        if needs.weights:
            out["weights"][t, k] = (grads.y[t].double() * o.rows[r].double()).sum()
    return out
