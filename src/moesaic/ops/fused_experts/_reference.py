"""The oracle for `fused_experts`: one (token, choice) pair at a time, fp64, gradients by autograd over the loop."""

from __future__ import annotations

import torch
from torch import Tensor

from ...activations import apply


def why_not(problem) -> str | None:
    return "the order of its sums depends on the batch" if problem.batch_invariant else None


def _layer(x, w_gate_up, w_down, weights, b_gate_up, b_down, row_order, expert_offsets, act, problem):
    """The layer in fp64, and its pre-activation rows; dropped rows stay zero."""
    K, ends = problem.top_k, expert_offsets.tolist()
    y = [torch.zeros(x.shape[1], dtype=torch.float64, device=x.device) for _ in range(x.shape[0])]
    width = w_gate_up.shape[2 if problem.transposed else 1]
    hidden = torch.zeros(row_order.shape[0], width, dtype=torch.float64, device=x.device)
    for e in range(len(ends) - 1):
        if ends[e] == ends[e + 1]:
            continue
        up, down = (w[e].double().T if problem.transposed else w[e].double() for w in (w_gate_up, w_down))
        for r in range(ends[e], ends[e + 1]):
            t, k = divmod(int(row_order[r]), K)
            h = up @ x[t].double()
            if b_gate_up is not None:
                h = h + b_gate_up[e].double()
            hidden[r] = h.detach()
            out = down @ apply(act, h, problem.interleaved)
            if b_down is not None:
                out = out + b_down[e].double()
            y[t] = y[t] + (out if weights is None else weights[t, k].double() * out)
    stacked = torch.stack(y) if y else torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    return stacked, hidden


def fused_experts(
    x, w_gate_up, w_down, weights, b_gate_up, b_down, row_order, row_index, expert_offsets, residual, act, problem
):
    y, hidden = _layer(x, w_gate_up, w_down, weights, b_gate_up, b_down, row_order, expert_offsets, act, problem)
    if residual is not None:
        y = y + residual.double()
    return y.to(x.dtype), hidden.to(x.dtype) if problem.training else None


def fused_experts_backward(
    grad,
    hidden,
    x,
    w_gate_up,
    w_down,
    weights,
    b_gate_up,
    b_down,
    row_order,
    row_index,
    expert_offsets,
    act,
    problem,
    needs,
):
    inputs = (x, w_gate_up, w_down, weights, b_gate_up, b_down)
    with torch.enable_grad():
        wide = [
            None if t is None else t.detach().double().requires_grad_(need)
            for t, need in zip(inputs, needs, strict=True)
        ]
        xw, up, down, w, bup, bdown = wide
        y, _ = _layer(xw, up, down, w, bup, bdown, row_order, expert_offsets, act, problem)
    wanted = [t for t in wide if t is not None and t.requires_grad]
    got: list[Tensor | None]
    if y.requires_grad:
        got = list(torch.autograd.grad(y, wanted, grad.double(), allow_unused=True))
    else:  # no row at all
        got = [None] * len(wanted)
    out: list[Tensor] = []
    for t, need in zip(inputs, needs, strict=True):
        g = got.pop(0) if need else None
        out.append((torch.zeros_like(t) if g is None else g.to(t.dtype)) if need else x.new_empty(0))
    return tuple(out)
