"""The oracle for `grouped_matmul`: one row at a time, fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(problem) -> str | None:
    return "the order of its sums depends on the batch" if problem.batch_invariant else None


def experts_of_rows(expert_offsets: Tensor) -> list[int]:
    """The expert of every row that has one."""
    ends = expert_offsets.tolist()
    return [e for e in range(len(ends) - 1) for _ in range(ends[e + 1] - ends[e])]


def forward(o, problem):
    out = torch.zeros(o.rows.shape[0], problem.intermediate_size, dtype=torch.float64, device=o.rows.device)
    for r, e in enumerate(experts_of_rows(o.expert_offsets)):
        matrix = o.w[e].double() if problem.transposed else o.w[e].double().T
        out[r] = o.rows[r].double() @ matrix
        if o.bias is not None:
            out[r] += o.bias[e].double()
    return (out.to(o.rows.dtype),), None


def backward(grads, o, saved, problem, needs):
    made = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in o._asdict().items() if getattr(needs, name)}
    for r, e in enumerate(experts_of_rows(o.expert_offsets)):
        g, x = grads.out[r].double(), o.rows[r].double()
        if needs.rows:
            made["rows"][r] = g @ (o.w[e].double().T if problem.transposed else o.w[e].double())
        if needs.w:
            made["w"][e] += torch.outer(x, g) if problem.transposed else torch.outer(g, x)
        if needs.bias:
            made["bias"][e] += g
    return {name: t.to(o.rows.dtype) for name, t in made.items()}
