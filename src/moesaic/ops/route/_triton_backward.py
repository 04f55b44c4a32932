"""Kernels of the router's backward: gradients of the logits in one pass, from the chosen ones alone or from all."""

# pyright: reportOperatorIssue=false
# (Triton's tuples grow in an unrolled loop; to a type checker they stay empty)
from __future__ import annotations

from ...hardware import tl, triton
from ...launch import Kernel
from ._triton_scores import NEG_INF, derivative, elementwise, exp_rows, load_rows, transform_logits


@Kernel
@triton.jit(do_not_specialize=["T"])
def sparse_backward_kernel(
    grad_ptr, logits_ptr, ids_ptr, out_ptr, stride_t, T,
    E: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, SCORE: tl.constexpr, POST: tl.constexpr,
    RENORM: tl.constexpr, EPS: tl.constexpr, MIN: tl.constexpr, SCALE: tl.constexpr, MULTIPLIER: tl.constexpr,
    CAP: tl.constexpr, BT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The backward where only chosen logits get a gradient; few choices.

    Every thread of a row reads all of its choices and keeps them to itself: nothing to exchange, nothing to wait for.
    """
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    alive_t = token < T
    ids, xs, gs = (), (), ()
    for k in tl.static_range(K):
        ids += (tl.load(ids_ptr + token * K + k, mask=alive_t, other=-1),)
        gs += (tl.load(grad_ptr + token * K + k, mask=alive_t, other=0.0).to(tl.float32),)
    top = tl.full((BT, 1), NEG_INF, tl.float32)
    for k in tl.static_range(K):
        x = tl.load(logits_ptr + token * stride_t + ids[k], mask=ids[k] >= 0, other=NEG_INF).to(tl.float32)
        xs += (x,)
        top = tl.maximum(top, transform_logits(x, MULTIPLIER, CAP))
    top = tl.where(top == NEG_INF, 0.0, top)

    # weights, their sum and that of what they get
    ws = ()
    whole = tl.zeros((BT, 1), tl.float32)
    got = tl.zeros((BT, 1), tl.float32)
    for k in tl.static_range(K):
        z = transform_logits(xs[k], MULTIPLIER, CAP)
        if SCORE == 0:
            w = tl.exp(z - top)
        else:
            w = tl.where(ids[k] >= 0, elementwise(z, SCORE), 0.0)
        ws += (w,)
        whole += w
        got += tl.where(ids[k] >= 0, gs[k] * w, 0.0)
    norm = whole if SCORE == 0 else tl.maximum(whole, MIN) + EPS
    norm = tl.where(norm == 0, 1.0, norm)
    drag = got / norm
    if SCORE > 0:
        drag = tl.where(whole < MIN, 0.0, drag)
    part = 1 / norm

    # through the score
    dzs = ()
    for k in tl.static_range(K):
        z = transform_logits(xs[k], MULTIPLIER, CAP)
        if SCORE == 0:
            dz = ws[k] * part * (gs[k] - drag)
        elif RENORM:
            dz = (gs[k] - drag) / norm * derivative(z, ws[k], SCORE)
        else:
            dz = gs[k] * derivative(z, ws[k], SCORE)
        if CAP > 0:
            dz *= 1 - (z / CAP) * (z / CAP)
        dzs += (tl.where(xs[k] == NEG_INF, 0.0, dz * (MULTIPLIER * SCALE)),)
    for first in tl.static_range(0, LANES, PIECE):
        lane = first + tl.arange(0, PIECE)[None, :]
        dx = tl.zeros((BT, PIECE), tl.float32)
        for k in tl.static_range(K):  # ids from outside may repeat
            dx += tl.where(lane == ids[k], dzs[k], 0.0)
        tl.store(out_ptr + token * E + lane, dx.to(out_ptr.dtype.element_ty), mask=alive_t & (lane < E))


@Kernel
@triton.jit(do_not_specialize=["T", "per_sequence"])
def route_backward_kernel(
    grad_ptr, grad_sums_ptr, grad_squares_ptr, logits_ptr, ids_ptr, out_ptr, stride_t, T, per_sequence,
    E: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, SCORE: tl.constexpr, POST: tl.constexpr,
    RENORM: tl.constexpr, EPS: tl.constexpr, MIN: tl.constexpr, SCALE: tl.constexpr, MULTIPLIER: tl.constexpr,
    CAP: tl.constexpr, STATISTICS: tl.constexpr, BT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """From the gradients of weights, probability sums and logsumexp squares to the logits'; scores are made again."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    alive_t = token < T
    lane = tl.arange(0, LANES)[None, :]
    inside = alive_t[:, None] & (lane < E)
    x = load_rows(logits_ptr, stride_t, token, alive_t, BT, E, E, LANES, LANES, PIECE)
    z = transform_logits(x, MULTIPLIER, CAP)

    # the weights' gradients, each at its expert's lane; `n` counts choices, since given ids may repeat
    g = tl.zeros((BT, LANES), tl.float32)
    n = tl.zeros((BT, LANES), tl.float32)
    for k in tl.range(0, K):
        slot = token.to(tl.int64) * K + k
        hit = lane == tl.load(ids_ptr + slot, mask=alive_t, other=-1)[:, None]
        g += tl.where(hit, tl.load(grad_ptr + slot, mask=alive_t, other=0.0).to(tl.float32)[:, None], 0.0)
        n += hit.to(tl.float32)
    g *= SCALE
    if POST and SCORE == 0:
        e_taken, _, _ = exp_rows(tl.where(n > 0, z, NEG_INF))
        whole = tl.sum(e_taken * n, 1)
        w = e_taken / tl.where(whole == 0, 1.0, whole)[:, None]
    if (SCORE == 0 and not POST) or STATISTICS:
        e, top, total = exp_rows(z)
        p = e / total[:, None]
        if SCORE == 0 and not POST:
            w = p
    if SCORE > 0:
        w = elementwise(z, SCORE)
        if SCORE < 3:
            w = tl.where(x == NEG_INF, 0.0, w)
        slope = derivative(z, w, SCORE)
    if RENORM:
        chosen = tl.where(n > 0, w * n, 0.0)
        whole = tl.sum(chosen, 1)
        norm = tl.maximum(whole, MIN) + EPS
        norm = tl.where(norm == 0, 1.0, norm)[:, None]
        drag = tl.where(whole < MIN, 0.0, tl.sum(tl.where(n > 0, g * w, 0.0), 1))[:, None] / norm
        g = tl.where(n > 0, (g - drag * n) / norm, 0.0)
    gp = tl.zeros((BT, LANES), tl.float32)
    if STATISTICS:
        sequence = token // per_sequence
        gp = tl.load(grad_sums_ptr + sequence[:, None] * E + lane, mask=inside, other=0.0)

    # through the score
    if SCORE == 0:
        mean = tl.sum(tl.where(n > 0, g * w, 0.0), 1)[:, None]
        dz = w * (g - n * mean) if POST else w * (g - mean)
        if STATISTICS:
            dz += p * (gp - tl.sum(gp * p, 1)[:, None])
    else:
        if STATISTICS and SCORE < 3:
            s_total = tl.sum(w, 1)
            s_total = tl.where(s_total == 0, 1.0, s_total)[:, None]
            g += (gp - tl.sum(gp * w, 1)[:, None] / s_total) / s_total
        dz = g * slope
        if STATISTICS and SCORE == 3:
            dz += p * (gp - tl.sum(gp * p, 1)[:, None])
    if STATISTICS:
        gl = tl.load(grad_squares_ptr + sequence, mask=alive_t, other=0.0)
        lse = tl.where(tl.max(z, 1) == NEG_INF, 0.0, top + tl.log(total))
        dz += (2 * gl * lse)[:, None] * p
    if CAP > 0:
        dz *= 1 - (z / CAP) * (z / CAP)
    dz = tl.where(x == NEG_INF, 0.0, dz * MULTIPLIER)
    tl.store(out_ptr + token.to(tl.int64)[:, None] * E + lane, dz.to(out_ptr.dtype.element_ty), mask=inside)
