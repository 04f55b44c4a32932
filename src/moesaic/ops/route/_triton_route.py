"""Kernels of the router: from logits to choices, weights, places and loss sums in one pass, and back in one.

Legend: a *lane* holds one expert; with groups, lanes are padded so that each group has a power of two of them.
"""

from __future__ import annotations

from ...hardware import tl, triton
from ._triton_index import number, tally, write_tables
from ._triton_scores import (
    NEG_INF,
    TAKEN,
    argmax,
    derivative,
    elementwise,
    exp_rows,
    keep_groups,
    key_of,
    transform_logits,
)  # fmt: skip


@triton.jit(do_not_specialize=["per_sequence", "ranges", "per_range"])
def _route_kernel(
    logits_ptr, bias_ptr, given_ptr, weights_ptr, ids_ptr, places_ptr, counts_ptr, sums_ptr, squares_ptr,
    tokens_ptr, offsets_ptr, order_ptr, index_ptr,
    stride_t, per_sequence, ranges, per_range,
    E: tl.constexpr, NUM_EXPERTS: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_LANES: tl.constexpr, LANES: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    MASK_VALUE: tl.constexpr, SCORE: tl.constexpr, POST: tl.constexpr, RENORM: tl.constexpr, EPS: tl.constexpr,
    MIN: tl.constexpr, SCALE: tl.constexpr, MULTIPLIER: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    ON_LOGITS: tl.constexpr, RAGGED: tl.constexpr, THRESHOLD: tl.constexpr, GIVEN: tl.constexpr,
    STATISTICS: tl.constexpr, SINGLE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One range of one sequence: score, choose, weigh, number the slots, sum what the losses need."""
    program = tl.program_id(0)
    end = (program // ranges + 1) * per_sequence
    begin = end - per_sequence + program % ranges * per_range
    end = tl.minimum(end, begin + per_range)
    lane = tl.arange(0, LANES)
    SIZE: tl.constexpr = E // GROUPS
    expert = lane // GROUP_LANES * SIZE + lane % GROUP_LANES
    is_lane = (lane % GROUP_LANES < SIZE) & (expert < E)
    k_lane = tl.arange(0, K_POW2)[None, :]
    bias = tl.zeros((LANES,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert, mask=is_lane, other=0.0).to(tl.float32)
    running = tl.zeros((LANES,), tl.int32)
    dead_running = tl.zeros((), tl.int32)
    sums = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((), tl.float32)
    for chunk in range(begin, end, BT):
        token = chunk + tl.arange(0, BT)
        alive_t = token < end
        row_ptr = logits_ptr + token.to(tl.int64)[:, None] * stride_t
        x = tl.load(row_ptr + expert[None, :], mask=alive_t[:, None] & is_lane[None, :], other=NEG_INF).to(tl.float32)
        z = transform_logits(x, MULTIPLIER, CAP)

        # score
        NORMALISED: tl.constexpr = SCORE == 0 or SCORE == 3  # the probabilities are a softmax
        if SCORE == 0 or RAGGED > 0 or STATISTICS:
            e, top, total = exp_rows(z)
        if SCORE > 0 and (not ON_LOGITS or STATISTICS or RAGGED == 1):
            s = tl.where(x == NEG_INF, 0.0, elementwise(z, SCORE)) if SCORE != 3 else elementwise(z, SCORE)
            if not NORMALISED:
                s_total = tl.sum(s, 1)
                s_total = tl.where(s_total == 0, 1.0, s_total)

        # choose
        if GIVEN:
            ids = tl.load(given_ptr + token.to(tl.int64)[:, None] * K + k_lane,
                          mask=alive_t[:, None] & (k_lane < K), other=-1).to(tl.int32)  # fmt: skip
            live = (ids >= 0) & (ids < E)
            ids = tl.where(live, ids, 0)
            lanes = ids // SIZE * GROUP_LANES + ids % SIZE
        else:
            if ON_LOGITS:
                choice = z
            elif SCORE > 0:
                choice = s
            elif HAS_BIAS or GROUPS > 1:
                choice = e / total[:, None]
            else:
                choice = z  # softmax keeps the order
            choice = tl.where(x == NEG_INF, NEG_INF, choice + bias[None, :])
            if GROUPS > 1:
                choice = keep_groups(choice, BT, LANES, GROUPS, GROUP_LANES, KEPT, TOP2, MASK_VALUE)
            key = tl.where(is_lane[None, :], key_of(choice), TAKEN)
            lanes = tl.zeros((BT, K_POW2), tl.int32)
            found = tl.zeros((BT, K_POW2), tl.int1)
            taken_now = tl.zeros((BT, LANES), tl.int1)
            for k in tl.range(0, K):
                best, here = argmax(key)
                ok = best > TAKEN
                lanes = tl.where(k_lane == k, here[:, None], lanes)
                found = found | ((k_lane == k) & ok[:, None])
                hit = (lane[None, :] == here[:, None]) & ok[:, None]
                taken_now = taken_now | hit
                key = tl.where(hit, TAKEN, key)
            live = found & alive_t[:, None]
            ids = lanes // GROUP_LANES * SIZE + lanes % GROUP_LANES
        chosen = transform_logits(tl.load(row_ptr + ids, mask=live, other=NEG_INF).to(tl.float32), MULTIPLIER, CAP)
        if RAGGED == 1:
            if NORMALISED:
                p = tl.exp(chosen - top[:, None]) / total[:, None]
            else:
                p = elementwise(chosen, SCORE) / s_total[:, None]
            p = tl.where(live, p, 0.0)
            live = live & (tl.cumsum(p, 1) - p < THRESHOLD)
        if RAGGED == 2:
            away = tl.where(e > 0, e * (z - top[:, None]), 0.0)
            entropy = tl.log(total) - tl.sum(away, 1) / total
            most = tl.where(entropy < THRESHOLD, 1, tl.where(entropy < 2 * THRESHOLD, 2, K))
            live = live & (k_lane < most[:, None])

        # weigh
        if POST and SCORE == 0:
            _, top_k, total_k = exp_rows(tl.where(live, chosen, NEG_INF))
            w = tl.exp(chosen - top_k[:, None]) / total_k[:, None]
        elif SCORE == 0:
            w = tl.exp(chosen - top[:, None]) / total[:, None]
        else:
            w = elementwise(chosen, SCORE)
        w = tl.where(live, w, 0.0)
        if RENORM:
            norm = tl.maximum(tl.sum(w, 1), MIN) + EPS
            w = w / tl.where(norm == 0, 1.0, norm)[:, None]
        slots = token[:, None] * K + k_lane
        inside = alive_t[:, None] & (k_lane < K)
        slots64 = token.to(tl.int64)[:, None] * K + k_lane
        tl.store(weights_ptr + slots64, w * SCALE, mask=inside)
        tl.store(ids_ptr + slots64, tl.where(live, ids, -1), mask=inside)

        # number
        if GIVEN or RAGGED > 0:
            taken, repeats = tally(lanes, live, BT, LANES, K, K_POW2)
        else:
            taken = (taken_now & alive_t[:, None]).to(tl.int32)
            repeats = tl.zeros((BT, K_POW2), tl.int32)
        routed = live & (ids < NUM_EXPERTS)
        place, running, dead_running = number(
            lanes, routed, taken, repeats, running, dead_running, alive_t, BT, K, K_POW2
        )
        if SINGLE:
            is_expert = is_lane & (expert < NUM_EXPERTS)
            counts = tl.where(is_expert, running, 0)
            start = tl.cumsum(counts, 0) - counts
            write_tables(
                lanes, routed, place, start, tl.sum(counts, 0), slots, inside, tokens_ptr, offsets_ptr, order_ptr,
                index_ptr, expert, is_expert, counts, BT, LANES, NUM_EXPERTS,
            )  # fmt: skip
        else:
            tl.store(places_ptr + slots64, place, mask=inside)

        # sum
        if STATISTICS:
            p = e / total[:, None] if NORMALISED else s / s_total[:, None]
            sums += tl.sum(tl.where(alive_t[:, None] & is_lane[None, :], p, 0.0), 0)
            anything = tl.max(z, 1) != NEG_INF
            lse = tl.where(alive_t & anything, top + tl.log(total), 0.0)
            squares += tl.sum(lse * lse, 0)
    if not SINGLE or STATISTICS:
        tl.store(counts_ptr + program * (E + 1) + expert, running, mask=is_lane)
        tl.store(counts_ptr + program * (E + 1) + E, dead_running)
    if STATISTICS:
        tl.store(sums_ptr + program * E + expert, sums, mask=is_lane)
        tl.store(squares_ptr + program, squares)


@triton.jit(do_not_specialize=["T", "per_sequence"])
def _route_backward_kernel(
    grad_ptr, grad_sums_ptr, grad_squares_ptr, logits_ptr, ids_ptr, out_ptr, stride_t, T, per_sequence,
    E: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr, SCORE: tl.constexpr,
    POST: tl.constexpr, RENORM: tl.constexpr, EPS: tl.constexpr, MIN: tl.constexpr, SCALE: tl.constexpr,
    MULTIPLIER: tl.constexpr, CAP: tl.constexpr, STATISTICS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """From the gradients of weights, probability sums and logsumexp squares to the logits'; scores are made again."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    alive_t = token < T
    lane = tl.arange(0, LANES)[None, :]
    k_lane = tl.arange(0, K_POW2)[None, :]
    inside = alive_t[:, None] & (lane < E)
    row_ptr = logits_ptr + token.to(tl.int64)[:, None] * stride_t
    x = tl.load(row_ptr + lane, mask=inside, other=NEG_INF).to(tl.float32)
    z = transform_logits(x, MULTIPLIER, CAP)
    slots = token.to(tl.int64)[:, None] * K + k_lane
    ids = tl.load(ids_ptr + slots, mask=alive_t[:, None] & (k_lane < K), other=-1)
    live = ids >= 0
    g = tl.load(grad_ptr + slots, mask=live, other=0.0).to(tl.float32) * SCALE
    chosen = transform_logits(tl.load(row_ptr + ids, mask=live, other=NEG_INF).to(tl.float32), MULTIPLIER, CAP)
    DENSE: tl.constexpr = (SCORE == 0 and not POST) or STATISTICS
    if DENSE:
        e, top, total = exp_rows(z)
        p = e / total[:, None]

    # the weights as they were, then their gradient at the scores
    if POST and SCORE == 0:
        _, top_k, total_k = exp_rows(chosen)
        w = tl.exp(chosen - top_k[:, None]) / total_k[:, None]
    elif SCORE == 0:
        w = tl.exp(chosen - top[:, None]) / total[:, None]
    else:
        w = elementwise(chosen, SCORE)
    w = tl.where(live, w, 0.0)
    if RENORM:
        whole = tl.sum(w, 1)
        norm = tl.maximum(whole, MIN) + EPS
        norm = tl.where(norm == 0, 1.0, norm)[:, None]
        drag = tl.where(whole < MIN, 0.0, tl.sum(g * w, 1))[:, None] / norm
        g = tl.where(live, (g - drag) / norm, 0.0)
    if SCORE == 0:
        mean = tl.sum(g * w, 1)[:, None]
        at = w * g
        if POST:
            at = w * (g - mean)
    else:
        at = g * tl.where(live, derivative(chosen, w, SCORE), 0.0)

    dz = tl.zeros((BT, LANES), tl.float32)
    for k in tl.range(0, K):
        mine = tl.sum(tl.where((k_lane == k) & live, ids + 1, 0), 1)[:, None] - 1
        dz += tl.where(lane == mine, tl.sum(tl.where(k_lane == k, at, 0.0), 1)[:, None], 0.0)
    if SCORE == 0 and not POST:
        dz -= p * mean
    if STATISTICS:
        sequence = token // per_sequence
        gp = tl.load(grad_sums_ptr + sequence[:, None] * E + lane, mask=inside, other=0.0)
        gl = tl.load(grad_squares_ptr + sequence, mask=alive_t, other=0.0)
        if SCORE == 0 or SCORE == 3:
            dz += p * (gp - tl.sum(gp * p, 1)[:, None])
        else:
            s = tl.where(x == NEG_INF, 0.0, elementwise(z, SCORE))
            s_total = tl.sum(s, 1)
            s_total = tl.where(s_total == 0, 1.0, s_total)[:, None]
            dz += (gp - tl.sum(gp * s, 1)[:, None] / s_total) / s_total * derivative(z, s, SCORE)
        lse = tl.where(tl.max(z, 1) == NEG_INF, 0.0, top + tl.log(total))
        dz += (2 * gl * lse)[:, None] * p
    if CAP > 0:
        dz *= 1 - (z / CAP) * (z / CAP)
    dz = tl.where(x == NEG_INF, 0.0, dz * MULTIPLIER)
    tl.store(out_ptr + token.to(tl.int64)[:, None] * E + lane, dz.to(out_ptr.dtype.element_ty), mask=inside)
