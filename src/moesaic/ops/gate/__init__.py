"""The gate's product: hidden states to fp32 logits from weights of any dtype, and with few tokens on to the tables.

Legend: T tokens, H hidden, E columns of the logits (experts).
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import check_same, check_shape
from ...guards import eager
from ...hardware import gpu_of, triton_why_not
from ...op import Op, Place, forced
from ...routing import Routing
from ..route import RouterConfig, route

__all__ = ["gate", "router_logits"]

FEW_TOKENS = 16  # one tile of the product


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor


class Options(NamedTuple):
    pass


class Outputs(NamedTuple):
    logits: Tensor


class RouterLogitsProblem(Place):
    """What choosing depends on: nothing but the place yet."""


def _fake(o: Operands, options: Options) -> Outputs:
    return Outputs(o.x.new_empty(o.x.shape[0], o.weight.shape[0], dtype=torch.promote_types(o.x.dtype, torch.float32)))


OP = Op(
    "router_logits", __name__, ("torch", "reference"), operands=Operands, options=Options, outputs=Outputs,
    problem=RouterLogitsProblem, describe=(("dtype",), lambda o, options: (o.x.dtype,)), fake=_fake,
)  # fmt: skip


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
    name = forced(implementation)  # whoever forces Triton's kernels gets torch's product with them
    logits = OP(Operands(x, weight), Options(), name if name in OP.implementations else "torch").logits
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
        config.fits(weight.shape[0], "gate")
        if bias is not None:
            check_shape("gate", "bias", bias, (weight.shape[0],))
            check_same("gate", "device", "x", x.device, bias=bias.device)
        if forced(implementation) in ("", "triton") and triton_why_not("cuda", gpu_of(x.device).arch) is None:
            kernels = importlib.import_module("._triton", __name__)  # which imports triton
            if kernels.why_not(x, weight) is None:
                logits, *made = kernels.route_few(x, weight, logit_bias, bias, RouterConfig.of_core(config.core()))
                return Routing(*made, logits=logits, config=config)
    if (mask := options.get("token_mask")) is not None:  # in W's gradient, zero times a masked token's NaN would be NaN
        check_shape("gate", "token_mask", mask, (x.shape[0],))
        x = x.masked_fill(~mask[:, None], 0.0)
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
