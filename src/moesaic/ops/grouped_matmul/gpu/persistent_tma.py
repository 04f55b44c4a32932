"""The persistent product for many rows: weights, rows and results go by tensor maps.

A program a multiprocessor walks over the tiles of a table, loads running ahead from one tile into the next. Legend as
in `pointer.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from ....hardware import tl, triton
from ....launch import Bound, Kernel, TensorMap, ceil_div, follow
from .cost import Cost, microseconds
from .epilogue import code, gate_up, halves, narrowed, row_scale
from .schedule import MAX_COLUMN_TILES, MAX_EXPERTS, Tiles, decode, entries, row_tiles, zero_tail
from .spec import Config, Gemm, GemmSpec

LOW, LARGE = Config(64, 256, 64, 4, 4), Config(128, 256, 64, 8, 4)
COSTS = {  # of gathered rows, and of rows in their order
    LOW: (Cost(4.2, 1.44, 2.5), Cost(4.1, 1.22, 1.5)),
    LARGE: (Cost(4.05, 1.09, 2.0), Cost(3.95, 1.08, 0.0)),
}


def why_not(spec: GemmSpec) -> str | None:
    if spec.gpu.arch != "sm_90":
        return f"its tiles are sized for sm_90, got {spec.gpu.arch}"
    return maps_why_not(spec)


def maps_why_not(spec: GemmSpec) -> str | None:
    """Tensor maps want unit strides last and 16-byte ones before; an entry of the tile table has bits for so many."""
    if not spec.half:
        return f"needs bf16 or fp16, got {str(spec.dtype).removeprefix('torch.')}"
    if spec.experts >= MAX_EXPERTS or spec.N >= 64 * MAX_COLUMN_TILES:  # 64: a gated tile's least columns
        return f"needs fewer than {MAX_EXPERTS} experts and {64 * MAX_COLUMN_TILES} columns"
    stride_x, we, wn, wk = spec.strides
    if wk != 1 and wn != 1:
        return f"needs weights with unit stride along a dimension, got {(we, wn, wk)}"
    outer = wk if spec.input_major else wn
    if any(s % 8 or s < 0 for s in (stride_x, we, outer, spec.N, spec.K)):
        return f"needs strides, N and K that are multiples of 8, got {spec.strides}, {spec.N} and {spec.K}"
    if max(we, outer) * 2 >= 2**40:
        return "needs strides below 2^40 bytes"
    return None


def candidates(spec: GemmSpec) -> tuple[Config, ...]:
    return tuple(COSTS)


def estimate(spec: GemmSpec, config: Config) -> float:
    return microseconds(spec, config, COSTS.get(config, COSTS[LARGE])[0 if spec.top_k else 1])


def launch(spec: GemmSpec, config: Config) -> Gemm:
    N, K, m, n, k, e = spec.N, spec.K, config.block_m, config.block_n, config.block_k, spec.epilogue
    out_n = n // 2 if e.gated else n
    maps = {"w_desc": _weight_map(spec, config), "out_desc": row_map(N, N, m, out_n if e.gated else out_n // 2)}
    if not spec.top_k:
        maps["x_ptr"] = row_map(K, spec.strides[0], m, k)
    if e.preact and e.gated and not e.interleaved:  # two maps, so that a tile past the gates' end spares the ups
        maps["preact_desc"] = maps["up_desc"] = row_map(N, 2 * N, m, out_n)
    elif e.preact:
        maps["preact_desc"] = row_map(spec.width, spec.width, m, n // 2)
    bound = persistent_gemm_kernel.bind(
        N=N, K=K, GATHER=spec.top_k, INPUT_MAJOR=spec.input_major, EPILOGUE=code(e), BLOCK_M=m, BLOCK_N=n, BLOCK_K=k,
        num_warps=config.num_warps, num_stages=config.num_stages, maps=maps,
    )  # fmt: skip
    tiles = Tiles(m, ceil_div(spec.width, n), config.group_m, config.slack)
    return Gemm(spec, tiles, table_run(spec, tiles, bound))


def table_run(spec: GemmSpec, tiles: Tiles, bound: Bound) -> Callable[..., None]:
    """How a kernel that walks over the tile table is run: a program for each multiprocessor that finds a tile."""
    strides, processors, N = spec.strides[:1], spec.gpu.processors, spec.N
    two = spec.epilogue.gated and not spec.epilogue.interleaved

    def run(out, x, w, table, gather, bias, preact, scale):
        programs = min(processors, row_tiles(table.rows, spec.experts, tiles.block_m) * tiles.columns)
        ups = preact[:, N:] if two and preact is not None else None
        bound((programs, 1, 1), (out, x, gather, w, bias, preact, ups, scale, table.of(tiles)), strides)
        if spec.zero_tail:
            zero_tail(out, table.offsets)

    return run


def _weight_map(spec: GemmSpec, config: Config) -> TensorMap:
    """A box is one expert's BLOCK_N × BLOCK_K weights; where gates come first, half are gate and half up columns."""
    _, we, wn, wk = spec.strides
    E, N, K, n, k = spec.experts, spec.N, spec.K, config.block_n, config.block_k
    joined = spec.epilogue.gated and not spec.epilogue.interleaved
    if spec.input_major:
        if joined:
            return TensorMap((E, K, 2, N), (we, wk, N, 1), (1, k, 2, n // 2))
        return TensorMap((E, K, spec.width), (we, wk, 1), (1, k, n))
    if joined:
        return TensorMap((E, 2, N, K), (we, N * wn, wn, 1), (1, 2, n // 2, k))
    return TensorMap((E, spec.width, K), (we, wn, 1), (1, n, k))


def row_map(width: int, stride: int, block_m: int, columns: int, gluon: bool = False) -> TensorMap:
    """Rows to load or store, of which `load_rows` and `store_rows` name the end."""
    big = 0x7FFF0000
    strides, box = (2**34 - stride, stride, stride, 1), (1, 1, block_m, columns)
    return TensorMap((big, big, 1 << 30, width), strides, box, gluon)


@triton.jit
def load_rows(desc, row, end, column):
    """Rows and columns of a tile, zeros from row `end` on; see `store_rows`."""
    block = desc.load([1073741824, end, 1073741824 + row - end, column])
    return tl.reshape(block, (desc.block_shape[2], desc.block_shape[3]))


@triton.jit
def store_rows(desc, row, end, column, values, EPILOGUE: tl.constexpr):
    """Store the rows of a tile that stand before `end`.

    The map's first two dimensions cancel in 64-bit arithmetic, so that row `end` lies on the edge of the third, where
    the hardware clips (`triton.tools.ragged_tma` has the idea).
    """
    rows: tl.constexpr = values.shape[0]
    columns: tl.constexpr = values.shape[1]
    block = tl.reshape(narrowed(values, desc.dtype, EPILOGUE), (1, 1, rows, columns))
    desc.store([1073741824, end, 1073741824 + row - end, column], block)


@Kernel
@triton.jit
def persistent_gemm_kernel(
    out_desc, x_ptr, gather_ptr, w_desc, bias_ptr, preact_desc, up_desc, scale_ptr, table_ptr, stride_xm,
    N: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, INPUT_MAJOR: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out[r] = epilogue(x[src(r)] @ w[expert(r)].T)`; N counts out's columns: a gated tile makes BLOCK_N / 2.

    `x_ptr` is a pointer where its rows are gathered, else a map.
    """
    GATED: tl.constexpr = EPILOGUE.gated
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    WIDTH: tl.constexpr = 2 * N if GATED else N
    JOINED: tl.constexpr = GATED and not EPILOGUE.interleaved  # the tile's left half is gate, the right one up
    follow(OVERLAP)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_ptr, used = entries(table_ptr), tl.load(table_ptr)
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    last = pid - programs  # counts with t: what the epilogue reads must not hang on what the next tile's loads need
    for t in tl.range(pid, used, programs, flatten=True):
        # locate tile
        row, expert, height, tile_n = decode(tl.load(tiles_ptr + t))

        # pointers; rows behind the tile's last are zeros, which cost neither traffic nor much power
        if GATHER > 0:
            live = offs_m < height
            slot = tl.load(gather_ptr + row + offs_m, mask=live, other=0)
            x_ptrs = x_ptr + (slot // GATHER).to(tl.int64)[:, None] * stride_xm + offs_k[None, :]

        # main loop
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if GATHER > 0:
                if K % BLOCK_K == 0:
                    a = tl.load(x_ptrs + k, mask=live[:, None], other=0.0)
                else:
                    a = tl.load(x_ptrs + k, mask=live[:, None] & (offs_k[None, :] < K - k), other=0.0)
            else:
                a = load_rows(x_ptr, row, row + height, k)
            if INPUT_MAJOR:
                if JOINED:
                    w = tl.reshape(w_desc.load([expert, k, 0, tile_n * OUT_N]), (BLOCK_K, BLOCK_N))
                else:
                    w = tl.reshape(w_desc.load([expert, k, tile_n * BLOCK_N]), (BLOCK_K, BLOCK_N))
            elif JOINED:
                w = tl.reshape(w_desc.load([expert, 0, tile_n * OUT_N, k]), (BLOCK_N, BLOCK_K)).T
            else:
                w = tl.reshape(w_desc.load([expert, tile_n * BLOCK_N, k]), (BLOCK_N, BLOCK_K)).T
            acc = tl.dot(a, w, acc)

        # epilogue
        last += programs
        row_, expert_, height_, tile_n_ = decode(tl.load(tiles_ptr + last))
        end = row_ + height_
        if EPILOGUE.bias:
            j = tl.arange(0, BLOCK_N)
            if JOINED:
                column = tile_n_ * OUT_N + j % OUT_N
                inside = column < N
                column += j // OUT_N * N
            else:
                column = tile_n_ * BLOCK_N + j
                inside = column < WIDTH
            acc += tl.load(bias_ptr + expert_ * WIDTH + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if EPILOGUE.preact and not JOINED:
            left, right = halves(acc)
            store_rows(preact_desc, row_, end, tile_n_ * BLOCK_N, left, EPILOGUE)
            store_rows(preact_desc, row_, end, tile_n_ * BLOCK_N + BLOCK_N // 2, right, EPILOGUE)
        if GATED:
            gate, up = gate_up(acc, EPILOGUE)
            if EPILOGUE.preact and JOINED:
                store_rows(preact_desc, row_, end, tile_n_ * OUT_N, gate, EPILOGUE)
                store_rows(up_desc, row_, end, tile_n_ * OUT_N, up, EPILOGUE)
            y = EPILOGUE.activation(gate, up, EPILOGUE.alpha, EPILOGUE.limit)
        else:
            y = EPILOGUE.activation(acc, EPILOGUE.alpha, EPILOGUE.limit)
        if EPILOGUE.scaled:
            y *= row_scale(scale_ptr, gather_ptr, row_ + offs_m, offs_m < height_)[:, None]
        if GATED:
            store_rows(out_desc, row_, end, tile_n_ * OUT_N, y, EPILOGUE)
        else:  # two halves: what they free in shared memory is a stage of the loads
            left, right = halves(y)
            store_rows(out_desc, row_, end, tile_n_ * OUT_N, left, EPILOGUE)
            store_rows(out_desc, row_, end, tile_n_ * OUT_N + OUT_N // 2, right, EPILOGUE)
