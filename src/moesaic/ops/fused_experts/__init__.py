"""fused_experts: the whole expert layer, from tokens to the weighted sum of their experts' outputs.

Legend: T tokens, H hidden, I intermediate, E experts, K choices; rows are the T·K (token, choice) pairs by expert.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...activations import Activation, resolve
from ...errors import check_choice, check_same, check_shape, check_tensors
from ...guards import autocast
from ...op import Op, Place, Table, octave
from ...routing import Routing

__all__ = ["LAYOUTS", "fused_experts"]

LAYOUTS = ("concatenated", "interleaved")
SIDES = ("output", "input")
_FROM_ROUTING: Any = "routing"


class Operands(NamedTuple):
    x: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    weights: Tensor | None
    b_gate_up: Tensor | None
    b_down: Tensor | None
    residual: Tensor | None
    row_order: Table
    row_index: Table
    expert_offsets: Table


class Options(NamedTuple):
    activation: str = "swiglu"
    alpha: float = 1.0
    limit: float = math.inf
    interleaved: bool = False
    transposed: bool = False
    allow_tf32: bool = False
    batch_invariant: bool = False


class Outputs(NamedTuple):
    y: Tensor


class Saved(NamedTuple):
    """`preact (T·K, 2I)` or `(T·K, I)`: the pre-activations of the rows, in the order of the weights' columns."""

    preact: Tensor


@dataclass(frozen=True)
class FusedExpertsProblem(Place):
    """What choosing depends on. `kernel` names the only one wanted of an implementation that has several."""

    num_tokens: int = 0
    top_k: int = 1
    num_experts: int = 1
    hidden_size: int = 0
    intermediate_size: int = 0
    bias: bool = False
    activation: str = "swiglu"
    alpha: float = 1.0
    limit: float = math.inf
    interleaved: bool = False
    transposed: bool = False
    training: bool = False
    allow_tf32: bool = False
    batch_invariant: bool = False
    kernel: str = ""


_DESCRIBED = ("dtype", "num_tokens", "top_k", "num_experts", "hidden_size", "intermediate_size", "bias")


def _describe(o: Operands, options: Options) -> tuple[Any, ...]:
    T, H = o.x.shape
    E, I, bias = o.w_down.shape[0], o.w_down.shape[1 if options.transposed else 2], o.b_gate_up is not None
    return o.x.dtype, octave(T), o.row_order.shape[0] // T if T else 1, E, H, I, bias or o.b_down is not None


def _fake_saved(o: Operands, options: Options) -> Saved:
    return Saved(o.x.new_empty(o.row_order.shape[0], o.w_gate_up.shape[2 if options.transposed else 1]))


OP = Op(
    "fused_experts", __name__, ("triton", "cpu", "torch", "reference"), operands=Operands, options=Options,
    outputs=Outputs, saved=Saved, problem=FusedExpertsProblem, describe=(_DESCRIBED, _describe), straight=("residual",),
    fake=lambda o, options: Outputs(o.x.new_empty(o.x.shape)), fake_saved=_fake_saved,
)  # fmt: skip


def fused_experts(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    routing: Routing,
    *,
    activation: str | Activation = "swiglu",
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    weights: Tensor | None = _FROM_ROUTING,
    residual: Tensor | None = None,
    reduce: str = "weighted_sum",
    weights_on: str = "output",
    layout: str = "concatenated",
    transposed: bool = False,
    allow_tf32: bool = False,
    batch_invariant: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Run every token through its experts: `y[t] = sum_k w[t,k] · down_e(act(gate_up_e(x[t])))`, e = topk_ids[t,k].

    `gate_up_e(v) = W_gate_up[e] v + b_gate_up[e]`, split into gate and up; `down_e(a) = W_down[e] a + b_down[e]`.
    With a residual, `y[t] = residual[t] + sum_k ...`; with weights on the input,
    `y[t] = sum_k down_e(act(gate_up_e(w[t,k] · x[t])))`.

    Args:
        x: `(T, H)`, bf16, fp16 or fp32 (fp64 in torch).
        w_gate_up: `(E, 2I, H)`, or `(E, I, H)` for an activation without gate; `transposed`: `(E, H, 2I)`.
        w_down: `(E, H, I)`; `transposed`: `(E, I, H)`.
        routing: from `route` or `Routing.from_topk`.
        activation: a name in `ACTIVATIONS`, or an entry with other constants (`Activation.with_constants`).
        b_gate_up, b_down: `(E, 2I)` (or `(E, I)`) and `(E, H)` biases.
        weights: by default the routing's; or a `(T, K)` tensor; None, only together with `reduce="sum"`, adds the
            experts' outputs without weights.
        residual: `(T, H)` in the dtype of x, any strides: what the sum is added to before its one rounding.
        reduce: `"weighted_sum"`, or `"sum"` to leave the routing weights out on purpose.
        weights_on: `"output"`, or `"input"` (Llama 4; vLLM's `apply_router_weight_on_input`): x is copied K times, and
            `w[t,k] · x[t]` rounded to its dtype.
        layout: `"concatenated"` [gate | up] halves, or `"interleaved"` g0 u0 g1 u1 ... (gpt-oss).
        transposed: both weights are stored input-major.
        allow_tf32: let fp32 products round to TF32 on a GPU; IEEE otherwise.
        batch_invariant: promise that a token's output has the same bits whatever else is in the batch, or raise. With
            Triton only. It fixes the tiles, but for half precision on sm_90, where all tiles give the same bits.
        implementation: force one of `fused_experts.implementations`, or one kernel for its products
            (`"triton:swap_ab_sm90"`); by default the first that can run.

    Returns:
        `(T, H)` in the dtype of x, accumulated in fp32; a token whose slots were all dropped gets a zero row, or
        its residual's.

    Raises:
        ValueError: shapes, dtypes, devices or names disagree, or weights are missing. Unsupported: the forced
            implementation cannot run.

    Differentiable in x, both weights, both biases, the routing weights and the residual. Keeps x, the pre-activations
    and the routing for backward, nothing else; nothing but its output when no gradient is needed. Deterministic. With
    Triton there is no host synchronisation and the call can be captured in a CUDA graph. Source of the recomputing
    backward: SonicMoE.
    """
    who = "fused_experts"
    act = resolve(activation, who)
    check_choice(who, "layout", layout, LAYOUTS)
    check_choice(who, "reduce", reduce, ("weighted_sum", "sum"))
    check_choice(who, "weights_on", weights_on, SIDES)
    if not (isinstance(x, Tensor) and isinstance(w_gate_up, Tensor) and isinstance(w_down, Tensor)):
        check_tensors(who, x=x, w_gate_up=w_gate_up, w_down=w_down)
    if not isinstance(routing, Routing):
        raise ValueError(
            f"{who}: routing must be a Routing, got {type(routing).__name__}; see route, Routing.from_topk."
        )
    weights = _weights(who, weights, reduce, routing)
    if routing.padded is not None:
        raise ValueError(
            f"{who}: routing must be packed, got one padded to {routing.padded} rows an expert; use the routing that "
            "to_capacity was called on."
        )
    x, w_gate_up, w_down, b_gate_up, b_down, residual = autocast(x, w_gate_up, w_down, b_gate_up, b_down, residual)
    _check(who, x, w_gate_up, w_down, weights, b_gate_up, b_down, residual, routing, act, transposed)
    if weights_on == "input":
        if weights is None:
            raise ValueError(f"{who}: weights_on='input' needs weights, got reduce='sum'; leave one of them out.")
        layer = functools.partial(
            fused_experts, w_gate_up=w_gate_up, w_down=w_down, activation=act, b_gate_up=b_gate_up, b_down=b_down,
            weights=None, reduce="sum", layout=layout, transposed=transposed, allow_tf32=allow_tf32,
            batch_invariant=batch_invariant, implementation=implementation,
        )  # fmt: skip
        return _weigh_inputs(layer, x, weights, routing, residual)
    operands = Operands(
        x, w_gate_up, w_down, weights, b_gate_up, b_down, residual, routing.row_order, routing.row_index,
        routing.expert_offsets,
    )  # fmt: skip
    options = Options(
        act.name, act.alpha, act.limit, layout == "interleaved", transposed, allow_tf32, batch_invariant
    )  # fmt: skip
    return OP(operands, options, implementation).y


fused_experts.implementations = OP.implementations  # type: ignore[attr-defined]


def _weights(who: str, weights: Tensor | None, reduce: str, routing: Routing) -> Tensor | None:
    if reduce == "sum":
        if weights is not None:
            raise ValueError(f"{who}: reduce='sum' leaves the routing weights out and needs weights=None, got weights; "
                             "pass weights=None, or reduce='weighted_sum'.")  # fmt: skip
        return None
    if weights is _FROM_ROUTING:
        weights = routing.topk_weights
    if weights is None:
        raise ValueError(f"{who}: routing weights must be given, got None; pass weights=None, reduce='sum' to add the "
                         "experts' outputs unweighted on purpose.")  # fmt: skip
    if weights.shape != routing.topk_ids.shape:
        check_shape(who, "weights", weights, (routing.num_tokens, routing.top_k))
    return weights if weights.dtype in (torch.float32, torch.float64) else weights.float()


def _weigh_inputs(
    layer: Callable[..., Tensor], x: Tensor, weights: Tensor, routing: Routing, residual: Tensor | None
) -> Tensor:
    """The layer with a token `w[t, k] · x[t]` for every slot, whose tables are the slots' own."""
    T, K = routing.topk_ids.shape
    # what is dropped is multiplied with nothing: zero times NaN, forward or backward, would be NaN
    dead = routing.topk_ids < 0
    tokens = x[:, None].expand(T, K, x.shape[1]).masked_fill(dead[..., None], 0)
    slots = (tokens * weights.masked_fill(dead, 0)[..., None]).to(x.dtype).flatten(0, 1)
    each = replace(routing, topk_weights=None, topk_ids=routing.topk_ids.reshape(-1, 1))
    if K == 1:
        return layer(slots, routing=each, residual=residual)
    y = layer(slots, routing=each).unflatten(0, (T, K)).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (y if residual is None else residual + y).to(x.dtype)


def _check(
    who: str, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor | None, b_gate_up: Tensor | None,
    b_down: Tensor | None, residual: Tensor | None, routing: Routing, act: Activation, transposed: bool,
) -> None:  # fmt: skip
    """Say what is wrong with the shapes, dtypes or devices, if anything is. First a look that costs little."""
    E, T = routing.num_experts, routing.num_tokens
    shape, down = x.shape, w_down.shape
    if len(shape) == 2 and len(down) == 3:
        H, I = shape[1], down[1 if transposed else 2]
        N, device, dtype = act.width(I), x.device, x.dtype
        if (
            shape[0] == T
            and down == ((E, I, H) if transposed else (E, H, I))
            and w_gate_up.shape == ((E, H, N) if transposed else (E, N, H))
            and (
                b_gate_up is None
                or (b_gate_up.shape == (E, N) and b_gate_up.dtype == dtype and b_gate_up.device == device)
            )
            and (b_down is None or (b_down.shape == (E, H) and b_down.dtype == dtype and b_down.device == device))
            and (
                residual is None or (residual.shape == (T, H) and residual.dtype == dtype and residual.device == device)
            )
            and w_gate_up.dtype == w_down.dtype == dtype
            and w_gate_up.device == w_down.device == routing.row_order.device == device
            and routing.row_index.device == routing.expert_offsets.device == device
            and (weights is None or weights.device == device)
            and dtype.is_floating_point
        ):
            return
    if x.dim() != 2:
        raise ValueError(f"{who}: x must have shape (T, H), got {tuple(x.shape)}; flatten the leading dimensions.")
    if not x.is_floating_point():
        raise ValueError(f"{who}: x must be floating point, got {x.dtype}; convert it.")
    if w_down.dim() != 3:
        raise ValueError(f"{who}: w_down must have shape (E, H, I), got {tuple(w_down.shape)}; stack the experts.")
    H, I = x.shape[1], w_down.shape[1 if transposed else 2]
    N = act.width(I)
    check_shape(who, "x", x, (T, "H"), "the routing was built for another number of tokens")
    other = "is it stored input-major? pass transposed=True" if not transposed else "is it really input-major?"
    check_shape(who, "w_down", w_down, (E, I, H) if transposed else (E, H, I), other)
    wanted = f"{'2I' if act.gated else 'I'} columns for activation {act.name!r}; {other}"
    check_shape(who, "w_gate_up", w_gate_up, (E, H, N) if transposed else (E, N, H), wanted)
    others = {"w_gate_up": w_gate_up, "w_down": w_down, "b_gate_up": b_gate_up, "b_down": b_down, "residual": residual}
    others = {name: t for name, t in others.items() if t is not None}
    if b_gate_up is not None:
        check_shape(who, "b_gate_up", b_gate_up, (E, N))
    if b_down is not None:
        check_shape(who, "b_down", b_down, (E, H))
    if residual is not None:
        check_shape(who, "residual", residual, (T, H), "one row for each token")
    devices = {name: t.device for name, t in others.items()}
    if weights is not None:
        devices["weights"] = weights.device
    check_same(who, "device", "x", x.device, **devices, **routing.devices())
    check_same(who, "dtype", "x", x.dtype, **{name: t.dtype for name, t in others.items()})
