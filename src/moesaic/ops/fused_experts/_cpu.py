"""`fused_experts` in native code on the CPU: `cpu/moe.c`, called through ctypes.

The whole layer is one call: both products with the activation between them in registers, and the combine. The weights
are read where they are. `_cpu_build` makes the kernels; this file says when they run and hands them the operands.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ... import hardware
from ...activations import Activation, resolve
from . import _cpu_build
from ._cpu_backward import backward
from ._cpu_build import status
from ._cpu_calls import ACTIVATIONS, DTYPES, call, pointer
from ._cpu_rows import activation, chunks, groups, products, sum_rows

__all__ = ["backward", "forward", "status", "why_not"]
NEEDS = "compiler"

_ARGUMENTS = struct.Struct("@12P19q2d")  # `arguments` of layer.h
AMX_ROWS = 3


def why_not(problem: Any) -> str | None:
    if problem.device != "cpu":
        return f"needs CPU tensors, got {problem.device}"
    if problem.dtype not in DTYPES:
        return f"needs float32, bfloat16 or float16, got {str(problem.dtype).removeprefix('torch.')}"
    if problem.activation not in ACTIVATIONS:
        return f"activation {problem.activation!r} has no native form"
    if problem.batch_invariant:
        return "the order of its sums depends on the batch"
    reason = _cpu_build.load().why_not
    return f"the native kernels are not there: {reason}" if reason else None


# Rows an expert from which torch's products beat the native ones (one core of a Xeon with AMX and AVX512-FP16, OLMoE's
# shape, CPU time, 2026-11-26: fp32 101 against 98 GFLOP/s at 96 rows and 101 against 107 at 128; fp16 96 against 83 at
# 32 and 103 against 109 at 64; bf16 on AMX 472 against 274 at 64 and 630 against 490 at 256).
CROSSOVER = {torch.float32: 112, torch.float16: 56, torch.bfloat16: 112}
# With AMX the weights must lie along the contraction: for the others torch repacks them (at 4 rows 24 against 18, at
# 64 rows 254 against 67 GFLOP/s).
CROSSOVER_INPUT_MAJOR_AMX = 2


def _torch_products(dtype: torch.dtype, rows: float, input_major: bool) -> bool:
    """Does torch multiply faster than the native kernels? By a fit to measurements: never timed, so bits stay."""
    if dtype == torch.bfloat16 and _cpu_build.load().amx:
        return input_major and rows >= CROSSOVER_INPUT_MAJOR_AMX
    return rows >= CROSSOVER[dtype]


def _rows_per_live_expert(problem: Any, tokens: int) -> float:
    """The mean, were routing even: of T tokens each expert is chosen by some with probability 1 - (1 - K/E)ᵀ."""
    E = max(problem.num_experts, 1)
    chosen = E * (1 - (1 - min(problem.top_k / E, 1.0)) ** tokens)
    return tokens * problem.top_k / chosen if chosen else 0.0


def _pairs() -> bool:
    """Does `vdpbf16ps` run at the full rate? On Zen 4 it does; on Xeons without AMX at half that of fp32."""
    return _cpu_build.load().pairs and hardware.cpu_vendor() != "GenuineIntel"


def _matrix(w: Tensor, transposed: bool) -> tuple[Tensor, tuple[int, int, int]]:
    """The weight and its strides as `W[e][output][input]`; one of the last two is 1, by a copy if need be."""
    if 1 not in w.stride()[1:]:
        w = w.contiguous()
    e, a, b = w.stride()
    # an axis of one element may have any stride: what counts is along which axis rows lie
    return w, (e, b, a) if transposed else (e, a, b)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor], dict[str, Tensor] | None]:
    x, act, weights = o.x, resolve(problem.activation).with_constants(problem.alpha, problem.limit), o.weights
    T, H = x.shape
    input_major = o.w_gate_up.stride(-1 - (not problem.transposed)) == 1
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    if _torch_products(x.dtype, _rows_per_live_expert(problem, T), input_major):
        return _by_rows(o, weights, act, problem)
    native = _cpu_build.load()
    R, I = o.row_order.shape[0], problem.intermediate_size
    x, residual = _rows(x), None if o.residual is None else _rows(o.residual)
    w_gate_up, up = _matrix(o.w_gate_up, problem.transposed)
    w_down, down = _matrix(o.w_down, problem.transposed)
    b_gate_up, b_down = (None if b is None else b.contiguous() for b in (o.b_gate_up, o.b_down))
    row_order, row_index, expert_offsets = (t.contiguous() for t in (o.row_order, o.row_index, o.expert_offsets))
    out = x.new_empty(T, H)
    preact = x.new_empty(R, act.width(I)) if problem.training else None
    given = _ARGUMENTS.pack(
        pointer(x), pointer(w_gate_up), pointer(b_gate_up), pointer(w_down), pointer(b_down), pointer(residual),
        pointer(weights), pointer(row_order), pointer(row_index), pointer(expert_offsets), pointer(out),
        pointer(preact),
        T, R // T if T else 1, expert_offsets.shape[0] - 1, H, I, x.stride(0),
        0 if residual is None else residual.stride(0), *up, *down,
        DTYPES[x.dtype], ACTIVATIONS[act.name], problem.interleaved, torch.get_num_threads(),
        AMX_ROWS if native.amx else 0, _pairs(), act.alpha, act.limit,
    )  # fmt: skip
    call("moesaic_fused_experts", given)
    return (out,), None if preact is None else {"preact": preact}


def _by_rows(
    o: Any, weights: Tensor | None, act: Activation, problem: Any
) -> tuple[tuple[Tensor], dict[str, Tensor] | None]:
    """The layer with torch's products, where they are the faster ones."""
    x, (live, experts, sizes), R, H = o.x, groups(o.expert_offsets), o.row_order.shape[0], o.x.shape[1]
    ups, downs = (o.w_gate_up, o.w_down) if problem.transposed else (o.w_gate_up.mT, o.w_down.mT)
    width = act.width(problem.intermediate_size)
    preact, y = x.new_empty(R, width) if problem.training else None, x.new_empty(live, H)
    tokens = o.row_order[:live] // problem.top_k
    for rows, which in chunks(sizes, width):
        kept = None if preact is None else preact[rows]
        some, counts = experts[which], sizes[which]
        h = products(x.index_select(0, tokens[rows]), ups, some, counts, o.b_gate_up, kept)
        a = activation(act, h, problem.intermediate_size, problem.interleaved)
        products(a, downs, some, counts, o.b_down, y[rows])
    if preact is not None:
        preact[live:] = 0
    residual = None if o.residual is None else _rows(o.residual)
    out = sum_rows(y, o.row_index, x, problem.top_k, weights, residual)
    return (out,), None if preact is None else {"preact": preact}
