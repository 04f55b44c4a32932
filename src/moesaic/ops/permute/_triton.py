"""`permute` and `unpermute` in Triton: gathers both ways, so nothing is added in an order that chance decides."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...hardware import tl, triton
from ...launch import Launch, follow, unit_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(problem) -> str | None:
    if problem.dtype not in DTYPES:
        return f"needs bf16, fp16 or fp32, got {str(problem.dtype).removeprefix('torch.')}"
    return None


@triton.jit
def _permute_kernel(
    x_ptr, row_order_ptr, live_ptr, out_ptr, stride_x, H: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out[r] = x[row_order[r] // TOP_K]`, zero for rows past the live ones and for padding."""
    follow(OVERLAP)
    row = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(row_order_ptr + row)
    token = slot // TOP_K
    mask = (offs < H) & (row < tl.load(live_ptr)) & (slot >= 0)
    x = tl.load(x_ptr + token.to(tl.int64) * stride_x + offs, mask=mask, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * H + offs, x, mask=offs < H)


@triton.jit
def _spread_kernel(
    x_ptr, row_index_ptr, out_ptr, stride_x, H: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out[row_index[t, k]] = x[t]`: a token is read once and written to all of its rows."""
    follow(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * stride_x + offs, mask=offs < H, other=0.0)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_index_ptr + token * TOP_K + k)
        tl.store(out_ptr + row.to(tl.int64) * H + offs, x, mask=(row >= 0) & (offs < H))


@triton.jit
def _combine_kernel(
    rows_ptr, row_index_ptr, weights_ptr, residual_ptr, out_ptr, stride_rows, stride_residual,
    H: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out[t] = sum_k w[t, k] · rows[row_index[t, k]] (+ residual[t])` in fp32, in this order; no row, no summand."""
    follow(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if RESIDUAL:  # asked for before the rows, whose addresses must be waited for
        residual = tl.load(residual_ptr + token * stride_residual + offs, mask=offs < H, other=0.0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_index_ptr + token * TOP_K + k)
        live = row >= 0
        x = tl.load(rows_ptr + row.to(tl.int64) * stride_rows + offs, mask=live & (offs < H), other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(weights_ptr + token * TOP_K + k, mask=live, other=0.0).to(tl.float32)
        acc += x
    if RESIDUAL:
        acc += residual.to(tl.float32)
    tl.store(out_ptr + token * H + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < H)


@triton.jit
def _combine_backward_kernel(
    grad_ptr, rows_ptr, weights_ptr, row_order_ptr, live_ptr, drows_ptr, dweights_ptr, stride_grad, stride_rows,
    H: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`drows[r] = w[slot] · grad[token]`, `dw[slot] = <grad[token], rows[r]>`; zeros for dropped slots."""
    row = tl.program_id(0)
    slot = tl.load(row_order_ptr + row)
    live = (row < tl.load(live_ptr)) & (slot >= 0)
    weight = tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)
    grad_ptr += (slot // TOP_K).to(tl.int64) * stride_grad
    rows_ptr += row.to(tl.int64) * stride_rows
    dot = tl.zeros((BLOCK,), tl.float32)
    for h in range(0, H, BLOCK):
        offs = h + tl.arange(0, BLOCK)
        mask = live & (offs < H)
        g = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dot += g * tl.load(rows_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        drow = (weight * g).to(drows_ptr.dtype.element_ty)
        tl.store(drows_ptr + row.to(tl.int64) * H + offs, drow, mask=offs < H)
    tl.store(dweights_ptr + slot, tl.sum(dot, 0).to(dweights_ptr.dtype.element_ty), mask=slot >= 0)


def _block(H: int) -> int:
    """Columns a program: 16 bytes a thread and load at 4 warps, several loads in flight."""
    return min(2048, max(16, triton.next_power_of_2(H)))


@functools.lru_cache(maxsize=4096)
def _permute_launch(dtype: torch.dtype, R: int, H: int, top_k: int, stride: int) -> Launch:
    block = _block(H)
    return Launch(_permute_kernel, (R, -(-H // block), 1), (H, top_k, block), overlaps=True)


def permute(x: Tensor, row_order: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    R, H, x = row_order.shape[0], x.shape[1], unit_rows(x)
    out = x.new_empty(R, H)
    if out.numel():
        stride = x.stride(0)
        launch = _permute_launch(x.dtype, R, H, top_k, stride)
        launch((x, row_order, expert_offsets[-1:], out), (stride,))
    return out


@functools.lru_cache(maxsize=4096)
def _spread_launch(dtype: torch.dtype, T: int, H: int, top_k: int, stride: int) -> Launch:
    block = _block(H)
    return Launch(_spread_kernel, (T, -(-H // block), 1), (H, top_k, block), overlaps=True)


def spread(x: Tensor, row_index: Tensor, top_k: int) -> Tensor:
    """`permute` by tokens; rows behind the last expert's are left as they are."""
    T, H = x.shape
    out = x.new_empty(T * top_k, H)
    if out.numel():
        _spread_launch(x.dtype, T, H, top_k, x.stride(0))((x, row_index, out), (x.stride(0),))
    return out


@functools.lru_cache(maxsize=4096)
def _combine_launch(
    dtype: torch.dtype, weights: torch.dtype | None, T: int, H: int, top_k: int, stride: int, residual: int | None
) -> Launch:
    """Kept apart by all that the compiled kernel depends on, though its constants need less.

    `stride` and `residual` are the row strides of the rows and of the residual.
    """
    block = min(_block(H), 1024)
    constants = (H, top_k, weights is not None, residual is not None, block)
    return Launch(_combine_kernel, (T, -(-H // block), 1), constants, overlaps=True)


def unpermute(
    rows: Tensor, weights: Tensor | None, row_index: Tensor, top_k: int, residual: Tensor | None = None
) -> Tensor:
    """With a residual, in the dtype of rows, the sums are added to it."""
    T, H, rows = row_index.shape[0] // top_k, rows.shape[1], unit_rows(rows)
    out = rows.new_empty(T, H)
    if out.numel():
        weights = None if weights is None else weights.contiguous()
        residual = None if residual is None else unit_rows(residual)
        stride, apart = rows.stride(0), None if residual is None else residual.stride(0)
        launch = _combine_launch(rows.dtype, None if weights is None else weights.dtype, T, H, top_k, stride, apart)
        launch((rows, row_index, weights, residual, out), (stride, apart or 0))
    return out


@functools.lru_cache(maxsize=4096)
def _combine_backward_launch(
    dtypes: tuple[torch.dtype, ...], R: int, H: int, top_k: int, strides: tuple[int, int]
) -> Launch:
    """Kept apart like `_combine_launch`; `dtypes` are those of gradient, rows and weights."""
    return Launch(_combine_backward_kernel, (R, 1, 1), (H, top_k, _block(H)))


def unpermute_backward(grad, rows, weights, row_order, row_index, expert_offsets, top_k):
    grad, rows = unit_rows(grad), unit_rows(rows)
    drows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    packed = row_order.shape[0] == weights.numel()  # otherwise slots beyond the capacity have no row
    dweights = (torch.empty if packed else torch.zeros)(weights.shape, dtype=weights.dtype, device=weights.device)
    R, H = rows.shape
    if R:
        strides = (grad.stride(0), rows.stride(0))
        launch = _combine_backward_launch((grad.dtype, rows.dtype, weights.dtype), R, H, top_k, strides)
        launch((grad, rows, weights.contiguous(), row_order, expert_offsets[-1:], drows, dweights), strides)
    return drows, dweights
