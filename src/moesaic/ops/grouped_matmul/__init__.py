"""grouped_matmul: each row times its expert's matrix.

Legend, here and nowhere else: R rows sorted by expert, K contraction, N output width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import check_same, check_shape
from ...hardware import arch_of
from ...op import Op, autocast, define, differentiable, forced, watch
from ...problem import Problem
from ...routing import Routing

__all__ = ["grouped_matmul"]

OP = Op("grouped_matmul", __name__, ("triton", "torch", "reference"))


def grouped_matmul(
    rows: Tensor,
    w: Tensor,
    routing: Routing,
    *,
    bias: Tensor | None = None,
    transposed: bool = False,
    allow_tf32: bool = False,
    batch_invariant: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Multiply each row by its expert's matrix: `out[r] = rows[r] @ w[expert(r)].T (+ bias[expert(r)])`.

    Args:
        rows: `(R, K)` sorted by expert (from `permute`), fp32, bf16 or fp16 (fp64 in torch).
        w: `(E, N, K)`; or, `transposed`, `(E, K, N)`. Any strides.
        routing: who goes where; only `expert_offsets` is read. Experts without rows are allowed.
        bias: `(E, N)`, added in fp32.
        transposed: the weight is stored input-major.
        allow_tf32: let fp32 products round to TF32 on a GPU; IEEE otherwise.
        batch_invariant: as in `fused_experts`.
        implementation: force one of `grouped_matmul.implementations`; by default the first that can run.

    Returns:
        `(R, N)` in the dtype of rows, accumulated in fp32; rows past `expert_offsets[-1]` are zero.

    Raises:
        ValueError: shapes, dtypes or devices disagree. Unsupported: the forced implementation cannot run.

    Differentiable in rows, w and bias (dgrad and wgrad are one private operator). Deterministic. No host
    synchronisation on a GPU with Triton. `torch.nn.functional.grouped_mm`, CANN's npu_grouped_matmul.
    """
    who = "grouped_matmul"
    if w.dim() != 3:
        raise ValueError(f"{who}: w must have shape (E, N, K), got {tuple(w.shape)}; stack the experts' matrices.")
    rows, w, bias = autocast(rows, w, bias)
    E, N, K = (w.shape[0], w.shape[2], w.shape[1]) if transposed else w.shape
    hint = "w_down in the other layout? pass transposed=True" if not transposed else "is w really (E, K, N)?"
    check_shape(who, "w", w, (routing.num_experts, "K" if transposed else "N", "N" if transposed else "K"))
    check_shape(who, "rows", rows, (routing.row_order.shape[0], K), hint)
    check_same(who, "dtype", "rows", rows.dtype, w=w.dtype, **({} if bias is None else {"bias": bias.dtype}))
    check_same(who, "device", "rows", rows.device, w=w.device, **routing.devices())
    if bias is not None:
        check_same(who, "device", "rows", rows.device, bias=bias.device)
        check_shape(who, "bias", bias, (E, N))
    watch(who, rows, w, bias)
    return torch.ops.moesaic.grouped_matmul(
        rows, w, routing.expert_offsets, bias, transposed, allow_tf32, batch_invariant, forced(implementation)
    )


grouped_matmul.implementations = OP.implementations  # type: ignore[attr-defined]


# ---------------------------------------------------------------- private operators
def _select(rows: Tensor, w: Tensor, bias: Tensor | None, transposed: bool, allow_tf32: bool, batch_invariant: bool,
            implementation: str):  # fmt: skip
    E, N, K = (w.shape[0], w.shape[2], w.shape[1]) if transposed else w.shape
    problem = Problem(
        "grouped_matmul", rows.device.type, arch_of(rows.device), rows.dtype, rows.shape[0], 1, E, K, N,
        transposed=transposed, bias=bias is not None, allow_tf32=allow_tf32, batch_invariant=batch_invariant,
    )  # fmt: skip
    return OP.select(problem, implementation), problem


def _call(rows, w, expert_offsets, bias, *rest):
    module, problem = _select(rows, w, bias, *rest)
    return module.grouped_matmul(rows, w, expert_offsets, bias, problem)


def _fake(rows, w, expert_offsets, bias, transposed, *_):
    return rows.new_empty(rows.shape[0], w.shape[2] if transposed else w.shape[1])


def _call_backward(grad, rows, w, expert_offsets, bias, *rest):
    transposed, allow_tf32, batch_invariant, needs, implementation = rest
    module, problem = _select(rows, w, bias, transposed, allow_tf32, batch_invariant, implementation)
    return module.grouped_matmul_backward(grad, rows, w, expert_offsets, bias, problem, needs)


def _fake_backward(grad, rows, w, expert_offsets, bias, *rest):
    needs = rest[-2]
    shapes = (rows.shape, w.shape, (0,) if bias is None else bias.shape)
    return tuple(rows.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))


_ARGS = (
    "Tensor rows, Tensor w, Tensor expert_offsets, Tensor? bias, bool transposed, bool allow_tf32, "
    "bool batch_invariant, "
)
define(f"grouped_matmul({_ARGS}str implementation) -> Tensor", _call, _fake)
define(
    f"grouped_matmul_backward(Tensor grad, {_ARGS}bool[] needs, str implementation) -> (Tensor, Tensor, Tensor)",
    _call_backward, _fake_backward,
)  # fmt: skip


def _setup(ctx, inputs, output):
    rows, w, offsets, bias, *ctx.rest = inputs
    ctx.save_for_backward(rows, w, offsets, bias)


def _autograd(ctx, grad):
    rows, w, offsets, bias = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    *options, implementation = ctx.rest
    grads = torch.ops.moesaic.grouped_matmul_backward(
        grad.contiguous(), rows, w, offsets, bias, *options, needs, implementation
    )
    drows, dw, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return drows, dw, None, dbias, None, None, None, None


differentiable("grouped_matmul", _autograd, _setup)
