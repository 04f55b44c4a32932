"""The persistent product of `grouped_matmul` in Triton, for many rows: weights, rows and results go by tensor maps.

A program a multiprocessor walks over the tiles of a table, loads running ahead from one tile into the next. Legend as
in `_triton.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...hardware import tl, triton
from ...launch import Launch, TensorMap, ceil_div, follow, pow2
from ._tiles import MAX_COLUMN_TILES, MAX_EXPERTS, Form, Tiles, decode, entries, epilogue, row_tiles


@triton.jit
def load_rows(desc, row, end, column):
    """Rows and columns of a tile, zeros from row `end` on; see `store_rows`."""
    block = desc.load([1073741824, end, 1073741824 + row - end, column])
    return tl.reshape(block, (desc.block_shape[2], desc.block_shape[3]))


@triton.jit
def store_rows(desc, row, end, column, values):
    """Store the rows of a tile that stand before `end`.

    The map's first two dimensions cancel in 64-bit arithmetic, so that row `end` lies on the edge of the third, where
    the hardware clips (`triton.tools.ragged_tma` has the idea).
    """
    rows: tl.constexpr = values.shape[0]
    columns: tl.constexpr = values.shape[1]
    block = tl.reshape(values.to(desc.dtype), (1, 1, rows, columns))
    desc.store([1073741824, end, 1073741824 + row - end, column], block)


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns)), (0, 2, 1)))


@triton.jit
def _persistent_gemm_kernel(
    x, gather_ptr, w_desc, bias_ptr, out_desc, hidden_desc, table_ptr, up_desc, stride_xm,
    N: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out[r] = act(x[src(r)] @ w[expert(r)].T + bias)`; N counts out's columns: a gated tile makes BLOCK_N / 2.

    `x` is a pointer where its rows are gathered, else a map.
    """
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    WIDTH: tl.constexpr = 2 * N if GATED else N
    JOINED: tl.constexpr = GATED and not INTERLEAVED  # the tile's left half is gate, the right one up
    follow(OVERLAP)
    pid = tl.program_id(0)
    tiles_ptr, used = entries(table_ptr), tl.load(table_ptr)
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    last = pid - PROGRAMS  # counts with t: what the epilogue reads must not hang on what the next tile's loads need
    for t in tl.range(pid, used, PROGRAMS, flatten=True):
        # locate tile
        row, expert, height, tile_n = decode(tl.load(tiles_ptr + t))

        # pointers; rows behind the tile's last are zeros, which cost neither traffic nor much power
        if GATHER > 0:
            live = offs_m < height
            slot = tl.load(gather_ptr + row + offs_m, mask=live, other=0)
            x_ptrs = x + (slot // GATHER).to(tl.int64)[:, None] * stride_xm + offs_k[None, :]

        # main loop
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if GATHER > 0:
                if K % BLOCK_K == 0:
                    a = tl.load(x_ptrs + k, mask=live[:, None], other=0.0)
                else:
                    a = tl.load(x_ptrs + k, mask=live[:, None] & (offs_k[None, :] < K - k), other=0.0)
            else:
                a = load_rows(x, row, row + height, k)
            if TRANSPOSED:
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
        last += PROGRAMS
        row_, expert_, height_, tile_n_ = decode(tl.load(tiles_ptr + last))
        end = row_ + height_
        if HAS_BIAS:
            j = tl.arange(0, BLOCK_N)
            if JOINED:
                column = tile_n_ * OUT_N + j % OUT_N
                inside = column < N
                column += j // OUT_N * N
            else:
                column = tile_n_ * BLOCK_N + j
                inside = column < WIDTH
            acc += tl.load(bias_ptr + expert_ * WIDTH + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SAVE_HIDDEN and not JOINED:
            left, right = halves(acc)
            store_rows(hidden_desc, row_, end, tile_n_ * BLOCK_N, left)
            store_rows(hidden_desc, row_, end, tile_n_ * BLOCK_N + BLOCK_N // 2, right)
        if GATED:
            if INTERLEAVED:
                gate, up = tl.split(tl.reshape(acc, (BLOCK_M, OUT_N, 2)))
            else:
                gate, up = halves(acc)
                if SAVE_HIDDEN:
                    store_rows(hidden_desc, row_, end, tile_n_ * OUT_N, gate)
                    store_rows(up_desc, row_, end, tile_n_ * OUT_N, up)
            store_rows(out_desc, row_, end, tile_n_ * OUT_N, ACTIVATION(gate, up, ALPHA, LIMIT))
        else:  # two halves: what they free in shared memory is a stage of the loads
            left, right = halves(ACTIVATION(acc, ALPHA, LIMIT))
            store_rows(out_desc, row_, end, tile_n_ * OUT_N, left)
            store_rows(out_desc, row_, end, tile_n_ * OUT_N + OUT_N // 2, right)


@triton.jit(do_not_specialize=["R"])
def _zero_tail_kernel(out_ptr, offsets_ptr, R, N: tl.constexpr, E: tl.constexpr, PROGRAMS: tl.constexpr,
                      BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    follow(OVERLAP)
    row = tl.load(offsets_ptr + E) + tl.program_id(0)
    while row < R:
        for n in range(0, N, BLOCK):
            offs = n + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
            tl.store(out_ptr + row.to(tl.int64) * N + offs, zeros, mask=offs < N)
        row += PROGRAMS


# ---------------------------------------------------------------- launches
def why_not(form: Form, aligned: bool) -> str | None:
    """Tensor maps want 16-byte strides, and unit ones last; an entry of the tile table has bits for so many tiles.

    `aligned` says that x and the weights begin at whole 16 bytes.
    """
    if form.dtype not in (torch.bfloat16, torch.float16):
        return "needs half precision"
    if form.experts >= MAX_EXPERTS or form.N >= 64 * MAX_COLUMN_TILES:  # 64: a gated tile's least columns
        return f"needs fewer than {MAX_EXPERTS} experts and {64 * MAX_COLUMN_TILES} columns"
    if form.strides[-1] != 1:
        return "needs unit strides"
    if any(s % 8 for s in (*form.strides[:-1], form.N, form.K)) or not aligned:
        return "needs strides and addresses of whole 16 bytes"
    return None


def _weight_map(form: Form, joined: bool, c) -> TensorMap:
    """A box is one expert's BLOCK_N × BLOCK_K weights; of `joined` ones half are gate and half up columns."""
    _, we, w1, _ = form.strides
    E, N, K, n, k = form.experts, form.N, form.K, c.block_n, c.block_k
    if form.transposed:
        if joined:
            return TensorMap((E, K, 2, N), (we, w1, N, 1), (1, k, 2, n // 2))
        return TensorMap((E, K, form.width), (we, w1, 1), (1, k, n))
    if joined:
        return TensorMap((E, 2, N, K), (we, N * w1, w1, 1), (1, 2, n // 2, k))
    return TensorMap((E, form.width, K), (we, w1, 1), (1, n, k))


def row_map(width: int, stride: int, block_m: int, columns: int) -> TensorMap:
    """Rows to load or store, of which `load_rows` and `store_rows` name the end."""
    big = 0x7FFF0000
    return TensorMap((big, big, 1 << 30, width), (2**34 - stride, stride, stride, 1), (1, 1, block_m, columns))


@functools.lru_cache(maxsize=4096)
def _persistent_launch(form: Form, programs: int, c) -> Launch:
    N, K, m, n = form.N, form.K, c.block_m, c.block_n
    act = epilogue(form.activation, form.interleaved)
    joined, out_n = form.gated and not form.interleaved, n // 2 if form.gated else n
    constants = (
        N, K, form.top_k, form.transposed, *act, form.bias, form.keeps, m, n, c.block_k, programs,
    )  # fmt: skip
    maps = {2: _weight_map(form, joined, c), 4: row_map(N, N, m, out_n if form.gated else out_n // 2)}
    if not form.top_k:
        maps[0] = row_map(K, form.strides[0], m, c.block_k)
    if form.keeps and joined:  # two maps, so that a tile past the gates' end does not reach the ups
        maps[5] = maps[7] = row_map(N, 2 * N, m, out_n)
    elif form.keeps:
        maps[5] = row_map(form.width, form.width, m, n // 2)
    return Launch(_persistent_gemm_kernel, (programs, 1, 1), constants, c.num_warps, c.num_stages, maps, overlaps=True)


def launch(form: Form, rows: int, processors: int, c) -> tuple[Launch, tuple[int, ...], Tiles]:
    """The launch of a product with configuration c, its numbers, and what it asks of the tile table."""
    columns = ceil_div(form.width, c.block_n)
    programs = min(processors, row_tiles(rows, form.experts, c.block_m) * columns)
    return _persistent_launch(form, programs, c), form.strides[:1], (c.block_m, columns, c.group_m, c.slack)


@functools.lru_cache(maxsize=4096)
def _zero_tail_launch(dtype: torch.dtype, programs: int, N: int, E: int) -> Launch:
    return Launch(_zero_tail_kernel, (programs, 1, 1), (N, E, programs, min(1024, pow2(N))), overlaps=True)


def zero_tail(out: Tensor, expert_offsets: Tensor) -> None:
    """Zero the rows behind the last expert's."""
    R, N = out.shape
    _zero_tail_launch(out.dtype, min(R, 128), N, expert_offsets.shape[0] - 1)((out, expert_offsets), (R,))
