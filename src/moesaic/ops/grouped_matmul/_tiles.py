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


@triton.jit
def _tiles_kernel(
    offsets_ptr, tiles_ptr, used_ptr,
    E: tl.constexpr, E_POW2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert's tiles, behind those of the experts before it; every tile but the last has BLOCK_M rows."""
    expert = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    begins = tl.load(offsets_ptr + e, mask=e < E, other=0)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(e < expert, tiles, 0), 0)
    if expert == 0:
        tl.store(used_ptr, tl.sum(tiles, 0))
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    mine = (end - begin + BLOCK_M - 1) // BLOCK_M
    for i in range(0, mine, BLOCK):
        tile = i + tl.arange(0, BLOCK)
        row = begin + tile * BLOCK_M
        height = tl.minimum(end - row, BLOCK_M)
        entry = row.to(tl.int64) | (expert.to(tl.int64) << 32) | (height.to(tl.int64) << 48)
        tl.store(tiles_ptr + first + tile, entry, mask=tile < mine)


@functools.lru_cache(maxsize=4096)
def _tiles_launch(E: int, block_m: int) -> Launch:
    return Launch(_tiles_kernel, (E, 1, 1), (E, pow2(E), block_m, 128))


class TileTable:
    """The tiles of R rows of E experts, for each height asked for; made where first needed.

    `of(block_m)` gives int64 entries `row | expert << 32 | height << 48`, experts in order, and their number as an
    int32 tensor; `bound(block_m)` is the number that the host may count on.
    """

    def __init__(self, expert_offsets: Tensor, rows: int):
        self.offsets, self.rows, self.experts = expert_offsets, rows, expert_offsets.shape[0] - 1
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def bound(self, block_m: int) -> int:
        return min(self.rows, self.rows // block_m + self.experts)

    def of(self, block_m: int) -> tuple[Tensor, Tensor]:
        if block_m not in self._made:
            # the count stands in front of the entries, in a cell of its own
            memory = torch.empty(2 + self.bound(block_m), dtype=torch.int64, device=self.offsets.device)
            used, tiles = memory[:1].view(torch.int32)[:1], memory[2:]
            _tiles_launch(self.experts, block_m)((self.offsets, tiles, used))
            self._made[block_m] = tiles, used
        return self._made[block_m]
