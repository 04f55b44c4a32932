"""`fused_experts` in torch: experts in order, in chunks whose intermediates stay in cache.

Legend: a chunk is a run of whole experts; `xs`, `h`, `a`, `ys` are its tokens, pre-activations, activations, outputs.
Products go through the same per-expert `mm` as `grouped_matmul`; activations are computed in fp32 between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...activations import apply, apply_backward
from ..grouped_matmul._torch import Workspace, matrices, wgrad

# Elements of a chunk's widest intermediate. Larger chunks spill the L2 (1 MiB a core), smaller ones repeat Python's overhead.
CHUNK_ELEMENTS = 1 << 19


def why_not(problem) -> str | None:
    return None


@dataclass
class Chunk:
    """Rows `start:end`, made of `groups` = (expert, first row, end), rows counted from the chunk's start."""

    start: int
    end: int
    groups: list[tuple[int, int, int]]


def _chunks(expert_offsets: Tensor, width: int) -> Iterator[Chunk]:
    """Runs of whole experts of about `CHUNK_ELEMENTS / width` rows; experts without rows are left out."""
    limit, ends = max(1, CHUNK_ELEMENTS // width), expert_offsets.tolist()
    chunk = Chunk(0, 0, [])
    for e, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if start == end:
            continue
        if chunk.groups and end - chunk.start > limit:
            yield chunk
            chunk = Chunk(start, start, [])
        chunk.groups.append((e, start - chunk.start, end - chunk.start))
        chunk.end = end
    if chunk.groups:
        yield chunk


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _combine(rows: Tensor, weights: Tensor | None, row_index: Tensor, top_k: int, out: Tensor, dropped: bool) -> Tensor:
    """`out[t] = sum_k w[t, k] · rows[row_index[t, k]]` in fp32, a block of tokens at a time."""
    H, T = rows.shape[1], out.shape[0]
    index = row_index.view(T, top_k).long()
    step = max(1, CHUNK_ELEMENTS // max(top_k * H, 1))
    for t in range(0, T, step):
        block = index[t : t + step]
        part = _wide(rows.index_select(0, (block.clamp_min(0) if dropped else block).reshape(-1))).view(-1, top_k, H)
        if dropped:
            part = part.masked_fill((block < 0)[..., None], 0)
        if weights is None:
            out[t : t + step] = part.sum(1)
        else:
            out[t : t + step] = torch.bmm(weights[t : t + step, None].to(part.dtype), part)[:, 0]
    return out


def fused_experts(x, w_gate_up, w_down, weights, b_gate_up, b_down, row_order, row_index, expert_offsets, act, problem):
    K, R, I = problem.top_k, row_order.shape[0], problem.intermediate_size
    ups, downs = matrices(w_gate_up, problem.transposed), matrices(w_down, problem.transposed)
    width = ups[0].shape[1]
    hidden = x.new_empty((R, width) if problem.training else (0,))
    y = x.new_empty(R, x.shape[1])
    tokens, work, live = row_order // K, Workspace(x), 0
    for chunk in _chunks(expert_offsets, width):
        n, live = chunk.end - chunk.start, chunk.end
        xs = x.index_select(0, tokens[chunk.start : chunk.end])
        h = hidden[chunk.start : chunk.end] if problem.training else x.new_empty(n, width)
        for e, s, t in chunk.groups:
            work.mm(xs[s:t], ups[e], h[s:t], None if b_gate_up is None else b_gate_up[e])
        a = apply(act, _wide(h), problem.interleaved).to(x.dtype)
        ys = y[chunk.start : chunk.end]
        for e, s, t in chunk.groups:
            work.mm(a[s:t], downs[e], ys[s:t], None if b_down is None else b_down[e])
    if problem.training:
        hidden[live:] = 0
    return _combine(y, weights, row_index, K, torch.empty_like(x, memory_format=torch.contiguous_format), live < R), hidden


def fused_experts_backward(
    grad, hidden, x, w_gate_up, w_down, weights, b_gate_up, b_down, row_order, row_index, expert_offsets, act, problem, needs
):
    """SonicMoE's order: `dA' = dO W_down`, then `dS = <dA', a>`, `dH = s·dA'·act'`, `dW_down = dOᵀ (s·a)`: y is never kept."""
    need_x, need_up, need_down, need_weights, need_bup, need_bdown = needs
    K, R = problem.top_k, row_order.shape[0]
    inputs = (x, w_gate_up, w_down, weights, b_gate_up, b_down)
    # experts without rows and dropped slots keep these zeros
    dx, dup, ddown, dweights, dbup, dbdown = (
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) if need else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )
    ups, downs = matrices(w_gate_up, not problem.transposed), matrices(w_down, not problem.transposed)
    tokens, work, live = row_order // K, Workspace(x), 0
    dxs = x.new_empty((R, x.shape[1]) if need_x else (0,))
    through = need_x or need_up or need_bup  # does anything want the gradient of the pre-activations?
    scales = None if weights is None else weights.reshape(-1).index_select(0, row_order)
    flat_dweights = dweights.view(-1)
    for chunk in _chunks(expert_offsets, hidden.shape[1]):
        here, live = slice(chunk.start, chunk.end), chunk.end
        slots = row_order[here]
        gs = grad.index_select(0, tokens[here])
        h = _wide(hidden[here])
        scale = None if scales is None else scales[here, None].to(h.dtype)
        da = None
        if through or need_weights:
            da = x.new_empty(gs.shape[0], problem.intermediate_size)
            for e, s, t in chunk.groups:
                work.mm(gs[s:t], downs[e], da[s:t])
            da = _wide(da)
        if need_down or need_weights:
            a = apply(act, h, problem.interleaved)
            if need_weights:
                ds = (da * a).sum(-1)
                if b_down is not None:
                    for e, s, t in chunk.groups:
                        ds[s:t] += _wide(gs[s:t]) @ _wide(b_down[e])
                flat_dweights.index_copy_(0, slots.long(), ds.to(dweights.dtype))
            if need_down:
                scaled = (a if scale is None else a * scale).to(x.dtype)
                for e, s, t in chunk.groups:
                    wgrad(gs[s:t], scaled[s:t], ddown[e], problem.transposed)
        if need_bdown:
            scaled = _wide(gs) if scale is None else _wide(gs) * scale
            for e, s, t in chunk.groups:
                dbdown[e] = scaled[s:t].sum(0)
        if through:
            dh = apply_backward(act, h, da if scale is None else da * scale, problem.interleaved)
            if need_bup:
                for e, s, t in chunk.groups:
                    dbup[e] = dh[s:t].sum(0)
            dh = dh.to(x.dtype)
            if need_up:
                xs = x.index_select(0, tokens[here])
                for e, s, t in chunk.groups:
                    wgrad(dh[s:t], xs[s:t], dup[e], problem.transposed)
            if need_x:
                for e, s, t in chunk.groups:
                    work.mm(dh[s:t], ups[e], dxs[here][s:t])
    if need_x:
        dx = _combine(dxs, None, row_index, K, dx, live < R)
    return dx, dup, ddown, dweights, dbup, dbdown
