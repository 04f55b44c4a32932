"""The backward of `fused_experts` on the CPU: torch's products of each expert, and native code for everything else.

Native are the activation's derivative with all that is computed beside it, the gradients of the weights, which are
written once into fresh memory, and the sum over a token's rows. Legend: rows lie by expert; `grads` holds the incoming
gradient of each row's token; `da`, `dh`, `dxs` are the gradients of activations, pre-activations and rows of x.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ...activations import resolve
from . import _cpu_build
from ._cpu_calls import DTYPES, call, pointer
from ._cpu_rows import activation_backward, groups, products, sum_rows

_WEIGHT = struct.Struct("@5P11q")  # `weight_arguments` of backward.h


def _weight_gradient(
    like: Tensor, left: Tensor, right: Tensor, gathered: Tensor | None, row_order: Tensor, expert_offsets: Tensor,
    top_k: int,
) -> Tensor:  # fmt: skip
    """`out[e] = left[group].T @ right[group]`; the operand that is `gathered` has a row for each token."""
    E, P, Q = like.shape
    out = torch.empty(like.shape, dtype=like.dtype)
    call(
        "moesaic_weight_gradient",
        _WEIGHT.pack(
            pointer(left), pointer(right), pointer(out), pointer(row_order), pointer(expert_offsets), left.stride(0),
            right.stride(0), left is gathered, right is gathered, top_k, E, P, Q, DTYPES[like.dtype],
            torch.get_num_threads(), _cpu_build.load().amx,
        ),
    )  # fmt: skip
    return out


def _bias_gradient(like: Tensor, rows: Tensor, experts: list[int], sizes: list[int]) -> Tensor:
    out = torch.zeros(like.shape, dtype=like.dtype)
    for e, part in zip(experts, rows.split(sizes), strict=True):
        out[e] = part.sum(0, dtype=torch.float32)
    return out


def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    """The gradients of x, both weights, the routing weights and both biases, as far as they are needed."""
    act = resolve(problem.activation).with_constants(problem.alpha, problem.limit)
    x, (live, experts, sizes), K, made = o.x, groups(o.expert_offsets), problem.top_k, {}
    ups, downs = (o.w_gate_up.mT, o.w_down.mT) if problem.transposed else (o.w_gate_up, o.w_down)
    order = o.row_order[:live]
    given = grads.y.index_select(0, order // K)
    scale = None if o.weights is None else o.weights.reshape(-1).float().index_select(0, order)
    tables = (o.row_order, o.expert_offsets, K)
    if needs.x or needs.w_gate_up or needs.w_down or needs.weights or needs.b_gate_up:
        da = products(given, downs, experts, sizes)
        dh, a, ds = activation_backward(
            act, saved.preact, da, scale, problem.interleaved, needs.w_down, needs.weights
        )  # fmt: skip
        if needs.weights and o.weights is not None:
            made["weights"] = _weights_gradient(o.weights, ds, given, o.b_down, order, experts, sizes)
        if needs.w_down:
            sides = (a, given) if problem.transposed else (given, a)
            made["w_down"] = _weight_gradient(o.w_down, *sides, None, *tables)
        if needs.w_gate_up:
            x = x if x.stride(1) == 1 else x.contiguous()
            made["w_gate_up"] = _weight_gradient(o.w_gate_up, *((x, dh) if problem.transposed else (dh, x)), x, *tables)
        if needs.b_gate_up:
            made["b_gate_up"] = _bias_gradient(o.b_gate_up, dh, experts, sizes)
        if needs.x:
            made["x"] = sum_rows(products(dh, ups, experts, sizes), o.row_index, x, K)
    if needs.b_down:
        wide = given.float()
        made["b_down"] = _bias_gradient(o.b_down, wide if scale is None else wide * scale[:, None], experts, sizes)
    return made


def _weights_gradient(weights: Tensor, ds: Tensor, grads: Tensor, b_down: Tensor | None, order: Tensor,
                      experts: list[int], sizes: list[int]) -> Tensor:  # fmt: skip
    """`ds`, and what the bias adds to it, back at the slots that the rows came from; dropped slots get none."""
    if b_down is not None:
        each = torch.repeat_interleave(torch.tensor(experts, dtype=torch.long), torch.tensor(sizes, dtype=torch.long))
        ds = ds + (grads.float() * b_down[each].float()).sum(-1)
    out = torch.zeros(weights.shape, dtype=weights.dtype)
    out.view(-1).index_copy_(0, order.long(), ds.to(weights.dtype))
    return out
