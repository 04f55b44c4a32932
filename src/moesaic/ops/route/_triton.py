"""`route` in Triton: scores, choice, weights, counts and loss sums in one launch, the index tables in a second one.

The tokens are cut into ranges, one a program. The first launch also numbers each slot among the earlier slots of its
expert in its range, and counts each range's slots by expert; the second adds what stands before: the experts' starts
and the earlier ranges' counts. A batch that fits one range needs the first launch alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...launch import Bound, ceil_div, pow2, unit_rows
from ._triton_backward import route_backward_kernel, sparse_backward_kernel
from ._triton_index import count_kernel, index_kernel
from ._triton_route import gate_route_kernel, route_kernel, weigh_kernel
from .config import RAGGED, SCORES

MAX_EXPERTS = 1024
SMS = 132
FEWEST_ROWS = 4  # of a range of many
FEW_ROWS = 2048  # of a backward
ROOM = 4096  # lanes of a block
BLOCK = 128  # slots that are compared each with each


def why_not(problem) -> str | None:
    if problem.dtype == torch.float64:
        return "needs fp32, bf16 or fp16 logits, got float64"
    if problem.num_experts > MAX_EXPERTS:
        return f"needs at most {MAX_EXPERTS} experts, got {problem.num_experts}"
    return None


@dataclass(frozen=True)
class _Cut:
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

    def of_slots(self, top_k: int) -> _Cut:
        """The same in slots."""
        return replace(
            self, per_sequence=self.per_sequence * top_k, per_range=self.per_range * top_k, block=self.block * top_k
        )


@functools.lru_cache(maxsize=4096)  # pure arithmetic, a few µs that decode would feel
def _cut(T: int, S: int, lanes: int, least: int = 1) -> _Cut:
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
    return _Cut(N, ranges, per_range, S * ranges, block, min(16, max(1, block * piece // 128)), piece)


@functools.lru_cache(maxsize=4096)
def _cut_slots(total: int) -> _Cut:
    per_range = max(1, ceil_div(ceil_div(total, SMS), BLOCK)) * BLOCK
    ranges = ceil_div(total, per_range)
    block = BLOCK if ranges > 1 else max(16, pow2(total))
    return _Cut(total, ranges, per_range if ranges > 1 else total, ranges, block, 4)


def _lanes(E: int, groups: int = 1) -> tuple[int, int]:
    """Lanes of a group and of all, at least 16: four threads a row."""
    size = pow2(E // groups)
    return max(size, 16 // pow2(groups)), max(size, 16 // pow2(groups)) * pow2(groups)


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


def _choosing(E: int, bias: bool, statistics: bool, single: bool, block: int, piece: int, config) -> dict[str, Any]:
    """The compile-time arguments of `route_range`."""
    group_lanes, lanes = _lanes(E, config.num_groups)
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
    return route_kernel.bind(**_choosing(E, bias, statistics, single, block, piece, config), num_warps=warps)


@functools.lru_cache(maxsize=1024)
def _weigh(E: int, K: int, statistics: bool, block: int, warps: int, config) -> Bound:
    """The same for given ids."""
    return weigh_kernel.bind(
        E=E, K=K, K_POW2=pow2(K), LANES=_lanes(E)[1], STATISTICS=statistics, BT=block, **_scoring(config),
        num_warps=warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _count(E: int, single: bool, block: int) -> Bound:
    warps = 8 if block == BLOCK else 4
    return count_kernel.bind(E=E, LANES=_lanes(E)[1], SINGLE=single, BLOCK=block, num_warps=warps)


@functools.lru_cache(maxsize=1024)
def _index(E: int, chunk: int, block: int, each: int) -> Bound:
    lanes = _lanes(E)[1]
    warps = 16 if max(chunk * lanes, block * 8) > 8192 else 8
    return index_kernel.bind(E=E, LANES=lanes, CHUNK=chunk, BLOCK=block, EACH=each, num_warps=warps)


@functools.lru_cache(maxsize=1024)
def _sparse_backward(E: int, K: int, piece: int, warps: int, block: int, config) -> Bound:
    constants = dict(E=E, K=K, LANES=_lanes(E)[1], BT=block, PIECE=piece)
    return sparse_backward_kernel.bind(**constants, **_scoring(config), num_warps=warps)


@functools.lru_cache(maxsize=1024)
def _dense_backward(E: int, K: int, statistics: bool, block: int, config) -> Bound:
    lanes = _lanes(E)[1]
    constants = dict(E=E, K=K, LANES=lanes, STATISTICS=statistics, BT=block, PIECE=min(lanes, max(16, lanes // 4)))
    return route_backward_kernel.bind(**constants, **_scoring(config), num_warps=8)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return like.new_empty(*shape) if like.dtype == dtype else like.new_empty(shape, dtype=dtype)


class _Tables:
    """The index tables' memory, and what passes from the first launch to the second; `cut` is one of slots.

    An operator's results may share no memory, so each is an allocation of its own.
    """

    def __init__(self, ids: Tensor, total: int, E: int, cut: _Cut, statistics: bool = False):
        self.E, self.cut = E, cut
        empty = ids.new_empty
        self.tokens, self.offsets, self.order, self.index = empty(E), empty(E + 1), empty(total), empty(total)
        self.places = None if cut.single else empty(total)
        self.counts = None if cut.single and not statistics else empty(cut.programs * (E + 1))

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self.tokens, self.offsets, self.order, self.index

    def finish(self, ids: Tensor) -> None:
        """The second launch, where one is needed."""
        cut = self.cut
        if not cut.single:
            each = ceil_div(cut.programs, SMS)
            chunk = max(1, min(16384 // _lanes(self.E)[1], pow2(cut.programs)))
            bound = _index(self.E, chunk, min(2048, max(16, pow2(cut.per_range))), each)
            pointers = (ids, self.places, self.counts, *self.pointers)
            bound((ceil_div(cut.programs, each), 1, 1), pointers, (), (*cut.numbers, cut.programs))


def expert_index(topk_ids: Tensor, num_experts: int):
    given = topk_ids.contiguous()
    total, ids = given.numel(), _empty(given, *given.shape)
    if total == 0:
        tables = _Tables(ids, 0, num_experts, _cut_slots(1))
        return ids, tables.tokens.zero_(), tables.offsets.zero_(), tables.order, tables.index
    cut = _cut_slots(total)
    tables = _Tables(ids, total, num_experts, cut)
    pointers = (given, ids, tables.places, tables.counts, *tables.pointers)
    _count(num_experts, cut.single, cut.block)((cut.programs, 1, 1), pointers, (), (total, cut.per_range))
    tables.finish(ids)
    return ids, *tables.pointers


def route(logits: Tensor, bias: Tensor | None, ids: Tensor | None, config, num_experts: int, sequences: int,
          statistics: bool):  # fmt: skip
    logits = unit_rows(logits)
    (T, E), S, stride, f32 = logits.shape, sequences, logits.stride(0), torch.float32
    K = config.top_k if ids is None else ids.shape[1]
    weights, given, ids = _empty(logits, T, K, dtype=f32), ids, _empty(logits, T, K)
    if T * K == 0:
        shape = (S, E) if statistics else (0,)
        sums, squares = logits.new_zeros(shape, dtype=f32), logits.new_zeros(shape[:1], dtype=f32)
        return weights, *expert_index(ids, num_experts), sums, squares, torch.zeros_like(sums, dtype=torch.int32)
    cut = _cut(T, S, _lanes(E, config.num_groups if given is None else 1)[1])
    sums = squares = None
    if statistics:
        sums, squares = _empty(weights, cut.programs, E, dtype=f32), _empty(weights, cut.programs, dtype=f32)
    if given is None:
        made = _Tables(ids, T * K, E, cut.of_slots(K), statistics)
        counts, tables = made.counts, made.pointers
        bound = _route(E, bias is not None, statistics, cut.single, cut.block, cut.piece, cut.num_warps, config)
        pointers = (logits, bias, weights, ids, made.places, counts, sums, squares, *tables)
        bound((cut.programs, 1, 1), pointers, (stride,), cut.numbers)
        if num_experts == E:
            made.finish(ids)
    else:
        counts, tables = (_empty(ids, cut.programs, E + 1) if statistics else None), ()
        bound = _weigh(E, K, statistics, cut.block, cut.num_warps, config)
        pointers = (logits, given.contiguous(), weights, ids, counts, sums, squares)
        bound((cut.programs, 1, 1), pointers, (stride,), cut.numbers)
    if given is not None or num_experts < E:  # the choice is not the kernel's, or some experts have no rows
        _, *tables = expert_index(ids, num_experts)
    if sums is None or squares is None or counts is None:
        return weights, ids, *tables, weights.new_empty(0), weights.new_empty(0), ids.new_empty(0)
    shape = (S, cut.ranges)
    choices = counts.view(*shape, E + 1).sum(1, dtype=torch.int32)[:, :E].contiguous()
    return weights, ids, *tables, sums.view(*shape, E).sum(1), squares.view(shape).sum(1), choices


def route_backward(grad: Tensor, grad_p: Tensor, grad_lse: Tensor, logits: Tensor, ids: Tensor, config,
                   statistics: bool) -> Tensor:  # fmt: skip
    logits = unit_rows(logits)
    T, E = logits.shape
    K = ids.shape[1]
    out = torch.empty(T, E, dtype=logits.dtype, device=logits.device)
    if T:
        stride, lanes, scoring = logits.stride(0), _lanes(E)[1], _scoring(config)
        if not statistics and (scoring["SCORE"] > 0 or scoring["POST"]) and K <= 16:
            # a row a warp for latency; four of them share one where there are many
            piece = min(lanes, max(lanes // 8, 128 if T <= FEW_ROWS else 32))
            warps = 1 if T <= SMS else 4
            block = warps * max(1, 128 // piece)
            bound = _sparse_backward(E, K, piece, warps, block, config)
            bound((ceil_div(T, block), 1, 1), (grad, logits, ids, out), (stride,), (T,))
        else:
            sums, squares = (grad_p, grad_lse) if statistics else (None, None)
            per_sequence, block = T // grad_p.shape[0] if statistics else T, max(1, 4096 // lanes)
            bound = _dense_backward(E, K, statistics, block, config)
            pointers = (grad, sums, squares, logits, ids, out)
            bound((ceil_div(T, block), 1, 1), pointers, (stride,), (T, per_sequence))
    return out


# ---------------------------------------------------------------- from hidden states, for few tokens
GATE_PROGRAMS = 128  # about one for each multiprocessor
_arrived: dict[tuple, Tensor] = {}


def gate_why_not(x: Tensor, weight: Tensor) -> str | None:
    """Why the fused kernel cannot take this gate, or None."""
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"needs x and weight in one half precision, got {x.dtype} and {weight.dtype}"
    if weight.shape[0] > 512:
        return f"needs at most 512 experts, got {weight.shape[0]}"
    return None


def _counter(device: torch.device) -> Tensor:
    """A zero for the programs to count on, one a stream: launches of a stream follow each other."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)  # the graph's own
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _arrived:
        _arrived[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _arrived[key]


@functools.lru_cache(maxsize=1024)
def _gate(T: int, E: int, H: int, logit_bias: bool, bias: bool, config) -> tuple[Bound, _Cut, tuple[int, int, int]]:
    """Of at most 16 tokens, which make two cuts or three."""
    cut = _cut(T, 1, _lanes(E, config.num_groups)[1], least=16)  # the least that its product takes
    block_n = 16 if E * H <= 1 << 19 else 32
    tiles = ceil_div(E, block_n)
    split = max(64, ceil_div(ceil_div(H, max(1, GATE_PROGRAMS // tiles)), 64) * 64)
    splits, block_k = ceil_div(H, split), 128 if split % 128 == 0 else 64
    bound = gate_route_kernel.bind(
        H=H, SPLIT=split, SPLITS=splits, TILES=tiles, BLOCK_N=block_n, BLOCK_K=block_k, HAS_LOGIT_BIAS=logit_bias,
        num_warps=cut.num_warps, **_choosing(E, bias, False, cut.single, cut.block, cut.piece, config),
    )  # fmt: skip
    return bound, cut, (tiles, splits, 1)


def gate_route(x: Tensor, weight: Tensor, logit_bias: Tensor | None, bias: Tensor | None, config):
    """`(logits, weights, ids, tables)` in one launch; at most 16 tokens."""
    x, weight = unit_rows(x), unit_rows(weight)
    (T, H), E, K, f32 = x.shape, weight.shape[0], config.top_k, torch.float32
    strides = (x.stride(0), weight.stride(0))
    bound, cut, grid = _gate(T, E, H, logit_bias is not None, bias is not None, config)
    logits, weights, ids = _empty(x, T, E, dtype=f32), _empty(x, T, K, dtype=f32), _empty(x, T, K)
    made, partial = _Tables(ids, T * K, E, cut), _empty(x, grid[1], T, E, dtype=f32)
    pointers = (x, weight, logit_bias, partial, _counter(x.device), logits, bias, weights, ids, *made.pointers)
    bound(grid, pointers, strides, (T,))
    return logits, weights, ids, *made.pointers
