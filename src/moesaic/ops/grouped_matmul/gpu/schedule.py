"""Which tiles there are, and in what order: the tile table, made on the device for a layer's products.

A table is int32: how many entries there are, how many are taken, two of nothing, and the entries, 8 bytes each. An
entry is a tile's first row in 32 bits, its expert in 12, its height in 9, its column tile in 11.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from ....hardware import tl, triton
from ....launch import Bound, Kernel, ceil_div, follow, pow2

HEAD = tl.constexpr(4)
MAX_EXPERTS, MAX_COLUMN_TILES = 4096, 2048
PADDING = 1024  # entries of nothing behind the last: whoever looks ahead may read them


class Tiles(NamedTuple):
    """What a product asks of the table: row tiles of `block_m` rows (or up to `slack` more), `columns` column tiles,
    `group_m` row tiles sharing one of these."""

    block_m: int
    columns: int
    group_m: int
    slack: int = 0


def row_tiles(rows: int, experts: int, block_m: int) -> int:
    """A bound on the tiles of rows that an expert each has, which holds however they are spread."""
    return min(rows, rows // block_m + experts)


@triton.jit
def entries(table_ptr):
    """Where they begin; `decode` reads one."""
    return (table_ptr + HEAD).to(tl.pointer_type(tl.int64))


@triton.jit
def decode(entry):
    """`(first row, expert, height, column tile)`."""
    row = (entry & 0xFFFFFFFF).to(tl.int32)
    rest = (entry >> 32).to(tl.int32)
    return row, rest & 0xFFF, (rest >> 12) & 0x1FF, (rest >> 21) & 0x7FF


@triton.jit
def _row_tiles(rows, block_m, slack):
    """An expert's number of row tiles: what is left behind the full ones has its own if they cannot take it."""
    full, left = rows // block_m, rows % block_m
    return full + (left > tl.minimum(full, 2) * slack).to(tl.int32)


@triton.jit
def _expert_tiles(
    expert, offsets_ptr, table_ptr, block_m, columns, group_m, slack,
    E: tl.constexpr, E_POW2: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert's tiles behind those of the experts before it, in the order in which they are to be made.

    Groups of `group_m` row tiles, and in a group rows fastest: neighbours in time share weights through the L2. Columns
    fastest costs 30% where weights are wide (H200, 2026-11-22). Every row tile but an expert's last has `block_m` rows,
    and with slack the last two take what is left, where slack rows each are enough for it.
    """
    tiles_ptr = entries(table_ptr)
    e = tl.arange(0, E_POW2)
    begins = tl.load(offsets_ptr + e, mask=e < E, other=0)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles = _row_tiles(ends - begins, block_m, slack)
    first = tl.sum(tl.where(e < expert, tiles, 0), 0) * columns
    i = tl.arange(0, BLOCK)
    if expert == 0:
        used = tl.sum(tiles, 0) * columns
        tl.store(table_ptr, used)
        tl.store(table_ptr + 1, 0)
        for j in tl.static_range(0, PADDING, BLOCK):
            tl.store(tiles_ptr + used + j + i, tl.zeros((BLOCK,), tl.int64))
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    mine = _row_tiles(end - begin, block_m, slack)
    over = end - begin - mine * block_m  # rows that the last two tiles take beyond their own
    early = tl.where((slack > 0) & (over > slack), slack, 0)  # of these, what the last but one takes
    late = tl.where(slack > 0, tl.maximum(over, 0), 0)
    for j in range(0, mine * columns, BLOCK):
        group = (j + i) // (group_m * columns)
        rest = (j + i) % (group_m * columns)
        in_group = tl.maximum(tl.minimum(mine - group * group_m, group_m), 1)
        m = group * group_m + rest % in_group
        row = begin + m * block_m
        stop = row + block_m + tl.where(m == mine - 2, early, tl.where(m == mine - 1, late, 0))
        row += tl.where(m == mine - 1, early, 0)
        height = tl.minimum(end, stop) - row
        high = expert | (height << 12) | ((rest // in_group) << 21)
        tl.store(tiles_ptr + first + j + i, row.to(tl.int64) | (high.to(tl.int64) << 32), mask=j + i < mine * columns)


TILE_NUMBERS = tuple(f"{what}_{n}" for n in (1, 2) for what in ("block_m", "columns", "group_m", "slack"))


@Kernel
@triton.jit(do_not_specialize=list(TILE_NUMBERS))
def tile_table_kernel(
    offsets_ptr, first_ptr, second_ptr,
    block_m_1, columns_1, group_m_1, slack_1, block_m_2, columns_2, group_m_2, slack_2,
    E: tl.constexpr, E_POW2: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One expert's tiles in the first table, or in the second: each is what `TileTable.of` takes."""
    follow(OVERLAP)
    second = tl.program_id(1) == 1
    _expert_tiles(
        tl.program_id(0), offsets_ptr, tl.where(second, second_ptr, first_ptr), tl.where(second, block_m_2, block_m_1),
        tl.where(second, columns_2, columns_1), tl.where(second, group_m_2, group_m_1),
        tl.where(second, slack_2, slack_1), E, E_POW2, PADDING, BLOCK,
    )  # fmt: skip


class TileTable:
    """The tiles of R rows of E experts, for each size of tiles asked for; made on the device where first needed.

    `of(tiles)` gives a table (see `entries`): its entries are experts in order, and none of them is taken between
    launches. Up to two tables that are named at once cost one launch.
    """

    __slots__ = ("_made", "experts", "offsets", "rows")

    def __init__(self, expert_offsets: Tensor, rows: int, *tiles: Tiles):
        self.offsets, self.rows, self.experts = expert_offsets, rows, expert_offsets.shape[0] - 1
        self._made: list[tuple[Tiles, Tensor]] = []  # a few: looking is quicker than hashing
        if tiles:
            self._make(*tiles)

    def of(self, tiles: Tiles) -> Tensor:
        for key, made in self._made:
            if key is tiles or key == tiles:
                return made
        self._make(tiles)
        return self._made[-1][1]

    def _make(self, first: Tiles, second: Tiles | None = None) -> None:
        E, size = self.experts, _size(first, self.rows, self.experts)
        if second is None:
            second, tables = first, 1
            memory = rest = self.offsets.new_empty(size)
        else:
            tables = 2
            memory = self.offsets.new_empty(size + _size(second, self.rows, E))
            rest = memory[size:]
            self._made.append((second, rest))
        self._made.append((first, memory))
        _table_maker(E)((E, tables, 1), (self.offsets, memory, rest), (), (*first, *second))


def _size(tiles: Tiles, rows: int, experts: int) -> int:
    """Of a table in int32; the one behind it begins at 16 bytes."""
    return ceil_div(4 + 2 * (row_tiles(rows, experts, tiles.block_m) * tiles.columns + PADDING), 4) * 4


@functools.lru_cache(maxsize=256)
def _table_maker(E: int) -> Bound:
    return tile_table_kernel.bind(E=E, E_POW2=pow2(E), PADDING=PADDING, BLOCK=512)


@Kernel
@triton.jit(do_not_specialize=["R"])
def zero_tail_kernel(
    out_ptr, offsets_ptr, R, N: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """Zero the rows behind the last expert's."""
    follow(OVERLAP)
    row = tl.load(offsets_ptr + E) + tl.program_id(0)
    while row < R:
        for n in range(0, N, BLOCK):
            offs = n + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
            tl.store(out_ptr + row.to(tl.int64) * N + offs, zeros, mask=offs < N)
        row += tl.num_programs(0)


def zero_tail(out: Tensor, expert_offsets: Tensor) -> None:
    R, N = out.shape
    bound = zero_tail_kernel.bind(N=N, E=expert_offsets.shape[0] - 1, BLOCK=min(1024, pow2(N)))
    bound((min(R, 128), 1, 1), (out, expert_offsets), (), (R,))
