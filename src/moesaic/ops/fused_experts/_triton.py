"""`fused_experts` in Triton. Forward is three launches: up (gather, product, activation), down, combine.

Legend: `dA'` the gradient at the activations before the routing weight s; `a` the activations; `h` the pre-activations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...hardware import tl, triton
from ...launch import Kernel, pow2, unit_rows
from ..grouped_matmul import gpu
from ..grouped_matmul.gpu.epilogue import clamped
from ..grouped_matmul.gpu.schedule import Tiles, TileTable
from ..grouped_matmul.gpu.spec import Epilogue, Gemm, GemmSpec
from ..grouped_matmul.gpu.wgrad import bias_grad, wgrad
from ..permute._triton import combine, spread

NEEDS = "triton"
Strides = tuple[int, int, int]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(problem: Any) -> str | None:
    if problem.dtype not in DTYPES:
        return f"needs bf16, fp16 or fp32, got {str(problem.dtype).removeprefix('torch.')}"
    if not problem.kernel:
        return None
    reasons = (gpu.forced_why_not(problem.kernel, spec) for spec in _contiguous(problem))
    return next((reason for reason in reasons if reason), None)


def details(problem: Any) -> list[str]:
    """What `explain` shows: kernel and tiles of both products, and why not the others."""
    rows = max(problem.num_tokens, 1) * problem.top_k
    up, down = (spec.of(rows) for spec in _contiguous(problem))
    return gpu.explained("up", up, True, problem.kernel) + gpu.explained("down", down, False, problem.kernel)


def padding(problem: Any, tokens_per_expert: Sequence[int]) -> float:
    """Rows that the up product's tiles compute for nobody, over the rows that there are; 0 where there are none.

    Every expert's rows are rounded up to its tiles.
    """
    up, _ = _contiguous(problem)
    config = gpu.choices(up, True, problem.kernel).choice(sum(tokens_per_expert)).config
    return sum(config.padded(rows)[0] - rows for rows in tokens_per_expert) / max(sum(tokens_per_expert), 1)


# ---------------------------------------------------------------- which products
def _contiguous(problem: Any) -> tuple[GemmSpec, GemmSpec]:
    """Both forward products of tokens and weights that lie in memory without gaps."""
    H, I = problem.hidden_size, problem.intermediate_size
    N = ACTIVATIONS[problem.activation].width(I)
    up: Strides = (N * H, N, 1) if problem.transposed else (N * H, H, 1)
    down: Strides = (H * I, H, 1) if problem.transposed else (H * I, I, 1)
    return _specs(problem, H, up, down, problem.bias, problem.bias)


def _specs(
    problem: Any, stride: int, up: Strides, down: Strides, up_bias: bool, down_bias: bool
) -> tuple[GemmSpec, GemmSpec]:
    """The up and the down product, given the strides of x's rows and of the weights as they are stored."""
    H, I, half = problem.hidden_size, problem.intermediate_size, problem.dtype == torch.float16
    if problem.transposed:
        up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
    inner = Epilogue(
        problem.activation, problem.alpha, problem.limit, problem.interleaved, up_bias, problem.training,
        saturates=half,
    )  # fmt: skip
    shared = dict(tf32=problem.allow_tf32, batch_invariant=problem.batch_invariant)
    return (
        GemmSpec(problem.gpu, problem.dtype, problem.num_experts, I, H, (stride, *up), top_k=problem.top_k,
                 epilogue=inner, **shared),
        GemmSpec(problem.gpu, problem.dtype, problem.num_experts, H, I, (I, *down),
                 epilogue=Epilogue(bias=down_bias, scaled=half, saturates=half), **shared),
    )  # fmt: skip


def _products(
    problem: Any, stride: int, up: Strides, down: Strides, up_bias: bool, down_bias: bool,
    weighted: bool,
) -> tuple[gpu.Choices, gpu.Choices, bool]:  # fmt: skip
    """The choices for both products of a layer; does the down product's epilogue weigh the rows?

    In fp16 it does, since an expert's output may be larger than what fp16 holds where its share of the sum is not.
    """
    first, second = _specs(problem, stride, up, down, up_bias, down_bias)
    if not weighted:
        second = replace(second, epilogue=replace(second.epilogue, scaled=False))
    kernel = problem.kernel
    return gpu.choices(first, True, kernel), gpu.choices(second, kernel=kernel), second.epilogue.scaled


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor], dict[str, Tensor] | None]:
    return run(o, problem)


def run(o: Any, problem: Any, plan: Any = None) -> tuple[tuple[Tensor], dict[str, Tensor] | None]:
    """The forward; tuning gives the plan, which else follows from the problem and the strides."""
    x, R, K = o.x, o.row_order.shape[0], problem.top_k
    preact = None
    if problem.training:
        preact = x.new_empty(R, ACTIVATIONS[problem.activation].width(problem.intermediate_size))
    saved = None if preact is None else {"preact": preact}
    if R == 0:
        y = x.new_zeros(x.shape)
        return (y if o.residual is None else y.copy_(o.residual),), saved
    x, b_gate_up, b_down, weights = unit_rows(x), _packed(o.b_gate_up), _packed(o.b_down), o.weights
    key = (
        x.stride(0), o.w_gate_up.stride(), o.w_down.stride(), b_gate_up is not None, b_down is not None,
        weights is not None,
    )  # fmt: skip
    if plan is None:
        plan = problem.memo.get(key)
    if plan is None:
        plan = problem.memo[key] = _products(problem, *key)
    ups, downs, scaled = plan
    up, down = ups.gemm(R), downs.gemm(R)
    table = TileTable(o.expert_offsets, R, *_tiles(up, down))
    rows, gather = (x, o.row_order) if up.spec.top_k else (spread(x, o.row_index, K), None)
    a = up(rows, _view(o.w_gate_up, problem), table, gather, b_gate_up, preact)
    scale = _packed(weights) if scaled else None
    y = down(a, _view(o.w_down, problem), table, o.row_order if scaled else None, b_down, scale=scale)
    return (combine(y, None if scaled else weights, o.row_index, K, o.residual),), saved


def _tiles(up: Gemm, down: Gemm) -> tuple[Tiles, ...]:
    """What both ask of the tile table."""
    if up.tiles is None or down.tiles is None or up.tiles == down.tiles:
        only = up.tiles or down.tiles
        return () if only is None else (only,)
    return up.tiles, down.tiles


def _view(w: Tensor, problem: Any) -> Tensor:
    """The weights as `(E, N, K)`."""
    return w.mT if problem.transposed else w


def _packed(t: Tensor | None) -> Tensor | None:
    """A small operand that the kernels index without strides."""
    return None if t is None else t.contiguous()


# ---------------------------------------------------------------- backward
@functools.lru_cache(maxsize=4096)
def _dgrad(problem: Any, N: int, K: int, strides: tuple[int, int, int, int], top_k: int) -> gpu.Choices:
    """The choices for a product with a weight the other way about."""
    e = Epilogue(saturates=problem.dtype == torch.float16)
    spec = GemmSpec(
        problem.gpu, problem.dtype, problem.num_experts, N, K, strides, top_k=top_k, epilogue=e,
        tf32=problem.allow_tf32, batch_invariant=problem.batch_invariant,
    )  # fmt: skip
    return gpu.choices(spec, kernel=problem.kernel)


def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    R, K = o.row_order.shape[0], problem.top_k
    if R == 0:
        return {name: torch.zeros_like(t) for name, t, need in zip(o._fields, o, needs, strict=True) if need}
    grad, x, offsets, out = unit_rows(grads.y), unit_rows(o.x), o.expert_offsets, {}
    weights, b_down, transposed, arch = _packed(o.weights), _packed(o.b_down), problem.transposed, problem.gpu.arch
    table = TileTable(offsets, R)
    if needs.x or needs.w_gate_up or needs.b_gate_up or needs.weights or needs.w_down:
        w = _view(o.w_down, problem).mT  # (E, I, H)
        product = _dgrad(problem, w.shape[1], w.shape[2], (grad.stride(0), *w.stride()), K).gemm(R)
        da = product(grad, w, table, o.row_order)
        dh, scaled, out["weights"] = _activation_backward(da, saved.preact, weights, grad, b_down, o, problem)
        if needs.w_down:
            out["w_down"] = wgrad(grad, scaled, offsets, o.w_down, transposed, arch, problem.allow_tf32,
                                  left_gather=o.row_order, top_k=K)  # fmt: skip
        if needs.w_gate_up:
            out["w_gate_up"] = wgrad(dh, x, offsets, o.w_gate_up, transposed, arch, problem.allow_tf32,
                                     right_gather=o.row_order, top_k=K)  # fmt: skip
        if needs.b_gate_up:
            out["b_gate_up"] = bias_grad(dh, offsets, o.b_gate_up)
        if needs.x:
            w = _view(o.w_gate_up, problem).mT  # (E, H, 2I)
            product = _dgrad(problem, w.shape[1], w.shape[2], (w.shape[2], *w.stride()), 0).gemm(R)
            out["x"] = combine(product(dh, w, table), None, o.row_index, K)
    if needs.b_down:
        out["b_down"] = bias_grad(grad, offsets, o.b_down, o.row_order, weights, K)
    return out


def _activation_backward(
    da: Tensor, preact: Tensor, weights: Tensor | None, grad: Tensor, b_down: Tensor | None, o: Any, problem: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dh, s·a, dweights)`, one program a row."""
    act, H, I, E = ACTIVATIONS[problem.activation], problem.hidden_size, problem.intermediate_size, problem.num_experts
    dh, scaled = torch.empty_like(preact), torch.empty_like(da)
    dweights = da.new_empty(0) if weights is None else torch.empty_like(weights)
    bound = activation_backward_kernel.bind(
        H=H, I=I, E=E, E_POW2=pow2(E), TOP_K=problem.top_k, FORWARD=act.device[0], BACKWARD=act.device[1],
        GATED=act.gated, INTERLEAVED=problem.interleaved, ALPHA=problem.alpha, LIMIT=problem.limit,
        WEIGHTED=weights is not None, HAS_BIAS=b_down is not None, SATURATES=problem.dtype == torch.float16,
        BLOCK=min(1024, max(16, pow2(I))),
    )  # fmt: skip
    pointers = (da, preact, weights, grad, b_down, o.row_order, o.expert_offsets, dh, scaled, dweights)
    bound((da.shape[0], 1, 1), pointers, (grad.stride(0),))
    return dh, scaled, dweights


@Kernel
@triton.jit
def activation_backward_kernel(
    da_ptr, preact_ptr, weights_ptr, grad_ptr, b_down_ptr, row_order_ptr, offsets_ptr, dh_ptr, scaled_ptr, dweights_ptr,
    stride_grad,
    H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, TOP_K: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, WEIGHTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    SATURATES: tl.constexpr, BLOCK: tl.constexpr,
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
            g = tl.load(preact_ptr + row * WIDTH + offs_g, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(preact_ptr + row * WIDTH + offs_u, mask=mask, other=0.0).to(tl.float32)
            a = FORWARD(g, u, ALPHA, LIMIT)
            dg, du = BACKWARD(g, u, d * scale, ALPHA, LIMIT)
            tl.store(dh_ptr + row * WIDTH + offs_g, clamped(dg, dh_ptr.dtype.element_ty, SATURATES), mask=mask)
            tl.store(dh_ptr + row * WIDTH + offs_u, clamped(du, dh_ptr.dtype.element_ty, SATURATES), mask=mask)
        else:
            u = tl.load(preact_ptr + row * WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
            a = FORWARD(u, ALPHA, LIMIT)
            du = BACKWARD(u, d * scale, ALPHA, LIMIT)
            tl.store(dh_ptr + row * WIDTH + offs, clamped(du, dh_ptr.dtype.element_ty, SATURATES), mask=mask)
        dot += tl.where(mask, d * a, 0.0)
        tl.store(scaled_ptr + row * I + offs, clamped(a * scale, scaled_ptr.dtype.element_ty, SATURATES), mask=mask)
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
