"""Rows by expert on the CPU: torch's products of each expert, and the native passes between and after them.

Where torch multiplies faster than `cpu/`'s own products (`_cpu._torch_products` says where), the forward is made of
these too; the backward always is.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import hardware
from ._cpu_calls import ACTIVATIONS, DTYPES, call, pointer

# rows from which an fp32 copy of a half-precision matrix and sgemm beat a product that has no units of its own
WIDEN_ROWS = 96
CHUNK_ELEMENTS = 1 << 20
_ACTIVATION = struct.Struct("@6P6q2d")  # the argument structures of backward.h
_SUM = struct.Struct("@5P6q")


def _widens(dtype: torch.dtype) -> bool:
    """Is a half-precision product slower than an fp32 one on this CPU?"""
    flags = hardware.cpu_flags()
    if dtype == torch.bfloat16:
        return "amx_bf16" not in flags and not ("avx512_bf16" in flags and hardware.cpu_vendor() != "GenuineIntel")
    return dtype == torch.float16 and not flags & {"amx_fp16", "avx512_fp16"}


def groups(expert_offsets: Tensor) -> tuple[int, list[int], list[int]]:
    """How many rows there are, the experts that have some, and how many each."""
    ends = expert_offsets.tolist()
    pairs = [(e, b - a) for e, (a, b) in enumerate(itertools.pairwise(ends)) if b > a]
    return ends[-1], [e for e, _ in pairs], [n for _, n in pairs]


def chunks(sizes: list[int], width: int) -> Iterator[tuple[slice, slice]]:
    """Runs of whole experts, `(rows, which of the experts)`, whose intermediates `width` wide stay in the L3."""
    limit, start, first, total = max(1, CHUNK_ELEMENTS // max(width, 1)), 0, 0, 0
    for i, n in enumerate(sizes):
        if total and total + n > limit:
            yield slice(start, start + total), slice(first, i)
            start, first, total = start + total, i, 0
        total += n
    if total:
        yield slice(start, start + total), slice(first, len(sizes))


def products(rows: Tensor, w: Tensor, experts: list[int], sizes: list[int], bias: Tensor | None = None,
             out: Tensor | None = None) -> Tensor:  # fmt: skip
    """`out[group] = rows[group] @ w[expert] (+ bias[expert])`; `w (E, K, N)` may have any strides."""
    out = rows.new_empty(rows.shape[0], w.shape[2]) if out is None else out
    wide, widen = None, _widens(rows.dtype)
    for e, n, part, into in zip(experts, sizes, rows.split(sizes), out.split(sizes), strict=True):
        if widen and n >= WIDEN_ROWS:
            wide = torch.empty_like(w[e], dtype=torch.float32) if wide is None else wide
            product = torch.mm(part.float(), wide.copy_(w[e]))
            into.copy_(product if bias is None else product.add_(bias[e]))
        elif bias is None:
            torch.mm(part, w[e], out=into)
        else:
            torch.addmm(bias[e], part, w[e], out=into)
    return out


def activation(act, hidden: Tensor, intermediate_size: int, interleaved: bool) -> Tensor:
    """The activation of all rows, computed in fp32 and rounded once."""
    rows, I = hidden.shape[0], intermediate_size
    a = hidden.new_empty(rows, I)
    call(
        "moesaic_activation_backward",  # without a gradient: the activation alone
        _ACTIVATION.pack(
            pointer(hidden), 0, 0, 0, pointer(a), 0, rows, I, DTYPES[hidden.dtype], ACTIVATIONS[act.name], interleaved,
            torch.get_num_threads(), act.alpha, act.limit,
        ),
    )  # fmt: skip
    return a


def activation_backward(
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


def sum_rows(
    rows: Tensor, row_index: Tensor, x: Tensor, top_k: int, weights: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`out[t] = residual[t] + sum_k weights[t, k]·rows[row_index[t, k]]`, summed in fp32; weights in fp32."""
    out, (T, H) = torch.empty(x.shape, dtype=x.dtype), x.shape
    call(
        "moesaic_sum_rows",
        _SUM.pack(
            pointer(rows), pointer(residual), pointer(weights), pointer(row_index), pointer(out), T, top_k, H,
            0 if residual is None else residual.stride(0), DTYPES[x.dtype], torch.get_num_threads(),
        ),
    )  # fmt: skip
    return out
