"""Kernels of the index tables: number the slots of a range, count them, and place them.

Legend: a *lane* holds one expert; a slot's *place* counts the slots of its expert that stand before it in its range.
"""

from __future__ import annotations

from ...hardware import tl, triton


@triton.jit
def number(
    lanes, live, taken, repeats, running, dead_running, alive_t, BT: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr
):  # fmt: skip
    """`(places, running, dead_running)`: how many slots of its expert, or dead slots, stand before each slot.

    `taken` (BT, LANES) counts each token's slots by expert, `repeats` (BT, K) the earlier ones of the same token. The
    sums over earlier tokens are a product with a triangle of ones: exact, since a half holds integers to 2048 and the
    accumulator is fp32.
    """
    t = tl.arange(0, BT)
    triangle = (t[:, None] > t[None, :]).to(tl.float16)
    before = tl.dot(triangle, taken.to(tl.float16), out_dtype=tl.float32).to(tl.int32) + running[None, :]
    place = tl.gather(before, lanes, 1) + repeats
    k = tl.arange(0, K_POW2)
    dead = ((k[None, :] < K) & alive_t[:, None] & ~live).to(tl.int32)
    each = tl.sum(dead, 1)
    place_dead = (dead_running + tl.cumsum(each, 0) - each)[:, None] + tl.cumsum(dead, 1) - dead
    return tl.where(live, place, place_dead), running + tl.sum(taken, 0), dead_running + tl.sum(each, 0)


@triton.jit
def tally(lanes, live, BT: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr):
    """`(taken, repeats)` of any ids, which may name an expert twice."""
    lane = tl.arange(0, LANES)[None, :]
    k_lane = tl.arange(0, K_POW2)[None, :]
    taken = tl.zeros((BT, LANES), tl.int32)
    repeats = tl.zeros((BT, K_POW2), tl.int32)
    for k in tl.range(0, K):
        mine = tl.sum(tl.where((k_lane == k) & live, lanes + 1, 0), 1)[:, None] - 1  # -1: a dead slot
        taken += (lane == mine).to(tl.int32)
        repeats += ((lanes == mine) & live & (k_lane > k)).to(tl.int32)
    return taken, repeats


@triton.jit
def write_tables(
    lanes, live, place, start, total, slots, inside, tokens_ptr, offsets_ptr, order_ptr, index_ptr, expert, is_expert,
    counts, BT: tl.constexpr, LANES: tl.constexpr, NUM_EXPERTS: tl.constexpr,
):  # fmt: skip
    """The tables of a batch of one range."""
    tl.store(tokens_ptr + expert, counts, mask=is_expert)
    tl.store(offsets_ptr + expert, start, mask=is_expert)
    tl.store(offsets_ptr + NUM_EXPERTS, total)
    first = tl.gather(tl.broadcast_to(start[None, :], (BT, LANES)), lanes, 1)
    row = place + tl.where(live, first, total)
    tl.store(order_ptr + row, slots, mask=inside)
    tl.store(index_ptr + slots, tl.where(live, row, -1), mask=inside)


@triton.jit(do_not_specialize=["T", "per_range"])
def _count_kernel(
    given_ptr, ids_ptr, places_ptr, counts_ptr, tokens_ptr, offsets_ptr, order_ptr, index_ptr, T, per_range,
    E: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr, SINGLE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One range of ids from outside: clean them, number their slots; what is not an expert is dropped."""
    program = tl.program_id(0)
    begin = program * per_range
    end = tl.minimum(T, begin + per_range)
    lane = tl.arange(0, LANES)
    k_lane = tl.arange(0, K_POW2)[None, :]
    running = tl.zeros((LANES,), tl.int32)
    dead_running = tl.zeros((), tl.int32)
    for chunk in range(begin, end, BT):
        token = chunk + tl.arange(0, BT)
        alive_t = token < end
        inside = alive_t[:, None] & (k_lane < K)
        slots = token[:, None] * K + k_lane
        slots64 = token.to(tl.int64)[:, None] * K + k_lane
        wide = tl.load(given_ptr + slots64, mask=inside, other=-1)
        live = (wide >= 0) & (wide < E)
        ids = tl.where(live, wide, 0).to(tl.int32)
        tl.store(ids_ptr + slots64, tl.where(live, ids, -1), mask=inside)
        taken, repeats = tally(ids, live, BT, LANES, K, K_POW2)
        place, running, dead_running = number(ids, live, taken, repeats, running, dead_running, alive_t, BT, K, K_POW2)
        if SINGLE:
            start = tl.cumsum(running, 0) - running
            write_tables(
                ids, live, place, start, tl.sum(running, 0), slots, inside, tokens_ptr, offsets_ptr, order_ptr,
                index_ptr, lane, lane < E, running, BT, LANES, E,
            )  # fmt: skip
        else:
            tl.store(places_ptr + slots64, place, mask=inside)
    if not SINGLE:
        tl.store(counts_ptr + program * (E + 1) + lane, running, mask=lane < E)
        tl.store(counts_ptr + program * (E + 1) + E, dead_running)


@triton.jit(do_not_specialize=["per_sequence", "ranges", "per_range", "programs"])
def _index_kernel(
    ids_ptr, places_ptr, counts_ptr, tokens_ptr, offsets_ptr, order_ptr, index_ptr,
    per_sequence, ranges, per_range, programs,
    COLUMNS: tl.constexpr, NUM_EXPERTS: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One range: rows from the slots' places, after the experts' starts and the earlier ranges' counts."""
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.int32)
    before = tl.zeros((LANES,), tl.int32)
    dead = tl.zeros((), tl.int32)
    for chunk in range(0, programs, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        inside = other < programs
        ptrs = counts_ptr + other[:, None] * (COLUMNS + 1) + lane[None, :]
        counts = tl.load(ptrs, mask=inside[:, None] & (lane < NUM_EXPERTS)[None, :], other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(other[:, None] < program, counts, 0), 0)
        earlier = other < program
        dead += tl.sum(tl.load(counts_ptr + other * (COLUMNS + 1) + COLUMNS, mask=earlier & inside, other=0), 0)
    start = tl.cumsum(total, 0) - total
    live_rows = tl.sum(total, 0)
    if program == 0:
        tl.store(tokens_ptr + lane, total, mask=lane < NUM_EXPERTS)
        tl.store(offsets_ptr + lane, start, mask=lane < NUM_EXPERTS)
        tl.store(offsets_ptr + NUM_EXPERTS, live_rows)
    base = start + before
    end = (program // ranges + 1) * per_sequence
    begin = end - per_sequence + program % ranges * per_range
    end = tl.minimum(end, begin + per_range)
    for block in range(begin * K, end * K, BLOCK):
        slots = block + tl.arange(0, BLOCK)
        inside = slots < end * K
        ids = tl.load(ids_ptr + slots, mask=inside, other=-1)
        live = (ids >= 0) & (ids < NUM_EXPERTS)
        first = tl.where(live, tl.gather(base, tl.where(live, ids, 0), 0), live_rows + dead)
        row = first + tl.load(places_ptr + slots, mask=inside, other=0)
        tl.store(order_ptr + row, slots, mask=inside)
        tl.store(index_ptr + slots, tl.where(live, row, -1), mask=inside)
