"""permute and unpermute: tokens to expert-sorted rows and back. With unit weights each is the other's adjoint.

Legend: T tokens, H width, K choices; row r holds the token of slot `row_order[r]` (see `moesaic.Routing`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import check_same, check_shape
from ...hardware import arch_of
from ...op import Op, define, differentiable, forced, watch
from ...problem import Problem
from ...routing import Routing

__all__ = ["permute", "unpermute"]

OP = Op("permute", __name__, ("triton", "torch", "reference"))


def permute(x: Tensor, routing: Routing, *, implementation: str | None = None) -> Tensor:
    """Copy each token to the rows of its experts: `rows[r] = x[row_order[r] // K]`.

    Args:
        x: `(T, H)`, any float dtype.
        routing: who goes where.

    Returns:
        `(T·K, H)` rows sorted by expert; rows past `expert_offsets[-1]` (dropped slots) are zero. With a routing padded
        by `Routing.to_capacity(C)`, `(E·C, H)`: `.view(E, C, H)` is a batch of experts, zeros behind their rows.

    Raises:
        ValueError: x does not have one row for each token, or is on another device.

    Differentiable in x (its gradient sums a token's rows in the order of K, in fp32). Deterministic. No host
    synchronisation. Megatron's permute, CANN's npu_moe_token_permute.
    """
    _check("permute", "x", x, routing, (routing.num_tokens, "H"))
    watch("permute", x)
    return torch.ops.moesaic.permute(
        x, routing.row_order, routing.row_index, routing.expert_offsets, routing.top_k, forced(implementation)
    )


def unpermute(
    rows: Tensor, routing: Routing, *, weights: bool | Tensor = True, implementation: str | None = None
) -> Tensor:
    """Add a token's rows back together: `y[t] = sum_k w[t, k] · rows[row_index[t·K + k]]`.

    Args:
        rows: `(T·K, H)` sorted by expert; `(E·C, H)` with a padded routing.
        routing: who goes where.
        weights: True takes `routing.topk_weights`, a `(T, K)` tensor takes that, False adds without weights.

    Returns:
        `(T, H)` in the dtype of rows, accumulated in fp32 in the order of K; dropped slots are skipped, a token whose
        slots were all dropped gets a zero row.

    Raises:
        ValueError: shapes or devices disagree, or weights are asked for and the routing has none.

    Differentiable in rows and weights. Deterministic (it gathers; no atomics). No host synchronisation.
    """
    who = "unpermute"
    _check(who, "rows", rows, routing, (routing.row_order.shape[0], "H"))
    if weights is True:
        if routing.topk_weights is None:
            raise ValueError(
                f"{who}: routing.topk_weights must be given, got None; pass weights=False to add unweighted."
            )
        weights = routing.topk_weights
    if isinstance(weights, Tensor):
        check_shape(who, "weights", weights, (routing.num_tokens, routing.top_k))
        if weights.device != rows.device:
            raise ValueError(f"{who}: weights must be on {rows.device}, got {weights.device}; move them.")
        if not weights.is_floating_point():
            raise ValueError(f"{who}: weights must be floating point, got {weights.dtype}; convert them with .float().")
    watch(who, rows, weights if isinstance(weights, Tensor) else None)
    return torch.ops.moesaic.unpermute(
        rows, weights if isinstance(weights, Tensor) else None, routing.row_order, routing.row_index,
        routing.expert_offsets, routing.top_k, forced(implementation),
    )  # fmt: skip


permute.implementations = unpermute.implementations = OP.implementations  # type: ignore[attr-defined]


def _check(who: str, name: str, x: Tensor, routing: Routing, want: tuple) -> None:
    check_shape(
        who, name, x, want, "one row for each token of the routing" if who == "permute" else "one row for each slot"
    )
    if x.device != routing.row_order.device:
        raise ValueError(f"{who}: {name} must be on {routing.row_order.device}, got {x.device}; move it.")
    check_same(who, "device", name, x.device, **routing.devices())
    if not x.is_floating_point():
        raise ValueError(f"{who}: {name} must be floating point, got {x.dtype}; convert it.")


# ---------------------------------------------------------------- private operators
def _select(x: Tensor, row_order: Tensor, top_k: int, implementation: str):
    tokens = row_order.shape[0] // max(top_k, 1)
    problem = Problem("permute", x.device.type, arch_of(x.device), x.dtype, tokens, top_k, hidden_size=x.shape[1])
    return OP.select(problem, implementation)


def _permute(x, row_order, row_index, expert_offsets, top_k, implementation):
    return _select(x, row_order, top_k, implementation).permute(x, row_order, expert_offsets, top_k)


def _unpermute(rows, weights, row_order, row_index, expert_offsets, top_k, implementation):
    return _select(rows, row_order, top_k, implementation).unpermute(rows, weights, row_index, top_k)


def _unpermute_backward(grad, rows, weights, row_order, row_index, expert_offsets, top_k, implementation):
    module = _select(rows, row_order, top_k, implementation)
    return module.unpermute_backward(grad, rows, weights, row_order, row_index, expert_offsets, top_k)


_TABLES = "Tensor row_order, Tensor row_index, Tensor expert_offsets, int top_k, str implementation"
define(
    f"permute(Tensor x, {_TABLES}) -> Tensor", _permute,
    lambda x, row_order, *_: x.new_empty(row_order.shape[0], x.shape[1]),
)  # fmt: skip
define(
    f"unpermute(Tensor rows, Tensor? weights, {_TABLES}) -> Tensor", _unpermute,
    lambda rows, w, order, index, offsets, top_k, _: rows.new_empty(index.shape[0] // top_k, rows.shape[1]),
)  # fmt: skip
define(
    f"unpermute_backward(Tensor grad, Tensor rows, Tensor weights, {_TABLES}) -> (Tensor, Tensor)", _unpermute_backward,
    lambda grad, rows, weights, *_: (rows.new_empty(rows.shape), weights.new_empty(weights.shape)),
)  # fmt: skip


def _permute_setup(ctx, inputs, output):
    _, *tables, ctx.top_k, ctx.implementation = inputs
    ctx.save_for_backward(*tables)


def _permute_backward(ctx, grad):
    tables = ctx.saved_tensors
    dx = torch.ops.moesaic.unpermute(grad.contiguous(), None, *tables, ctx.top_k, ctx.implementation)
    return dx, None, None, None, None, None


def _unpermute_setup(ctx, inputs, output):
    rows, weights, *tables, ctx.top_k, ctx.implementation = inputs
    ctx.weighted = weights is not None
    ctx.save_for_backward(*((rows, weights) if ctx.weighted else ()), *tables)


def _unpermute_autograd(ctx, grad):
    grad = grad.contiguous()
    if not ctx.weighted:
        tables = ctx.saved_tensors
        return torch.ops.moesaic.permute(grad, *tables, ctx.top_k, ctx.implementation), *([None] * 6)
    rows, weights, *tables = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody will differentiate this
        return *_composed_backward(grad, rows, weights, tables, ctx.top_k, ctx.implementation), *([None] * 5)
    drows, dweights = torch.ops.moesaic.unpermute_backward(grad, rows, weights, *tables, ctx.top_k, ctx.implementation)
    return drows, dweights, *([None] * 5)


def _composed_backward(grad, rows, weights, tables, top_k: int, implementation: str):
    """`unpermute_backward` of operations that have derivatives."""
    row_order, row_index, expert_offsets = tables
    live = (torch.arange(row_order.shape[0], device=row_order.device) < expert_offsets[-1]) & (row_order >= 0)
    spread = torch.ops.moesaic.permute(grad, *tables, top_k, implementation)
    scale = weights.reshape(-1)[row_order.clamp_min(0).long()].masked_fill(~live, 0)
    drows = (spread * scale[:, None]).to(rows.dtype)
    dots = (spread.to(weights.dtype) * rows.to(weights.dtype)).sum(-1).masked_fill(~live, 0)
    dweights = dots[row_index.clamp_min(0).long()].masked_fill(row_index < 0, 0)
    return drows, dweights.view(weights.shape)


differentiable("permute", _permute_backward, _permute_setup, twice=True)
differentiable("unpermute", _unpermute_autograd, _unpermute_setup, twice=True)
