"""Kernels of the router: from logits to choices, weights, places and loss sums in one pass.

Legend: a *lane* holds one expert; with groups, lanes are padded so that each group has a power of two of them. All
of a token's values live in one layout, a row of lanes, because a change of layout costs more than idle lanes.
"""

from __future__ import annotations

from ...hardware import tl, triton
from ...launch import Kernel, follow
from ..index._triton import places, range_of, starts, takers
from ._triton_scores import (
    NAN_KEY,
    NEG_INF,
    choose,
    elementwise,
    exp_rows,
    expert_of,
    keep_groups,
    key_of,
    load_rows,
    ranked,
    transform_logits,
    value_of,
)  # fmt: skip


@triton.jit
def route_range(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, places_ptr, counts_ptr, sums_ptr, squares_ptr,
    tokens_ptr, offsets_ptr, order_ptr, index_ptr, stride_t, program, begin, end,
    E: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_LANES: tl.constexpr, LANES: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    MASK_VALUE: tl.constexpr, SCORE: tl.constexpr, POST: tl.constexpr, RENORM: tl.constexpr, EPS: tl.constexpr,
    MIN: tl.constexpr, SCALE: tl.constexpr, MULTIPLIER: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    ON_LOGITS: tl.constexpr, RAGGED: tl.constexpr, THRESHOLD: tl.constexpr, STATISTICS: tl.constexpr,
    SINGLE: tl.constexpr, BT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One range of tokens: score, choose, weigh, number the slots, sum what the losses need."""
    lane = tl.arange(0, LANES)
    SIZE: tl.constexpr = E // GROUPS
    expert, is_lane = expert_of(lane, E, SIZE, GROUP_LANES)
    k_lane = tl.arange(0, K_POW2)[None, :]
    running = tl.zeros((LANES,), tl.int32)
    dead_running = tl.zeros((), tl.int32)
    sums = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((), tl.float32)
    for chunk in tl.range(begin, end, BT, disable_licm=True):  # what could be hoisted would not fit the registers
        token = chunk + tl.arange(0, BT)
        alive_t = token < end
        x = load_rows(logits_ptr, stride_t, token, alive_t, BT, E, SIZE, GROUP_LANES, LANES, PIECE)
        z = transform_logits(x, MULTIPLIER, CAP)

        # score
        SOFTMAX: tl.constexpr = SCORE == 0 or SCORE == 3  # the probabilities are a softmax
        SCORED: tl.constexpr = not POST or ((HAS_BIAS or GROUPS > 1) and not ON_LOGITS)
        p = z
        if (SCORE == 0 and SCORED) or RAGGED > 0 or STATISTICS:
            e, top, total = exp_rows(z)
        if SCORE > 0:
            s = elementwise(z, SCORE)
            if SCORE < 3:
                s = tl.where(x == NEG_INF, 0.0, s)
        if RAGGED == 1 or STATISTICS:
            if SOFTMAX:
                p = e / total[:, None]
            else:
                s_total = tl.sum(s, 1)
                p = s / tl.where(s_total == 0, 1.0, s_total)[:, None]

        # choose
        CHOICE_IS_Z: tl.constexpr = not HAS_BIAS and GROUPS == 1 and (SCORE == 0 or ON_LOGITS)
        if ON_LOGITS:
            choice = z
        elif SCORE > 0:
            choice = s
        elif HAS_BIAS or GROUPS > 1:
            choice = e / total[:, None]
        else:
            choice = z  # softmax keeps the order
        if HAS_BIAS:  # loaded for each block: registers are scarcer
            choice += tl.load(bias_ptr + expert, mask=is_lane, other=0.0).to(tl.float32)[None, :]
        choice = tl.where(x == NEG_INF, NEG_INF, ranked(choice))
        if GROUPS > 1:
            choice = keep_groups(choice, BT, LANES, GROUPS, GROUP_LANES, KEPT, TOP2, MASK_VALUE)
        want = tl.where(alive_t, K, 0)
        if RAGGED == 2:
            away = tl.where(e > 0, e * (z - top[:, None]), 0.0)
            entropy = tl.log(total) - tl.sum(away, 1) / total
            want = tl.minimum(want, tl.where(entropy < THRESHOLD, 1, tl.where(entropy < 2 * THRESHOLD, 2, K)))
        ids, keys, number, taken = choose(key_of(choice), want, p, BT, LANES, K_POW2, K, RAGGED, THRESHOLD)
        slot = token[:, None] * K + k_lane  # row numbers are int32, so slots are
        inside = alive_t[:, None] & (k_lane < K)
        live = inside & (ids >= 0)
        at = tl.where(live, ids // GROUP_LANES * SIZE + ids % GROUP_LANES, -1)
        tl.store(ids_ptr + slot, at, mask=inside)

        # weigh the chosen logits
        if CHOICE_IS_Z:
            doubt = keys == NAN_KEY  # NaN, or the lowest finite number: the logit itself tells
            value = tl.load(logits_ptr + token.to(tl.int64)[:, None] * stride_t + at, mask=live & doubt, other=0.0)
            value = tl.where(doubt, transform_logits(value.to(tl.float32), MULTIPLIER, CAP), value_of(keys))
        else:  # once more, from a cache near by
            value = tl.load(logits_ptr + token.to(tl.int64)[:, None] * stride_t + at, mask=live, other=NEG_INF)
            value = transform_logits(value.to(tl.float32), MULTIPLIER, CAP)
        if POST and SCORE == 0:
            w, _, total_taken = exp_rows(tl.where(live, value, NEG_INF))
            w = w / total_taken[:, None]
        elif SCORE == 0:
            w = tl.exp(value - top[:, None]) / total[:, None]
        else:
            w = elementwise(value, SCORE)
        w = tl.where(live, w, 0.0)
        if RENORM:
            norm = tl.maximum(tl.sum(w, 1), MIN) + EPS
            w = w / tl.where(norm == 0, 1.0, norm)[:, None]
        tl.store(weights_ptr + slot, w * SCALE, mask=inside)

        # number
        words, counted = takers(taken & alive_t[:, None], BT, LANES)
        if SINGLE:  # the first row of an expert is where its slots' numbers start
            running, dead_running = starts(counted, tokens_ptr, offsets_ptr, expert, is_lane, E)
        place = places(words, running, ids, BT, LANES, K_POW2)
        few = tl.where(alive_t, K - number, 0)  # slots that found no expert
        dead = tl.sum(few, 0)
        first = tl.zeros((BT,), tl.int32)
        if dead > 0:
            earlier = tl.arange(0, BT)[:, None] > tl.arange(0, BT)[None, :]
            first += dead_running + tl.sum(tl.where(earlier, few[None, :], 0), 1)
        place = tl.where(live, place, (first + few)[:, None] + k_lane - K)
        if SINGLE:
            tl.store(order_ptr + place, slot, mask=inside)
            tl.store(index_ptr + slot, tl.where(live, place, -1), mask=inside)
        else:
            tl.store(places_ptr + slot, place, mask=inside)
        running = counted if SINGLE else running + counted
        dead_running += dead

        # sum
        if STATISTICS:
            sums += tl.sum(tl.where(alive_t[:, None] & is_lane[None, :], p, 0.0), 0)
            lse = tl.where(alive_t & (tl.max(z, 1) != NEG_INF), top + tl.log(total), 0.0)
            squares += tl.sum(lse * lse, 0)
    if not SINGLE or STATISTICS:
        tl.store(counts_ptr + program * (E + 1) + expert, running, mask=is_lane)
        tl.store(counts_ptr + program * (E + 1) + E, dead_running)
    if STATISTICS:
        tl.store(sums_ptr + program * E + expert, sums, mask=is_lane)
        tl.store(squares_ptr + program, squares)


@Kernel
@triton.jit(do_not_specialize=["per_sequence", "ranges", "per_range"])
def route_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, places_ptr, counts_ptr, sums_ptr, squares_ptr,
    tokens_ptr, offsets_ptr, order_ptr, index_ptr,
    stride_t, per_sequence, ranges, per_range,
    E: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_LANES: tl.constexpr, LANES: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    MASK_VALUE: tl.constexpr, SCORE: tl.constexpr, POST: tl.constexpr, RENORM: tl.constexpr, EPS: tl.constexpr,
    MIN: tl.constexpr, SCALE: tl.constexpr, MULTIPLIER: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    ON_LOGITS: tl.constexpr, RAGGED: tl.constexpr, THRESHOLD: tl.constexpr, STATISTICS: tl.constexpr,
    SINGLE: tl.constexpr, BT: tl.constexpr, PIECE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`route_range` for each range of each sequence."""
    follow(OVERLAP)
    program = tl.program_id(0)
    begin, end = program, per_sequence
    if not SINGLE:
        begin, end = range_of(program, per_sequence, ranges, per_range)
    route_range(
        logits_ptr, bias_ptr, weights_ptr, ids_ptr, places_ptr, counts_ptr, sums_ptr, squares_ptr,
        tokens_ptr, offsets_ptr, order_ptr, index_ptr, stride_t, program, begin, end,
        E, K, K_POW2, GROUPS, GROUP_LANES, LANES, KEPT, TOP2, MASK_VALUE, SCORE, POST, RENORM, EPS, MIN, SCALE,
        MULTIPLIER, CAP, HAS_BIAS, ON_LOGITS, RAGGED, THRESHOLD, STATISTICS, SINGLE, BT, PIECE,
    )  # fmt: skip


@Kernel
@triton.jit(do_not_specialize=["per_sequence", "ranges", "per_range"])
def weigh_kernel(
    logits_ptr, given_ptr, weights_ptr, ids_ptr, counts_ptr, sums_ptr, squares_ptr,
    stride_t, per_sequence, ranges, per_range,
    E: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr, LANES: tl.constexpr, SCORE: tl.constexpr,
    POST: tl.constexpr, RENORM: tl.constexpr, EPS: tl.constexpr, MIN: tl.constexpr, SCALE: tl.constexpr,
    MULTIPLIER: tl.constexpr, CAP: tl.constexpr, STATISTICS: tl.constexpr, BT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The same for ids made elsewhere: clean them, weigh them, sum what the losses need."""
    follow(OVERLAP)
    program = tl.program_id(0)
    begin, end = range_of(program, per_sequence, ranges, per_range)
    lane = tl.arange(0, LANES)
    k_lane = tl.arange(0, K_POW2)[None, :]
    sums = tl.zeros((LANES,), tl.float32)
    chosen_by = tl.zeros((LANES,), tl.int32)
    squares = tl.zeros((), tl.float32)
    for chunk in range(begin, end, BT):
        token = chunk + tl.arange(0, BT)
        alive_t = token < end
        inside = alive_t[:, None] & (lane < E)[None, :]
        row_ptr = logits_ptr + token.to(tl.int64)[:, None] * stride_t
        slot = token.to(tl.int64)[:, None] * K + k_lane
        ids = tl.load(given_ptr + slot, mask=alive_t[:, None] & (k_lane < K), other=-1)
        live = (ids >= 0) & (ids < E)
        ids = tl.where(live, ids, 0).to(tl.int32)
        chosen = tl.load(row_ptr + ids, mask=live, other=NEG_INF).to(tl.float32)
        chosen = transform_logits(chosen, MULTIPLIER, CAP)
        if (SCORE == 0 and not POST) or STATISTICS:
            x = tl.load(row_ptr + lane[None, :], mask=inside, other=NEG_INF).to(tl.float32)
            z = transform_logits(x, MULTIPLIER, CAP)
            e, top, total = exp_rows(z)
        if POST and SCORE == 0:
            e_chosen, _, total_chosen = exp_rows(chosen)
            w = e_chosen / total_chosen[:, None]
        elif SCORE == 0:
            w = tl.exp(chosen - top[:, None]) / total[:, None]
        else:
            w = elementwise(chosen, SCORE)
        w = tl.where(live, w, 0.0)
        if RENORM:
            norm = tl.maximum(tl.sum(w, 1), MIN) + EPS
            w = w / tl.where(norm == 0, 1.0, norm)[:, None]
        tl.store(weights_ptr + slot, w * SCALE, mask=alive_t[:, None] & (k_lane < K))
        tl.store(ids_ptr + slot, tl.where(live, ids, -1), mask=alive_t[:, None] & (k_lane < K))
        if STATISTICS:
            if SCORE == 0 or SCORE == 3:
                p = e / total[:, None]
            else:
                s = tl.where(x == NEG_INF, 0.0, elementwise(z, SCORE))
                s_total = tl.sum(s, 1)
                p = s / tl.where(s_total == 0, 1.0, s_total)[:, None]
            sums += tl.sum(tl.where(inside, p, 0.0), 0)
            lse = tl.where(alive_t & (tl.max(z, 1) != NEG_INF), top + tl.log(total), 0.0)
            squares += tl.sum(lse * lse, 0)
            for k in tl.range(0, K):
                mine = tl.load(given_ptr + token.to(tl.int64) * K + k, mask=alive_t, other=-1)
                chosen_by += tl.sum((lane[None, :] == mine[:, None]).to(tl.int32), 0)
    if STATISTICS:
        tl.store(counts_ptr + program * (E + 1) + lane, chosen_by, mask=lane < E)
        tl.store(sums_ptr + program * E + lane, sums, mask=lane < E)
        tl.store(squares_ptr + program, squares)
