"""`route` in Triton: one launch from logits to weights and ids, one or two for the index tables, one for the backward.

Legend: a *key* is a float as an int32 of the same order, so that "taken" can rank below minus infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...hardware import tl, triton

SMALL = 512  # slots that one program indexes by itself
BLOCK = 512  # slots a program otherwise


def why_not(problem) -> str | None:
    if problem.dtype == torch.float64:
        return "needs fp32, bf16 or fp16 logits, got float64"
    if problem.num_experts > 4096:
        return f"needs at most 4096 experts, got {problem.num_experts}"
    return None


@triton.jit
def _key(x):
    """A float's place in order as int32; NaN ranks with minus infinity, everything above the smallest int32."""
    x = tl.where(x != x, float("-inf"), x)
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(x, inside, SIGMOID: tl.constexpr):
    """Scores of one row of logits; 0 outside."""
    if SIGMOID:
        return tl.where(inside, 1 / (1 + tl.exp(-x)), 0.0)
    top = tl.max(tl.where(inside, x, float("-inf")), 0)
    p = tl.where(inside, tl.exp(x - top), 0.0)
    return p / tl.sum(p, 0)


@triton.jit
def _keep_groups(choice, lane, E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr):
    """True on the lanes of the KEPT best groups, scored by their best choice or by their two best."""
    SIZE: tl.constexpr = E // GROUPS
    group = lane // SIZE
    score = tl.full(choice.shape, float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        mine = tl.where(group == g, choice, float("-inf"))
        best = tl.max(mine, 0)
        if TOP2:
            first = tl.min(tl.where((mine == best) & (group == g), lane, E), 0)
            best += tl.max(tl.where(lane == first, float("-inf"), mine), 0)
        score = tl.where(group == g, best, score)
    key = tl.where(lane < E, _key(score), -2147483648)
    keep = lane < 0
    for _ in tl.static_range(KEPT):
        best_key = tl.max(key, 0)
        chosen = tl.min(tl.where(key == best_key, group, GROUPS), 0)
        keep = keep | (group == chosen)
        key = tl.where(group == chosen, -2147483648, key)
    return keep


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, stride_t,
    E: tl.constexpr, E_POW2: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr,
    SIGMOID: tl.constexpr, POST: tl.constexpr, RENORM: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, MASK_VALUE: tl.constexpr,
):  # fmt: skip
    """One token: score, choose, normalise."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, E_POW2)
    inside = lane < E
    x = tl.load(logits_ptr + token * stride_t + lane, mask=inside, other=0.0).to(tl.float32)
    score = x if POST else _scores(x, inside, SIGMOID)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias_ptr + lane, mask=inside, other=0.0).to(tl.float32)
    if GROUPS > 1:
        keep = _keep_groups(choice, lane, E, GROUPS, KEPT, TOP2)
        choice = tl.where(keep, choice, MASK_VALUE)
    key = tl.where(inside, _key(choice), -2147483648)

    k_lane = tl.arange(0, K_POW2)
    ids = tl.zeros((K_POW2,), tl.int32)
    weights = tl.zeros((K_POW2,), tl.float32)
    for k in tl.static_range(K):
        best = tl.max(key, 0)
        chosen = tl.min(tl.where((key == best) & inside, lane, E), 0)
        ids = tl.where(k_lane == k, chosen, ids)
        weights = tl.where(k_lane == k, tl.sum(tl.where(lane == chosen, score, 0.0), 0), weights)
        key = tl.where(lane == chosen, -2147483648, key)
    live = k_lane < K
    if POST:
        weights = _scores(weights, live, SIGMOID)
    elif RENORM:
        weights = weights / (tl.sum(tl.where(live, weights, 0.0), 0) + EPS)
    tl.store(weights_ptr + token * K + k_lane, weights * SCALE, mask=live)
    tl.store(ids_ptr + token * K + k_lane, ids, mask=live)


@triton.jit
def _route_backward_kernel(
    grad_ptr, logits_ptr, ids_ptr, out_ptr, stride_t,
    E: tl.constexpr, E_POW2: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, POST: tl.constexpr, RENORM: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One token: from the gradient of the weights to the gradient of the logits; the scores are computed again."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, E_POW2)
    inside = lane < E
    x = tl.load(logits_ptr + token * stride_t + lane, mask=inside, other=0.0).to(tl.float32)
    grad = tl.zeros((E_POW2,), tl.float32)  # of the weights, at the chosen lanes
    chosen = lane < 0
    for k in tl.static_range(K):
        here = lane == tl.load(ids_ptr + token * K + k)
        chosen = chosen | here
        grad = tl.where(here, tl.load(grad_ptr + token * K + k).to(tl.float32) * SCALE, grad)
    among = chosen if POST else inside
    s = _scores(x, among, SIGMOID)
    if RENORM and not POST:
        total = tl.sum(tl.where(chosen, s, 0.0), 0) + EPS
        mean = tl.sum(tl.where(chosen, grad * s, 0.0), 0) / total
        grad = tl.where(chosen, (grad - mean) / total, 0.0)
    if SIGMOID:
        dx = grad * s * (1 - s)
    else:
        dx = s * (grad - tl.sum(grad * s, 0))
    tl.store(out_ptr + token * E + lane, tl.where(among, dx, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- index tables
@triton.jit
def _load_ids(ids_ptr, slots, total, E: tl.constexpr):
    """Experts of slots as sort keys: what is not an expert (dropped, out of range) becomes E; slots past the end, E + 1."""
    ids = tl.load(ids_ptr + slots, mask=slots < total, other=0).to(tl.int32)
    ids = tl.where((ids < 0) | (ids >= E), E, ids)
    return tl.where(slots < total, ids, E + 1)


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, total, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a block's slots chose each expert; the column E counts dropped slots."""
    block = tl.program_id(0)
    key = _load_ids(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), total, E)
    e = tl.arange(0, E_POW2)
    counts = tl.histogram(key, E_POW2)
    tl.store(counts_ptr + block * (E + 1) + e, counts, mask=e <= E)


@triton.jit
def _index_kernel(
    ids_ptr, counts_ptr, base_ptr, out_ids_ptr, tokens_ptr, offsets_ptr, order_ptr, index_ptr, total, num_blocks,
    E: tl.constexpr, E_POW2: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Stable rows of a block's slots: rows before this expert, plus its slots in earlier blocks, plus earlier slots here."""
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    key = _load_ids(ids_ptr, slots, total, E)
    e = tl.arange(0, E_POW2)
    all_counts = tl.zeros((E_POW2,), tl.int32)
    before = tl.zeros((E_POW2,), tl.int32)
    if SINGLE:
        all_counts += tl.histogram(key, E_POW2)
    else:
        for b in range(0, num_blocks):
            counts = tl.load(counts_ptr + b * (E + 1) + e, mask=e <= E, other=0)
            all_counts += counts
            before += tl.where(b < block, counts, 0)
    all_counts = tl.where(e <= E, all_counts, 0)
    start = tl.cumsum(all_counts, 0) - all_counts
    # a table in memory is the cheapest way to look up by expert; the barrier makes it visible to the whole program
    tl.store(base_ptr + block * (E + 1) + e, start + before, mask=e <= E)
    tl.debug_barrier()
    row = tl.load(base_ptr + block * (E + 1) + key, mask=slots < total, other=0)
    for c in range(0, BLOCK, CHUNK):
        other_slots = block * BLOCK + c + tl.arange(0, CHUNK)
        other = _load_ids(ids_ptr, other_slots, total, E)
        earlier = (other[None, :] == key[:, None]) & (other_slots[None, :] < slots[:, None])
        row += tl.sum(earlier.to(tl.int32), 1)
    live = slots < total
    tl.store(order_ptr + row, slots, mask=live)
    tl.store(index_ptr + slots, tl.where(key < E, row, -1), mask=live)
    tl.store(out_ids_ptr + slots, tl.where(key < E, key, -1), mask=live)
    if block == 0:
        tl.store(tokens_ptr + e, all_counts, mask=e < E)
        tl.store(offsets_ptr + e, start, mask=e <= E)


def _pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def expert_index(topk_ids: Tensor, num_experts: int):
    ids = topk_ids.contiguous()
    T, K = ids.shape
    total, E = T * K, num_experts
    out_ids, (tokens, offsets, order, index) = (
        _empty(ids, (T, K)),
        (_empty(ids, (n,)) for n in (E, E + 1, total, total)),
    )
    if total == 0:
        return out_ids, tokens.zero_(), offsets.zero_(), order, index
    single = total <= SMALL
    block = max(16, _pow2(total)) if single else BLOCK
    num_blocks = triton.cdiv(total, block)
    width = _pow2(E + 2)
    base = _empty(ids, (num_blocks, E + 1))
    counts = base
    if not single:
        counts = _empty(ids, (num_blocks, E + 1))
        _count_kernel[(num_blocks,)](ids, counts, total, E, width, block)
    _index_kernel[(num_blocks,)](
        ids, counts, base, out_ids, tokens, offsets, order, index, total, num_blocks,
        E, width, block, min(block, 32), single,
    )  # fmt: skip
    return out_ids, tokens, offsets, order, index


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=like.device)


def _warps(num_experts: int) -> int:
    return 1 if num_experts <= 512 else 4


def route(logits: Tensor, bias: Tensor | None, config):
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    T, E = logits.shape
    weights = torch.empty(T, config.top_k, dtype=torch.float32, device=logits.device)
    ids = _empty(logits, (T, config.top_k))
    if T:
        _route_kernel[(T,)](
            logits, bias, weights, ids, logits.stride(0),
            E, _pow2(E), config.top_k, _pow2(config.top_k),
            config.score == "sigmoid", config.order == "post", config.order == "pre_renorm", config.norm_eps, config.scale,
            bias is not None, config.num_groups, config.topk_groups, config.group_score == "top2_sum",
            config.group_mask_value, num_warps=_warps(E),
        )  # fmt: skip
    return (weights, *expert_index(ids, E))


def route_backward(grad: Tensor, logits: Tensor, ids: Tensor, config) -> Tensor:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    T, E = logits.shape
    out = torch.empty(T, E, dtype=logits.dtype, device=logits.device)
    if T:
        _route_backward_kernel[(T,)](
            grad, logits, ids, out, logits.stride(0), E, _pow2(E), config.top_k,
            config.score == "sigmoid", config.order == "post", config.order == "pre_renorm", config.norm_eps, config.scale,
            num_warps=_warps(E),
        )  # fmt: skip
    return out
