"""`grouped_matmul` in Triton: one kernel for all products of rows with experts' matrices, one for weight gradients.

Many rows an expert, where tensor maps can hold the operands, go to the persistent kernel of `_triton_tma`.

Legend: M rows, N output columns, K contraction; a *slot* is a place in the grid that may hold a tile of rows. Where the
tiles lie is known on the device only, so grids are upper bounds and surplus slots leave at once: nobody waits.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from ... import hardware
from ...hardware import tl, triton
from ...launch import Launch, ceil_div, follow, pow2, unit_rows
from . import _triton_tma
from ._configs import Config, Product, choose, configs, sorts_first, wgrad_config
from ._tiles import Form, Tiles, TileTable, epilogue

# what `experts` composes
__all__ = [
    "Config", "Gemm", "Product", "TileTable", "aligned", "choose", "configs", "gemm", "plan", "sorts_first", "wgrad",
]  # fmt: skip

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(problem) -> str | None:
    if problem.dtype not in DTYPES:
        return f"needs bf16, fp16 or fp32, got {str(problem.dtype).removeprefix('torch.')}"
    return None


# ---------------------------------------------------------------- device code shared by the kernels
@triton.jit
def locate_tile(
    offsets_ptr, slot, R, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK_M: tl.constexpr, BY_ROW: tl.constexpr
):
    """`(expert, first row, end of the expert's rows)` of a slot; the slot is empty when first row >= end.

    With few rows (`BY_ROW`) slot s belongs to row s, and holds a tile if that row starts one. Otherwise expert e owns
    the slots from `offsets[e] // BLOCK_M + e` on: never too few, since floor(b/m) - floor(a/m) + 1 >= ceil((b-a)/m),
    and monotone, so the expert is a count. Expert E stands for the rows behind the last expert's; they end at R.
    """
    e = tl.arange(0, E_POW2)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=2147483647)
    if BY_ROW:
        expert = tl.sum((ends <= slot).to(tl.int32), 0)
    else:
        expert = tl.sum((ends // BLOCK_M + e + 1 <= slot).to(tl.int32), 0)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + tl.minimum(expert + 1, E))
    end = tl.where(expert == E, R, end)
    if BY_ROW:
        row = tl.where((slot - start) % BLOCK_M == 0, slot, end)
    else:
        row = start + (slot - start // BLOCK_M - expert) * BLOCK_M
    return expert, row, end


@triton.jit(do_not_specialize=["R", "num_slots"])
def _grouped_gemm_kernel(
    x_ptr, gather_ptr, w_ptr, bias_ptr, out_ptr, hidden_ptr, offsets_ptr,
    stride_xm, stride_we, stride_wn, stride_wk,
    R, num_slots,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_HIDDEN: tl.constexpr, ZERO_TAIL: tl.constexpr, BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out[r] = act(x[src(r)] @ w[expert(r)].T + bias)`; N counts out's columns: a gated tile makes BLOCK_N / 2."""
    follow(OVERLAP)
    # locate tile: slots of a group are neighbours in time, so that they share a weight tile through the L2
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    WIDTH: tl.constexpr = 2 * N if GATED else N
    num_n: tl.constexpr = (N + OUT_N - 1) // OUT_N
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_n)
    in_group = tl.minimum(num_slots - group * GROUP_M, GROUP_M)
    slot = group * GROUP_M + (pid % (GROUP_M * num_n)) % in_group
    tile_n = (pid % (GROUP_M * num_n)) // in_group
    # rows behind the last expert's are nobody's, and no matrix is there for them: they end before they begin
    behind = R if ZERO_TAIL else 0
    expert, row, end = locate_tile(offsets_ptr, slot, behind, E, E_POW2, BLOCK_M, BY_ROW)
    if row >= end:
        return
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    offs_out = tile_n * OUT_N + tl.arange(0, OUT_N)
    mask_out = offs_out < N
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_out[None, :]
    if ZERO_TAIL:
        if expert == E:
            tl.store(
                out_ptrs, tl.zeros((BLOCK_M, OUT_N), out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_out[None, :]
            )
            return

    # pointers: rows outside are read from the nearest inside and never stored, so their loads need no mask
    src = tl.minimum(offs_m, end - 1)
    if GATHER > 0:
        src = tl.load(gather_ptr + src) // GATHER
    j = tl.arange(0, BLOCK_N)
    if GATED and not INTERLEAVED:  # the left half of the tile holds gate columns, the right half their up columns
        offs_n = tile_n * OUT_N + j % OUT_N + (j // OUT_N) * N
        mask_n = tile_n * OUT_N + j % OUT_N < N
    else:
        offs_n = tile_n * BLOCK_N + j
        mask_n = offs_n < WIDTH
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + src.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    w_base = w_ptr + expert.to(tl.int64) * stride_we
    w_ptrs = w_base + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn

    # main loop
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        if K % BLOCK_K == 0 and N % OUT_N == 0:
            w = tl.load(w_ptrs)
        elif K % BLOCK_K == 0:
            w = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(offs_k[:, None] < K - k) & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk

    # epilogue
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * WIDTH + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    hidden_ptrs = hidden_ptr
    if SAVE_HIDDEN:
        hidden_ptrs += offs_m.to(tl.int64)[:, None] * WIDTH
    if GATED:
        if INTERLEAVED:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, OUT_N, 2)))
        else:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, OUT_N)), (0, 2, 1)))
        if SAVE_HIDDEN:
            step: tl.constexpr = 2 if INTERLEAVED else 1
            shift: tl.constexpr = 1 if INTERLEAVED else N
            inside = mask_m[:, None] & mask_out[None, :]
            tl.store(hidden_ptrs + offs_out[None, :] * step, gate.to(hidden_ptr.dtype.element_ty), mask=inside)
            tl.store(hidden_ptrs + offs_out[None, :] * step + shift, up.to(hidden_ptr.dtype.element_ty), mask=inside)
        y = ACTIVATION(gate, up, ALPHA, LIMIT)
    else:
        if SAVE_HIDDEN:
            inside = mask_m[:, None] & mask_out[None, :]
            tl.store(hidden_ptrs + offs_out[None, :], acc.to(hidden_ptr.dtype.element_ty), mask=inside)
        y = ACTIVATION(acc, ALPHA, LIMIT)

    # store
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_out[None, :])


@triton.jit
def _grouped_wgrad_kernel(
    left_ptr, left_gather_ptr, right_ptr, right_gather_ptr, out_ptr, offsets_ptr,
    stride_left, stride_right, stride_oe, stride_on, stride_ok,
    N: tl.constexpr, K: tl.constexpr, LEFT_GATHER: tl.constexpr, RIGHT_GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
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
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_oe + offs_n[:, None] * stride_on + offs_k[None, :] * stride_ok
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


@triton.jit
def _bias_grad_kernel(
    grad_ptr, gather_ptr, weights_ptr, out_ptr, offsets_ptr, stride_grad,
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


# ---------------------------------------------------------------- launches
def _precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    return "tf32" if allow_tf32 and dtype == torch.float32 else "ieee"


@functools.lru_cache(maxsize=4096)
def _plain_launch(form: Form, rows: int, c: Config) -> tuple[Launch, tuple[int, ...]]:
    """The launch of a product and its numbers."""
    E, (stride, we, wn, wk) = form.experts, form.strides
    by_row = rows <= rows // c.block_m + E
    num_slots = rows if by_row else rows // c.block_m + E + form.zeros
    act = epilogue(form.activation, form.interleaved)
    constants = (
        form.N, form.K, E, pow2(E), form.top_k, *act, form.bias, form.keeps, form.zeros, by_row,
        _precision(form.dtype, form.allow_tf32), c.block_m, c.block_n, c.block_k, c.group_m,
    )  # fmt: skip
    grid = (num_slots * ceil_div(form.width, c.block_n), 1, 1)
    strides = (stride, we, wk, wn) if form.transposed else form.strides
    launch = Launch(_grouped_gemm_kernel, grid, constants, c.num_warps, c.num_stages, overlaps=True)
    return launch, (*strides, rows, num_slots)


def swaps(problem, *, K: int, gathered: bool, gated: bool = False, keeps: bool = False, transposed=None) -> bool:
    """Can `_gluon` make a product of a problem, where `_triton_tma` can?

    Not where it `keeps` what the activation is given, where gates and ups lie apart in weights stored input-major, or
    where gathered rows are not whole stages long.
    """
    apart = gated and (problem.transposed if transposed is None else transposed) and not problem.interleaved
    refused = keeps or apart or (gathered and K % 64 != 0)
    return problem.arch == "sm_90" and not refused and hardware.has_gluon()


class Gemm(NamedTuple):
    """A product with everything fixed but its memory; `tiles` is what it asks of the tile table, if anything."""

    shape: tuple[int, int]
    launch: Launch
    numbers: tuple[int, ...]
    tiles: Tiles | None
    ups: int | None  # of the persistent kernel, where they begin in what is kept
    zeros: bool

    def __call__(
        self, x: Tensor, w: Tensor, table: TileTable, gather: Tensor | None = None, bias: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = x.new_empty(*self.shape)
        where = table.offsets if self.tiles is None else table.of(*self.tiles)
        pointers = (x, gather, w, bias, out, hidden, where)
        if self.ups is not None:
            pointers += (None if hidden is None else hidden[:, self.ups :],)
        self.launch(pointers, self.numbers)
        if self.zeros and self.tiles is not None:
            _triton_tma.zero_tail(out, table.offsets)
        return out


def aligned(x: Tensor, w: Tensor) -> bool:
    """Do both begin at whole 16 bytes?"""
    return not (x.data_ptr() | w.data_ptr()) & 15


@functools.lru_cache(maxsize=4096)
def plan(
    problem, config: Config | None, rows: int, sources: int, N: int, K: int, transposed: bool,
    strides: tuple[int, ...], aligned: bool, device: int, top_k: int = 0, bias: bool = False,
    activation: tuple[str, float, float] | None = None, keeps: bool = False, zeros: bool = False,
) -> Gemm:  # fmt: skip
    """A product of `rows` > 0 that read `sources` rows, on GPU number `device` (-1: none). See `Form` and `aligned`."""
    form = Form(problem.dtype, problem.num_experts, N, K, transposed, strides, top_k, activation, problem.interleaved,
                bias, keeps, zeros, problem.allow_tf32)  # fmt: skip
    swap = swaps(problem, K=K, gathered=top_k > 0, gated=form.gated, keeps=keeps, transposed=transposed)
    product = Product(rows, form.experts, form.width, K, N, sources if top_k else 0, swap)
    c = config or choose(problem.arch, form.dtype, problem.batch_invariant, product)
    if c.kernel == "plain" or _triton_tma.why_not(form, aligned) is not None:
        return Gemm((rows, N), *_plain_launch(form, rows, c.plain), None, None, zeros)
    processors = hardware.sm_count(device) if device >= 0 else 4
    if c.kernel == "swapped" and swap and not (top_k and c.block_m > 128):
        launch, numbers, tiles = importlib.import_module("._gluon", __package__).launch(form, rows, processors, c)
        return Gemm((rows, N), launch, numbers, tiles, None, zeros)
    return Gemm((rows, N), *_triton_tma.launch(form, rows, processors, c.persistent), N, zeros)


def gemm(
    x: Tensor, w: Tensor, transposed: bool, tiles: TileTable, problem, *, N: int, K: int,
    gather: Tensor | None = None, top_k: int = 0, bias: Tensor | None = None, activation=None,
    hidden: Tensor | None = None, zero_tail: bool = False, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Plan a product and launch it. `w` is `(E, width, K)`, or `(E, K, width)` when transposed; N as in the kernels."""
    if tiles.rows == 0:
        return x.new_empty((0, N))
    act = None if activation is None else (activation.name, activation.alpha, activation.limit)
    product = plan(
        problem, config, tiles.rows, x.shape[0], N, K, transposed, (x.stride(0), *w.stride()), aligned(x, w),
        x.get_device(), top_k if gather is not None else 0, bias is not None, act, hidden is not None, zero_tail,
    )  # fmt: skip
    return product(x, w, tiles, gather, bias, hidden)


@functools.lru_cache(maxsize=4096)
def _wgrad_launch(
    arch: str, dtype: torch.dtype, allow_tf32: bool, E: int, N: int, K: int, gathers: tuple[int, int],
    strides: tuple[int, ...],
) -> Launch:  # fmt: skip
    """Kept apart by all that the compiled kernel depends on, though its constants need less."""
    block_n, block_k, block_r, num_warps, num_stages = wgrad_config(arch, dtype)
    constants = (N, K, *gathers, _precision(dtype, allow_tf32), block_n, block_k, block_r)
    grid = (ceil_div(K, block_k), ceil_div(N, block_n), E)
    return Launch(_grouped_wgrad_kernel, grid, constants, num_warps, num_stages)


def wgrad(
    left: Tensor, right: Tensor, expert_offsets: Tensor, w: Tensor, transposed: bool, problem,
    left_gather: Tensor | None = None, right_gather: Tensor | None = None, top_k: int = 0,
) -> Tensor:  # fmt: skip
    """Launch `_grouped_wgrad_kernel`: the gradient of `w` from `left` (N columns) and `right` (K columns)."""
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    oe, on, ok = out.stride()
    strides = (left.stride(0), right.stride(0), oe, *((ok, on) if transposed else (on, ok)))
    gathers = (top_k if left_gather is not None else 0, top_k if right_gather is not None else 0)
    launch = _wgrad_launch(
        problem.arch, left.dtype, problem.allow_tf32, w.shape[0], left.shape[1], right.shape[1], gathers, strides
    )
    launch((left, left_gather, right, right_gather, out, expert_offsets), strides)
    return out


@functools.lru_cache(maxsize=4096)
def _bias_grad_launch(dtypes: tuple[torch.dtype | None, ...], E: int, N: int, gather: int, stride: int) -> Launch:
    """Kept apart by all that the compiled kernel depends on: `dtypes` are those of gradient, weights and result."""
    block_n = min(256, max(16, pow2(N)))
    constants = (N, gather, dtypes[1] is not None, 32, block_n)
    return Launch(_bias_grad_kernel, (ceil_div(N, block_n), E, 1), constants)


def bias_grad(
    grad: Tensor,
    expert_offsets: Tensor,
    bias: Tensor,
    gather: Tensor | None = None,
    weights: Tensor | None = None,
    top_k: int = 0,
) -> Tensor:
    out = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    dtypes = (grad.dtype, None if weights is None else weights.dtype, bias.dtype)
    launch = _bias_grad_launch(dtypes, *bias.shape, top_k if gather is not None else 0, grad.stride(0))
    launch((grad, gather, weights, out, expert_offsets), (grad.stride(0),))
    return out


def default_config(problem) -> Config:
    R, E, N, K = problem.num_slots, problem.num_experts, problem.intermediate_size, problem.hidden_size
    product = Product(R, E, N, K, N, 0, swaps(problem, K=K, gathered=False))
    return choose(problem.arch, problem.dtype, problem.batch_invariant, product)


def grouped_matmul(rows: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None, problem) -> Tensor:
    return gemm(
        unit_rows(rows), w, problem.transposed, TileTable(expert_offsets, rows.shape[0]), problem,
        N=problem.intermediate_size, K=problem.hidden_size, zero_tail=True,
        bias=None if bias is None else bias.contiguous(),
    )  # fmt: skip


def grouped_matmul_backward(grad, rows, w, expert_offsets, bias, problem, needs):
    drows, dw, dbias = (rows.new_empty(0) for _ in range(3))
    grad, rows = unit_rows(grad), unit_rows(rows)
    if needs[0]:
        drows = gemm(grad, w, not problem.transposed, TileTable(expert_offsets, grad.shape[0]), problem,
                     N=problem.hidden_size, K=problem.intermediate_size, zero_tail=True)  # fmt: skip
    if needs[1]:
        dw = wgrad(grad, rows, expert_offsets, w, problem.transposed, problem)
    if needs[2]:
        dbias = bias_grad(grad, expert_offsets, bias)
    return drows, dw, dbias
