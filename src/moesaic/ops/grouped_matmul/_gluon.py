"""The product of `grouped_matmul` in Gluon, for Hopper, with weights on the tensor cores' M side and tokens on N.

A *tall* tile is 256 rows of weights by up to 128 tokens, a *wide* one 128 by 256, and either takes a tail of 16 or 32
tokens more, so that what an expert has beyond full tiles costs about what it is. A program a multiprocessor takes tiles
from a counter. One partition loads; two multiply, each with half of the tile's rows of weights, and may drift apart, so
that the epilogue of one runs under the products of the other. Legend: N output columns, K contraction; ROWS of weights
a consumer has, and MAIN tokens a tile but for the tail.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...hardware import gl, gluon, sm_count
from ...launch import Launch, TensorMap, ceil_div
from ._gluon_partitions import BLOCK_K, STAGES, TAIL, consume, mbarrier, produce, produce_gathered
from ._tiles import TileTable, epilogue
from ._triton_tma import row_map


@gluon.jit
def _swapped_gemm_kernel(
    tiles_ptr, used_ptr, x_ptr, gather_ptr, bias_ptr, x_desc, w_desc, out_desc, stride_x,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    ACTIVATION: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, MAIN: gl.constexpr, ROWS: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """`out[r] = act(x[src(r)] @ w[expert(r)].T + bias)`; N counts out's columns. TOP_K is 0 without a gather.

    Registers: 168 a thread at entry, of which the producer gives most to the consumers. Barriers are set up only if
    they live to the end: the allocator puts data on those that do not.
    """
    dtype: gl.constexpr = out_desc.dtype
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([MAIN, BLOCK_K], dtype)
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES, MAIN, BLOCK_K], rows)
    tails = gl.allocate_shared_memory(dtype, [STAGES, TAIL, BLOCK_K], rows)
    w_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    out_0 = gl.allocate_shared_memory(dtype, [2] + out_desc.block_type.shape, out_desc.layout)  # noqa: RUF005
    out_1 = gl.allocate_shared_memory(dtype, [2] + out_desc.block_type.shape, out_desc.layout)  # noqa: RUF005
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    board = gl.allocate_shared_memory(gl.int64, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(posted.index(s), count=1)
        mbarrier.init(taken.index(s), count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(empty.index(s), count=2)
        mbarrier.init(full.index(s), count=1 + 128 if TOP_K > 0 else 1)
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    GATHERED: gl.constexpr = TOP_K > 0
    EPILOGUE: gl.constexpr = (ACTIVATION, GATED, INTERLEAVED, ALPHA, LIMIT, HAS_BIAS, GATED and TRANSPOSED)
    ring = (x_bufs, tails, w_bufs, empty, full)
    cue = (board, posted, taken)
    outputs = (out_desc, bias_ptr)
    if GATHERED:
        gl.warp_specialize([
            (consume, (ring, outputs, out_0, cue, (0, ROWS, STEPS, TRANSPOSED, True), N, EPILOGUE)),
            (consume, (ring, outputs, out_1, cue, (1, ROWS, STEPS, TRANSPOSED, True), N, EPILOGUE)),
            (produce_gathered, (x_ptr, stride_x, gather_ptr, w_desc, tiles_ptr, used_ptr, ring, cue, K, TOP_K,
                                 ROWS, TRANSPOSED, GATED, PROGRAMS)),
        ], [4, 4], [208, 96])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (ring, outputs, out_0, cue, (0, ROWS, STEPS, TRANSPOSED, False), N, EPILOGUE)),
            (consume, (ring, outputs, out_1, cue, (1, ROWS, STEPS, TRANSPOSED, False), N, EPILOGUE)),
            (produce, (x_desc, w_desc, tiles_ptr, used_ptr, ring, cue, K, ROWS, TRANSPOSED, GATED, PROGRAMS)),
        ], [4, 1], [232, 40])  # fmt: skip


# ---------------------------------------------------------------- launches
def _weight_map(w: Tensor, transposed: bool, gated: bool, interleaved: bool, N: int, K: int, rows: int) -> TensorMap:
    """A box is a consumer's `rows` rows of one expert's weights, 64 deep; of gated ones eight are gates, eight ups."""
    we, w1, _ = w.stride()
    E = w.shape[0]
    if transposed or not gated:
        return TensorMap(w, tuple(w.shape), w.stride(), (1, 64, rows) if transposed else (1, rows, 64), True)
    half, step = (w1, 2 * w1) if interleaved else (N * w1, w1)
    return TensorMap(w, (E, N // 8, 2, 8, K), (we, 8 * step, half, step, 1), (1, rows // 16, 2, 8, 64), True)


def _row_map(rows: Tensor, columns: int) -> TensorMap:
    """4 KiB of rows to load or store, of which an access names the end."""
    return row_map(rows, 2048 // columns, columns)._replace(gluon=True)


@functools.lru_cache(maxsize=4096)
def _gemm_launch(
    dtype: torch.dtype, programs: int, N: int, K: int, top_k: int, transposed: bool, activation: tuple | None,
    interleaved: bool, has_bias: bool, stride: int, block_m: int,
) -> Launch:  # fmt: skip
    act = epilogue(activation, interleaved)
    constants = (N, K, top_k, transposed, *act, has_bias, block_m, 16384 // block_m, programs)
    return Launch(_swapped_gemm_kernel, (programs, 1, 1), constants, num_warps=4)


def gemm(
    x: Tensor, w: Tensor, transposed: bool, tiles: TileTable, out: Tensor, K: int, gather: Tensor | None, top_k: int,
    bias: Tensor | None, activation: tuple | None, interleaved: bool, hidden: None, c,
) -> None:  # fmt: skip
    """Launch `_swapped_gemm_kernel` with configuration c; `activation` is its name and constants."""
    N, gated, weights = out.shape[1], epilogue(activation, interleaved)[1], 16384 // c.block_m
    columns = ceil_div(N, weights if gated else 2 * weights)
    entries, used = tiles.of(c.block_m, columns, c.group_m, c.slack)
    programs = min(sm_count(x.get_device()) if x.is_cuda else 4, tiles.bound(c.block_m) * columns)
    launch = _gemm_launch(
        x.dtype, programs, N, K, top_k if gather is not None else 0, transposed, activation, interleaved,
        bias is not None, x.stride(0), c.block_m,
    )  # fmt: skip
    x_map = None if gather is not None else _row_map(x, 64)
    width = min(64, weights // 2 if gated else weights)
    w_map = _weight_map(w, transposed, gated, interleaved, N, K, weights)
    maps = (x_map, w_map, _row_map(out, width))
    launch((entries, used, x, gather, bias, *maps), (x.stride(0),))
