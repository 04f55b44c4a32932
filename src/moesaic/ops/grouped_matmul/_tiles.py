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


# An entry of the table: the tile's first row in 32 bits, its expert in 12, its height in 8, its column tile in 12.
MAX_EXPERTS = MAX_COLUMN_TILES = 4096
PADDING = 1024  # entries of nothing behind the last: whoever looks ahead may read them


@triton.jit
def decode(entry):
    """`(first row, expert, height, column tile)`."""
    row = (entry & 0xFFFFFFFF).to(tl.int32)
    rest = (entry >> 32).to(tl.int32)
    return row, rest & 0xFFF, (rest >> 12) & 0xFF, (rest >> 20) & 0xFFF


@triton.jit
def _tiles_kernel(
    offsets_ptr, tiles_ptr, used_ptr,
    E: tl.constexpr, E_POW2: tl.constexpr, NUM_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
    PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert's tiles behind those of the experts before it, in the order in which they are to be made.

    Groups of GROUP_M row tiles, and in a group rows fastest: neighbours in time share weights through the L2. Columns
    fastest costs 30% where weights are wide (H200, 2026-11-22). Every row tile but an expert's last has BLOCK_M rows.
    """
    expert = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    begins = tl.load(offsets_ptr + e, mask=e < E, other=0)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(e < expert, tiles, 0), 0) * NUM_N
    i = tl.arange(0, BLOCK)
    if expert == 0:
        used = tl.sum(tiles, 0) * NUM_N
        tl.store(used_ptr, used)
        for j in tl.static_range(0, PADDING, BLOCK):
            tl.store(tiles_ptr + used + j + i, tl.zeros((BLOCK,), tl.int64))
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    mine = (end - begin + BLOCK_M - 1) // BLOCK_M
    for j in range(0, mine * NUM_N, BLOCK):
        group = (j + i) // (GROUP_M * NUM_N)
        rest = (j + i) % (GROUP_M * NUM_N)
        in_group = tl.maximum(tl.minimum(mine - group * GROUP_M, GROUP_M), 1)
        row = begin + (group * GROUP_M + rest % in_group) * BLOCK_M
        height = tl.minimum(end - row, BLOCK_M)
        high = expert | (height << 12) | ((rest // in_group) << 20)
        tl.store(tiles_ptr + first + j + i, row.to(tl.int64) | (high.to(tl.int64) << 32), mask=j + i < mine * NUM_N)


@functools.lru_cache(maxsize=4096)
def tiles_launch(E: int, num_n: int, block_m: int, group_m: int) -> Launch:
    return Launch(_tiles_kernel, (E, 1, 1), (E, pow2(E), num_n, block_m, group_m, PADDING, 512))


class TileTable:
    """The tiles of R rows of E experts, for each size of tiles asked for; made on the device where first needed.

    `of(...)` gives the entries (see `decode`), experts in order, and their number as an int32 tensor; `bound(block_m)`
    is the number of row tiles that the host may count on.
    """

    def __init__(self, expert_offsets: Tensor, rows: int):
        self.offsets, self.rows, self.experts = expert_offsets, rows, expert_offsets.shape[0] - 1
        self._made: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def bound(self, block_m: int) -> int:
        return min(self.rows, self.rows // block_m + self.experts)

    def of(self, block_m: int, num_n: int, group_m: int) -> tuple[Tensor, Tensor]:
        """Tiles of `block_m` rows and their `num_n` column tiles, `group_m` row tiles sharing one of these."""
        key = (num_n, block_m, group_m)
        if key not in self._made:
            # the number stands in front of the entries, in a cell of its own
            size = 2 + self.bound(block_m) * num_n + PADDING
            memory = torch.empty(size, dtype=torch.int64, device=self.offsets.device)
            used, tiles = memory[:1].view(torch.int32)[:1], memory[2:]
            tiles_launch(self.experts, *key)((self.offsets, tiles, used))
            self._made[key] = tiles, used
        return self._made[key]
