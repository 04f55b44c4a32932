"""`fused_experts` in torch: experts in order, in chunks whose intermediates stay in cache.

Legend: a chunk is a run of whole experts; `xs`, `h`, `a`, `ys` are its tokens, pre-activations, activations, outputs.
Products go through the same per-expert `mm` as `grouped_matmul`; activations are computed in fp32 between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...activations import ACTIVATIONS, Activation, apply, apply_backward
from ..grouped_matmul._torch import Products, bias_grad, live_experts, wgrad, zero_gradients

# Elements of a chunk's widest intermediate: it stays in the L3 between the two products.
CHUNK_ELEMENTS = 1 << 20
# Elements that an fp32 pass works on at a time: it stays in the L2 (1 MiB a core) between the operations of the pass.
BLOCK_ELEMENTS = 1 << 17


def why_not(problem: Any) -> str | None:
    return "the order of its sums depends on the batch" if problem.batch_invariant else None


def _chunks(expert_offsets: Tensor, width: int) -> Iterator[tuple[slice, list[int], list[int]]]:
    """Runs of whole experts of about `CHUNK_ELEMENTS / width` rows: `(rows, experts, rows of each)`."""
    limit = max(1, CHUNK_ELEMENTS // width)
    experts, sizes = live_experts(expert_offsets)
    start = first = total = 0
    for i, n in enumerate(sizes):
        if total and total + n > limit:
            yield slice(start, start + total), experts[first:i], sizes[first:i]
            start, first, total = start + total, i, 0
        total += n
    if total:
        yield slice(start, start + total), experts[first:], sizes[first:]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _activate(act: Activation, h: Tensor, interleaved: bool) -> Tensor:
    """`act(h)` computed in fp32, rounded once, a block of rows at a time."""
    if h.dtype in (torch.float32, torch.float64):
        return apply(act, h, interleaved)
    step = max(1, BLOCK_ELEMENTS // h.shape[1])
    if h.shape[0] <= step:
        return apply(act, h.float(), interleaved).to(h.dtype)
    out = h.new_empty(h.shape[0], h.shape[1] // 2 if act.gated else h.shape[1])
    for part, into in zip(h.split(step), out.split(step), strict=True):
        into.copy_(apply(act, part.float(), interleaved))
    return out


def _combine(
    rows: Tensor, weights: Tensor | None, row_index: Tensor, out: Tensor, dropped: bool, residual: Tensor | None = None
) -> None:
    """`out[t] = sum_k w[t, k] · rows[row_index[t, k]] (+ residual[t])` in fp32, a block of tokens at a time."""
    T, H = out.shape
    if T == 0:
        return
    K = row_index.shape[0] // T
    step = max(1, BLOCK_ELEMENTS // max(K * H, 1))
    if T <= step:
        _combine_block(rows, weights, row_index, out, dropped, residual)
        return
    for t in range(0, T, step):
        here = slice(t, min(t + step, T))
        index = row_index[here.start * K : here.stop * K]
        w, add = (None if t is None else t[here] for t in (weights, residual))
        _combine_block(rows, w, index, out[here], dropped, add)


def _combine_block(
    rows: Tensor, weights: Tensor | None, index: Tensor, out: Tensor, dropped: bool, residual: Tensor | None
) -> None:
    part = _wide(rows.index_select(0, index.clamp_min(0) if dropped else index))
    if weights is not None and weights.dtype != part.dtype:
        weights = weights.to(part.dtype)
    if dropped:
        dead = index < 0
        part.masked_fill_(dead[:, None], 0)
        weights = None if weights is None else weights.masked_fill(dead.view(weights.shape), 0)
    part = part.view(out.shape[0], -1, out.shape[1])
    if weights is None:
        total = part.sum(1)
    else:  # into a tensor of its own dtype, lest autocast round the sum to half precision
        total = torch.bmm(weights[:, None], part, out=part.new_empty(out.shape[0], 1, out.shape[1]))[:, 0]
    out.copy_(total if residual is None else total.add_(residual))


def _activation(problem: Any) -> Activation:
    return ACTIVATIONS[problem.activation].with_constants(problem.alpha, problem.limit)


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor], dict[str, Tensor] | None]:
    act, x, R = _activation(problem), o.x, o.row_order.shape[0]
    width = act.width(problem.intermediate_size)
    ups, downs = (o.w_gate_up, o.w_down) if problem.transposed else (o.w_gate_up.mT, o.w_down.mT)
    chunks = list(_chunks(o.expert_offsets, width))
    live = chunks[-1][0].stop if chunks else 0
    whole = len(chunks) == 1 and live == R  # one chunk's results are the results
    preact = None if whole or not problem.training else x.new_empty(R, width)
    y, out = x.new_empty((0,) if whole else (R, x.shape[1])), x.new_empty(x.shape)
    tokens, product = o.row_order // problem.top_k, Products(x)
    for rows, experts, sizes in chunks:
        kept = None if preact is None else preact[rows]
        h = product(x.index_select(0, tokens if whole else tokens[rows]), ups, experts, sizes, o.b_gate_up, kept)
        a = _activate(act, h, problem.interleaved)
        ys = product(a, downs, experts, sizes, o.b_down, None if whole else y[rows])
        if whole:
            preact, y = h if problem.training else None, ys
    if preact is not None:
        preact[live:] = 0
    _combine(y, o.weights, o.row_index, out, live < R, o.residual)
    return (out,), None if preact is None else {"preact": preact}


def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    """SonicMoE's order, so that y is never kept.

    `dA' = dO W_down`, `dS = <dA', a>`, `dH = s·dA'·act'(h)`, `dW_down = dOᵀ (s·a)`, `dW_gate_up = dHᵀ x`,
    `dx = dH W_gate_up`.
    """
    act, x, grad, made = _activation(problem), o.x, grads.y, zero_gradients(o, needs)
    ups, downs = (o.w_gate_up.mT, o.w_down.mT) if problem.transposed else (o.w_gate_up, o.w_down)
    R, tokens, product, live = o.row_order.shape[0], o.row_order // problem.top_k, Products(x), 0
    dxs = x.new_empty((R, x.shape[1]) if needs.x else (0,))
    through = needs.x or needs.w_gate_up or needs.b_gate_up  # does anything want the pre-activations' gradient?
    scales = None if o.weights is None else _wide(o.weights).reshape(-1).index_select(0, o.row_order)[:, None]
    for rows, experts, sizes in _chunks(o.expert_offsets, saved.preact.shape[1]):
        live = rows.stop
        given, h = grad.index_select(0, tokens[rows]), _wide(saved.preact[rows])
        scale = None if scales is None else scales[rows].to(h.dtype)
        if through or needs.weights:
            da = _wide(product(given, downs, experts, sizes))
        if needs.w_down or needs.weights:
            a = apply(act, h, problem.interleaved)
            if needs.weights:
                ds = (da * a).sum(-1)
                if o.b_down is not None:
                    ds += (_wide(given) * _wide(o.b_down[_repeat(experts, sizes, given)])).sum(-1)
                made["weights"].view(-1).index_copy_(0, o.row_order[rows].long(), ds.to(made["weights"].dtype))
            if needs.w_down:
                wgrad(given, _scaled(a, scale).to(x.dtype), made["w_down"], experts, sizes, problem.transposed)
        if needs.b_down:
            bias_grad(_scaled(_wide(given), scale), made["b_down"], experts, sizes)
        if through:
            dh = apply_backward(act, h, _scaled(da, scale), problem.interleaved)
            if needs.b_gate_up:
                bias_grad(dh, made["b_gate_up"], experts, sizes)
            dh = dh.to(x.dtype)
            if needs.w_gate_up:
                source = x.index_select(0, tokens[rows])
                wgrad(dh, source, made["w_gate_up"], experts, sizes, problem.transposed)
            if needs.x:
                product(dh, ups, experts, sizes, out=dxs[rows])
    if needs.x:
        _combine(dxs, None, o.row_index, made["x"], live < R)
    return made


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _repeat(experts: list[int], sizes: list[int], like: Tensor) -> Tensor:
    """The expert of every row."""
    return torch.tensor(experts, device=like.device).repeat_interleave(torch.tensor(sizes, device=like.device))
