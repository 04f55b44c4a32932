"""`route` in Triton: one launch from logits to weights and ids, one or two for the index tables, one for the backward.

Legend: a *key* is a float as an int32 of the same order, so that "taken" can rank below minus infinity.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...hardware import tl, triton
from ...launch import Launch

BLOCK = 128  # slots a program indexes: it compares each with each


def why_not(problem) -> str | None:
    if problem.dtype == torch.float64:
        return "needs fp32, bf16 or fp16 logits, got float64"
    if problem.num_experts > 4096:
        return f"needs at most 4096 experts, got {problem.num_experts}"
    return None


@triton.jit
def _key(x):
    """A float's place in order as int32; NaN ranks with minus infinity, everything above the smallest int32."""
    x = tl.where(x != x, float("-inf"), tl.where(x == 0, 0.0, x))  # the two zeros are one
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
    """Experts of slots as sort keys: what is not an expert (dropped, out of range) is E; slots past the end, E + 1."""
    ids = tl.load(ids_ptr + slots, mask=slots < total, other=0).to(tl.int32)
    ids = tl.where((ids < 0) | (ids >= E), E, ids)
    return tl.where(slots < total, ids, E + 1)


@triton.jit(do_not_specialize=["total"])
def _count_kernel(ids_ptr, counts_ptr, total, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a block's slots chose each expert; the column E counts dropped slots."""
    block = tl.program_id(0)
    key = _load_ids(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), total, E)
    e = tl.arange(0, E_POW2)
    tl.store(counts_ptr + block * (E + 1) + e, tl.histogram(key, E_POW2), mask=e <= E)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_kernel(counts_ptr, tokens_ptr, num_blocks, E: tl.constexpr, CHUNK: tl.constexpr):
    """One expert: its counts in earlier blocks, in place of its counts, and its total."""
    expert = tl.program_id(0)
    before = tl.zeros((), tl.int32)
    for b in range(0, num_blocks, CHUNK):
        blocks = b + tl.arange(0, CHUNK)
        ptrs = counts_ptr + blocks * (E + 1) + expert
        counts = tl.load(ptrs, mask=blocks < num_blocks, other=0)
        tl.store(ptrs, before + tl.cumsum(counts, 0) - counts, mask=blocks < num_blocks)
        before += tl.sum(counts, 0)
    tl.store(tokens_ptr + expert, before)


@triton.jit(do_not_specialize=["total"])
def _index_kernel(
    ids_ptr, before_ptr, out_ids_ptr, tokens_ptr, offsets_ptr, order_ptr, index_ptr, total,
    E: tl.constexpr, E_POW2: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Stable rows of a block's slots: earlier experts' slots, its expert's in earlier blocks, and earlier ones here."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    slots = block * BLOCK + lane
    live = slots < total
    key = _load_ids(ids_ptr, slots, total, E)
    e = tl.arange(0, E_POW2)
    if SINGLE:
        counts = tl.where(e <= E, tl.histogram(key, E_POW2), 0)
    else:
        counts = tl.load(tokens_ptr + e, mask=e <= E, other=0)
    start = tl.cumsum(counts, 0) - counts
    if SINGLE:
        tl.store(tokens_ptr + e, counts, mask=e <= E)
    # every program writes the same offsets, and reads them back to look up by expert
    tl.store(offsets_ptr + e, start, mask=e <= E)
    tl.debug_barrier()
    # what stands before a slot: earlier experts' slots, earlier blocks' of its expert, earlier ones of this block
    row = tl.load(offsets_ptr + key, mask=live, other=0)
    if not SINGLE:
        row += tl.load(before_ptr + block * (E + 1) + key, mask=live, other=0)
    row += tl.sum(((key[None, :] == key[:, None]) & (lane[None, :] < lane[:, None])).to(tl.int32), 1)
    tl.store(order_ptr + row, slots, mask=live)
    tl.store(index_ptr + slots, tl.where(key < E, row, -1), mask=live)
    tl.store(out_ids_ptr + slots, tl.where(key < E, key, -1), mask=live)


def _pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(maxsize=4096)
def _index_launches(dtype: torch.dtype, total: int, E: int) -> tuple[Launch | None, Launch | None, Launch, int]:
    """Count, scan and index, and the number of blocks; one block needs the last alone."""
    width, single = _pow2(E + 2), total <= BLOCK
    block = max(16, _pow2(total)) if single else BLOCK
    num_blocks = -(-total // block)
    grid = (num_blocks, 1, 1)
    index = Launch(_index_kernel, grid, (E, width, block, single), 4 if single else 8)
    if single:
        return None, None, index, 1
    count = Launch(_count_kernel, grid, (E, width, block))
    scan = Launch(_scan_kernel, (E + 1, 1, 1), (E, min(1024, max(16, _pow2(num_blocks)))))
    return count, scan, index, num_blocks


def expert_index(topk_ids: Tensor, num_experts: int):
    ids = topk_ids.contiguous()
    T, K = ids.shape
    total, E = T * K, num_experts
    out_ids, (tokens, offsets, order, index) = (
        _empty(ids, (T, K)),
        (_empty(ids, (n,)) for n in (E + 1, E + 1, total, total)),
    )
    if total == 0:
        return out_ids, tokens[:E].zero_(), offsets.zero_(), order, index
    count, scan, index_slots, num_blocks = _index_launches(ids.dtype, total, E)
    before = None
    if count is not None and scan is not None:
        before = _empty(ids, (num_blocks, E + 1))
        count((ids, before), (total,))
        scan((before, tokens), (num_blocks,))
    index_slots((ids, before, out_ids, tokens, offsets, order, index), (total,))
    tokens = tokens[:E]
    return out_ids, tokens, offsets, order, index


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_empty(shape) if like.dtype == torch.int32 else like.new_empty(shape, dtype=torch.int32)


def _warps(num_experts: int) -> int:
    return 1 if num_experts <= 512 else 4


@functools.lru_cache(maxsize=4096)
def _route_launch(dtype: torch.dtype, bias: torch.dtype | None, T: int, E: int, stride: int, config) -> Launch:
    constants = (
        E, _pow2(E), config.top_k, _pow2(config.top_k), config.score == "sigmoid", config.order == "post",
        config.order == "pre_renorm", config.norm_eps, config.scale, bias is not None, config.num_groups,
        config.topk_groups, config.group_score == "top2_sum", config.group_mask_value,
    )  # fmt: skip
    return Launch(_route_kernel, (T, 1, 1), constants, _warps(E))


def route(logits: Tensor, bias: Tensor | None, config):
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    T, E = logits.shape
    weights = torch.empty(T, config.top_k, dtype=torch.float32, device=logits.device)
    ids = _empty(logits, (T, config.top_k))
    if T:
        stride = logits.stride(0)
        launch = _route_launch(logits.dtype, None if bias is None else bias.dtype, T, E, stride, config)
        launch((logits, bias, weights, ids), (stride,))
    return (weights, *expert_index(ids, E))


def route_backward(grad: Tensor, logits: Tensor, ids: Tensor, config) -> Tensor:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    T, E = logits.shape
    out = torch.empty(T, E, dtype=logits.dtype, device=logits.device)
    if T:
        constants = (
            E, _pow2(E), config.top_k, config.score == "sigmoid", config.order == "post", config.order == "pre_renorm",
            config.norm_eps, config.scale,
        )  # fmt: skip
        launch = Launch(_route_backward_kernel, (T, 1, 1), constants, _warps(E))
        launch((grad, logits, ids, out), (logits.stride(0),))
    return out
