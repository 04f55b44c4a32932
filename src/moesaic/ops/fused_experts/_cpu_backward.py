"""The backward of `fused_experts` on the CPU: torch's products of each expert, and native code for everything else.

Native are the activation's derivative with all that is computed beside it, the gradients of the weights, which are
written once into fresh memory, and the sum over a token's rows. Legend: rows lie by expert; `grads` holds the incoming
gradient of each row's token; `da`, `dh`, `dxs` are the gradients of activations, pre-activations and rows of x.
"""

from __future__ import annotations

import itertools
import struct
from typing import Any

import torch
from torch import Tensor

from ... import hardware
from . import _cpu_build
from ._cpu_calls import ACTIVATIONS, DTYPES, call, pointer

# rows from which an fp32 copy of a half-precision matrix and sgemm beat a product that has no units of its own
WIDEN_ROWS = 96
_ACTIVATION = struct.Struct("@6P6q2d")  # the argument structures of backward.h
_SUM = struct.Struct("@3P5q")
_WEIGHT = struct.Struct("@5P11q")


def _widens(dtype: torch.dtype) -> bool:
    """Is a half-precision product slower than an fp32 one on this CPU?"""
    flags = hardware.cpu_flags()
    if dtype == torch.bfloat16:
        return "amx_bf16" not in flags and not ("avx512_bf16" in flags and hardware.cpu_vendor() != "GenuineIntel")
    return dtype == torch.float16 and not flags & {"amx_fp16", "avx512_fp16"}


def _products(rows: Tensor, w: Tensor, experts: list[int], sizes: list[int]) -> Tensor:
    """`out[group] = rows[group] @ w[expert]`; `w (E, K, N)` may have any strides."""
    out, wide, widen = rows.new_empty(rows.shape[0], w.shape[2]), None, _widens(rows.dtype)
    for e, n, part, into in zip(experts, sizes, rows.split(sizes), out.split(sizes), strict=True):
        if widen and n >= WIDEN_ROWS:
            wide = torch.empty_like(w[e], dtype=torch.float32) if wide is None else wide
            into.copy_(torch.mm(part.float(), wide.copy_(w[e])))
        else:
            torch.mm(part, w[e], out=into)
    return out


def _activation(
    act, hidden: Tensor, da: Tensor, scale: Tensor | None, interleaved: bool, scaled: bool, ds: bool
) -> Any:
    """`(dh, scale·a or None, <da, a> or None)` of all rows, computed in fp32."""
    rows, I = da.shape
    dh = da.new_empty(rows, hidden.shape[1])
    a = da.new_empty(rows, I) if scaled else None
    sums = da.new_empty(rows, dtype=torch.float32) if ds else None
    call(
        "moesaic_activation_backward",
        _ACTIVATION.pack(
            pointer(hidden), pointer(da), pointer(scale), pointer(dh), pointer(a), pointer(sums), rows, I,
            DTYPES[da.dtype], ACTIVATIONS[act.name], interleaved, torch.get_num_threads(), act.alpha, act.limit,
        ),
    )  # fmt: skip
    return dh, a, sums


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


def _sum_rows(rows: Tensor, row_index: Tensor, x: Tensor, top_k: int) -> Tensor:
    out, (T, H) = torch.empty(x.shape, dtype=x.dtype), x.shape
    call(
        "moesaic_sum_rows",
        _SUM.pack(pointer(rows), pointer(row_index), pointer(out), T, top_k, H, DTYPES[x.dtype],
                  torch.get_num_threads()),
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
    ends, K = expert_offsets.tolist(), problem.top_k
    live, pairs = ends[-1], [(e, b - a) for e, (a, b) in enumerate(itertools.pairwise(ends)) if b > a]
    experts, sizes = [e for e, _ in pairs], [n for _, n in pairs]
    ups, downs = (w_gate_up.mT, w_down.mT) if problem.transposed else (w_gate_up, w_down)
    order = row_order[:live]
    grads = grad.index_select(0, order // K)
    scale = None if weights is None else weights.reshape(-1).float().index_select(0, order)
    dx = dup = ddown = dweights = dbup = dbdown = x.new_empty(0)
    tables = (row_order, expert_offsets, K)
    if any(needs[:5]):
        da = _products(grads, downs, experts, sizes)
        dh, a, ds = _activation(act, hidden, da, scale, problem.interleaved, need_down, need_weights)
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
            dx = _sum_rows(_products(dh, ups, experts, sizes), row_index, x, K)
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
