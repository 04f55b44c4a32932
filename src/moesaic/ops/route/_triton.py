"""`route` in Triton: scores, choice, weights, counts and loss sums in one launch, the index tables in a second one.

The tokens are cut into ranges, one a program. The first launch also numbers each slot among the earlier slots of its
expert in its range, and counts each range's slots by expert; the second adds what stands before: the experts' starts
and the earlier ranges' counts. A batch that fits one range needs the first launch alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...launch import Launch, ceil_div, pow2, unit_rows
from ._triton_backward import _route_backward_kernel, _sparse_backward_kernel
from ._triton_index import _count_kernel, _index_kernel
from ._triton_route import _gate_route_kernel, _route_kernel, _weigh_kernel
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


def _cut_slots(total: int) -> _Cut:
    per_range = max(1, ceil_div(ceil_div(total, SMS), BLOCK)) * BLOCK
    ranges = ceil_div(total, per_range)
    block = BLOCK if ranges > 1 else max(16, pow2(total))
    return _Cut(total, ranges, per_range if ranges > 1 else total, ranges, block, 4)


def _lanes(E: int, groups: int = 1) -> tuple[int, int]:
    """Lanes of a group and of all, at least 16: four threads a row."""
    size = pow2(E // groups)
    return max(size, 16 // pow2(groups)), max(size, 16 // pow2(groups)) * pow2(groups)


def _scoring(config) -> tuple:
    """What forward and backward must have in common.

    A softmax that is divided by its sum over the choices is the softmax of the choices' logits.
    """
    renorm = config.order == "pre_renorm"
    post = config.order == "post" or (renorm and config.score == "softmax" and config.norm_eps == config.norm_min == 0)
    return (
        SCORES.index(config.score), post, renorm and not post, config.norm_eps, config.norm_min, config.scale,
        config.multiplier, config.soft_cap,
    )  # fmt: skip


def _routing_constants(E: int, K: int, bias: torch.dtype | None, statistics: bool, cut: _Cut, config) -> tuple:
    """The compile-time arguments of `route_range`."""
    group_lanes, lanes = _lanes(E, config.num_groups)
    return (
        E, K, pow2(K), config.num_groups, group_lanes, lanes, config.topk_groups, config.group_score == "top2_sum",
        config.group_mask_value, *_scoring(config), bias is not None,
        config.order == "post" or config.bias_on == "logits", (*("topk",), *RAGGED).index(config.policy),
        config.threshold, statistics, cut.single, cut.block, cut.piece,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _route_launch(
    dtypes: tuple, T: int, E: int, K: int, stride: int, S: int, statistics: bool, config
) -> tuple[Launch, _Cut, _Cut]:
    """The launch, its cut, and the same of slots. Kept apart by all that the compiled kernel depends on: `dtypes` are
    those of logits and bias."""
    cut = _cut(T, S, _lanes(E, config.num_groups)[1])
    constants = _routing_constants(E, K, dtypes[1], statistics, cut, config)
    launch = Launch(_route_kernel, (cut.programs, 1, 1), constants, cut.num_warps, overlaps=True)
    return launch, cut, cut.of_slots(K)


@functools.lru_cache(maxsize=4096)
def _weigh_launch(
    dtypes: tuple, T: int, E: int, K: int, stride: int, S: int, statistics: bool, config
) -> tuple[Launch, _Cut]:
    """The same for given ids; `dtypes` are those of logits and ids."""
    _, lanes = _lanes(E)
    cut = _cut(T, S, lanes)
    constants = (E, K, pow2(K), lanes, *_scoring(config), statistics, cut.block)
    return Launch(_weigh_kernel, (cut.programs, 1, 1), constants, cut.num_warps, overlaps=True), cut


@functools.lru_cache(maxsize=4096)
def _count_launch(dtype: torch.dtype, total: int, E: int) -> tuple[Launch, _Cut]:
    cut = _cut_slots(total)
    constants = (E, _lanes(E)[1], cut.single, cut.block)
    num_warps = 8 if cut.block == BLOCK else 4
    return Launch(_count_kernel, (cut.programs, 1, 1), constants, num_warps, overlaps=True), cut


@functools.lru_cache(maxsize=4096)
def _index_launch(E: int, cut: _Cut) -> Launch:
    """`cut` is one of slots."""
    _, lanes = _lanes(E)
    each = ceil_div(cut.programs, SMS)
    chunk = max(1, min(16384 // lanes, pow2(cut.programs)))
    block = min(2048, max(16, pow2(cut.per_range)))
    warps = 16 if max(chunk * lanes, block * 8) > 8192 else 8
    constants, grid = (E, lanes, chunk, block, each), (ceil_div(cut.programs, each), 1, 1)
    return Launch(_index_kernel, grid, constants, warps, overlaps=True)


@functools.lru_cache(maxsize=4096)
def _backward_launch(
    dtypes: tuple, T: int, E: int, K: int, stride: int, statistics: bool, config
) -> tuple[Launch, bool]:
    """The launch, and whether it is the sparse one; `dtypes` are those of the weights' gradient and the logits."""
    _, lanes = _lanes(E)
    scoring = _scoring(config)
    score, post, *_ = scoring
    if not statistics and (score > 0 or post) and K <= 16:
        # a row a warp for latency; four of them share one where there are many
        piece = min(lanes, max(lanes // 8, 128 if T <= FEW_ROWS else 32))
        warps = 1 if T <= SMS else 4
        block = warps * max(1, 128 // piece)
        constants = (E, K, lanes, *scoring, block, piece)
        return Launch(_sparse_backward_kernel, (ceil_div(T, block), 1, 1), constants, warps), True
    block = max(1, 4096 // lanes)
    piece = min(lanes, max(16, lanes // 4))
    constants = (E, K, lanes, *scoring, statistics, block, piece)
    return Launch(_route_backward_kernel, (ceil_div(T, block), 1, 1), constants, 8), False


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
        if not self.cut.single:
            launch, numbers = _index_launch(self.E, self.cut), self.cut.numbers
            launch((ids, self.places, self.counts, *self.pointers), (*numbers, self.cut.programs))


def expert_index(topk_ids: Tensor, num_experts: int):
    given = topk_ids.contiguous()
    total, ids = given.numel(), _empty(given, *given.shape)
    if total == 0:
        tables = _Tables(ids, 0, num_experts, _cut_slots(1))
        return ids, tables.tokens.zero_(), tables.offsets.zero_(), tables.order, tables.index
    launch, cut = _count_launch(given.dtype, total, num_experts)
    tables = _Tables(ids, total, num_experts, cut)
    launch((given, ids, tables.places, tables.counts, *tables.pointers), (total, cut.per_range))
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
    if given is None:
        dtypes = (logits.dtype, None if bias is None else bias.dtype)
        launch, cut, slots = _route_launch(dtypes, T, E, K, stride, S, statistics, config)
    else:
        launch, cut = _weigh_launch((logits.dtype, given.dtype), T, E, K, stride, S, statistics, config)
    sums = squares = None
    if statistics:
        sums, squares = _empty(weights, cut.programs, E, dtype=f32), _empty(weights, cut.programs, dtype=f32)
    if given is None:
        made = _Tables(ids, T * K, E, slots, statistics)
        counts, tables = made.counts, made.pointers
        launch((logits, bias, weights, ids, made.places, counts, sums, squares, *tables), (stride, *cut.numbers))
        if num_experts == E:
            made.finish(ids)
    else:
        counts, tables = (_empty(ids, cut.programs, E + 1) if statistics else None), ()
        launch((logits, given.contiguous(), weights, ids, counts, sums, squares), (stride, *cut.numbers))
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
        stride = logits.stride(0)
        launch, sparse = _backward_launch((grad.dtype, logits.dtype), T, E, K, stride, statistics, config)
        if sparse:
            launch((grad, logits, ids, out), (stride, T))
        else:
            sums, squares = (grad_p, grad_lse) if statistics else (None, None)
            per_sequence = T // grad_p.shape[0] if statistics else T
            launch((grad, sums, squares, logits, ids, out), (stride, T, per_sequence))
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


@functools.lru_cache(maxsize=4096)
def _gate_launch(
    dtypes: tuple, T: int, E: int, H: int, stride_x: int, stride_w: int, config
) -> tuple[Launch, _Cut, int]:
    """Kept apart by all that the compiled kernel depends on: `dtypes` are those of x, the logits' bias and bias."""
    cut = _cut(T, 1, _lanes(E, config.num_groups)[1], least=16)  # the least that its product takes
    block_n = 16 if E * H <= 1 << 19 else 32
    tiles = ceil_div(E, block_n)
    split = max(64, ceil_div(ceil_div(H, max(1, GATE_PROGRAMS // tiles)), 64) * 64)
    splits, block_k = ceil_div(H, split), 128 if split % 128 == 0 else 64
    constants = (H, split, splits, tiles, block_n, block_k, dtypes[1] is not None)
    constants += _routing_constants(E, config.top_k, dtypes[2], False, cut, config)
    return Launch(_gate_route_kernel, (tiles, splits, 1), constants, cut.num_warps, overlaps=True), cut, splits


def gate_route(x: Tensor, weight: Tensor, logit_bias: Tensor | None, bias: Tensor | None, config):
    """`(logits, weights, ids, tables)` in one launch; at most 16 tokens."""
    x, weight = unit_rows(x), unit_rows(weight)
    (T, H), E, K, f32 = x.shape, weight.shape[0], config.top_k, torch.float32
    strides = (x.stride(0), weight.stride(0))
    dtypes = (x.dtype, None if logit_bias is None else logit_bias.dtype, None if bias is None else bias.dtype)
    launch, cut, splits = _gate_launch(dtypes, T, E, H, *strides, config)
    logits, weights, ids = _empty(x, T, E, dtype=f32), _empty(x, T, K, dtype=f32), _empty(x, T, K)
    made, partial = _Tables(ids, T * K, E, cut), _empty(x, splits, T, E, dtype=f32)
    pointers = (x, weight, logit_bias, partial, _counter(x.device), logits, bias, weights, ids, *made.pointers)
    launch(pointers, (*strides, T))
    return logits, weights, ids, *made.pointers
