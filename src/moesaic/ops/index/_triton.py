"""`expert_index` in Triton: number the slots of each range and count them, then place them; one launch for few.

The slots are cut into ranges, one a program. The first launch numbers each slot among the earlier slots of its expert
in its range and counts the range's slots by expert; the second adds what stands before: the experts' starts and the
earlier ranges' counts. Slots that fit one range need the first launch alone.

Legend: a *lane* holds one expert; a slot's *place* counts the slots of its expert that stand before it in its range.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...hardware import tl, triton
from ...launch import Bound, Kernel, ceil_div, follow, pow2

NEEDS = "triton"
MAX_EXPERTS = 1024
SMS = 132
BLOCK = 128  # slots that are compared each with each


def why_not(problem: Any) -> str | None:
    if problem.num_experts > MAX_EXPERTS:
        return f"needs at most {MAX_EXPERTS} experts, got {problem.num_experts}"
    return None


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor, ...], None]:
    return tables_of(o.topk_ids, problem.num_experts), None


def tables_of(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """The ids in int32 and their four tables."""
    given = topk_ids.contiguous()
    total, ids = given.numel(), empty(given, *given.shape)
    if total == 0:
        tables = Tables(ids, 0, num_experts, _cut_slots(1))
        return ids, tables.tokens.zero_(), tables.offsets.zero_(), tables.order, tables.index
    cut = _cut_slots(total)
    tables = Tables(ids, total, num_experts, cut)
    pointers = (given, ids, tables.places, tables.counts, *tables.pointers)
    _count(num_experts, cut.single, cut.block)((cut.programs, 1, 1), pointers, (), (total, cut.per_range))
    tables.finish(ids)
    return ids, *tables.pointers


# ---------------------------------------------------------------- how slots are cut
@dataclass(frozen=True)
class Cut:
    """How T tokens of S equal sequences are cut: `programs` ranges of up to `per_range` tokens, `block` at a time."""

    per_sequence: int
    ranges: int  # of a sequence
    per_range: int
    programs: int
    block: int
    num_warps: int
    piece: int = 32

    @property
    def single(self) -> bool:
        return self.programs == 1 and self.per_range <= self.block

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.per_sequence, self.ranges, self.per_range

    def of_slots(self, top_k: int) -> Cut:
        """The same in slots."""
        return replace(
            self, per_sequence=self.per_sequence * top_k, per_range=self.per_range * top_k, block=self.block * top_k
        )


@functools.lru_cache(maxsize=4096)
def _cut_slots(total: int) -> Cut:
    per_range = max(1, ceil_div(ceil_div(total, SMS), BLOCK)) * BLOCK
    ranges = ceil_div(total, per_range)
    block = BLOCK if ranges > 1 else max(16, pow2(total))
    return Cut(total, ranges, per_range if ranges > 1 else total, ranges, block, 4)


def lanes_of(E: int, groups: int = 1) -> tuple[int, int]:
    """Lanes of a group and of all, at least 16: four threads a row."""
    size = pow2(E // groups)
    return max(size, 16 // pow2(groups)), max(size, 16 // pow2(groups)) * pow2(groups)


@functools.lru_cache(maxsize=1024)
def _count(E: int, single: bool, block: int) -> Bound:
    warps = 8 if block == BLOCK else 4
    return count_kernel.bind(E=E, LANES=lanes_of(E)[1], SINGLE=single, BLOCK=block, num_warps=warps)


@functools.lru_cache(maxsize=1024)
def _index(E: int, chunk: int, block: int, each: int) -> Bound:
    lanes = lanes_of(E)[1]
    warps = 16 if max(chunk * lanes, block * 8) > 8192 else 8
    return index_kernel.bind(E=E, LANES=lanes, CHUNK=chunk, BLOCK=block, EACH=each, num_warps=warps)


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return like.new_empty(*shape) if like.dtype == dtype else like.new_empty(shape, dtype=dtype)


class Tables:
    """The index tables' memory, and what passes from the first launch to the second; `cut` is one of slots.

    An operator's results may share no memory, so each is an allocation of its own.
    """

    def __init__(self, ids: Tensor, total: int, E: int, cut: Cut, statistics: bool = False):
        self.E, self.cut = E, cut
        new = ids.new_empty
        self.tokens, self.offsets, self.order, self.index = new(E), new(E + 1), new(total), new(total)
        self.places = None if cut.single else new(total)
        self.counts = None if cut.single and not statistics else new(cut.programs * (E + 1))

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self.tokens, self.offsets, self.order, self.index

    def finish(self, ids: Tensor) -> None:
        """The second launch, where one is needed."""
        cut = self.cut
        if not cut.single:
            each = ceil_div(cut.programs, SMS)
            chunk = max(1, min(16384 // lanes_of(self.E)[1], pow2(cut.programs)))
            bound = _index(self.E, chunk, min(2048, max(16, pow2(cut.per_range))), each)
            pointers = (ids, self.places, self.counts, *self.pointers)
            bound((ceil_div(cut.programs, each), 1, 1), pointers, (), (*cut.numbers, cut.programs))


# ---------------------------------------------------------------- kernels
@triton.jit
def range_of(program, per_sequence, ranges, per_range):
    """`(begin, end)` of a program's range; every sequence has `ranges` of them."""
    end = (program // ranges + 1) * per_sequence
    begin = end - per_sequence + program % ranges * per_range
    return begin, tl.minimum(end, begin + per_range)


@triton.jit
def _ones(x):
    """The number of ones in each int32."""
    x = x.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def takers(taken, BT: tl.constexpr, LANES: tl.constexpr):
    """`((words, LANES), (LANES,))`: which tokens took a lane, a bit each; and how many."""
    WORDS: tl.constexpr = (BT + 31) // 32
    bit = 1 << (tl.arange(0, BT) % 32)
    words = tl.sum(tl.reshape(tl.where(taken, bit[:, None], 0), (WORDS, BT // WORDS, LANES)), 1)
    return words, tl.sum(_ones(words), 0)


@triton.jit
def places(words, running, ids, BT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """`running` at each id, and the earlier tokens of the block that took it too; anything where ids is negative.

    In one dimension, a gather goes through shared memory: a shuffle for every register of a row would cost more.
    """
    WORDS: tl.constexpr = (BT + 31) // 32
    t = tl.arange(0, BT)
    flat = tl.reshape(tl.maximum(ids, 0), (BT * WIDTH,))
    words = tl.reshape(words, (WORDS * LANES,))
    place = tl.reshape(tl.gather(running, flat, 0), (BT, WIDTH))
    for word in tl.static_range(WORDS):
        earlier = tl.where(t // 32 > word, -1, tl.where(t // 32 == word, (1 << (t % 32)) - 1, 0))
        mine = tl.reshape(tl.gather(words, flat + word * LANES, 0), (BT, WIDTH))
        place += _ones(mine & earlier[:, None])
    return place


@triton.jit
def starts(counts, tokens_ptr, offsets_ptr, expert, is_expert, E: tl.constexpr):
    """`(each expert's first row, number of rows)`, written out as tables too."""
    start = tl.cumsum(counts, 0) - counts
    total = tl.sum(counts, 0)
    tl.store(tokens_ptr + expert, counts, mask=is_expert)
    tl.store(offsets_ptr + expert, start, mask=is_expert)
    tl.store(offsets_ptr + E, total)
    return start, total


@Kernel
@triton.jit(do_not_specialize=["total", "per_range"])
def count_kernel(
    given_ptr, ids_ptr, places_ptr, counts_ptr, tokens_ptr, offsets_ptr, order_ptr, index_ptr, total, per_range,
    E: tl.constexpr, LANES: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One range of slots from outside: clean their ids, number them; what is not an expert is dropped.

    Slots of a block are compared each with each, so that ids may repeat and the cost does not grow with E.
    """
    follow(OVERLAP)
    program = tl.program_id(0)
    begin = program * per_range
    end = tl.minimum(total, begin + per_range)
    lane = tl.arange(0, LANES)
    i = tl.arange(0, BLOCK)
    running = tl.zeros((LANES,), tl.int32)
    dead_running = tl.zeros((), tl.int32)
    for block in range(begin, end, BLOCK):
        slots = block + i
        inside = slots < end
        given = tl.load(given_ptr + slots, mask=inside, other=-1)
        live = (given >= 0) & (given < E)
        ids = tl.where(live, given, -1).to(tl.int32)
        tl.store(ids_ptr + slots, ids, mask=inside)
        counts = tl.histogram(tl.where(live, ids, 0), LANES)
        counts -= tl.where(lane == 0, tl.sum((~live).to(tl.int32), 0), 0)  # dead slots were counted as expert 0
        if SINGLE:  # the first row of an expert is where its slots' numbers start
            running, dead_running = starts(counts, tokens_ptr, offsets_ptr, lane, lane < E, E)
        twins = (ids[:, None] == ids[None, :]) & (i[:, None] > i[None, :])
        first = tl.where(live, tl.gather(running, tl.maximum(ids, 0), 0), dead_running)
        row = first + tl.sum(twins.to(tl.int32), 1)
        if SINGLE:
            tl.store(order_ptr + row, slots, mask=inside)
            tl.store(index_ptr + slots, tl.where(live, row, -1), mask=inside)
        else:
            tl.store(places_ptr + slots, row, mask=inside)
        running += counts
        dead_running += tl.sum((inside & ~live).to(tl.int32), 0)
    if not SINGLE:
        tl.store(counts_ptr + program * (E + 1) + lane, running, mask=lane < E)
        tl.store(counts_ptr + program * (E + 1) + E, dead_running)


@Kernel
@triton.jit(do_not_specialize=["per_sequence", "ranges", "per_range", "programs"])
def index_kernel(
    ids_ptr, places_ptr, counts_ptr, tokens_ptr, offsets_ptr, order_ptr, index_ptr,
    per_sequence, ranges, per_range, programs,
    E: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """EACH ranges of slots: rows from their places, after the experts' starts and the earlier ranges' counts."""
    follow(OVERLAP)
    own = tl.program_id(0) * EACH
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.int32)
    before = tl.zeros((LANES,), tl.int32)
    dead = tl.zeros((), tl.int32)
    for chunk in range(0, programs, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        inside, earlier = other < programs, other < own
        ptrs = counts_ptr + other[:, None] * (E + 1) + lane[None, :]
        counts = tl.load(ptrs, mask=inside[:, None] & (lane < E)[None, :], other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(earlier[:, None], counts, 0), 0)
        dead += tl.sum(tl.load(counts_ptr + other * (E + 1) + E, mask=earlier, other=0), 0)
    start, live_rows = starts(total, tokens_ptr, offsets_ptr, lane, (lane < E) & (own == 0), E)
    base = start + before
    for program in range(own, tl.minimum(programs, own + EACH)):
        begin, end = range_of(program, per_sequence, ranges, per_range)
        for block in range(begin, end, BLOCK):
            slots = block + tl.arange(0, BLOCK)
            inside = slots < end
            ids = tl.load(ids_ptr + slots, mask=inside, other=-1)
            live = (ids >= 0) & (ids < E)
            first = tl.where(live, tl.gather(base, tl.where(live, ids, 0), 0), live_rows + dead)
            row = first + tl.load(places_ptr + slots, mask=inside, other=0)
            tl.store(order_ptr + row, slots, mask=inside)
            tl.store(index_ptr + slots, tl.where(live, row, -1), mask=inside)
        base += tl.load(counts_ptr + program * (E + 1) + lane, mask=lane < E, other=0)
        dead += tl.load(counts_ptr + program * (E + 1) + E)
