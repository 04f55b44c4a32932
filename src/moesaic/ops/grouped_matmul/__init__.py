"""grouped_matmul: each row times its expert's matrix.

Legend, here and nowhere else: R rows sorted by expert, K contraction, N output width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import check_same, check_shape
from ...guards import autocast
from ...op import Op, Place, Table, octave
from ...routing import Routing

__all__ = ["grouped_matmul"]


class Operands(NamedTuple):
    rows: Tensor
    w: Tensor
    bias: Tensor | None
    expert_offsets: Table


class Options(NamedTuple):
    transposed: bool = False
    allow_tf32: bool = False
    batch_invariant: bool = False


class Outputs(NamedTuple):
    out: Tensor


@dataclass(frozen=True)
class GroupedMatmulProblem(Place):
    """What choosing depends on. `hidden_size` is the contraction K, `intermediate_size` the width N; `kernel` names the
    only one wanted of an implementation that has several."""

    num_rows: int = 0
    num_experts: int = 1
    hidden_size: int = 0
    intermediate_size: int = 0
    bias: bool = False
    transposed: bool = False
    allow_tf32: bool = False
    batch_invariant: bool = False
    kernel: str = ""


_DESCRIBED = ("dtype", "num_rows", "num_experts", "hidden_size", "intermediate_size", "bias")


def _describe(o: Operands, options: Options) -> tuple[Any, ...]:
    E, N, K = o.w.shape
    if options.transposed:
        N, K = K, N
    return o.rows.dtype, octave(o.rows.shape[0]), E, K, N, o.bias is not None


def _fake(o: Operands, options: Options) -> Outputs:
    return Outputs(o.rows.new_empty(o.rows.shape[0], o.w.shape[2 if options.transposed else 1]))


OP = Op(
    "grouped_matmul", __name__, ("triton", "torch", "reference"), operands=Operands, options=Options, outputs=Outputs,
    problem=GroupedMatmulProblem, describe=(_DESCRIBED, _describe), fake=_fake,
)  # fmt: skip


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
        implementation: force one of `grouped_matmul.implementations`, or one kernel (`"triton:pointer"`); by default
            the first that can run.

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
    operands = Operands(rows, w, bias, routing.expert_offsets)
    return OP(operands, Options(transposed, allow_tf32, batch_invariant), implementation).out


grouped_matmul.implementations = OP.implementations  # type: ignore[attr-defined]
