"""route: router logits -> Routing. Which experts, with what weights, and where each token's rows go.

Legend: T tokens, E experts, K choices, G groups of experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import check_choice, check_shape
from ...hardware import arch_of
from ...op import Op, define, differentiable, forced
from ...problem import Problem
from ...routing import Routing
from .losses import load_balancing_loss, z_loss

__all__ = ["RouterConfig", "load_balancing_loss", "route", "z_loss"]

OP = Op("route", __name__, ("triton", "torch", "reference"))

SCORES = ("softmax", "sigmoid")
ORDERS = ("pre", "pre_renorm", "post")
GROUP_SCORES = ("max", "top2_sum")


@dataclass(frozen=True)
class RouterConfig:
    """What a router does with its logits. Every difference between real models' routers is a field here.

    With `s = score(logits)` in fp32 (softmax over E, or elementwise sigmoid) and `c = s + bias`:

    - `order="pre"`: choose the K largest c, weight `w_k = s[id_k]`.
    - `order="pre_renorm"`: the same, then `w_k / (sum_k w_k + norm_eps)`.
    - `order="post"`: choose the K largest `logits + bias`, then score the chosen logits (softmax over K).

    Then `w *= scale`. The bias takes part in the choice alone (DeepSeek-V3's aux-loss-free balancing). With
    `num_groups > 1` experts form G equal consecutive groups, scored by their best c (`"max"`) or their two best
    (`"top2_sum"`); all but the `topk_groups` best groups are masked with `group_mask_value` before the choice.
    Ties go to the lowest expert, NaN ranks below every number.

    Sources: softmax `pre_renorm` Mixtral, Qwen3-MoE; `post` GPT-OSS, Granite; sigmoid + bias + groups DeepSeek-V3.
    """

    top_k: int
    score: str = "softmax"
    order: str = "pre_renorm"
    norm_eps: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "top2_sum"
    group_mask_value: float = float("-inf")

    def check(self, num_experts: int, who: str = "route") -> None:
        """Raise `ValueError` unless this configuration fits `num_experts`."""
        check_choice(who, "score", self.score, SCORES)
        check_choice(who, "order", self.order, ORDERS)
        check_choice(who, "group_score", self.group_score, GROUP_SCORES)
        groups = self.num_groups
        if groups < 1 or num_experts % groups:
            raise ValueError(
                f"{who}: num_groups must divide the number of experts E={num_experts}, got {groups}; use a divisor."
            )
        if not 1 <= self.topk_groups <= groups:
            raise ValueError(
                f"{who}: topk_groups must be between 1 and num_groups={groups}, got {self.topk_groups}; lower it."
            )
        reach = num_experts // groups * (self.topk_groups if groups > 1 else 1)
        if not 1 <= self.top_k <= reach:
            raise ValueError(
                f"{who}: top_k must be between 1 and the {reach} experts that can be chosen, got {self.top_k}."
            )
        if groups > 1 and self.group_score == "top2_sum" and num_experts // groups < 2:
            raise ValueError(f"{who}: group_score='top2_sum' needs groups of at least 2 experts, got 1; use 'max'.")
        if self.order == "post" and groups > 1:
            raise ValueError(
                f"{who}: order='post' has no group form; use order='pre' or 'pre_renorm', got num_groups={groups}."
            )

    def fields(self) -> tuple:
        """The configuration as plain values, in the order of the private operator's schema."""
        return (self.top_k, self.score, self.order, self.norm_eps, self.scale,
                self.num_groups, self.topk_groups, self.group_score, self.group_mask_value)  # fmt: skip


def route(
    router_logits: Tensor,
    config: RouterConfig | None = None,
    *,
    bias: Tensor | None = None,
    implementation: str | None = None,
    **fields,
) -> Routing:
    """Choose K experts for each token and build the index tables: `logits (T, E) -> Routing`.

    Args:
        router_logits: `(T, E)`, any float dtype; scored in fp32 (fp64 in fp64).
        config: a `RouterConfig`; or give its fields as keywords (`route(logits, top_k=8, score="softmax")`).
        bias: `(E,)`, added to the scores (to the logits when `order="post"`) for the choice alone; it gets no gradient.
        implementation: force one of `route.implementations`; by default the first that can run.

    Returns:
        A `Routing` whose `topk_weights` carry the gradient to `router_logits`; ids are not differentiable.

    Raises:
        ValueError: shapes, devices or configuration disagree. Unsupported: the forced implementation cannot run.

    Deterministic; no host synchronisation. T = 0 is allowed.
    """
    who = "route"
    if config is None:
        config = RouterConfig(**fields)
    elif fields:
        raise ValueError(
            f"{who}: give config or its fields as keywords, not both; got both {config} and {sorted(fields)}."
        )
    if router_logits.dim() != 2:
        raise ValueError(
            f"{who}: router_logits must have shape (T, E), got {tuple(router_logits.shape)}; flatten the tokens."
        )
    if not router_logits.is_floating_point():
        raise ValueError(
            f"{who}: router_logits must be floating point, got {router_logits.dtype}; convert with .float()."
        )
    num_experts = router_logits.shape[1]
    config.check(num_experts)
    if bias is not None:
        check_shape(who, "bias", bias, (num_experts,))
        if bias.device != router_logits.device:
            raise ValueError(f"{who}: bias must be on {router_logits.device}, got {bias.device}; move it.")
        bias = bias.detach()
    weights, ids, counts, offsets, order, index = torch.ops.moesaic.route(
        router_logits, bias, *config.fields(), forced(implementation)
    )
    return Routing(weights, ids, counts, offsets, order, index, router_logits)


route.implementations = OP.implementations  # type: ignore[attr-defined]

# ---------------------------------------------------------------- private operators
_CONFIG = (
    "int top_k, str score, str order, float norm_eps, float scale, "
    "int num_groups, int topk_groups, str group_score, float group_mask_value, str implementation"
)


@functools.lru_cache(maxsize=4096)
def _select(device, dtype, tokens: int, top_k: int, num_experts: int, config: RouterConfig | None, implementation: str):
    """The implementation of a call, cached on plain values."""
    problem = Problem("route", device.type, arch_of(device), dtype, tokens, top_k, num_experts, option=config)
    return OP.select(problem, implementation)


def _route(logits, bias, *rest):
    config, implementation = RouterConfig(*rest[:-1]), rest[-1]
    module = _select(
        logits.device, logits.dtype, logits.shape[0], config.top_k, logits.shape[1], config, implementation
    )
    return module.route(logits, bias, config)


def _route_fake(logits, bias, top_k, *rest):
    T, E = logits.shape
    return (logits.new_empty(T, top_k, dtype=_weight_dtype(logits)), *_index_fake(logits.new_empty(T, top_k), E, ""))


def _weight_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _index(topk_ids, num_experts, implementation):
    T, K = topk_ids.shape
    module = _select(topk_ids.device, topk_ids.dtype, T, K, num_experts, None, forced(implementation))
    return module.expert_index(topk_ids, num_experts)


def _index_fake(topk_ids, num_experts, implementation):
    def i32(*n):
        return topk_ids.new_empty(n, dtype=torch.int32)

    T, K = topk_ids.shape
    return i32(T, K), i32(num_experts), i32(num_experts + 1), i32(T * K), i32(T * K)


def _backward_op(grad, logits, ids, *rest):
    config, implementation = RouterConfig(*rest[:-1]), rest[-1]
    module = _select(
        logits.device, logits.dtype, logits.shape[0], config.top_k, logits.shape[1], config, implementation
    )
    return module.route_backward(grad, logits, ids, config)


define(
    f"route(Tensor logits, Tensor? bias, {_CONFIG}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route, _route_fake,
)  # fmt: skip
define(
    "expert_index(Tensor topk_ids, int num_experts, str implementation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _index, _index_fake,
)  # fmt: skip
define(
    f"route_backward(Tensor grad, Tensor logits, Tensor ids, {_CONFIG}) -> Tensor",
    _backward_op, lambda grad, logits, ids, *rest: torch.empty_like(logits, memory_format=torch.contiguous_format),
)  # fmt: skip


def _setup(ctx, inputs, output):
    logits, _, *ctx.rest = inputs
    ctx.save_for_backward(logits, output[1])


def _backward(ctx, grad, *_):
    logits, ids = ctx.saved_tensors
    return (torch.ops.moesaic.route_backward(grad.contiguous(), logits, ids, *ctx.rest), *([None] * 11))


differentiable("route", _backward, _setup)
