"""What the products share: the tile table, made once on the device for all products of a layer, and the epilogue."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...hardware import tl, triton
from ...launch import Launch, pow2


@triton.jit
def identity(x, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    return x


def epilogue(activation: tuple | None, interleaved: bool) -> tuple:
    """The kernels' arguments from ACTIVATION to LIMIT; `activation` is its name and constants."""
    if activation is None:
        return identity, False, False, 1.0, 0.0
    act = ACTIVATIONS[activation[0]]
    return act.device[0], act.gated, interleaved, *activation[1:]


# An entry of the table: the tile's first row in 32 bits, its expert in 12, its height in 9, its column tile in 11.
MAX_EXPERTS, MAX_COLUMN_TILES = 4096, 2048
PADDING = 1024  # entries of nothing behind the last: whoever looks ahead may read them


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
def _tiles_kernel(
    offsets_ptr, tiles_ptr, used_ptr,
    E: tl.constexpr, E_POW2: tl.constexpr, NUM_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
    SLACK: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert's tiles behind those of the experts before it, in the order in which they are to be made.

    Groups of GROUP_M row tiles, and in a group rows fastest: neighbours in time share weights through the L2. Columns
    fastest costs 30% where weights are wide (H200, 2026-11-22). Every row tile but an expert's last has BLOCK_M rows,
    and with SLACK the last two take what is left, where SLACK each is enough for it.
    """
    expert = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    begins = tl.load(offsets_ptr + e, mask=e < E, other=0)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles = _row_tiles(ends - begins, BLOCK_M, SLACK)
    first = tl.sum(tl.where(e < expert, tiles, 0), 0) * NUM_N
    i = tl.arange(0, BLOCK)
    if expert == 0:
        used = tl.sum(tiles, 0) * NUM_N
        tl.store(used_ptr, used)
        tl.store(used_ptr + 1, 0)
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


@functools.lru_cache(maxsize=4096)
def tiles_launch(E: int, num_n: int, block_m: int, group_m: int, slack: int = 0) -> Launch:
    return Launch(_tiles_kernel, (E, 1, 1), (E, pow2(E), num_n, block_m, group_m, slack, PADDING, 512))


class TileTable:
    """The tiles of R rows of E experts, for each size of tiles asked for; made on the device where first needed.

    `of(...)` gives the entries (see `decode`), experts in order, and an int32 tensor of two: their number, and how many
    of them are taken, which is zero between launches; `bound(block_m)` is the number of row tiles that the host may
    count on.
    """

    def __init__(self, expert_offsets: Tensor, rows: int):
        self.offsets, self.rows, self.experts = expert_offsets, rows, expert_offsets.shape[0] - 1
        self._made: dict[tuple[int, int, int, int], tuple[Tensor, Tensor]] = {}

    def bound(self, block_m: int) -> int:
        return min(self.rows, self.rows // block_m + self.experts)

    def of(self, block_m: int, num_n: int, group_m: int, slack: int = 0) -> tuple[Tensor, Tensor]:
        """Tiles of `block_m` rows (or up to `slack` more) and their `num_n` column tiles, `group_m` row tiles sharing
        one of these."""
        key = (num_n, block_m, group_m, slack)
        if key not in self._made:
            # the two numbers stand in front of the entries, in a cell of their own
            size = 2 + self.bound(block_m) * num_n + PADDING
            memory = torch.empty(size, dtype=torch.int64, device=self.offsets.device)
            used, tiles = memory[:1].view(torch.int32), memory[2:]
            tiles_launch(self.experts, *key)((self.offsets, tiles, used))
            self._made[key] = tiles, used
        return self._made[key]
