"""`permute` and `unpermute` in Triton: gathers both ways, so nothing is added in an order that chance decides."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...hardware import tl, triton
from ...launch import Bound, Kernel, ceil_div, follow, pow2, unit_rows

NEEDS = "triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(problem: Any) -> str | None:
    if problem.dtype not in DTYPES:
        return f"needs bf16, fp16 or fp32, got {str(problem.dtype).removeprefix('torch.')}"
    return None


@Kernel
@triton.jit
def permute_kernel(
    x_ptr, row_order_ptr, offsets_ptr, out_ptr, stride_x, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out[r] = x[row_order[r] // TOP_K]`, zero for rows past the live ones and for padding."""
    follow(OVERLAP)
    row = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(row_order_ptr + row)
    token = slot // TOP_K
    mask = (offs < H) & (row < tl.load(offsets_ptr + E)) & (slot >= 0)
    x = tl.load(x_ptr + token.to(tl.int64) * stride_x + offs, mask=mask, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * H + offs, x, mask=offs < H)


@Kernel
@triton.jit
def spread_kernel(
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


@Kernel
@triton.jit
def combine_kernel(
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


@Kernel
@triton.jit
def combine_backward_kernel(
    grad_ptr, rows_ptr, weights_ptr, row_order_ptr, offsets_ptr, drows_ptr, dweights_ptr, stride_grad, stride_rows,
    H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`drows[r] = w[slot] · grad[token]`, `dw[slot] = <grad[token], rows[r]>`; zeros for dropped slots."""
    row = tl.program_id(0)
    slot = tl.load(row_order_ptr + row)
    live = (row < tl.load(offsets_ptr + E)) & (slot >= 0)
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


# ---------------------------------------------------------------- launches
def _block(H: int) -> int:
    """Columns a program: 16 bytes a thread and load at 4 warps, several loads in flight."""
    return min(2048, max(16, pow2(H)))


@functools.lru_cache(maxsize=1024)
def _bound(kernel: Kernel, H: int, top_k: int, block: int, **more: Any) -> Bound:
    return kernel.bind(H=H, TOP_K=top_k, BLOCK=block, **more)


@functools.lru_cache(maxsize=1024)
def _combine_bound(H: int, top_k: int, weighted: bool, residual: bool) -> tuple[Bound, int]:
    """The kernel, and into how many blocks it cuts a row."""
    block = min(_block(H), 1024)
    return _bound(combine_kernel, H, top_k, block, WEIGHTED=weighted, RESIDUAL=residual), ceil_div(H, block)


def permute(o: Any, problem: Any) -> tuple[tuple[Tensor], None]:
    return (_permuted(unit_rows(o.x), o, problem.top_k),), None


def _permuted(x: Tensor, o: Any, top_k: int) -> Tensor:
    R, H = o.row_order.shape[0], x.shape[1]
    out = x.new_empty(R, H)
    if R and H:
        block = _block(H)
        bound = _bound(permute_kernel, H, top_k, block, E=o.expert_offsets.shape[0] - 1)
        bound((R, ceil_div(H, block), 1), (x, o.row_order, o.expert_offsets, out), (x.stride(0),))
    return out


def spread(x: Tensor, row_index: Tensor, top_k: int) -> Tensor:
    """`permute` by tokens; rows behind the last expert's are left as they are."""
    T, H = x.shape
    out = x.new_empty(T * top_k, H)
    if T and H:
        block = _block(H)
        _bound(spread_kernel, H, top_k, block)((T, ceil_div(H, block), 1), (x, row_index, out), (x.stride(0),))
    return out


def combine(
    rows: Tensor, weights: Tensor | None, row_index: Tensor, top_k: int, residual: Tensor | None = None
) -> Tensor:
    """The sums of each token's rows; with a residual, in the dtype of rows, they are added to it."""
    T, H, rows, apart = row_index.shape[0] // top_k, rows.shape[1], unit_rows(rows), 0
    out = rows.new_empty(T, H)
    if T and H:
        if weights is not None:
            weights = weights.contiguous()
        if residual is not None:
            residual = unit_rows(residual)
            apart = residual.stride(0)
        bound, blocks = _combine_bound(H, top_k, weights is not None, residual is not None)
        bound((T, blocks, 1), (rows, row_index, weights, residual, out), (rows.stride(0), apart))
    return out


def unpermute(o: Any, problem: Any) -> tuple[tuple[Tensor], None]:
    return (combine(o.rows, o.weights, o.row_index, problem.top_k),), None


def unpermute_backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    grad, rows, top_k = unit_rows(grads.y), unit_rows(o.rows), problem.top_k
    if o.weights is None:
        return {"rows": _permuted(grad, o, top_k)}
    weights = o.weights
    drows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    packed = o.row_order.shape[0] == weights.numel()  # otherwise slots beyond the capacity have no row
    dweights = (torch.empty if packed else torch.zeros)(weights.shape, dtype=weights.dtype, device=weights.device)
    R, H = rows.shape
    if R:
        bound = _bound(combine_backward_kernel, H, top_k, _block(H), E=o.expert_offsets.shape[0] - 1)
        pointers = (grad, rows, weights.contiguous(), o.row_order, o.expert_offsets, drows, dweights)
        bound((R, 1, 1), pointers, (grad.stride(0), rows.stride(0)))
    return {"rows": drows, "weights": dweights}
