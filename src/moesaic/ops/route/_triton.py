"""`route` in Triton: scores, choice, weights, counts and loss sums in one launch, the index tables in a second one.

The tokens are cut into ranges, one a program. The first launch also numbers each slot among the earlier slots of its
expert in its range, and counts each range's slots by expert; the second adds what stands before: the experts' starts
and the earlier ranges' counts. A batch that fits one range needs the first launch alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...launch import Launch, ceil_div, pow2, unit_rows
from ._triton_index import _count_kernel, _index_kernel
from ._triton_route import _route_backward_kernel, _route_kernel
from .config import RAGGED, SCORES

MAX_EXPERTS = 1024
TILE = 8192  # lanes × tokens that one program holds in registers at a time
RANGES = 132  # programs: each reads every range's counts, so that more of them would cost more than they hide


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

    @property
    def single(self) -> bool:
        return self.programs == 1 and self.per_range <= self.block

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.per_sequence, self.ranges, self.per_range


def _cut(T: int, S: int, lanes: int, statistics: bool = False) -> _Cut:
    N = T // S
    # the sums take registers too, and so does the triangle of block × block
    most = min(64, max(16, TILE // (2 if statistics else 1) // lanes))
    if S == 1 and T <= most:
        wanted = block = max(16, pow2(T))
    else:
        wanted = ceil_div(T, RANGES)
        block = min(max(16, pow2(wanted)), most)
    per_range = max(1, min(ceil_div(wanted, block) * block, N))
    ranges = ceil_div(N, per_range)
    warps = min(16, max(1, block * lanes // 512))
    return _Cut(N, ranges, per_range, S * ranges, block, warps)


def _lanes(E: int, groups: int = 1) -> tuple[int, int]:
    """Lanes of a group and of all: at least 16, the least that a product takes."""
    size = pow2(E // groups)
    return max(size, 16 // pow2(groups)), max(size, 16 // pow2(groups)) * pow2(groups)


def _scoring(config) -> tuple:
    """What forward and backward must have in common."""
    return (
        SCORES.index(config.score), config.order == "post", config.order == "pre_renorm", config.norm_eps,
        config.norm_min, config.scale, config.multiplier, config.soft_cap,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _route_launch(
    dtypes: tuple, T: int, E: int, num_experts: int, K: int, stride: int, S: int, statistics: bool, config
) -> tuple[Launch, _Cut]:
    """Kept apart by all that the compiled kernel depends on: `dtypes` are those of logits, bias and given ids."""
    group_lanes, lanes = _lanes(E, config.num_groups)
    cut = _cut(T, S, lanes, statistics)
    constants = (
        E, num_experts, K, pow2(K), config.num_groups, group_lanes, lanes, config.topk_groups,
        config.group_score == "top2_sum", config.group_mask_value, *_scoring(config), dtypes[1] is not None,
        config.order == "post" or config.bias_on == "logits", (*("topk",), *RAGGED).index(config.policy),
        config.threshold, dtypes[2] is not None, statistics, cut.single, cut.block,
    )  # fmt: skip
    return Launch(_route_kernel, (cut.programs, 1, 1), constants, cut.num_warps), cut


@functools.lru_cache(maxsize=4096)
def _count_launch(dtype: torch.dtype, T: int, E: int, K: int) -> tuple[Launch, _Cut]:
    _, lanes = _lanes(E)
    cut = _cut(T, 1, lanes)
    constants = (E, lanes, K, pow2(K), cut.single, cut.block)
    return Launch(_count_kernel, (cut.programs, 1, 1), constants, cut.num_warps), cut


@functools.lru_cache(maxsize=4096)
def _index_launch(columns: int, num_experts: int, K: int, programs: int, slots: int) -> Launch:
    _, lanes = _lanes(num_experts)
    chunk = min(max(1, 8192 // lanes), pow2(programs))
    block = min(1024, max(16, pow2(slots)))
    return Launch(_index_kernel, (programs, 1, 1), (columns, num_experts, lanes, K, chunk, block), 8)


@functools.lru_cache(maxsize=4096)
def _backward_launch(dtype: torch.dtype, T: int, E: int, K: int, stride: int, statistics: bool, config) -> Launch:
    _, lanes = _lanes(E)
    block = max(1, 4096 // lanes)
    constants = (E, lanes, K, pow2(K), *_scoring(config), statistics, block)
    return Launch(_route_backward_kernel, (ceil_div(T, block), 1, 1), constants)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return like.new_empty(shape) if like.dtype == dtype else like.new_empty(shape, dtype=dtype)


class _Tables:
    """The index tables' memory, and what passes from the first launch to the second."""

    def __init__(self, like: Tensor, T: int, K: int, columns: int, num_experts: int, cut: _Cut, statistics: bool):
        self.columns, self.num_experts, self.cut = columns, num_experts, cut
        self.tokens, self.offsets = _empty(like, num_experts), _empty(like, num_experts + 1)
        self.order, self.index = _empty(like, T * K), _empty(like, T * K)
        self.places = None if cut.single else _empty(like, T, K)
        self.counts = None if cut.single and not statistics else _empty(like, cut.programs, columns + 1)

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self.tokens, self.offsets, self.order, self.index

    def finish(self, ids: Tensor) -> None:
        """The second launch, where one is needed."""
        if not self.cut.single:
            K = ids.shape[1]
            launch = _index_launch(self.columns, self.num_experts, K, self.cut.programs, self.cut.per_range * K)
            launch((ids, self.places, self.counts, *self.pointers), (*self.cut.numbers, self.cut.programs))


def _no_tokens(like: Tensor, K: int, num_experts: int):
    return (_empty(like, 0, K), _empty(like, num_experts).zero_(), _empty(like, num_experts + 1).zero_(),
            _empty(like, 0), _empty(like, 0))  # fmt: skip


def expert_index(topk_ids: Tensor, num_experts: int):
    given = topk_ids.contiguous()
    T, K = given.shape
    if T * K == 0:
        return _no_tokens(given, K, num_experts)[0].view(T, K), *_no_tokens(given, K, num_experts)[1:]
    launch, cut = _count_launch(given.dtype, T, num_experts, K)
    tables, ids = _Tables(given, T, K, num_experts, num_experts, cut, False), _empty(given, T, K)
    launch((given, ids, tables.places, tables.counts, *tables.pointers), (T, cut.per_range))
    tables.finish(ids)
    return ids, *tables.pointers


def route(logits: Tensor, bias: Tensor | None, ids: Tensor | None, config, num_experts: int, sequences: int,
          statistics: bool):  # fmt: skip
    logits = unit_rows(logits)
    (T, E), f32 = logits.shape, torch.float32
    K = config.top_k if ids is None else ids.shape[1]
    if T * K == 0:
        sums = logits.new_zeros((sequences, E) if statistics else (0,), dtype=f32)
        squares = logits.new_zeros((sequences,) if statistics else (0,), dtype=f32)
        return (logits.new_zeros((T, K), dtype=f32), *_no_tokens(logits, K, num_experts), sums, squares,
                torch.zeros_like(sums, dtype=torch.int32))  # fmt: skip
    given = None if ids is None else ids.contiguous()
    stride = logits.stride(0)
    dtypes = (logits.dtype, None if bias is None else bias.dtype, None if given is None else given.dtype)
    launch, cut = _route_launch(dtypes, T, E, num_experts, K, stride, sequences, statistics, config)
    weights, ids = _empty(logits, T, K, dtype=f32), _empty(logits, T, K)
    tables = _Tables(ids, T, K, E, num_experts, cut, statistics)
    sums = squares = None
    if statistics:
        sums, squares = _empty(weights, cut.programs, E, dtype=f32), _empty(weights, cut.programs, dtype=f32)
    pointers = (logits, bias, given, weights, ids, tables.places, tables.counts, sums, squares, *tables.pointers)
    launch(pointers, (stride, *cut.numbers))
    tables.finish(ids)
    if sums is None or squares is None or tables.counts is None:
        return weights, ids, *tables.pointers, weights.new_empty(0), weights.new_empty(0), ids.new_empty(0)
    shape = (sequences, cut.ranges)
    choices = tables.counts.view(*shape, E + 1).sum(1, dtype=torch.int32)[:, :E].contiguous()
    return weights, ids, *tables.pointers, sums.view(*shape, E).sum(1), squares.view(shape).sum(1), choices


def route_backward(grad: Tensor, grad_p: Tensor, grad_lse: Tensor, logits: Tensor, ids: Tensor, config,
                   statistics: bool) -> Tensor:  # fmt: skip
    logits = unit_rows(logits)
    T, E = logits.shape
    K = ids.shape[1]
    out = torch.empty(T, E, dtype=logits.dtype, device=logits.device)
    if T:
        stride = logits.stride(0)
        sums, squares = (grad_p, grad_lse) if statistics else (None, None)
        launch = _backward_launch(logits.dtype, T, E, K, stride, statistics, config)
        launch((grad, sums, squares, logits, ids, out), (stride, T, T // grad_p.shape[0] if statistics else T))
    return out
