"""permute and unpermute: tokens to expert-sorted rows and back. With unit weights each is the other's adjoint.

Legend: T tokens, H width, K choices; row r holds the token of slot `row_order[r]` (see `moesaic.Routing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import check_same, check_shape
from ...op import Op, Place, Table
from ...routing import Routing

__all__ = ["permute", "unpermute"]

IMPLEMENTATIONS = ("triton", "torch", "reference")


@dataclass(frozen=True)
class PermuteProblem(Place):
    """What choosing depends on."""

    hidden_size: int = 0
    top_k: int = 1


class Options(NamedTuple):
    top_k: int


class Rows(NamedTuple):
    rows: Tensor


class Sums(NamedTuple):
    y: Tensor


class PermuteOperands(NamedTuple):
    x: Tensor
    row_order: Table
    row_index: Table
    expert_offsets: Table


class UnpermuteOperands(NamedTuple):
    rows: Tensor
    weights: Tensor | None
    row_order: Table
    row_index: Table
    expert_offsets: Table


def _permute_twice(grads: Rows, o: PermuteOperands, saved: None, options: Options, implementation: str, needs: Any):
    operands = UnpermuteOperands(grads.rows, None, o.row_order, o.row_index, o.expert_offsets)
    return {"x": UNPERMUTE(operands, options, implementation).y}


def _unpermute_twice(grads: Sums, o: UnpermuteOperands, saved: None, options: Options, implementation: str, needs: Any):
    """The backward in operations that have derivatives."""
    operands = PermuteOperands(grads.y, o.row_order, o.row_index, o.expert_offsets)
    spread = PERMUTE(operands, options, implementation).rows
    if o.weights is None:
        return {"rows": spread}
    live = (torch.arange(o.row_order.shape[0], device=o.row_order.device) < o.expert_offsets[-1]) & (o.row_order >= 0)
    scale = o.weights.reshape(-1)[o.row_order.clamp_min(0).long()].masked_fill(~live, 0)
    drows = (spread * scale[:, None]).to(o.rows.dtype)
    dots = (spread.to(o.weights.dtype) * o.rows.to(o.weights.dtype)).sum(-1).masked_fill(~live, 0)
    dweights = dots[o.row_index.clamp_min(0).long()].masked_fill(o.row_index < 0, 0)
    return {"rows": drows, "weights": dweights.view(o.weights.shape)}


_DESCRIBED = ("dtype", "hidden_size")
PERMUTE = Op(
    "permute", __name__, IMPLEMENTATIONS, operands=PermuteOperands, options=Options, outputs=Rows,
    problem=PermuteProblem, describe=(_DESCRIBED, lambda o, options: (o.x.dtype, o.x.shape[1])),
    fake=lambda o, options: Rows(o.x.new_empty(o.row_order.shape[0], o.x.shape[1])), twice=_permute_twice,
    calls=("permute", ""),
)  # fmt: skip
UNPERMUTE = Op(
    "unpermute", __name__, IMPLEMENTATIONS, operands=UnpermuteOperands, options=Options, outputs=Sums,
    problem=PermuteProblem, describe=(_DESCRIBED, lambda o, options: (o.rows.dtype, o.rows.shape[1])),
    fake=lambda o, options: Sums(o.rows.new_empty(o.row_index.shape[0] // options.top_k, o.rows.shape[1])),
    twice=_unpermute_twice, calls=("unpermute", "unpermute_backward"),
)  # fmt: skip


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
    operands = PermuteOperands(x, routing.row_order, routing.row_index, routing.expert_offsets)
    return PERMUTE(operands, Options(routing.top_k), implementation).rows


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
    operands = UnpermuteOperands(
        rows, weights if isinstance(weights, Tensor) else None, routing.row_order, routing.row_index,
        routing.expert_offsets,
    )  # fmt: skip
    return UNPERMUTE(operands, Options(routing.top_k), implementation).y


permute.implementations = unpermute.implementations = IMPLEMENTATIONS  # type: ignore[attr-defined]


def _check(who: str, name: str, x: Tensor, routing: Routing, want: tuple) -> None:
    check_shape(
        who, name, x, want, "one row for each token of the routing" if who == "permute" else "one row for each slot"
    )
    if x.device != routing.row_order.device:
        raise ValueError(f"{who}: {name} must be on {routing.row_order.device}, got {x.device}; move it.")
    check_same(who, "device", name, x.device, **routing.devices())
    if not x.is_floating_point():
        raise ValueError(f"{who}: {name} must be floating point, got {x.dtype}; convert it.")
