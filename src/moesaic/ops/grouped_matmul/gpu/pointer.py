"""The product by pointers: any strides, any alignment of columns, any Triton GPU; the only one for few rows.

Legend: M rows, N output columns, K contraction; a *slot* here is a place in the grid that may hold a tile of rows.
Where the tiles lie is known on the device only, so grids are upper bounds and surplus places leave at once: nobody
waits.
"""

from __future__ import annotations

import torch

from ....hardware import tl, triton
from ....launch import Kernel, ceil_div, follow, pow2
from .cost import Cost, microseconds
from .epilogue import code, gate_up, narrowed, row_scale
from .schedule import row_tiles
from .spec import Config, Gemm, GemmSpec

SMALL_MEMORY = ("sm_86", "sm_89", "sm_120", "sm_121")  # 99 KiB of shared memory a block
SKINNY, LOW, LARGE = Config(16, 128, 128, 4, 4), Config(32, 128, 64, 4, 5), Config(128, 128, 64, 8, 3)
COSTS = {  # of gathered rows, and of rows in their order; LARGE serves what tensor maps refuse, and is not fitted
    SKINNY: (Cost(4.4, 5.65, 0.0), Cost(4.3, 5.4, 0.3)),
    LOW: (Cost(4.35, 3.0, 1.5, blocks=2), Cost(4.25, 3.125, 1.5, blocks=2)),
    LARGE: (Cost(3.9, 1.6, 2.0), Cost(3.9, 1.6, 2.0)),
}


def why_not(spec: GemmSpec) -> str | None:
    return None


def candidates(spec: GemmSpec) -> tuple[Config, ...]:
    """On sm_90 what the model chooses from; elsewhere one tile by the rows an expert has, sized to shared memory and
    registers by compiling."""
    arch, rows = spec.gpu.arch, spec.rows_per_expert
    if spec.dtype == torch.float32:
        return (Config(16 if rows <= 16 else 64, 64, 32, 4, 2),)
    if arch == "sm_90":
        return tuple(COSTS)
    if arch.startswith("gfx"):  # 64 KiB of LDS
        if rows <= 16:
            return (Config(16, 64, 128, 4, 2),)
        return (Config(32 if rows <= 32 else 64 if rows <= 64 else 128, 128, 64, 8, 2),)
    if arch in ("sm_100", "sm_103"):
        if rows <= 16:
            return (Config(16, 128, 128, 4, 4),)
        return (Config(64, 128, 64, 4, 4) if rows <= 40 else Config(128, 256, 64, 8, 3),)
    stages = 3 if arch in SMALL_MEMORY else 4
    if rows <= 16:
        return (Config(16, 64, 128, 4, stages),)
    if rows <= 64:
        return (Config(32 if rows <= 32 else 64, 64 if arch in SMALL_MEMORY else 128, 64, 4, stages),)
    return (Config(128, 128, 32 if arch in SMALL_MEMORY else 64, 8, 3),)


def estimate(spec: GemmSpec, config: Config) -> float:
    cost = COSTS.get(config, COSTS[LARGE])[0 if spec.top_k else 1]
    return microseconds(spec, config, cost)


def launch(spec: GemmSpec, config: Config) -> Gemm:
    E, (stride_x, we, wn, wk) = spec.experts, spec.strides
    bound = grouped_gemm_kernel.bind(
        N=spec.N, K=spec.K, E=E, E_POW2=pow2(E), GATHER=spec.top_k, EPILOGUE=code(spec.epilogue),
        ZERO_TAIL=spec.zero_tail, WIDE=spec.wide, PRECISION=precision(spec), BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    columns, strides, zeros = ceil_div(spec.width, config.block_n), (stride_x, we, wn, wk), int(spec.zero_tail)

    def run(out, x, w, table, gather, bias, preact, scale):
        rows = table.rows
        places = row_tiles(rows, E, config.block_m)
        by_row = int(places == rows)
        places += 0 if by_row else zeros
        pointers = (out, x, gather, w, bias, preact, scale, table.offsets)
        bound((places * columns, 1, 1), pointers, strides, (rows, places, by_row))

    return Gemm(spec, None, run)


def precision(spec: GemmSpec) -> str:
    return "tf32" if spec.tf32 and spec.dtype == torch.float32 else "ieee"


@triton.jit
def locate_tile(offsets_ptr, slot, R, by_row, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """`(expert, first row, end of the expert's rows)` of a slot; the slot is empty when first row >= end.

    With few rows (`by_row`) slot s belongs to row s, and holds a tile if that row starts one. Otherwise expert e owns
    the slots from `offsets[e] // BLOCK_M + e` on: never too few, since floor(b/m) - floor(a/m) + 1 >= ceil((b-a)/m),
    and monotone, so the expert is a count. Expert E stands for the rows behind the last expert's; they end at R.
    """
    e = tl.arange(0, E_POW2)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=2147483647)
    last = tl.where(by_row != 0, ends, ends // BLOCK_M + e + 1)  # the first slot that is not the expert's any more
    expert = tl.sum((last <= slot).to(tl.int32), 0)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + tl.minimum(expert + 1, E))
    end = tl.where(expert == E, R, end)
    if by_row != 0:
        row = tl.where((slot - start) % BLOCK_M == 0, slot, end)
    else:
        row = start + (slot - start // BLOCK_M - expert) * BLOCK_M
    return expert, row, end


@Kernel
@triton.jit(do_not_specialize=["R", "num_slots", "by_row"])
def grouped_gemm_kernel(
    out_ptr, x_ptr, gather_ptr, w_ptr, bias_ptr, preact_ptr, scale_ptr, offsets_ptr,
    stride_xm, stride_we, stride_wn, stride_wk,
    R, num_slots, by_row,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, GATHER: tl.constexpr,
    EPILOGUE: tl.constexpr, ZERO_TAIL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out[r] = epilogue(x[src(r)] @ w[expert(r)].T)`; N counts out's columns: a gated tile makes BLOCK_N / 2."""
    follow(OVERLAP)
    # locate tile: slots of a group are neighbours in time, so that they share a weight tile through the L2
    GATED: tl.constexpr = EPILOGUE.gated
    INTERLEAVED: tl.constexpr = EPILOGUE.interleaved
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
    expert, row, end = locate_tile(offsets_ptr, slot, behind, by_row, E, E_POW2, BLOCK_M)
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
    if WIDE:
        w_ptrs = w_base + offs_k.to(tl.int64)[:, None] * stride_wk + offs_n.to(tl.int64)[None, :] * stride_wn
    else:
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
        if WIDE:
            w_ptrs += tl.full((), BLOCK_K, tl.int64) * stride_wk
        else:
            w_ptrs += BLOCK_K * stride_wk

    # epilogue
    inside = mask_m[:, None] & mask_out[None, :]
    if EPILOGUE.bias:
        acc += tl.load(bias_ptr + expert * WIDTH + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    preact_ptrs = preact_ptr
    if EPILOGUE.preact:
        preact_ptrs += offs_m.to(tl.int64)[:, None] * WIDTH
    if GATED:
        gate, up = gate_up(acc, EPILOGUE)
        if EPILOGUE.preact:
            step: tl.constexpr = 2 if INTERLEAVED else 1
            shift: tl.constexpr = 1 if INTERLEAVED else N
            dtype: tl.constexpr = preact_ptr.dtype.element_ty
            tl.store(preact_ptrs + offs_out[None, :] * step, narrowed(gate, dtype, EPILOGUE), mask=inside)
            tl.store(preact_ptrs + offs_out[None, :] * step + shift, narrowed(up, dtype, EPILOGUE), mask=inside)
        y = EPILOGUE.activation(gate, up, EPILOGUE.alpha, EPILOGUE.limit)
    else:
        if EPILOGUE.preact:
            kept = narrowed(acc, preact_ptr.dtype.element_ty, EPILOGUE)
            tl.store(preact_ptrs + offs_out[None, :], kept, mask=inside)
        y = EPILOGUE.activation(acc, EPILOGUE.alpha, EPILOGUE.limit)
    if EPILOGUE.scaled:
        y *= row_scale(scale_ptr, gather_ptr, offs_m, mask_m)[:, None]

    # store
    tl.store(out_ptrs, narrowed(y, out_ptr.dtype.element_ty, EPILOGUE), mask=inside)
