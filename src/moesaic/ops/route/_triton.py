"""`route` in Triton: scores, choice, weights, counts and loss sums in one launch, the index tables in a second one.

The tokens are cut into ranges, one a program. The first launch also numbers each slot among the earlier slots of its
expert in its range, and counts each range's slots by expert; the second adds what stands before: the experts' starts
and the earlier ranges' counts. A batch that fits one range needs the first launch alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...launch import Bound, ceil_div, pow2, unit_rows
from ..index._triton import MAX_EXPERTS, SMS, Cut, Tables, empty, lanes_of, tables_of
from ._triton_backward import route_backward_kernel, sparse_backward_kernel
from ._triton_route import route_kernel, weigh_kernel
from .config import RAGGED, SCORES
from .gradients import incoming

NEEDS = "triton"
FEWEST_ROWS = 4  # of a range of many
FEW_ROWS = 2048  # of a backward
ROOM = 4096  # lanes of a block


def why_not(problem: Any) -> str | None:
    if problem.dtype == torch.float64:
        return "needs fp32, bf16 or fp16 logits, got float64"
    columns = max(problem.columns, problem.num_experts)
    if columns > MAX_EXPERTS:
        return f"needs at most {MAX_EXPERTS} experts, got {columns}"
    return None


@functools.lru_cache(maxsize=4096)  # pure arithmetic, a few µs that decode would feel
def cut_tokens(T: int, S: int, lanes: int, least: int = 1) -> Cut:
    """From one row a warp, for latency, to eight threads a row, which have the least to exchange: a thread then
    holds 16 lanes, and two blocks of eight warps have an SM's registers."""
    N = T // S
    # 256 lanes, half a word of choices each: one block of twice the rows beats two (81 and 96 µs at T = 32768, H200)
    most = max(least, min(64, (2 * ROOM if lanes == 256 else ROOM) // lanes))
    ranges = SMS if T <= SMS * most else 2 * SMS
    wanted = T if S == 1 and T <= min(16, most) else max(FEWEST_ROWS, ceil_div(T, ranges))
    block = min(max(least, pow2(wanted)), most)
    per_range = max(1, min(ceil_div(wanted, block) * block, N))
    ranges = ceil_div(N, per_range)
    threads = 512 if S * ranges == 1 and least == 1 else 256
    piece = max(min(lanes, 128, max(32, 4 * threads // block)), lanes // 8)
    return Cut(N, ranges, per_range, S * ranges, block, min(16, max(1, block * piece // 128)), piece)


def _scoring(config) -> dict[str, Any]:
    """What forward and backward must have in common.

    A softmax that is divided by its sum over the choices is the softmax of the choices' logits.
    """
    renorm = config.order == "pre_renorm"
    post = config.order == "post" or (renorm and config.score == "softmax" and config.norm_eps == config.norm_min == 0)
    return dict(
        SCORE=SCORES.index(config.score), POST=post, RENORM=renorm and not post, EPS=config.norm_eps,
        MIN=config.norm_min, SCALE=config.scale, MULTIPLIER=config.multiplier, CAP=config.soft_cap,
    )  # fmt: skip


def choosing(E: int, bias: bool, statistics: bool, single: bool, block: int, piece: int, config) -> dict[str, Any]:
    """The compile-time arguments of `route_range`."""
    group_lanes, lanes = lanes_of(E, config.num_groups)
    K = config.top_k
    return dict(
        E=E, K=K, K_POW2=pow2(K), GROUPS=config.num_groups, GROUP_LANES=group_lanes, LANES=lanes,
        KEPT=config.topk_groups, TOP2=config.group_score == "top2_sum", MASK_VALUE=config.group_mask_value,
        HAS_BIAS=bias, ON_LOGITS=config.order == "post" or config.bias_on == "logits",
        RAGGED=(*("topk",), *RAGGED).index(config.policy), THRESHOLD=config.threshold, STATISTICS=statistics,
        SINGLE=single, BT=block, PIECE=piece, **_scoring(config),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _route(E: int, bias: bool, statistics: bool, single: bool, block: int, piece: int, warps: int, config) -> Bound:
    return route_kernel.bind(**choosing(E, bias, statistics, single, block, piece, config), num_warps=warps)


@functools.lru_cache(maxsize=1024)
def _weigh(E: int, K: int, statistics: bool, block: int, warps: int, config) -> Bound:
    """The same for given ids."""
    return weigh_kernel.bind(
        E=E, K=K, K_POW2=pow2(K), LANES=lanes_of(E)[1], STATISTICS=statistics, BT=block, **_scoring(config),
        num_warps=warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _sparse_backward(E: int, K: int, piece: int, warps: int, block: int, config) -> Bound:
    constants = dict(E=E, K=K, LANES=lanes_of(E)[1], BT=block, PIECE=piece)
    return sparse_backward_kernel.bind(**constants, **_scoring(config), num_warps=warps)


@functools.lru_cache(maxsize=1024)
def _dense_backward(E: int, K: int, statistics: bool, block: int, config) -> Bound:
    lanes = lanes_of(E)[1]
    constants = dict(E=E, K=K, LANES=lanes, STATISTICS=statistics, BT=block, PIECE=min(lanes, max(16, lanes // 4)))
    return route_backward_kernel.bind(**constants, **_scoring(config), num_warps=8)


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor, ...], None]:
    bias, ids, config, statistics = o.bias, o.ids, problem.config, problem.statistics
    logits, num_experts = unit_rows(o.logits), problem.num_experts
    (T, E), S, stride, f32 = logits.shape, problem.sequences, logits.stride(0), torch.float32
    K = config.top_k if ids is None else ids.shape[1]
    weights, given, ids = empty(logits, T, K, dtype=f32), ids, empty(logits, T, K)
    if T * K == 0:
        shape = (S, E) if statistics else (0,)
        sums, squares = logits.new_zeros(shape, dtype=f32), logits.new_zeros(shape[:1], dtype=f32)
        none = torch.zeros_like(sums, dtype=torch.int32)
        return (weights, *tables_of(ids, num_experts), sums, squares, none), None
    cut = cut_tokens(T, S, lanes_of(E, config.num_groups if given is None else 1)[1])
    sums = squares = None
    if statistics:
        sums, squares = empty(weights, cut.programs, E, dtype=f32), empty(weights, cut.programs, dtype=f32)
    if given is None:
        made = Tables(ids, T * K, E, cut.of_slots(K), statistics)
        counts, tables = made.counts, made.pointers
        bound = _route(E, bias is not None, statistics, cut.single, cut.block, cut.piece, cut.num_warps, config)
        pointers = (logits, bias, weights, ids, made.places, counts, sums, squares, *tables)
        bound((cut.programs, 1, 1), pointers, (stride,), cut.numbers)
        if num_experts == E:
            made.finish(ids)
    else:
        counts, tables = (empty(ids, cut.programs, E + 1) if statistics else None), ()
        bound = _weigh(E, K, statistics, cut.block, cut.num_warps, config)
        pointers = (logits, given.contiguous(), weights, ids, counts, sums, squares)
        bound((cut.programs, 1, 1), pointers, (stride,), cut.numbers)
    if given is not None or num_experts < E:  # the choice is not the kernel's, or some experts have no rows
        _, *tables = tables_of(ids, num_experts)
    if sums is None or squares is None or counts is None:
        return (weights, ids, *tables, weights.new_empty(0), weights.new_empty(0), ids.new_empty(0)), None
    shape = (S, cut.ranges)
    choices = counts.view(*shape, E + 1).sum(1, dtype=torch.int32)[:, :E].contiguous()
    return (weights, ids, *tables, sums.view(*shape, E).sum(1), squares.view(shape).sum(1), choices), None


def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    logits, ids, config = unit_rows(o.logits), saved.ids, problem.config
    grad, sums, squares = incoming(grads, logits, ids, problem.statistics)
    statistics = sums is not None
    T, E = logits.shape
    K = ids.shape[1]
    out = torch.empty(T, E, dtype=logits.dtype, device=logits.device)
    if T:
        stride, lanes, scoring = logits.stride(0), lanes_of(E)[1], _scoring(config)
        if not statistics and (scoring["SCORE"] > 0 or scoring["POST"]) and K <= 16:
            # a row a warp for latency; four of them share one where there are many
            piece = min(lanes, max(lanes // 8, 128 if T <= FEW_ROWS else 32))
            warps = 1 if T <= SMS else 4
            block = warps * max(1, 128 // piece)
            bound = _sparse_backward(E, K, piece, warps, block, config)
            bound((ceil_div(T, block), 1, 1), (grad, logits, ids, out), (stride,), (T,))
        else:
            per_sequence, block = T if sums is None else T // sums.shape[0], max(1, 4096 // lanes)
            bound = _dense_backward(E, K, statistics, block, config)
            pointers = (grad, sums, squares, logits, ids, out)
            bound((ceil_div(T, block), 1, 1), pointers, (stride,), (T, per_sequence))
    return {"logits": out}
