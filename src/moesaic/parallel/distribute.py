"""The Ascend (CANN) operators between ranks, by meaning: dispatch and combine, grouped products with all-to-alls.

Legend: W ranks, BS tokens a rank (numbers may differ), K choices, H hidden; E experts with matrices, L of them on
each rank; A rows that a rank receives. Names of arguments are CANN's (`npu_moe_distribute_dispatch_v2` and
`_combine_v2`, with the special experts and the waiting times of v3 and v4). What CANN passes between the two calls as
opaque tensors is one value here, `assist_info`.

Ids from E on are experts without matrices: first `zero_expert_num` that give nothing, then `copy_expert_num` that give
the token back, then `const_expert_num` that give `alpha_1 · x + alpha_2 · v`. With `shared_expert_rank_num` S the first
S ranks hold shared experts, each with S / shared_expert_num copies, and the others the E experts; every token of rank r
goes to copy `r % copies` of each shared expert, unweighted.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import check_choice, check_shape
from ..ops.grouped_matmul import grouped_matmul
from ..ops.permute import permute, unpermute
from ..routing import Routing
from .all_to_all import AllToAll, Plan
from .collectives import Flight, arrive, gather, group_of

QUANT_MODES = (0, 2)  # as they are; int8 with a scale a row


class Assist(NamedTuple):
    """What combine needs of a dispatch. Opaque."""

    plan: Plan
    local: Routing
    dispatcher: AllToAll
    shared: int
    live: Tensor  # (BS, K + shared) bool: slots that travelled


class Dispatched(NamedTuple):
    """What a rank got.

    Attributes:
        expand_x: `(A, H)`, rows by local expert, within one by source rank; int8 with `quant_mode=2`.
        dynamic_scales: `(A,)` fp32: `expand_x · dynamic_scales` are the rows; None without quantisation.
        assist_info: for combine.
        expert_token_nums: `(L,)` int64, rows of each expert, or running sums of them.
        ep_recv_counts: `(L·W,)` int32, running sums of rows by (local expert, source rank).
        expand_scales: `(A,)` fp32, the routing weight of each row; None where none were given.
    """

    expand_x: Tensor
    dynamic_scales: Tensor | None
    assist_info: Assist
    expert_token_nums: Tensor
    ep_recv_counts: Tensor
    expand_scales: Tensor | None


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 in [-127, 127] and the fp32 factor that undoes it; a row of zeros has the factor 1."""
    most = rows.float().abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0], dtype=torch.float32)
    factor = torch.where(most > 0, most / 127, torch.ones_like(most))
    return (rows.float() / factor[:, None]).round().clamp(-127, 127).to(torch.int8), factor


def moe_distribute_dispatch(
    x: Tensor, expert_ids: Tensor, *, moe_expert_num: int, group_ep: Any = None, expert_scales: Tensor | None = None,
    x_active_mask: Tensor | None = None, shared_expert_num: int = 1, shared_expert_rank_num: int = 0,
    quant_mode: int = 0, expert_token_nums_type: int = 1, zero_expert_num: int = 0, copy_expert_num: int = 0,
    const_expert_num: int = 0, performance_info: Tensor | None = None,
) -> Dispatched:  # fmt: skip
    """Bring tokens to the ranks of their experts.

    Args:
        x: `(BS, H)`.
        expert_ids: `(BS, K)`; ids from `moe_expert_num` on are special experts (see the module), which stay here.
        moe_expert_num: E, a multiple of the ranks that hold them.
        group_ep: the ranks.
        expert_scales: `(BS, K)` routing weights, to be had beside the rows.
        x_active_mask: `(BS,)` or `(BS, K)` bool; what is False does not travel.
        shared_expert_num, shared_expert_rank_num: see the module.
        quant_mode: 0, or 2 for int8 rows with a scale each.
        expert_token_nums_type: 1 counts, 0 running sums.
        zero_expert_num, copy_expert_num, const_expert_num: numbers of special experts.
        performance_info: `(W,)` int64, to which the microseconds are added that this rank waited for each other one
            to come (by the ranks' clocks, which on several hosts must be synchronised).

    Differentiable in x (not with `quant_mode=2`) and `expert_scales`.
    """
    who = "moe_distribute_dispatch"
    group = group_of(group_ep, who)
    W, rank = group.size(), group.rank()
    check_choice(who, "quant_mode", quant_mode, QUANT_MODES)
    check_choice(who, "expert_token_nums_type", expert_token_nums_type, (0, 1))
    special = zero_expert_num + copy_expert_num + const_expert_num
    S, moe_ranks = shared_expert_rank_num, W - shared_expert_rank_num
    if moe_ranks < 1 or moe_expert_num % moe_ranks or (S and (shared_expert_num < 1 or S % shared_expert_num)):
        raise ValueError(
            f"{who}: moe_expert_num must be a multiple of the {moe_ranks} ranks without shared experts, and "
            f"shared_expert_rank_num of shared_expert_num, got {moe_expert_num}, {S} and {shared_expert_num}."
        )
    check_shape(who, "x", x, (expert_ids.shape[0], "H"))
    if expert_ids.device.type == "cpu" and expert_ids.numel() and int(expert_ids.max()) >= moe_expert_num + special:
        raise ValueError(
            f"{who}: expert_ids must be below {moe_expert_num} + {special} special experts, got "
            f"{int(expert_ids.max())}."
        )
    if performance_info is not None:
        _clock(performance_info, group, who)
    L = moe_expert_num // moe_ranks
    ids = expert_ids.masked_fill((expert_ids < 0) | (expert_ids >= moe_expert_num), -1)
    active = torch.ones_like(ids, dtype=torch.bool)
    if x_active_mask is not None:
        active = x_active_mask if x_active_mask.dim() == 2 else x_active_mask[:, None].expand_as(ids)
        check_shape(who, "x_active_mask", active, ids.shape)
    ids = torch.where(ids < 0, -1, ids + S * L).masked_fill(~active, -1)
    scales, shared = expert_scales, shared_expert_num if S else 0
    if shared:
        each = S // shared
        where = (torch.arange(shared, device=ids.device) * each + rank % each) * L
        ids = torch.cat([ids, where.to(ids.dtype).expand(ids.shape[0], -1).masked_fill(~active.any(1)[:, None], -1)], 1)
        scales = None if scales is None else torch.cat([scales, scales.new_ones(scales.shape[0], shared)], 1)
    dispatcher = AllToAll(W * L, group, send="slot")
    routing = Routing.from_topk(scales, ids, W * L)
    (plan,) = dispatcher.plans(x, [routing])
    factors = None
    if quant_mode == 2:
        q, factor = _quantize(permute(x.detach(), plan.copies))
        ways = (plan.sent, plan.received, group, "same")
        moved, travelled = Flight(q, *ways, f"{who}, rows"), Flight(factor[:, None], *ways, f"{who}, scales")
        _, local, _ = dispatcher.receive(dispatcher.send(x.new_zeros(x.shape[0], 1), routing, plan))
        order = local.row_order.long()
        rows, factors = moved.wait()[order], travelled.wait()[order, 0]
    else:
        rows, local, _ = dispatcher.receive(dispatcher.send(x, routing, plan))
        rows = permute(rows, local)
    counts = local.tokens_per_expert.long()
    source = torch.repeat_interleave(
        torch.arange(W, device=x.device), torch.tensor(plan.received, device=x.device), output_size=sum(plan.received)
    )
    pairs = local.topk_ids[:, 0].long() * W + source
    received = torch.zeros(L * W, dtype=torch.int64, device=x.device).scatter_add_(0, pairs, torch.ones_like(pairs))
    weight = local.topk_weights
    return Dispatched(
        rows, factors, Assist(plan, local, dispatcher, shared, ids >= 0),
        counts if expert_token_nums_type else counts.cumsum(0), received.cumsum(0).int(),
        None if weight is None or scales is None else permute(weight, local)[:, 0],
    )  # fmt: skip


def _clock(performance_info: Tensor, group: Any, who: str) -> None:
    """Add how much later than this rank each other one has come."""
    check_shape(who, "performance_info", performance_info, (group.size(),))
    now = torch.tensor([time.time_ns() // 1000], dtype=torch.int64, device=performance_info.device)
    performance_info += (gather(now, group, f"{who}, clocks") - now).clamp_min(0)


def moe_distribute_combine(
    expand_x: Tensor, expert_ids: Tensor, assist_info: Assist, expert_scales: Tensor, *,
    shared_expert_x: Tensor | None = None, comm_quant_mode: int = 0, moe_expert_num: int, zero_expert_num: int = 0,
    copy_expert_num: int = 0, const_expert_num: int = 0, ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None, const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None, performance_info: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Bring rows back: `y[t] = sum_k expert_scales[t, k] · row(t, k) (+ special and shared experts)`, added in fp32.

    Args:
        expand_x: `(A, H)`, the experts' outputs for the rows of dispatch, in their order.
        expert_ids, assist_info: those of dispatch.
        expert_scales: `(BS, K)` fp32.
        shared_expert_x: `(BS, H)`, added without a weight.
        comm_quant_mode: 2 sends rows back in int8.
        moe_expert_num, zero_expert_num, copy_expert_num, const_expert_num: as in dispatch.
        ori_x: `(BS, H)`, the tokens, for copy and constant experts.
        const_expert_alpha_1, const_expert_alpha_2, const_expert_v: `(n, 1)` or `(n, H)`, and `(n, H)`, of n constant
            experts.
        performance_info: as in dispatch.

    Differentiable in `expand_x` (not with `comm_quant_mode=2`), `expert_scales`, `ori_x`, the constants and
    `shared_expert_x`.
    """
    who = "moe_distribute_combine"
    check_choice(who, "comm_quant_mode", comm_quant_mode, QUANT_MODES)
    plan, local, dispatcher, shared, live = assist_info
    group = dispatcher.group
    check_shape(who, "expand_x", expand_x, (local.num_tokens, "H"), "one row for each row of dispatch")
    check_shape(who, "expert_scales", expert_scales, expert_ids.shape)
    if performance_info is not None:
        _clock(performance_info, group, who)
    rows = unpermute(expand_x, local, weights=False)  # a row each: back into the order in which they came
    ways = (plan.received, plan.sent, group, "same")
    if comm_quant_mode == 2:
        q, factor = _quantize(rows.detach())
        back, factors = Flight(q, *ways, f"{who}, rows"), Flight(factor[:, None], *ways, f"{who}, scales")
        came = (back.wait().float() * factors.wait()).to(expand_x.dtype)
    else:
        came = arrive(rows, Flight(rows, *ways, f"{who}, rows"))
    scales = expert_scales.float()
    if shared:
        scales = torch.cat([scales, scales.new_ones(scales.shape[0], shared)], 1)
    y = unpermute(came.float(), plan.copies, weights=scales.masked_fill(~live, 0))
    first = moe_expert_num + zero_expert_num
    if copy_expert_num:
        y = y + _weight_of(expert_ids, expert_scales, first, copy_expert_num).sum(1, keepdim=True) * _given(
            who, "ori_x", ori_x
        )
    if const_expert_num:
        w = _weight_of(expert_ids, expert_scales, first + copy_expert_num, const_expert_num)
        a1, a2 = (_given(who, "the constants' alphas", a) for a in (const_expert_alpha_1, const_expert_alpha_2))
        y = y + (w @ a1.expand(const_expert_num, y.shape[1])) * _given(who, "ori_x", ori_x)
        y = y + w @ (a2 * _given(who, "const_expert_v", const_expert_v))
    if shared_expert_x is not None:
        check_shape(who, "shared_expert_x", shared_expert_x, y.shape)
        y = y + shared_expert_x.float()
    return y.to(expand_x.dtype)


def _given(who: str, name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"{who}: {name} must be given for copy and constant experts, got None.")
    return value.float()


def _weight_of(ids: Tensor, scales: Tensor, first: int, n: int) -> Tensor:
    """`(BS, n)` fp32: the weight that a token gives to each of n consecutive experts."""
    places = torch.arange(first, first + n, device=ids.device)
    return ((ids[:, :, None] == places) * scales.float()[:, :, None]).sum(1)


# ---------------------------------------------------------------- products and all-to-alls
def _by_expert(counts: list[int], W: int, device: torch.device) -> Routing:
    """The routing, of one choice each, of rows that lie by (rank, local expert); counts have that order."""
    local = len(counts) // W
    ids = torch.arange(local, device=device, dtype=torch.int32).repeat(W)
    ids = torch.repeat_interleave(ids, torch.tensor(counts, device=device), output_size=sum(counts))
    return Routing.from_topk(None, ids[:, None], local)


def _counts(who: str, send_counts: Any, recv_counts: Any, W: int) -> tuple[list[int], list[int], list[int], list[int]]:
    send, recv = ([int(n) for n in counts] for counts in (send_counts, recv_counts))
    if len(send) != len(recv) or not send or len(send) % W or min(send + recv) < 0:
        raise ValueError(
            f"{who}: send_counts and recv_counts must hold one number for each of {W} ranks and local expert, got "
            f"{len(send)} and {len(recv)}."
        )
    local = len(send) // W
    ins, outs = ([sum(c[r * local : r * local + local]) for r in range(W)] for c in (send, recv))
    return send, recv, ins, outs


def alltoallv_gmm(
    gmm_x: Tensor, gmm_weight: Tensor, send_counts: Any, recv_counts: Any, *, group: Any = None,
    mm_x: Tensor | None = None, mm_weight: Tensor | None = None, permute_out_flag: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """All-to-all, rows by local expert, grouped product: `npu_alltoallv_gmm`.

    Args:
        gmm_x: `(B, H)`, rows by (rank, its expert).
        gmm_weight: `(L, H, N)`.
        send_counts, recv_counts: `L·W` numbers each, `[rank][local expert]`.
        mm_x, mm_weight: a product of the shared expert beside it.
        permute_out_flag: also return the received rows by expert.

    Returns:
        `(A, N)` by local expert and then rank, the shared product or None, the rows or None. Differentiable.
    """
    who, pg = "alltoallv_gmm", group_of(group, "alltoallv_gmm")
    _, recv, ins, outs = _counts(who, send_counts, recv_counts, pg.size())
    flight = Flight(gmm_x, ins, outs, pg, "same", f"{who}, rows")
    shared = None if mm_x is None or mm_weight is None else mm_x @ mm_weight  # while rows travel
    routing = _by_expert(recv, pg.size(), gmm_x.device)
    rows = permute(arrive(gmm_x, flight), routing)
    return grouped_matmul(rows, gmm_weight, routing, transposed=True), shared, rows if permute_out_flag else None


def gmm_alltoallv(
    gmm_x: Tensor, gmm_weight: Tensor, send_counts: Any, recv_counts: Any, *, group: Any = None,
    mm_x: Tensor | None = None, mm_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Grouped product, rows by rank, all-to-all: `npu_gmm_alltoallv`, the way back of `alltoallv_gmm`.

    Args:
        gmm_x: `(A, H)`, rows by local expert and then rank.
        gmm_weight: `(L, H, N)`.
        send_counts, recv_counts: those of the way there, changed over: this rank sends `send_counts[rank][expert]`.
        mm_x, mm_weight: a product of the shared expert beside it.

    Returns:
        `(B, N)` by (rank, its expert), and the shared product or None. Differentiable.
    """
    who, pg = "gmm_alltoallv", group_of(group, "gmm_alltoallv")
    send, _, ins, outs = _counts(who, send_counts, recv_counts, pg.size())
    routing = _by_expert(send, pg.size(), gmm_x.device)
    rows = unpermute(grouped_matmul(gmm_x, gmm_weight, routing, transposed=True), routing, weights=False)
    flight = Flight(rows, ins, outs, pg, "same", f"{who}, rows")
    shared = None if mm_x is None or mm_weight is None else mm_x @ mm_weight
    return arrive(rows, flight), shared


def matmul_all_to_all(x1: Tensor, x2: Tensor, *, bias: Tensor | None = None, group: Any = None) -> Tensor:
    """`(BS, H) @ (H, N) (+ bias)`, columns dealt out: `(W·BS, N / W)`, the rows of rank 0 first. Differentiable."""
    who, pg = "matmul_all_to_all", group_of(group, "matmul_all_to_all")
    W, (BS, N) = pg.size(), (x1.shape[0], x2.shape[1])
    if N % W:
        raise ValueError(f"{who}: the {N} columns of x2 must be a multiple of the {W} ranks.")
    y = x1 @ x2
    y = y if bias is None else y + bias
    y = y.view(BS, W, N // W).transpose(0, 1).reshape(W * BS, N // W)
    return arrive(y, Flight(y, [BS] * W, [BS] * W, pg, "same", f"{who}, rows"))


def all_to_all_matmul(
    x1: Tensor, x2: Tensor, *, bias: Tensor | None = None, group: Any = None
) -> tuple[Tensor, Tensor]:
    """Rows `(BS, H)` dealt out, columns gathered, product: `y (BS / W, N)` and its operand `(BS / W, W·H)`.

    `x2` is `(W·H, N)`. Differentiable.
    """
    who, pg = "all_to_all_matmul", group_of(group, "all_to_all_matmul")
    W, (BS, H) = pg.size(), x1.shape
    if BS % W:
        raise ValueError(f"{who}: the {BS} rows of x1 must be a multiple of the {W} ranks.")
    n = BS // W
    came = arrive(x1, Flight(x1, [n] * W, [n] * W, pg, "same", f"{who}, rows"))
    whole = came.view(W, n, H).transpose(0, 1).reshape(n, W * H)
    y = whole @ x2
    return (y if bias is None else y + bias), whole
