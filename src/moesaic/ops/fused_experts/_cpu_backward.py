"""The backward of `fused_experts` on the CPU: torch's products of each expert, and native code for everything else.

Native are the activation's derivative with all that is computed beside it, the gradients of the weights, which are
written once into fresh memory, and the sum over a token's rows. Legend: rows lie by expert; `grads` holds the incoming
gradient of each row's token; `da`, `dh`, `dxs` are the gradients of activations, pre-activations and rows of x.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

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


def backward(grad, hidden, x, w_gate_up, w_down, weights, b_gate_up, b_down, row_order, row_index, expert_offsets,
             act, problem, needs):  # fmt: skip
    """The gradients of x, both weights, the routing weights and both biases; an empty tensor where none is needed."""
    need_x, need_up, need_down, need_weights, need_bup, need_bdown = needs
    (live, experts, sizes), K = groups(expert_offsets), problem.top_k
    ups, downs = (w_gate_up.mT, w_down.mT) if problem.transposed else (w_gate_up, w_down)
    order = row_order[:live]
    grads = grad.index_select(0, order // K)
    scale = None if weights is None else weights.reshape(-1).float().index_select(0, order)
    dx = dup = ddown = dweights = dbup = dbdown = x.new_empty(0)
    tables = (row_order, expert_offsets, K)
    if any(needs[:5]):
        da = products(grads, downs, experts, sizes)
        dh, a, ds = activation_backward(act, hidden, da, scale, problem.interleaved, need_down, need_weights)
        if need_weights and weights is not None:
            dweights = _weights_gradient(weights, ds, grads, b_down, order, experts, sizes)
        if need_down:
            ddown = _weight_gradient(w_down, *((a, grads) if problem.transposed else (grads, a)), None, *tables)
        if need_up:
            x = x if x.stride(1) == 1 else x.contiguous()
            dup = _weight_gradient(w_gate_up, *((x, dh) if problem.transposed else (dh, x)), x, *tables)
        if need_bup:
            dbup = _bias_gradient(b_gate_up, dh, experts, sizes)
        if need_x:
            dx = sum_rows(products(dh, ups, experts, sizes), row_index, x, K)
    if need_bdown:
        wide = grads.float()
        dbdown = _bias_gradient(b_down, wide if scale is None else wide * scale[:, None], experts, sizes)
    return dx, dup, ddown, dweights, dbup, dbdown


def _weights_gradient(weights: Tensor, ds: Tensor, grads: Tensor, b_down: Tensor | None, order: Tensor,
                      experts: list[int], sizes: list[int]) -> Tensor:  # fmt: skip
    """`ds`, and what the bias adds to it, back at the slots that the rows came from; dropped slots get none."""
    if b_down is not None:
        each = torch.repeat_interleave(torch.tensor(experts, dtype=torch.long), torch.tensor(sizes, dtype=torch.long))
        ds = ds + (grads.float() * b_down[each].float()).sum(-1)
    out = torch.zeros(weights.shape, dtype=weights.dtype)
    out.view(-1).index_copy_(0, order.long(), ds.to(weights.dtype))
    return out
