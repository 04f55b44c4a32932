"""The gate's product: hidden states to fp32 logits from weights of any dtype, and with few tokens on to the tables.

Legend: T tokens, H hidden, E columns of the logits (experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import check_same, check_shape
from ...guards import eager, watch
from ...op import forced
from ...problem import define, differentiable
from ...routing import Routing
from . import _select, _weight_dtype, route
from .config import RouterConfig

FEW_TOKENS = 16  # one tile of the product


def router_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, implementation: str | None = None
) -> Tensor:
    """`logits = x W^T + b` in fp32, accumulated in fp32, whatever the dtype of x and W.

    Args:
        x: `(T, H)`.
        weight: `(E, H)`, in the dtype of x or another.
        bias: `(E,)`.

    Returns:
        `(T, E)` fp32 (fp64 from fp64). Half-precision x and W are multiplied as they are, with an fp32 result: twice
        the accuracy of a half-precision product and, on a GPU, a third of the time of widening both.

    Raises:
        ValueError: shapes or devices disagree.

    Differentiable in x, weight and bias; the gradients accumulate in fp32, and on a GPU the fp32 gradient of the logits
    enters half-precision products as the sum of two halves, which keeps 16 bits of it. Under autocast the same.
    Source: the fp32 router of GShard and Switch; the bf16-in, fp32-out product of vLLM's gate.
    """
    _check("router_logits", x, weight, "bias", bias)
    watch("router_logits", x, weight, bias)
    logits = torch.ops.moesaic.router_logits(x, weight, forced(implementation))
    return logits if bias is None else logits + bias.to(logits.dtype)


def gate(
    x: Tensor,
    weight: Tensor,
    config: RouterConfig,
    *,
    logit_bias: Tensor | None = None,
    bias: Tensor | None = None,
    implementation: str | None = None,
    **options,
) -> Routing:
    """`route(router_logits(x, weight, logit_bias), config, bias=bias, **options)`.

    Without a gradient to keep and with at most 16 tokens in half precision, one Triton kernel does it all: product,
    scores, choice, weights and tables. Everything else goes through the two functions.

    Args:
        x, weight: `(T, H)` and `(E, H)`, as in `router_logits`.
        logit_bias: `(E,)`, the gate's own bias.
        bias: `(E,)`, for the choice alone, as in `route`, whose other arguments may follow.

    Returns:
        A `Routing`. Differentiable in x, weight and logit_bias; deterministic; no host synchronisation.
    """
    _check("gate", x, weight, "logit_bias", logit_bias)
    tensors = (x, weight, logit_bias, bias)
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    usual = {"sequences": 1}
    given = {n: v for n, v in options.items() if v is not None and v is not False and v != usual.get(n)}
    if not keeps and not given and x.is_cuda and config.plain and eager(tensors) and 0 < x.shape[0] <= FEW_TOKENS:
        E, core = weight.shape[0], RouterConfig.of_core(*config.core())
        config.check(E, "gate")
        if bias is not None:
            check_shape("gate", "bias", bias, (E,))
            check_same("gate", "device", "x", x.device, bias=bias.device)
        module = _select(x.device, x.dtype, x.shape[0], core.top_k, E, core, forced(implementation))
        if hasattr(module, "gate_route") and module.gate_why_not(x, weight) is None:
            logits, *made = module.gate_route(x, weight, logit_bias, bias, core)
            return Routing(*made, logits=logits, config=config)
    logits = router_logits(x, weight, logit_bias, implementation=implementation)
    return route(logits, config, bias=bias, implementation=implementation, **options)


def _check(who: str, x: Tensor, weight: Tensor, name: str, bias: Tensor | None) -> None:
    """`name` is that of the logits' bias; the one for the choice is `route`'s to check."""
    if x.dim() != 2:
        raise ValueError(f"{who}: x must have shape (T, H), got {tuple(x.shape)}; flatten the leading dimensions.")
    check_shape(who, "weight", weight, ("E", x.shape[1]))
    check_same(who, "device", "x", x.device, weight=weight.device)
    if bias is not None:
        check_shape(who, name, bias, (weight.shape[0],))
        check_same(who, "device", "x", x.device, **{name: bias.device})
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"{who}: x and weight must be floating point, got {x.dtype} and {weight.dtype}; convert them.")


# ---------------------------------------------------------------- private operators
def _half(x: Tensor, weight: Tensor) -> bool:
    """Both in the same half precision, on a device whose product can widen its result."""
    return x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of half-precision operands with an fp32 result."""
    return torch.mm(a, b, out_dtype=torch.float32)


def _logits(x: Tensor, weight: Tensor, implementation: str) -> Tensor:
    if implementation == "reference":
        return (x.double() @ weight.double().mT).to(_weight_dtype(x))
    if _half(x, weight):
        return _product(x, weight.mT)
    return x.to(_weight_dtype(x)) @ weight.to(_weight_dtype(x)).mT


def _logits_backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool], implementation: str):
    dx = dw = grad.new_empty(0)
    if implementation == "reference":
        grad, wide_x, wide_w = grad.double(), x.double(), weight.double()
    elif _half(x, weight):
        high = grad.to(x.dtype)
        low = (grad - high.to(grad.dtype)).to(x.dtype)
        if needs[0]:
            dx = (_product(high, weight) + _product(low, weight)).to(x.dtype)
        if needs[1]:
            dw = (_product(high.mT, x) + _product(low.mT, x)).to(weight.dtype)
        return dx, dw
    else:
        wide_x, wide_w = x.to(grad.dtype), weight.to(grad.dtype)
    if needs[0]:
        dx = (grad @ wide_w).to(x.dtype)
    if needs[1]:
        dw = (grad.mT @ wide_x).to(weight.dtype)
    return dx, dw


define(
    "router_logits(Tensor x, Tensor weight, str implementation) -> Tensor", _logits,
    lambda x, weight, _: x.new_empty(x.shape[0], weight.shape[0], dtype=_weight_dtype(x)),
)  # fmt: skip
define(
    "router_logits_backward(Tensor grad, Tensor x, Tensor weight, bool[] needs, str implementation) "
    "-> (Tensor, Tensor)", _logits_backward,
    lambda grad, x, weight, needs, _: (
        x.new_empty(x.shape) if needs[0] else grad.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else grad.new_empty(0),
    ),
)  # fmt: skip


def _setup(ctx, inputs, output):
    x, weight, ctx.implementation = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    dx, dw = torch.ops.moesaic.router_logits_backward(grad.contiguous(), x, weight, needs, ctx.implementation)
    return dx if needs[0] else None, dw if needs[1] else None, None


differentiable("router_logits", _backward, _setup)
