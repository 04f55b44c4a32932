"""The oracle for `fused_experts`: one (token, choice) pair at a time, fp64, gradients by autograd over the loop."""

from __future__ import annotations

import torch

from ...activations import ACTIVATIONS, apply


def why_not(problem) -> str | None:
    return "the order of its sums depends on the batch" if problem.batch_invariant else None


def _layer(o, problem):
    """The layer in fp64, and its pre-activation rows; dropped rows stay zero."""
    act = ACTIVATIONS[problem.activation].with_constants(problem.alpha, problem.limit)
    K, ends = problem.top_k, o.expert_offsets.tolist()
    y = [torch.zeros(o.x.shape[1], dtype=torch.float64, device=o.x.device) for _ in range(o.x.shape[0])]
    width = o.w_gate_up.shape[2 if problem.transposed else 1]
    preact = torch.zeros(o.row_order.shape[0], width, dtype=torch.float64, device=o.x.device)
    for e in range(len(ends) - 1):
        if ends[e] == ends[e + 1]:
            continue
        up, down = (w[e].double().T if problem.transposed else w[e].double() for w in (o.w_gate_up, o.w_down))
        for r in range(ends[e], ends[e + 1]):
            t, k = divmod(int(o.row_order[r]), K)
            h = up @ o.x[t].double()
            if o.b_gate_up is not None:
                h = h + o.b_gate_up[e].double()
            preact[r] = h.detach()
            out = down @ apply(act, h, problem.interleaved)
            if o.b_down is not None:
                out = out + o.b_down[e].double()
            y[t] = y[t] + (out if o.weights is None else o.weights[t, k].double() * out)
    stacked = torch.stack(y) if y else torch.zeros(o.x.shape, dtype=torch.float64, device=o.x.device)
    return stacked, preact


def forward(o, problem):
    y, preact = _layer(o, problem)
    if o.residual is not None:
        y = y + o.residual.double()
    return (y.to(o.x.dtype),), {"preact": preact.to(o.x.dtype)} if problem.training else None


def backward(grads, o, saved, problem, needs):
    wanted = [name for name in o._fields if getattr(needs, name)]
    with torch.enable_grad():
        wide = o._replace(**{name: getattr(o, name).detach().double().requires_grad_() for name in wanted})
        y, _ = _layer(wide, problem)
    if not y.requires_grad:  # no row at all
        return {name: torch.zeros_like(getattr(o, name)) for name in wanted}
    got = torch.autograd.grad(y, [getattr(wide, name) for name in wanted], grads.y.double(), allow_unused=True)
    like = [getattr(o, name) for name in wanted]
    return {
        name: torch.zeros_like(t) if g is None else g.to(t.dtype) for name, t, g in zip(wanted, like, got, strict=True)
    }
