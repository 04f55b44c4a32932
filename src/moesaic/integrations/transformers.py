"""Hugging Face transformers: importing this module registers `experts_implementation="moesaic"`.

The name is put in two registries, since the experts of an FP8 checkpoint are dispatched through one of their own. An
experts function gets the module, hidden_states `(T, H)`, top_k_index `(T, K)` and top_k_weights `(T, K)`, and returns
`(T, H)`; attributes of the module say how its weights are stored and what its activation is. Attributes that some
releases lack are read with a default. Weights are read at every call and nothing made from them is kept, so adapters,
sharding and training work. Classes that transformers does not dispatch are patched as far as they are in
`undecorated.py`.

Two paths, chosen by `plan` (in `recognise.py`):
- fused: the activation is an entry of `ACTIVATIONS`, so the whole layer is one `fused_experts`;
- composed: `permute`, `grouped_matmul`, the module's own activation, `grouped_matmul`, its norm, `unpermute`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MissingExtra, Unsupported
from ..formats import FORMATS, format_of, why_not_readable
from ..ops.fused_experts import fused_experts
from ..ops.grouped_matmul import grouped_matmul
from ..ops.permute import permute, unpermute
from ..routing import Routing
from . import undecorated
from .recognise import Flags, Plan, plan
from .report import NAME, Line, Report, report

try:
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:  # absent, or older than the experts registries
    raise MissingExtra("transformers >= 5.17", "hf", "moesaic.integrations.transformers") from error

__all__ = ["NAME", "Line", "Plan", "Report", "experts_forward", "plan", "register", "report"]


# ---------------------------------------------------------------- the experts function
def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls for each layer: `y[t] = sum_k top_k_weights[t, k] · expert(top_k_index[t, k])(x[t])`.

    Args:
        experts: the module that owns the weights; only its attributes are read.
        hidden_states: `(T, H)`, converted to the weights' dtype if it differs (norms may leave fp32 under autocast).
        top_k_index: `(T, K)` integers. An id outside `[0, E)` is another rank's expert (transformers writes E): its
            slot is skipped and its routing weight, whatever it is, gets a zero gradient.
        top_k_weights: `(T, K)`, any float dtype.

    Returns:
        `(T, H)` in the dtype of hidden_states.

    Raises:
        ValueError: shapes, dtypes or devices disagree. Unsupported: weights in a format that is not read here (packed
            FP4, a quantisation library's tensor subclass).

    Differentiable in hidden_states, the weights and biases (not FP8 ones) and top_k_weights. Deterministic.
    """
    chosen, flags = plan(experts), Flags.of(experts)
    w_up, w_down, ids = _weights(experts, flags, top_k_index, hidden_states.dtype)
    b_up, b_down = _biases(experts, flags, w_down.dtype)
    routing = Routing.from_topk(top_k_weights, _local(ids, w_down.shape[0]), w_down.shape[0])
    x = hidden_states.to(w_down.dtype)
    if chosen.activation is not None:
        y = fused_experts(
            x, w_up, w_down, routing, activation=chosen.activation, b_gate_up=b_up, b_down=b_down,
            layout="interleaved" if flags.interleaved else "concatenated", transposed=flags.transposed,
        )  # fmt: skip
        return y.to(hidden_states.dtype)
    rows = grouped_matmul(permute(x, routing), w_up, routing, bias=b_up, transposed=flags.transposed)
    rows = experts._apply_gate(rows) if flags.gated else experts.act_fn(rows)
    rows = grouped_matmul(rows, w_down, routing, bias=b_down, transposed=flags.transposed)
    if flags.post_norm:
        rows = experts.post_expert_norm(rows)
    return unpermute(rows, routing).to(hidden_states.dtype)


def register() -> None:
    """Put `"moesaic"` in both registries and patch the classes that neither serves: done when this
    module is imported, and harmless to repeat."""
    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, experts_forward)
    undecorated.register()


def _local(ids: Tensor, num_experts: int) -> Tensor:
    """`ids` with those of other ranks made -1. On a GPU the operator does that itself, without these launches."""
    if ids.is_cuda:
        return ids
    return ids.masked_fill(ids >= num_experts, -1).clamp_min_(-1)


# ---------------------------------------------------------------- weights
def _weights(experts: Any, flags: Flags, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Both weights, and the ids that index them. FP8 weights are decoded to `dtype`, at each call.

    When fewer slots than experts are chosen (decode) only the chosen experts are decoded, one copy a slot, and the ids
    count slots: no host synchronisation, and less to read.
    """
    names = (flags.up, "down_proj")
    w_up, w_down = (getattr(experts, name) for name in names)
    for name, w in zip(names, (w_up, w_down), strict=True):
        if reason := why_not_readable(w):
            raise Unsupported(
                f"moesaic: {name} of {type(experts).__name__} must be a plain tensor of floats, or FP8 with "
                f"scales; got {reason}; dequantise at load, or choose another experts_implementation."
            )
    stored = format_of(w_down)
    if stored is None or stored is FORMATS["plain"]:
        return w_up, w_down, ids
    scales = [getattr(experts, f"{name}_scale_inv") for name in names]
    E, slots = w_down.shape[0], ids.numel()
    if slots < E:
        here = ids.reshape(-1).clamp(0, E - 1)
        w_up, w_down, *scales = (_pick(t, here) for t in (w_up, w_down, *scales))
        count = torch.arange(slots, device=ids.device).view(ids.shape)
        ids = torch.where((ids >= 0) & (ids < E), count, -1)
    block = getattr(experts, "block_size", None)
    w_up, w_down = (stored.dequantize(w, s, block, dtype) for w, s in zip((w_up, w_down), scales, strict=True))
    return w_up, w_down, ids


def _biases(experts: Any, flags: Flags, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Both biases in the dtype of the weights: a checkpoint may keep them wider, and transformers adds them as such."""
    if not flags.bias:
        return None, None
    b_up, b_down = getattr(experts, f"{flags.up}_bias"), experts.down_proj_bias
    return b_up.to(dtype), b_down.to(dtype)


def _pick(t: Tensor, experts: Tensor) -> Tensor:
    """`t[experts]`, by bytes where t is FP8: indexing is not implemented for all of its dtypes."""
    t = t.detach()
    return t.view(torch.uint8)[experts].view(t.dtype) if t.dtype.itemsize == 1 else t[experts]


register()
