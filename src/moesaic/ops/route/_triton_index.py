"""Kernels of the index tables: number the slots of a range, count them, and place them.

Legend: a *lane* holds one expert; a slot's *place* counts the slots of its expert that stand before it in its range.
"""

from __future__ import annotations

from ...hardware import tl, triton
from ...launch import Kernel, follow


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
