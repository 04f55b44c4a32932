"""What the products share: their form and epilogue, and the tile table, made on the device for a layer's products."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...hardware import tl, triton
from ...launch import Launch, ceil_div, follow, pow2


@triton.jit
def identity(x, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    return x


def epilogue(activation: tuple | None, interleaved: bool) -> tuple:
    """The kernels' arguments from ACTIVATION to LIMIT; `activation` is its name and constants."""
    if activation is None:
        return identity, False, False, 1.0, 0.0
    act = ACTIVATIONS[activation[0]]
    return act.device[0], act.gated, interleaved, *activation[1:]


class Form(NamedTuple):
    """What a product is whatever its rows: all that its kernel and its tensor maps depend on.

    `strides` are that of x's rows and the three of the weights; `top_k` is 0 where rows are not gathered; `activation`
    is its name and constants. Does it have a `bias`, does it `keep` what the activation is given, zero the rows behind
    the last expert's?
    """

    dtype: torch.dtype
    experts: int
    N: int
    K: int
    transposed: bool
    strides: tuple[int, ...]
    top_k: int
    activation: tuple[str, float, float] | None
    interleaved: bool
    bias: bool
    keeps: bool
    zeros: bool
    allow_tf32: bool

    @property
    def gated(self) -> bool:
        return self.activation is not None and ACTIVATIONS[self.activation[0]].gated

    @property
    def width(self) -> int:
        """Columns of the weights."""
        return 2 * self.N if self.gated else self.N


# ---------------------------------------------------------------- the tile table
# A table is int32: how many entries there are, how many are taken, two of nothing, and the entries, 8 bytes each.
HEAD = tl.constexpr(4)
# An entry of the table: the tile's first row in 32 bits, its expert in 12, its height in 9, its column tile in 11.
MAX_EXPERTS, MAX_COLUMN_TILES = 4096, 2048
PADDING = 1024  # entries of nothing behind the last: whoever looks ahead may read them


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
def _row_tiles(rows, BLOCK_M: tl.constexpr, SLACK: tl.constexpr):
    """An expert's number of row tiles: what is left behind the full ones has its own if they cannot take it."""
    full, left = rows // BLOCK_M, rows % BLOCK_M
    return full + (left > tl.minimum(full, 2) * SLACK).to(tl.int32)


@triton.jit
def _expert_tiles(
    expert, offsets_ptr, table_ptr,
    E: tl.constexpr, E_POW2: tl.constexpr, TILES: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert's tiles behind those of the experts before it, in the order in which they are to be made.

    Groups of GROUP_M row tiles, and in a group rows fastest: neighbours in time share weights through the L2. Columns
    fastest costs 30% where weights are wide (H200, 2026-11-22). Every row tile but an expert's last has BLOCK_M rows,
    and with SLACK the last two take what is left, where SLACK each is enough for it.
    """
    BLOCK_M: tl.constexpr = TILES[0]
    NUM_N: tl.constexpr = TILES[1]
    GROUP_M: tl.constexpr = TILES[2]
    SLACK: tl.constexpr = TILES[3]
    tiles_ptr = entries(table_ptr)
    e = tl.arange(0, E_POW2)
    begins = tl.load(offsets_ptr + e, mask=e < E, other=0)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles = _row_tiles(ends - begins, BLOCK_M, SLACK)
    first = tl.sum(tl.where(e < expert, tiles, 0), 0) * NUM_N
    i = tl.arange(0, BLOCK)
    if expert == 0:
        used = tl.sum(tiles, 0) * NUM_N
        tl.store(table_ptr, used)
        tl.store(table_ptr + 1, 0)
        for j in tl.static_range(0, PADDING, BLOCK):
            tl.store(tiles_ptr + used + j + i, tl.zeros((BLOCK,), tl.int64))
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    mine = _row_tiles(end - begin, BLOCK_M, SLACK)
    over = end - begin - mine * BLOCK_M  # rows that the last two tiles take beyond their own
    for j in range(0, mine * NUM_N, BLOCK):
        group = (j + i) // (GROUP_M * NUM_N)
        rest = (j + i) % (GROUP_M * NUM_N)
        in_group = tl.maximum(tl.minimum(mine - group * GROUP_M, GROUP_M), 1)
        m = group * GROUP_M + rest % in_group
        row = begin + m * BLOCK_M
        stop = row + BLOCK_M
        if SLACK > 0:
            early = tl.where(over > SLACK, SLACK, 0)  # of these, what the last but one takes
            row += tl.where(m == mine - 1, early, 0)
            stop += tl.where(m == mine - 2, early, tl.where(m == mine - 1, tl.maximum(over, 0), 0))
        height = tl.minimum(end, stop) - row
        high = expert | (height << 12) | ((rest // in_group) << 21)
        tl.store(tiles_ptr + first + j + i, row.to(tl.int64) | (high.to(tl.int64) << 32), mask=j + i < mine * NUM_N)


@triton.jit
def _tiles_kernel(
    offsets_ptr, first_ptr, second_ptr,
    E: tl.constexpr, E_POW2: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, PADDING: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One expert's tiles in a table of FIRST, or where there is a SECOND of either: what `TileTable.of` takes."""
    follow(OVERLAP)
    expert = tl.program_id(0)
    if SECOND is None:
        _expert_tiles(expert, offsets_ptr, first_ptr, E, E_POW2, FIRST, PADDING, BLOCK)
    elif tl.program_id(1) == 0:
        _expert_tiles(expert, offsets_ptr, first_ptr, E, E_POW2, FIRST, PADDING, BLOCK)
    else:
        _expert_tiles(expert, offsets_ptr, second_ptr, E, E_POW2, SECOND, PADDING, BLOCK)


Tiles = tuple[int, int, int, int]  # what a product asks of the table: the arguments of `TileTable.of`


@functools.lru_cache(maxsize=4096)
def tiles_launch(E: int, first: Tiles, second: Tiles | None = None) -> Launch:
    grid = (E, 1 if second is None else 2, 1)
    return Launch(_tiles_kernel, grid, (E, pow2(E), first, second, PADDING, 512), overlaps=True)


@functools.lru_cache(maxsize=4096)
def _tables(rows: int, E: int, tiles: tuple[Tiles, ...]) -> tuple[Launch, int, int]:
    """The launch that makes one table or two, the first one's size and that of both; a table begins at 16 bytes."""
    sizes = [HEAD.value + 2 * (row_tiles(rows, E, block_m) * num_n + PADDING) for block_m, num_n, *_ in tiles]
    sizes = [ceil_div(size, 4) * 4 for size in sizes]
    return tiles_launch(E, *tiles), sizes[0], sum(sizes)


class TileTable:
    """The tiles of R rows of E experts, for each size of tiles asked for; made on the device where first needed.

    `of(*tiles)` gives a table (see `entries`): its entries are experts in order, and none of them is taken
    between launches. Up to two tables that are named at once cost one launch.
    """

    def __init__(self, expert_offsets: Tensor, rows: int, *tiles: Tiles):
        self.offsets, self.rows, self.experts = expert_offsets, rows, expert_offsets.shape[0] - 1
        self._made: dict[Tiles, Tensor] = {}
        if tiles:
            self._make(*tiles)

    def of(self, block_m: int, num_n: int, group_m: int, slack: int = 0) -> Tensor:
        """Tiles of `block_m` rows (or up to `slack` more) and their `num_n` column tiles, `group_m` row tiles sharing
        one of these."""
        tiles = (block_m, num_n, group_m, slack)
        if tiles not in self._made:
            self._make(tiles)
        return self._made[tiles]

    def _make(self, *tiles: Tiles) -> None:
        launch, first, both = _tables(self.rows, self.experts, tiles)
        memory = self.offsets.new_empty(both)
        self._made[tiles[0]], rest = memory, None
        if len(tiles) > 1:
            self._made[tiles[1]] = rest = memory[first:]
        launch((self.offsets, memory, rest))
