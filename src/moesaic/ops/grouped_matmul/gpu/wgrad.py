"""Gradients of weights and biases: sums over an expert's rows, which no program shares with another."""

from __future__ import annotations

import torch
from torch import Tensor

from ....hardware import tl, triton
from ....launch import Kernel, ceil_div, pow2
from .pointer import SMALL_MEMORY


def tiles(arch: str, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """`block_n, block_k, block_r, num_warps, num_stages`."""
    if dtype == torch.float32:
        return 64, 64, 32, 4, 2
    if arch.startswith("gfx"):
        return 128, 128, 32, 8, 2
    return 128, 128, 32 if arch in SMALL_MEMORY else 64, 8, 3


def wgrad(
    left: Tensor, right: Tensor, expert_offsets: Tensor, w: Tensor, transposed: bool, arch: str, tf32: bool = False,
    left_gather: Tensor | None = None, right_gather: Tensor | None = None, top_k: int = 0,
) -> Tensor:  # fmt: skip
    """The gradient of `w` from `left` (N columns) and `right` (K columns), whose rows may be tokens to gather."""
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    oe, on, ok = out.stride()
    if transposed:
        on, ok = ok, on
    N, K = left.shape[1], right.shape[1]
    block_n, block_k, block_r, num_warps, num_stages = tiles(arch, left.dtype)
    bound = grouped_wgrad_kernel.bind(
        N=N, K=K, LEFT_GATHER=top_k if left_gather is not None else 0,
        RIGHT_GATHER=top_k if right_gather is not None else 0,
        WIDE=N * K >= 2**31, PRECISION="tf32" if tf32 and left.dtype == torch.float32 else "ieee",
        BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    pointers = (out, left, left_gather, right, right_gather, expert_offsets)
    grid = (ceil_div(K, block_k), ceil_div(N, block_n), w.shape[0])
    bound(grid, pointers, (left.stride(0), right.stride(0), oe, on, ok))
    return out


def bias_grad(
    grad: Tensor,
    expert_offsets: Tensor,
    bias: Tensor,
    gather: Tensor | None = None,
    weights: Tensor | None = None,
    top_k: int = 0,
) -> Tensor:
    """The gradient of a bias, whose rows may be tokens to gather and weigh."""
    out = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    E, N = bias.shape
    block_n = min(256, max(16, pow2(N)))
    bound = bias_grad_kernel.bind(
        N=N, GATHER=top_k if gather is not None else 0, WEIGHTED=weights is not None, BLOCK_R=32, BLOCK_N=block_n
    )
    bound((ceil_div(N, block_n), E, 1), (out, grad, gather, weights, expert_offsets), (grad.stride(0),))
    return out


@Kernel
@triton.jit
def grouped_wgrad_kernel(
    out_ptr, left_ptr, left_gather_ptr, right_ptr, right_gather_ptr, offsets_ptr,
    stride_left, stride_right, stride_oe, stride_on, stride_ok,
    N: tl.constexpr, K: tl.constexpr, LEFT_GATHER: tl.constexpr, RIGHT_GATHER: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`out[e] = left[rows of e].T @ right[rows of e]`, (N, K); an expert without rows gets zeros."""
    # locate tile
    expert = tl.program_id(2)
    start, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K

    # main loop (pointers are made in it: each row may come from anywhere)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r in range(start, end, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R)
        live = rows < end
        left_rows = rows
        if LEFT_GATHER > 0:
            left_rows = tl.load(left_gather_ptr + rows, mask=live, other=0) // LEFT_GATHER
        right_rows = rows
        if RIGHT_GATHER > 0:
            right_rows = tl.load(right_gather_ptr + rows, mask=live, other=0) // RIGHT_GATHER
        left_ptrs = left_ptr + left_rows.to(tl.int64)[:, None] * stride_left + offs_n[None, :]
        right_ptrs = right_ptr + right_rows.to(tl.int64)[:, None] * stride_right + offs_k[None, :]
        left = tl.load(left_ptrs, mask=live[:, None] & mask_n[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=live[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)

    # store
    out_ptr += expert.to(tl.int64) * stride_oe
    if WIDE:
        out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * stride_on + offs_k.to(tl.int64)[None, :] * stride_ok
    else:
        out_ptrs = out_ptr + offs_n[:, None] * stride_on + offs_k[None, :] * stride_ok
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


@Kernel
@triton.jit
def bias_grad_kernel(
    out_ptr, grad_ptr, gather_ptr, weights_ptr, offsets_ptr, stride_grad,
    N: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`out[e] = sum over its rows of (weight ·) grad`; with GATHER the row is the slot's token."""
    expert = tl.program_id(1)
    start, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for r in range(start, end, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R)
        live = rows < end
        source = rows
        if GATHER > 0:
            slots = tl.load(gather_ptr + rows, mask=live, other=0)
            source = slots // GATHER
        ptrs = grad_ptr + source.to(tl.int64)[:, None] * stride_grad + offs_n[None, :]
        g = tl.load(ptrs, mask=live[:, None] & (offs_n < N)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            g *= tl.load(weights_ptr + slots, mask=live, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(g, 0)
    tl.store(out_ptr + expert * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=offs_n < N)
