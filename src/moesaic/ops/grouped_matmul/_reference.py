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


def grouped_matmul(rows: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None, problem) -> Tensor:
    out = torch.zeros(rows.shape[0], problem.intermediate_size, dtype=torch.float64, device=rows.device)
    for r, e in enumerate(experts_of_rows(expert_offsets)):
        matrix = w[e].double() if problem.transposed else w[e].double().T
        out[r] = rows[r].double() @ matrix
        if bias is not None:
            out[r] += bias[e].double()
    return out.to(rows.dtype)


def grouped_matmul_backward(
    grad: Tensor, rows: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None, problem, needs
):
    drows, dw = torch.zeros_like(rows, dtype=torch.float64), torch.zeros_like(w, dtype=torch.float64)
    dbias = torch.zeros(0 if bias is None else bias.shape, dtype=torch.float64, device=rows.device)
    for r, e in enumerate(experts_of_rows(expert_offsets)):
        g, x = grad[r].double(), rows[r].double()
        drows[r] = g @ (w[e].double().T if problem.transposed else w[e].double())
        dw[e] += torch.outer(x, g) if problem.transposed else torch.outer(g, x)
        if bias is not None:
            dbias[e] += g
    empty = rows.new_empty(0)
    return tuple(t.to(rows.dtype) if need else empty.clone() for t, need in zip((drows, dw, dbias), needs, strict=True))
