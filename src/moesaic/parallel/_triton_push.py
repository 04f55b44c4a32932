"""The kernels of `Push`: rows written straight into the memory of other ranks, and the barrier between them.

Legend: W ranks, M places a rank, H hidden, K choices, L experts a rank, C = H / BLOCK pieces of a row. Token t of rank
s has one place in every rank's memory: row `s·M + t`. Tuples of pointers hold one a rank, from the next rank on, so
that ranks do not all write to the same one at once; the own rank's comes last.
"""

from __future__ import annotations

from ..hardware import tl, triton


@triton.jit
def _barrier(flags, state_ptr, failed_ptr, spins, RANK: tl.constexpr, W: tl.constexpr):
    """The launch's last program says to all ranks that this one has come to its next epoch, and waits for theirs.

    state: [epoch, programs that are done, waits in vain]. Release and acquire are cumulative: what a program's threads
    stored before the counter, the counter passes on to the last program, and its flags to the other ranks. A rank that
    does not come within `spins` looks leaves a mark on the device and one that the host can see.
    """
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(state_ptr + 1, 0)
        epoch = tl.load(state_ptr) + 1
        looks = epoch * 0
        for j in tl.static_range(W - 1):
            tl.atomic_xchg(flags[j] + RANK, epoch, sem="release", scope="sys")
        for j in tl.static_range(W - 1):
            flag = flags[W - 1] + (RANK + 1 + j) % W
            while (tl.load(flag, volatile=True) < epoch) & (looks < spins):
                looks += 1
            if tl.atomic_add(flag, 0, sem="acquire", scope="sys") < epoch:
                tl.store(state_ptr + 2, 1)
                tl.store(failed_ptr, 1)
        tl.store(state_ptr, epoch)


@triton.jit(do_not_specialize=["tokens", "M", "spins"])
def send_kernel(
    x_ptr, ids_ptr, w_ptr, xs, idss, ws, flags, state_ptr, failed_ptr, tokens, M, spins, stride_x, L: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    META: tl.constexpr,
):  # fmt: skip
    """Rows to the ranks that own one of their experts; with META ids (-1 where not that rank's) and weights to all.

    An item is BLOCK columns of a token; its first also carries ids and weights, for places without a token too.
    """
    C: tl.constexpr = (H + BLOCK - 1) // BLOCK
    k, M64 = tl.arange(0, K_POW2), M.to(tl.int64)
    for item in range(tl.program_id(0), M * C, tl.num_programs(0)):
        t, col = item // C, item % C * BLOCK + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + t * K + k, mask=(k < K) & (t < tokens), other=-1)
        x = tl.load(x_ptr + (M64 * 0 + t) * stride_x + col, mask=(col < H) & (t < tokens), other=0.0)
        row = RANK * M64 + t
        for j in tl.static_range(W):
            p = (RANK + 1 + j) % W
            here = (ids >= p * L) & (ids < (p + 1) * L)
            if tl.max(here.to(tl.int32), 0) > 0:
                tl.store(xs[j] + row * H + col, x, mask=col < H)
            if META:
                if item % C == 0:
                    w = tl.load(w_ptr + t * K + k, mask=(k < K) & (t < tokens), other=0.0)
                    tl.store(idss[j] + row * K + k, tl.where(here, ids - p * L, -1), mask=k < K)
                    tl.store(ws[j] + row * K + k, w, mask=k < K)
    _barrier(flags, state_ptr, failed_ptr, spins, RANK, W)


@triton.jit(do_not_specialize=["M", "spins"])
def give_back_kernel(
    y_ptr, ids_ptr, dw_ptr, backs, back_ws, flags, state_ptr, failed_ptr, M, spins, stride_y, H: tl.constexpr,
    K: tl.constexpr, K_POW2: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    META: tl.constexpr,
):  # fmt: skip
    """This rank's sums to the tokens' ranks; its own it reads where they lie. META: weights' gradients too."""
    C: tl.constexpr = (H + BLOCK - 1) // BLOCK
    k, M64 = tl.arange(0, K_POW2), M.to(tl.int64)
    for j in tl.static_range(W - 1):
        p = (RANK + 1 + j) % W
        for item in range(tl.program_id(0), M * C, tl.num_programs(0)):
            t, col = item // C, item % C * BLOCK + tl.arange(0, BLOCK)
            row, place = p * M64 + t, RANK * M64 + t
            ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=-1)
            live = tl.max(ids, 0) >= 0
            y = tl.load(y_ptr + row * stride_y + col, mask=live & (col < H), other=0.0)
            if live:
                tl.store(backs[j] + place * H + col, y, mask=col < H)
                if META:
                    if item % C == 0:
                        dw = tl.load(dw_ptr + row * K + k, mask=k < K, other=0.0)
                        tl.store(back_ws[j] + place * K + k, dw, mask=k < K)
    _barrier(flags, state_ptr, failed_ptr, spins, RANK, W)


@triton.jit(do_not_specialize=["M"])
def add_kernel(
    ids_ptr, y_ptr, back_ptr, dw_ptr, back_w_ptr, state_ptr, out_ptr, out_w_ptr, M, stride_y, H: tl.constexpr,
    K: tl.constexpr, K_POW2: tl.constexpr, L: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    META: tl.constexpr,
):  # fmt: skip
    """`out[t]` = the ranks' sums in their order, in fp32; NaN after a wait in vain. META: each choice's gradient."""
    t, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K_POW2)
    ids = tl.load(ids_ptr + t * K + k, mask=k < K, other=-1)
    lost = tl.load(state_ptr + 2) != 0
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(W):
        here = (ids >= p * L) & (ids < (p + 1) * L)
        some = tl.max(here.to(tl.int32), 0) > 0
        if p == RANK:
            part = tl.load(y_ptr + (p * M + t) * stride_y + col, mask=some & (col < H), other=0.0)
        else:
            part = tl.load(back_ptr + (p * M + t) * H + col, mask=some & (col < H), other=0.0)
        acc += part.to(tl.float32)
    acc = tl.where(lost, float("nan"), acc)
    tl.store(out_ptr + t * H + col, acc.to(out_ptr.dtype.element_ty), mask=col < H)
    if META:
        if tl.program_id(1) == 0:
            dw = tl.zeros((K_POW2,), tl.float32)
            for p in tl.static_range(W):
                here = (ids >= p * L) & (ids < (p + 1) * L)
                source = dw_ptr if p == RANK else back_w_ptr
                dw += tl.load(source + (p * M + t) * K + k, mask=here, other=0.0)
            tl.store(out_w_ptr + t * K + k, tl.where(lost, float("nan"), dw), mask=k < K)
