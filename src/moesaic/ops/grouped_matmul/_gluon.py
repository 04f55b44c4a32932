"""The product of `grouped_matmul` in Gluon, for Hopper, with weights on the tensor cores' M side and tokens on N.

A *tall* tile is 256 rows of weights by up to 128 tokens, a *wide* one 128 by 256, and either takes a tail of 16 or 32
tokens more, so that what an expert has beyond full tiles costs about what it is. A program a multiprocessor takes tiles
from a counter. One partition loads; two multiply, each with half of the tile's rows of weights, and may drift apart, so
that the epilogue of one runs under the products of the other. Legend: N output columns, K contraction; ROWS of weights
a consumer has, and MAIN tokens a tile but for the tail.
"""

from __future__ import annotations

import functools

from ...hardware import gl, gluon
from ...launch import Launch, TensorMap, ceil_div, follow
from ._gluon_partitions import BLOCK_K, STAGES, TAIL, consume, mbarrier, produce, produce_gathered
from ._tiles import Form, Tiles, entries, epilogue, row_tiles
from ._triton_tma import row_map


@gluon.jit
def _swapped_gemm_kernel(
    x, gather_ptr, w_desc, bias_ptr, out_desc, hidden_ptr, table_ptr, stride_x,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    ACTIVATION: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, MAIN: gl.constexpr, ROWS: gl.constexpr, PROGRAMS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """`out[r] = act(x[src(r)] @ w[expert(r)].T + bias)`; N counts out's columns. TOP_K is 0 without a gather.

    `x` is a pointer where its rows are gathered, else a map. Nothing is kept: `hidden_ptr` is the other kernels'.
    Registers: 168 a thread at entry, of which the producer gives most to the consumers. Barriers are set up only if
    they live to the end: the allocator puts data on those that do not.
    """
    tiles_ptr, used_ptr = entries(table_ptr), table_ptr
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
    follow(OVERLAP)
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
            (produce_gathered, (x, stride_x, gather_ptr, w_desc, tiles_ptr, used_ptr, ring, cue, K, TOP_K,
                                 ROWS, TRANSPOSED, GATED, PROGRAMS)),
        ], [4, 4], [208, 96])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (ring, outputs, out_0, cue, (0, ROWS, STEPS, TRANSPOSED, False), N, EPILOGUE)),
            (consume, (ring, outputs, out_1, cue, (1, ROWS, STEPS, TRANSPOSED, False), N, EPILOGUE)),
            (produce, (x, w_desc, tiles_ptr, used_ptr, ring, cue, K, ROWS, TRANSPOSED, GATED, PROGRAMS)),
        ], [4, 1], [224, 64])  # fmt: skip


# ---------------------------------------------------------------- launches
def _weight_map(form: Form, rows: int) -> TensorMap:
    """A box is a consumer's `rows` rows of one expert's weights, 64 deep; of gated ones eight are gates, eight ups."""
    _, we, w1, _ = form.strides
    E, N, K = form.experts, form.N, form.K
    if form.transposed:
        return TensorMap((E, K, form.width), (we, w1, 1), (1, 64, rows), gluon=True)
    if not form.gated:
        return TensorMap((E, form.width, K), (we, w1, 1), (1, rows, 64), gluon=True)
    half, step = (w1, 2 * w1) if form.interleaved else (N * w1, w1)
    return TensorMap((E, N // 8, 2, 8, K), (we, 8 * step, half, step, 1), (1, rows // 16, 2, 8, 64), gluon=True)


def _row_map(width: int, stride: int, columns: int) -> TensorMap:
    """4 KiB of rows to load or store, of which an access names the end."""
    return row_map(width, stride, 2048 // columns, columns)._replace(gluon=True)


@functools.lru_cache(maxsize=4096)
def _swapped_launch(form: Form, programs: int, block_m: int) -> Launch:
    act, rows = epilogue(form.activation, form.interleaved), 16384 // block_m
    constants = (form.N, form.K, form.top_k, form.transposed, *act, form.bias, block_m, rows, programs)
    width = min(64, rows // 2 if form.gated else rows)
    maps = {2: _weight_map(form, rows), 4: _row_map(form.N, form.N, width)}
    if not form.top_k:
        maps[0] = _row_map(form.K, form.strides[0], 64)
    return Launch(_swapped_gemm_kernel, (programs, 1, 1), constants, num_warps=4, maps=maps, overlaps=True)


def launch(form: Form, rows: int, processors: int, c) -> tuple[Launch, tuple[int, ...], Tiles]:
    """As `_triton_tma.launch`."""
    weights = 16384 // c.block_m
    columns = ceil_div(form.N, weights if form.gated else 2 * weights)
    programs = min(processors, row_tiles(rows, form.experts, c.block_m) * columns)
    return _swapped_launch(form, programs, c.block_m), form.strides[:1], (c.block_m, columns, c.group_m, c.slack)
