"""`fused_experts` in Triton. Forward is three launches: up (gather, product, activation), down, combine.

Legend: `dA'` the gradient at the activations before the routing weight s; `a` the activations; `h` the pre-activations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...hardware import tl, triton
from ...launch import Launch, pow2, unit_rows
from ..grouped_matmul import _triton as products
from ..permute._triton import spread, unpermute


def why_not(problem) -> str | None:
    return products.why_not(problem)


def default_config(problem) -> tuple[products.Config, products.Config]:
    """The configurations of the up and the down product."""
    H, I, R, E = problem.hidden_size, problem.intermediate_size, problem.num_slots, problem.num_experts
    down = products.Product(R, E, H, I, H, 0, products.swaps(problem, K=I, gathered=False))
    return _up_config(problem), products.choose(problem.arch, problem.dtype, problem.batch_invariant, down)


def _up_config(problem) -> products.Config:
    sorts = _sorts(problem)
    product = _up(problem, 0 if sorts else problem.num_tokens, gathered=not sorts)
    return products.choose(problem.arch, problem.dtype, problem.batch_invariant, product)


def _sorts(problem) -> bool:
    """Are rows copied into their order before the up product? Then what can make it need not gather."""
    return products.sorts_first(problem.arch, problem.dtype, _up(problem, problem.num_tokens, gathered=False))


def _up(problem, sources: int, gathered: bool) -> products.Product:
    """The up product of rows from `sources` tokens, 0 for rows in order; does what can make it gather them?"""
    H, I, act = problem.hidden_size, problem.intermediate_size, ACTIVATIONS[problem.activation]
    swap = products.swaps(problem, K=H, gathered=gathered, gated=act.gated, keeps=problem.training)
    return products.Product(problem.num_slots, problem.num_experts, act.width(I), H, I, sources, swap)


def configs(problem):
    return products.configs()


def padding(problem, tokens_per_expert: Sequence[int]) -> float:
    """Rows that the up product's tiles compute for nobody, over the rows that there are; 0 where there are none.

    Every expert's rows are rounded up to its tiles.
    """
    config = _up_config(problem)
    return sum(config.padded(rows)[0] - rows for rows in tokens_per_expert) / max(sum(tokens_per_expert), 1)


def fused_experts(
    x, w_gate_up, w_down, weights, b_gate_up, b_down, row_order, row_index, expert_offsets, residual, act, problem,
    config: tuple[products.Config, products.Config] | None = None,
):  # fmt: skip
    R, K = row_order.shape[0], problem.top_k
    hidden = x.new_empty(R, act.width(problem.intermediate_size)) if problem.training else None
    if R == 0:
        y = x.new_zeros(x.shape)
        return y if residual is None else y.copy_(residual), hidden
    x, b_gate_up, b_down = unit_rows(x), _packed(b_gate_up), _packed(b_down)
    sorts, up, down, sizes = _plan(
        problem, config, R, act.alpha, act.limit, x.stride(0), w_gate_up.stride(), w_down.stride(),
        b_gate_up is not None, b_down is not None, products.aligned(x, w_gate_up), products.aligned(w_down, w_down),
        x.get_device(),
    )  # fmt: skip
    tiles = products.TileTable(expert_offsets, R, *sizes)
    rows, gather = (spread(x, row_index, K), None) if sorts else (x, row_order)
    a = up(rows, w_gate_up, tiles, gather, b_gate_up, hidden)
    y = down(a, w_down, tiles, None, b_down)
    return unpermute(y, weights, row_index, K, residual), hidden


@functools.lru_cache(maxsize=4096)
def _plan(
    problem, config: tuple[products.Config, products.Config] | None, R: int, alpha: float, limit: float, stride: int,
    up_strides: tuple[int, ...], down_strides: tuple[int, ...], up_bias: bool, down_bias: bool, up_aligned: bool,
    down_aligned: bool, device: int,
) -> tuple[bool, products.Gemm, products.Gemm, tuple]:  # fmt: skip
    """Are rows copied into their order first; the up and the down product; what they ask of the tile table."""
    H, I, transposed, sorts = problem.hidden_size, problem.intermediate_size, problem.transposed, _sorts(problem)
    up, down = config or (None, None)
    up = products.plan(
        problem, up, R, R if sorts else problem.num_tokens, I, H, transposed, (H if sorts else stride, *up_strides),
        up_aligned, device, 0 if sorts else problem.top_k, up_bias, (problem.activation, alpha, limit),
        problem.training,
    )  # fmt: skip
    down = products.plan(problem, down, R, R, H, I, transposed, (I, *down_strides), down_aligned, device,
                         bias=down_bias)  # fmt: skip
    return sorts, up, down, tuple(dict.fromkeys(g.tiles for g in (up, down) if g.tiles))


def _packed(t: Tensor | None) -> Tensor | None:
    """A small operand that the kernels index without strides."""
    return None if t is None else t.contiguous()


@triton.jit
def _activation_backward_kernel(
    da_ptr, hidden_ptr, weights_ptr, grad_ptr, b_down_ptr, row_order_ptr, offsets_ptr, dh_ptr, scaled_ptr, dweights_ptr,
    stride_grad,
    H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, TOP_K: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, WEIGHTED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For one row: `a = act(h)`, `dS = <dA', a> (+ <dO, b_down>)`, `dh = s·dA'·act'(h)`, `s·a`."""
    row = tl.program_id(0)
    slot = tl.load(row_order_ptr + row)
    live = row < tl.load(offsets_ptr + E)
    if not live:
        if WEIGHTED:
            tl.store(dweights_ptr + slot, 0.0)
        return
    scale = 1.0
    if WEIGHTED:
        scale = tl.load(weights_ptr + slot).to(tl.float32)
    row = row.to(tl.int64)
    WIDTH: tl.constexpr = 2 * I if GATED else I
    dot = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, I, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        mask = offs < I
        d = tl.load(da_ptr + row * I + offs, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            offs_g = offs * 2 if INTERLEAVED else offs
            offs_u = offs * 2 + 1 if INTERLEAVED else offs + I
            g = tl.load(hidden_ptr + row * WIDTH + offs_g, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(hidden_ptr + row * WIDTH + offs_u, mask=mask, other=0.0).to(tl.float32)
            a = FORWARD(g, u, ALPHA, LIMIT)
            dg, du = BACKWARD(g, u, d * scale, ALPHA, LIMIT)
            tl.store(dh_ptr + row * WIDTH + offs_g, dg.to(dh_ptr.dtype.element_ty), mask=mask)
            tl.store(dh_ptr + row * WIDTH + offs_u, du.to(dh_ptr.dtype.element_ty), mask=mask)
        else:
            u = tl.load(hidden_ptr + row * WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
            a = FORWARD(u, ALPHA, LIMIT)
            du = BACKWARD(u, d * scale, ALPHA, LIMIT)
            tl.store(dh_ptr + row * WIDTH + offs, du.to(dh_ptr.dtype.element_ty), mask=mask)
        dot += tl.where(mask, d * a, 0.0)
        tl.store(scaled_ptr + row * I + offs, (a * scale).to(scaled_ptr.dtype.element_ty), mask=mask)
    if WEIGHTED:
        ds = tl.sum(dot, 0)
        if HAS_BIAS:
            e = tl.arange(0, E_POW2)
            ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=2147483647)
            expert = tl.sum((ends <= row).to(tl.int32), 0)
            dot = tl.zeros((BLOCK,), tl.float32)
            for h in range(0, H, BLOCK):
                offs = h + tl.arange(0, BLOCK)
                grad = tl.load(grad_ptr + (slot // TOP_K).to(tl.int64) * stride_grad + offs, mask=offs < H, other=0.0)
                bias = tl.load(b_down_ptr + expert * H + offs, mask=offs < H, other=0.0)
                dot += grad.to(tl.float32) * bias.to(tl.float32)
            ds += tl.sum(dot, 0)
        tl.store(dweights_ptr + slot, ds.to(dweights_ptr.dtype.element_ty))


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
    need_x, need_up, need_down, need_weights, need_bup, need_bdown = needs
    H, I, R, K = problem.hidden_size, problem.intermediate_size, row_order.shape[0], problem.top_k
    out: list[Tensor] = [grad.new_empty(0) for _ in needs]
    if R == 0:
        inputs = (x, w_gate_up, w_down, weights, b_gate_up, b_down)
        return tuple(torch.zeros_like(t) if need else o for t, need, o in zip(inputs, needs, out, strict=True))
    grad, x, weights, b_down = unit_rows(grad), unit_rows(x), _packed(weights), _packed(b_down)
    tiles = products.TileTable(expert_offsets, R)
    if need_x or need_up or need_bup or need_weights or need_down:
        da = products.gemm(grad, w_down, not problem.transposed, tiles, problem, N=I, K=H, gather=row_order, top_k=K)
        dh, scaled, out[3] = _activation_backward(
            da, hidden, weights, grad, b_down, row_order, expert_offsets, act, problem
        )
        if need_down:
            out[2] = products.wgrad(grad, scaled, expert_offsets, w_down, problem.transposed, problem,
                                    left_gather=row_order, top_k=K)  # fmt: skip
        if need_up:
            out[1] = products.wgrad(dh, x, expert_offsets, w_gate_up, problem.transposed, problem,
                                    right_gather=row_order, top_k=K)  # fmt: skip
        if need_bup:
            out[4] = products.bias_grad(dh, expert_offsets, b_gate_up)
        if need_x:
            dxs = products.gemm(dh, w_gate_up, not problem.transposed, tiles, problem, N=H, K=act.width(I))
            out[0] = unpermute(dxs, None, row_index, K)
    if need_bdown and b_down is not None:
        out[5] = products.bias_grad(grad, expert_offsets, b_down, row_order, weights, K)
    if not need_weights:
        out[3] = grad.new_empty(0)
    return tuple(out)


@functools.lru_cache(maxsize=4096)
def _activation_backward_launch(
    problem, R: int, alpha: float, limit: float, weights: torch.dtype | None, biased: bool, stride: int
) -> Launch:
    """Kept apart by all that the compiled kernel depends on; `stride` is that of the gradient's rows."""
    act, I, E = ACTIVATIONS[problem.activation], problem.intermediate_size, problem.num_experts
    constants = (
        problem.hidden_size, I, E, pow2(E), problem.top_k, *act.device, act.gated, problem.interleaved, alpha, limit,
        weights is not None, biased, min(1024, max(16, pow2(I))),
    )  # fmt: skip
    return Launch(_activation_backward_kernel, (R, 1, 1), constants)


def _activation_backward(da, hidden, weights, grad, b_down, row_order, expert_offsets, act, problem):
    """`(dh, s·a, dweights)`, one program a row."""
    dh, scaled = torch.empty_like(hidden), torch.empty_like(da)
    dweights = da.new_empty(0) if weights is None else torch.empty_like(weights)
    stride, scales = grad.stride(0), None if weights is None else weights.dtype
    launch = _activation_backward_launch(problem, da.shape[0], act.alpha, act.limit, scales, b_down is not None, stride)
    launch((da, hidden, weights, grad, b_down, row_order, expert_offsets, dh, scaled, dweights), (stride,))
    return dh, scaled, dweights
