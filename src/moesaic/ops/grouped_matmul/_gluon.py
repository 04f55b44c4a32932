"""The product of `grouped_matmul` in Gluon, for Hopper and many rows: one warp group loads, two multiply.

A program a multiprocessor walks over the tile table. Its producer keeps four stages of 64 columns of rows and weights
on their way; each consumer owns 64 of the tile's 128 rows, and their epilogues may drift into each other's products. A
tile of at most 64 rows costs half: the second consumer passes it by. Legend as in `_triton.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...hardware import gl, gluon, sm_count
from ...launch import Launch, ceil_div, descriptor
from ._tiles import TileTable, epilogue

hopper = gl.nvidia.hopper
tma, mbarrier, async_copy = hopper.tma, hopper.mbarrier, hopper.async_copy
fence_async_shared = hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
BLOCK_M, BLOCK_N, BLOCK_K, STAGES, HALF_M, WIDTH = (gl.constexpr(n) for n in (128, 256, 64, 4, 64, 128))
EDGE = gl.constexpr(1 << 30)  # see `_store`


@gluon.jit
def _decode(entry):
    """An entry of the tile table, as `_tiles.decode` reads it."""
    rest = (entry >> 32).to(gl.int32)
    return (entry & 0xFFFFFFFF).to(gl.int32), rest & 0xFFF, (rest >> 12) & 0xFF, (rest >> 20) & 0xFFF


@gluon.jit
def _next(stage, phase):
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _load_weights(w_desc, w_bufs, full, stage, expert, tile_n, k, TRANSPOSED: gl.constexpr, JOINED: gl.constexpr):
    """One box of an expert's weights; of JOINED ones half the columns are gates and half ups."""
    if JOINED:
        tma.async_copy_global_to_shared(
            w_desc, [expert, 0, tile_n * (BLOCK_N // 2), k], full.index(stage), w_bufs.index(stage)
        )
    elif TRANSPOSED:
        tma.async_copy_global_to_shared(w_desc, [expert, k, tile_n * BLOCK_N], full.index(stage), w_bufs.index(stage))
    else:
        tma.async_copy_global_to_shared(w_desc, [expert, tile_n * BLOCK_N, k], full.index(stage), w_bufs.index(stage))


@gluon.jit
def _produce(x_desc, w_desc, x_bufs, w_bufs, empty, full, tiles_ptr, used_ptr, K, TRANSPOSED: gl.constexpr,
             JOINED: gl.constexpr, PROGRAMS: gl.constexpr):  # fmt: skip
    """Rows that lie one after the other; those behind the tile's last are read too, and not stored."""
    stage, phase = 0, 1
    used = gl.load(used_ptr)
    first = gl.program_id(0)
    entry = gl.load(tiles_ptr + first)
    following = gl.load(tiles_ptr + first + PROGRAMS)
    for t in range(first, used, PROGRAMS):
        row, expert, _, tile_n = _decode(entry)
        entry = following
        following = gl.load(tiles_ptr + t + 2 * PROGRAMS)
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [row, k], full.index(stage), x_bufs.index(stage))
            _load_weights(w_desc, w_bufs, full, stage, expert, tile_n, k, TRANSPOSED, JOINED)
            stage, phase = _next(stage, phase)


@gluon.jit
def _produce_gathered(x_ptr, stride_x, gather_ptr, w_desc, x_bufs, w_bufs, empty, full, tiles_ptr, used_ptr, K,
                      TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr, JOINED: gl.constexpr,
                      PROGRAMS: gl.constexpr):  # fmt: skip
    """Rows from anywhere, by 16-byte copies of four warps; where they come from is read a tile ahead."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    stage, phase = 0, 1
    used = gl.load(used_ptr)
    first = gl.program_id(0)
    entry = gl.load(tiles_ptr + first)
    following = gl.load(tiles_ptr + first + PROGRAMS)
    row, expert, height, tile_n = _decode(entry)
    next_slot = gl.load(gather_ptr + row + offs_m, mask=offs_m < height, other=0)
    for t in range(first, used, PROGRAMS):
        _, expert, height, tile_n = _decode(entry)
        live = (offs_m < height)[:, None]
        x_ptrs = x_ptr + (next_slot // TOP_K).to(gl.int64)[:, None] * stride_x + offs_k[None, :]
        entry = following
        row, _, next_height, _ = _decode(entry)
        next_slot = gl.load(gather_ptr + row + offs_m, mask=offs_m < next_height, other=0)
        following = gl.load(tiles_ptr + t + 2 * PROGRAMS)
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), w_desc.block_type.nbytes)
            _load_weights(w_desc, w_bufs, full, stage, expert, tile_n, k, TRANSPOSED, JOINED)
            # what is masked keeps what was there: rows that nobody stores
            async_copy.async_copy_global_to_shared(x_bufs.index(stage), x_ptrs + k, mask=live)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            stage, phase = _next(stage, phase)


@gluon.jit
def _operands(x_bufs, w_bufs, stage, WHO: gl.constexpr, TRANSPOSED: gl.constexpr):
    x = x_bufs.index(stage).slice(WHO * HALF_M, HALF_M, dim=0)
    if TRANSPOSED:
        w = w_bufs.index(stage).reshape([BLOCK_K, BLOCK_N])
    else:
        w = w_bufs.index(stage).reshape([BLOCK_N, BLOCK_K]).permute((1, 0))
    return x, w


@gluon.jit
def _multiply(acc, stage, phase, steps, x_bufs, w_bufs, empty, full, WHO: gl.constexpr, TRANSPOSED: gl.constexpr,
              GATHERED: gl.constexpr):  # fmt: skip
    """A tile's products, one in flight behind the next; a stage is given back when its product is done."""
    mbarrier.wait(full.index(stage), phase)
    if GATHERED:  # ordinary copies become visible to the tensor cores
        fence_async_shared()
    x, w = _operands(x_bufs, w_bufs, stage, WHO, TRANSPOSED)
    acc = warpgroup_mma(x, w, acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))  # waits for nothing, but makes a tensor of the token
    before = stage
    stage, phase = _next(stage, phase)
    for _ in range(1, steps):
        mbarrier.wait(full.index(stage), phase)
        if GATHERED:
            fence_async_shared()
        x, w = _operands(x_bufs, w_bufs, stage, WHO, TRANSPOSED)
        acc = warpgroup_mma(x, w, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1)
        before = stage
        stage, phase = _next(stage, phase)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before), count=1)
    return acc, stage, phase


@gluon.jit
def _pass_by(stage, phase, steps, empty, full):
    """A tile without work for this consumer: its stages are given back unread."""
    for _ in range(0, steps):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _next(stage, phase)
    return stage, phase


@gluon.jit
def _store(values, desc, buffer, row, end, column):
    """Store the rows before `end` (see `_triton_tma.store_rows`), through a buffer that may still be on its way out."""
    tma.store_wait(0)
    buffer.reshape([HALF_M, WIDTH]).store(values.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [EDGE, end, EDGE + row - end, column], buffer)


@gluon.jit
def _halves(tile):
    return tile.reshape((HALF_M, 2, WIDTH)).permute((0, 2, 1)).split()


@gluon.jit
def _finish(acc, out_desc, hidden_desc, up_desc, bias_ptr, buffer, row, end, expert, tile_n, N: gl.constexpr,
            EPILOGUE: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """Bias, pre-activations, activation, result."""
    ACTIVATION: gl.constexpr = EPILOGUE[0]
    GATED: gl.constexpr = EPILOGUE[1]
    INTERLEAVED: gl.constexpr = EPILOGUE[2]
    ALPHA: gl.constexpr = EPILOGUE[3]
    LIMIT: gl.constexpr = EPILOGUE[4]
    HAS_BIAS: gl.constexpr = EPILOGUE[5]
    SAVE_HIDDEN: gl.constexpr = EPILOGUE[6]
    JOINED: gl.constexpr = GATED and not INTERLEAVED
    if HAS_BIAS:
        j = gl.arange(0, BLOCK_N, gl.SliceLayout(0, L))
        if JOINED:
            column = tile_n * WIDTH + j % WIDTH
            inside = column < N
            column += j // WIDTH * N
            bias_ptr += expert * (2 * N)
        else:
            column = tile_n * BLOCK_N + j
            inside = column < (2 * N if GATED else N)
            bias_ptr += expert * (2 * N if GATED else N)
        acc += gl.load(bias_ptr + column, mask=inside, other=0.0).to(gl.float32)[None, :]
    if SAVE_HIDDEN and not JOINED:
        left, right = _halves(acc)
        _store(left, hidden_desc, buffer, row, end, tile_n * BLOCK_N)
        _store(right, hidden_desc, buffer, row, end, tile_n * BLOCK_N + WIDTH)
    if GATED:
        if INTERLEAVED:
            gate, up = acc.reshape((HALF_M, WIDTH, 2)).split()
        else:
            gate, up = _halves(acc)
            if SAVE_HIDDEN:
                _store(gate, hidden_desc, buffer, row, end, tile_n * WIDTH)
                _store(up, up_desc, buffer, row, end, tile_n * WIDTH)
        _store(ACTIVATION(gate, up, ALPHA, LIMIT), out_desc, buffer, row, end, tile_n * WIDTH)
    else:
        left, right = _halves(ACTIVATION(acc, ALPHA, LIMIT))
        _store(left, out_desc, buffer, row, end, tile_n * BLOCK_N)
        _store(right, out_desc, buffer, row, end, tile_n * BLOCK_N + WIDTH)


@gluon.jit
def _consume(out_desc, hidden_desc, up_desc, bias_ptr, x_bufs, w_bufs, buffer, empty, full, tiles_ptr, used_ptr,
             WHO: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GATHERED: gl.constexpr, TRANSPOSED: gl.constexpr,
             EPILOGUE: gl.constexpr, PROGRAMS: gl.constexpr):  # fmt: skip
    """The rows from 64 · WHO on of every tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    steps: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    stage, phase = 0, 0
    used = gl.load(used_ptr)
    following = gl.load(tiles_ptr + gl.program_id(0))
    for t in range(gl.program_id(0), used, PROGRAMS):
        row, expert, height, tile_n = _decode(following)
        following = gl.load(tiles_ptr + t + PROGRAMS)
        if height > WHO * HALF_M:
            acc = gl.zeros((HALF_M, BLOCK_N), gl.float32, layout)
            acc, stage, phase = _multiply(
                acc, stage, phase, steps, x_bufs, w_bufs, empty, full, WHO, TRANSPOSED, GATHERED
            )
            _finish(
                acc, out_desc, hidden_desc, up_desc, bias_ptr, buffer, row + WHO * HALF_M, row + height, expert, tile_n,
                N, EPILOGUE, layout,
            )  # fmt: skip
        else:
            stage, phase = _pass_by(stage, phase, steps, empty, full)
    tma.store_wait(0)


@gluon.jit
def _grouped_gemm_kernel(
    tiles_ptr, used_ptr, x_ptr, gather_ptr, bias_ptr, x_desc, w_desc, out_desc, hidden_desc, up_desc, stride_x,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    ACTIVATION: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, SAVE_HIDDEN: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """`out[r] = act(x[src(r)] @ w[expert(r)].T + bias)`; N counts out's columns. TOP_K is 0 without a gather.

    Registers: 168 a thread at entry, of which the producer gives most to the consumers. Barriers are set up only if
    they live to the end: the allocator puts data on those that do not.
    """
    dtype: gl.constexpr = out_desc.dtype
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    JOINED: gl.constexpr = GATED and not INTERLEAVED
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], rows)
    w_bufs = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    out_0 = gl.allocate_shared_memory(dtype, [1, 1, HALF_M, WIDTH], out_desc.layout)
    out_1 = gl.allocate_shared_memory(dtype, [1, 1, HALF_M, WIDTH], out_desc.layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(empty.index(s), count=2)
        mbarrier.init(full.index(s), count=1 + 128 if TOP_K > 0 else 1)
    EPILOGUE: gl.constexpr = (ACTIVATION, GATED, INTERLEAVED, ALPHA, LIMIT, HAS_BIAS, SAVE_HIDDEN)
    if TOP_K > 0:
        gl.warp_specialize([
            (_consume, (out_desc, hidden_desc, up_desc, bias_ptr, x_bufs, w_bufs, out_0, empty, full, tiles_ptr,
                        used_ptr, 0, N, K, True, TRANSPOSED, EPILOGUE, PROGRAMS)),
            (_consume, (out_desc, hidden_desc, up_desc, bias_ptr, x_bufs, w_bufs, out_1, empty, full, tiles_ptr,
                        used_ptr, 1, N, K, True, TRANSPOSED, EPILOGUE, PROGRAMS)),
            (_produce_gathered, (x_ptr, stride_x, gather_ptr, w_desc, x_bufs, w_bufs, empty, full, tiles_ptr, used_ptr,
                                 K, TOP_K, TRANSPOSED, JOINED, PROGRAMS)),
        ], [4, 4], [216, 56])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (out_desc, hidden_desc, up_desc, bias_ptr, x_bufs, w_bufs, out_0, empty, full, tiles_ptr,
                        used_ptr, 0, N, K, False, TRANSPOSED, EPILOGUE, PROGRAMS)),
            (_consume, (out_desc, hidden_desc, up_desc, bias_ptr, x_bufs, w_bufs, out_1, empty, full, tiles_ptr,
                        used_ptr, 1, N, K, False, TRANSPOSED, EPILOGUE, PROGRAMS)),
            (_produce, (x_desc, w_desc, x_bufs, w_bufs, empty, full, tiles_ptr, used_ptr, K, TRANSPOSED, JOINED,
                        PROGRAMS)),
        ], [4, 1], [240, 24])  # fmt: skip


# ---------------------------------------------------------------- launches
def why_not(transposed: bool, joined: bool, gathered: bool, K: int) -> str | None:
    """Beyond what `_triton_tma` wants: whole stages of gathered rows, since zeros do not undo a NaN left in memory."""
    if gathered and K % 64:
        return f"needs K in multiples of 64 where rows are gathered, got {K}"
    if transposed and joined:
        return "needs gate and up interleaved where weights are stored input-major"
    return None


def _map(t: Tensor, shape, strides, box: list[int]):
    dtype = gl.bfloat16 if t.dtype == torch.bfloat16 else gl.float16
    return descriptor(t, shape, strides, box, gl.NVMMASharedLayout.get_default_for(box, dtype))


def _weight_map(w: Tensor, transposed: bool, joined: bool, N: int, K: int):
    """A box is one expert's 256 × 64 weights; of `joined` ones half are gate and half up columns."""
    we, w1, _ = w.stride()
    if joined:
        return _map(w, [w.shape[0], 2, N, K], [we, N * w1, w1, 1], [1, 2, 128, 64])
    return _map(w, w.shape, w.stride(), [1, 64, 256] if transposed else [1, 256, 64])


def _row_map(rows: Tensor):
    """64 rows to store, of which `_store` names the end."""
    (_, width), stride, big = rows.shape, rows.stride(0), 0x7FFF0000
    return _map(rows, [big, big, 1 << 30, width], [2**34 - stride, stride, stride, 1], [1, 1, 64, 128])


@functools.lru_cache(maxsize=4096)
def _gemm_launch(
    dtype: torch.dtype, programs: int, N: int, K: int, top_k: int, transposed: bool, activation: tuple | None,
    interleaved: bool, has_bias: bool, save_hidden: bool, stride: int,
) -> Launch:  # fmt: skip
    act = epilogue(activation, interleaved)
    constants = (N, K, top_k, transposed, *act, has_bias, save_hidden, programs)
    return Launch(_grouped_gemm_kernel, (programs, 1, 1), constants, num_warps=4)


def gemm(
    x: Tensor, w: Tensor, transposed: bool, tiles: TileTable, out: Tensor, K: int, gather: Tensor | None, top_k: int,
    bias: Tensor | None, activation: tuple | None, interleaved: bool, hidden: Tensor | None, c,
) -> None:  # fmt: skip
    """Launch the kernel; `activation` is its name and constants, and of the configuration only `group_m` counts."""
    N, gated = out.shape[1], epilogue(activation, interleaved)[1]
    joined, columns = gated and not interleaved, ceil_div(N, 128 if gated else 256)
    entries, used = tiles.of(128, columns, c.group_m)
    programs = min(sm_count(x.get_device()), tiles.bound(128) * columns)
    launch = _gemm_launch(
        x.dtype, programs, N, K, top_k if gather is not None else 0, transposed, activation, interleaved,
        bias is not None, hidden is not None, x.stride(0),
    )  # fmt: skip
    x_map = None if gather is not None else _map(x, x.shape, x.stride(), [128, 64])
    hidden_map = up_map = None
    if hidden is not None and joined:  # two maps, so that a tile past the gates' end does not reach the ups
        hidden_map, up_map = map(_row_map, hidden.chunk(2, 1))
    elif hidden is not None:
        hidden_map = _row_map(hidden)
    maps = (x_map, _weight_map(w, transposed, joined, N, K), _row_map(out), hidden_map, up_map)
    launch((entries, used, x, gather, bias, *maps), (x.stride(0),))
