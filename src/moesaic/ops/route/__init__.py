"""route: router logits -> Routing. Which experts, with what weights, and where each token's rows go.

Legend: T tokens, E experts, K choices, S sequences.
"""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import check_shape, check_tensors
from ...guards import watch
from ...op import Op, Place, Size, Table, octave
from ...routing import Routing, signed_ids
from ..index import expert_index
from . import _torch, capacity, policies
from .config import Core, RouterConfig
from .gradients import incoming
from .losses import (
    cross_entropy_balance_loss,
    device_balance_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    sequence_balance_loss,
    uniform_cross_entropy_loss,
    z_loss,
)
from .policies import Generator

__all__ = [
    "RouterConfig",
    "cross_entropy_balance_loss",
    "device_balance_loss",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "route",
    "sequence_balance_loss",
    "uniform_cross_entropy_loss",
    "z_loss",
]


class Operands(NamedTuple):
    logits: Tensor
    bias: Table | None
    ids: Table | None


_OPTIONS = dict(num_experts=int, sequences=Size, statistics=bool)
Options: Any = NamedTuple("Options", [*typing.get_type_hints(Core).items(), *_OPTIONS.items()])  # pyright: ignore


class Outputs(NamedTuple):
    """The choices, the tables of `Routing`, and sums over each sequence's tokens for the losses (else empty)."""

    weights: Tensor
    ids: Table
    tokens_per_expert: Table
    expert_offsets: Table
    row_order: Table
    row_index: Table
    probability_sums: Tensor
    logsumexp_squares: Tensor
    choices: Table


class Saved(NamedTuple):
    ids: Tensor


@dataclass(frozen=True)
class RouteProblem(Place):
    """What choosing depends on, and what implementations read; `num_experts` of the logits' `columns` have rows."""

    num_tokens: int = 0
    top_k: int = 1
    num_experts: int = 1
    columns: int = 0
    config: RouterConfig | None = None
    sequences: int = 1
    statistics: bool = False


def _describe(o: Operands, options: Any) -> tuple[Any, ...]:
    T, E = o.logits.shape
    return o.logits.dtype, octave(T), E, RouterConfig.of_core(Core(*options[:_CORE]))


def _fake(o: Operands, options: Any) -> Outputs:
    (T, E), rows, wide = o.logits.shape, options.num_experts, torch.promote_types(o.logits.dtype, torch.float32)
    K = options.top_k if o.ids is None else o.ids.shape[1]
    S = options.sequences if options.statistics else 0
    sums = (S, E) if S else (0,)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return o.logits.new_empty(shape, dtype=dtype)

    return Outputs(
        new(T, K, dtype=wide), new(T, K), new(rows), new(rows + 1), new(T * K), new(T * K), new(*sums, dtype=wide),
        new(S, dtype=wide), new(*sums),
    )  # fmt: skip


def _twice(
    grads: Outputs, o: Operands, saved: Saved, options: Any, implementation: str, needs: Any
) -> dict[str, Tensor]:
    came = incoming(grads, o.logits, saved.ids, options.statistics)
    return {"logits": _torch.gradient(*came, o.logits, saved.ids, RouterConfig.of_core(Core(*options[:_CORE])))}


_CORE = len(Core._fields)
OP = Op(
    "route", __name__, ("triton", "torch", "reference"), operands=Operands, options=Options, outputs=Outputs,
    saved=Saved, problem=RouteProblem, describe=(("dtype", "num_tokens", "columns", "config"), _describe), fake=_fake,
    twice=_twice,
)  # fmt: skip


def route(
    router_logits: Tensor,
    config: RouterConfig | None = None,
    *,
    bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
    ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    expert_mask: Tensor | None = None,
    noise_logits: Tensor | None = None,
    training: bool = False,
    generator: Generator = None,
    sequences: int = 1,
    statistics: bool | None = None,
    checked: bool = False,
    implementation: str | None = None,
    **fields,
) -> Routing:
    """Choose K experts for each token and build the index tables: `logits (T, E) -> Routing`.

    Args:
        router_logits: `(T, E)`, any float dtype; scored in fp32 (fp64 in fp64). With columns for zero, identity,
            constant and shared experts behind them where the configuration has such.
        config: a `RouterConfig`; or give its fields as keywords (`route(logits, top_k=8, score="softmax")`).
        bias: `(E,)`, added to the scores (to the logits when `order="post"`) for the choice alone; it gets no gradient.
        expert_scale: `(E,)` or `(1,)`, multiplied into each choice's weight, `(1,)` into shared experts' too;
            differentiable (Gemma 4, Inkling).
        ids: `(T, K)` integers, the choice made elsewhere: recorded earlier (`routing.chosen_ids`), hashed from the
            tokens (`table[input_ids]`, where an expert may stand twice), or forced. Weights and gradients come from the
            logits; -1 leaves a slot out, and so does a mask over its token or expert.
        token_mask: `(T,)` bool; False routes the token nowhere (padding, finished sequences).
        expert_mask: `(E,)` or `(T, E)` bool; False takes the expert out as if its logit were -inf.
        noise_logits: `(T, E)`, noisy top-k's second linear map; differentiable where noise enters the weights.
        training: turns on noise, expert sampling, and the training capacity.
        generator: for the noise. An int seeds this one call, which activation checkpointing can repeat; None draws
            from torch's generator, whose state checkpointing restores, and which alone `torch.compile` can trace.
        sequences: S, the T tokens are that many sequences of equal length; for the statistics of sequence-wise losses.
        statistics: keep what the losses read, sums over tokens; by default where the logits need a gradient.
        checked: look at the values too, which waits for a GPU: NaN logits.
        implementation: force one of `route.implementations`; by default the first that can run.

    Returns:
        A `Routing` whose `topk_weights` and statistics carry the gradient to `router_logits`; ids are not
        differentiable. A token for which fewer than K experts remain gets -1 and weight 0 in the slots that are left.

    Raises:
        ValueError: shapes, devices, values or configuration disagree. Unsupported: the forced implementation cannot
            run.

    Deterministic but for the noise; no host synchronisation unless checked. T = 0 is allowed.
    """
    who = "route"
    config = _given(who, config, fields)
    _check(who, router_logits, config, bias, expert_scale, ids, token_mask, expert_mask, noise_logits, training,
           sequences)  # fmt: skip
    if checked or router_logits.device.type == "cpu":
        _check_values(who, router_logits, config, signed_ids(ids), expert_mask, checked)
    E = config.num_experts(router_logits.shape[1])
    x, shared = router_logits, None
    if config.shared_logits:
        x, shared = x[:, : -config.shared_logits], x[:, -config.shared_logits :]
    x, ids = _masked(x, token_mask, expert_mask), signed_ids(ids)
    bias = None if bias is None else bias.detach()
    if statistics is None:
        statistics = torch.is_grad_enabled() and router_logits.requires_grad
    if training or ids is not None or config.policy in ("expert_choice", "sparsemixer"):
        x, ids, own_weights, load = _chosen(x, config, bias, ids, noise_logits, training, generator, implementation)
    else:
        own_weights = load = None
    weights, raw, *tables, probability_sums, logsumexp_squares, choices = OP(
        Operands(x, bias, ids), Options(*config.core(), E, sequences, statistics), implementation
    )
    weights = weights if own_weights is None else own_weights
    scaled = own_weights is None and not (config.weights_later or config.straight_through)
    limit = None if config.policy == "expert_choice" else config.capacity(x.shape[0], E, training)
    tail = None
    if not scaled or shared is not None:
        weights, tail = policies.finish_weights(weights, raw, shared, config, scaled)
    if expert_scale is not None:
        scale = expert_scale.to(weights.dtype)
        weights = weights * (scale[raw.clamp_min(0)] if scale.numel() > 1 else scale)
        weights = weights.masked_fill(raw < 0, 0.0)
        if tail is not None and scale.numel() == 1:
            tail = tail * scale
    extras: dict[str, Any] = {"shared_weights": tail}
    topk_ids = raw
    if limit is not None or config.extra_experts:
        extras["undropped_ids"] = raw
    if config.extra_experts:
        extras.update(_extra_weights(weights, raw, E + config.zero_experts, config))
        topk_ids, weights = raw.masked_fill(raw >= E, -1), weights.masked_fill(raw >= E, 0.0)
    if limit is not None:
        weights, topk_ids, tables = _limited(weights, topk_ids, limit, config, E, implementation)
    if statistics:
        extras.update(
            probability_sums=probability_sums, logsumexp_squares=logsumexp_squares, choices=choices, load=load
        )
    return Routing(weights, topk_ids, *tables, logits=router_logits, config=config, capacity=limit, **extras)


route.implementations = OP.implementations  # type: ignore[attr-defined]
_config = functools.lru_cache(maxsize=1024)(RouterConfig)


def _given(who: str, config: RouterConfig | None, fields: dict[str, Any]) -> RouterConfig:
    """The configuration, whole or by its fields."""
    if config is None:
        if "top_k" not in fields:
            raise ValueError(f"{who}: top_k must be given, got {sorted(fields)}; write route(logits, top_k=...).")
        return RouterConfig(**fields) if torch.compiler.is_compiling() else _config(**fields)
    if not isinstance(config, RouterConfig):
        raise ValueError(f"{who}: config must be a RouterConfig, got {config!r}; write route(logits, top_k=...).")
    if fields:
        raise ValueError(
            f"{who}: give config or its fields as keywords, not both; got both {config} and {sorted(fields)}."
        )
    return config


def _limited(weights, topk_ids, limit: int, config: RouterConfig, num_experts: int, implementation: str | None):
    """`(weights, ids, tables)` after each expert dropped what it has no room for."""
    index = functools.partial(expert_index, num_experts=num_experts, implementation=implementation)
    weights, topk_ids = capacity.drop(weights, topk_ids, limit, config.drop_policy, config.renorm_after_drop, index)
    topk_ids, *tables = index(topk_ids)
    return weights, topk_ids, tables


def _masked(x: Tensor, token_mask: Tensor | None, expert_mask: Tensor | None) -> Tensor:
    if token_mask is not None:
        x = x.masked_fill(~token_mask[:, None], policies.NEG_INF)
    return x if expert_mask is None else x.masked_fill(~expert_mask, policies.NEG_INF)


def _chosen(x, config, bias, ids, noise_logits, training, generator, implementation):
    """`(logits for the weights, ids or None, weights or None, load or None)` of what the kernel does not choose."""
    generator = policies.generator_of(generator, x.device)
    load, choice = None, x
    if training and config.expert_sampling < 1:
        choice = x = x.masked_fill(~policies.sample_experts(x, config, generator), policies.NEG_INF)
    if training and (config.noise != "none" or config.temperature != 1.0):
        choice, std = policies.noisy(x, config, noise_logits, generator)
        if std is not None:
            load = policies.expected_load(x / config.temperature, choice, std / config.temperature, config.top_k)
        if config.noise_in_weights:
            x = choice
    if ids is not None:  # a masked expert cannot be forced
        ids = ids.masked_fill(x.gather(1, ids.long().clamp(0, x.shape[1] - 1)) == policies.NEG_INF, -1)
    if config.policy == "sparsemixer":
        weights, ids = policies.sparsemixer(_torch._transform(x, config), config, training, generator, ids)
        return x, ids, weights, load
    if ids is not None:
        return x, ids, None, load
    if config.policy in policies.CHOOSE:  # sinkhorn in training alone: otherwise the kernel makes the plain choice
        with torch.no_grad():
            ids = policies.CHOOSE[config.policy](_torch._transform(choice, config), config, bias=bias)
        return x, ids, None, load
    if choice is not x:
        with torch.no_grad():
            options = Options(*config.core(), choice.shape[1], 1, False)
            ids = OP(Operands(choice, bias, None), options, implementation).ids
    return x, ids, None, load


def _extra_weights(weights: Tensor, raw: Tensor, first: int, config: RouterConfig) -> dict[str, Tensor]:
    """Weights of the identity experts, summed, and of each constant one; `first` is the id of the first identity."""
    out, last = {}, first + config.identity_experts
    if config.identity_experts:
        out["identity_weight"] = weights.masked_fill((raw < first) | (raw >= last), 0.0).sum(-1)
    if config.constant_experts:
        mine = weights.masked_fill(raw < last, 0.0)
        empty = weights.new_zeros(weights.shape[0], config.constant_experts)
        out["constant_weights"] = empty.scatter_add(1, (raw.long() - last).clamp_min(0), mine)
    return out


# ---------------------------------------------------------------- checks
def _check(who, logits, config, bias, expert_scale, ids, token_mask, expert_mask, noise_logits, training, sequences):
    check_tensors(who, router_logits=logits)
    watch(who, logits, expert_scale, noise_logits)
    if logits.dim() != 2:
        raise ValueError(f"{who}: router_logits must have shape (T, E), got {tuple(logits.shape)}; flatten the tokens.")
    if not logits.is_floating_point():
        raise ValueError(f"{who}: router_logits must be floating point, got {logits.dtype}; convert with .float().")
    T, columns = logits.shape
    if torch.compiler.is_compiling():
        config.check(config.num_experts(columns), who)
    else:
        config.fits(config.num_experts(columns), who)
    candidates = columns - config.shared_logits
    if bias is not None:
        check_shape(who, "bias", bias, (candidates,))
        if config.policy in ("sinkhorn", "sparsemixer"):
            raise ValueError(f"{who}: bias must be None with policy={config.policy!r}, which has no place for it.")
    if expert_scale is not None and expert_scale.shape != (1,):
        check_shape(who, "expert_scale", expert_scale, (candidates,), "or (1,)")
    if token_mask is not None:
        check_shape(who, "token_mask", token_mask, (T,))
    if expert_mask is not None and expert_mask.shape != (candidates,):
        check_shape(who, "expert_mask", expert_mask, (T, candidates), f"or ({candidates},)")
    for name, mask in (("token_mask", token_mask), ("expert_mask", expert_mask)):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"{who}: {name} must be bool, got {mask.dtype}; compare it, as in mask > 0.")
    if ids is not None:
        width = min(config.max_choices or candidates, candidates)
        width = width if config.policy == "expert_choice" else config.top_k
        check_shape(who, "ids", ids, (T, width), "one expert for each choice")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{who}: ids must be integers, got {ids.dtype}; convert it with .int().")
    if config.noise == "noisy_topk" and training:
        if noise_logits is None:
            raise ValueError(f"{who}: noise='noisy_topk' needs noise_logits of shape {(T, candidates)}, got None.")
        check_shape(who, "noise_logits", noise_logits, (T, candidates))
    for name, tensor in (("bias", bias), ("expert_scale", expert_scale), ("noise_logits", noise_logits)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{who}: {name} must be floating point, got {tensor.dtype}; convert it with .float().")
    tensors = dict(bias=bias, expert_scale=expert_scale, ids=ids, token_mask=token_mask, expert_mask=expert_mask,
                   noise_logits=noise_logits)  # fmt: skip
    device = logits.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{who}: {name} must be on {device}, got {tensor.device}; move it.")
    if sequences < 1 or T % sequences:
        raise ValueError(
            f"{who}: sequences must be positive and divide the number of tokens T={T}, got {sequences}; pad them to "
            "one length."
        )


def _check_values(who: str, logits: Tensor, config: RouterConfig, ids, expert_mask, checked: bool) -> None:
    """What only the values show. On the CPU a look costs nothing but the pass over the logits, kept for `checked`."""
    if torch.compiler.is_compiling() and not checked:
        return
    if checked and bool(logits.isnan().any()):
        t, e = logits.isnan().nonzero()[0].tolist()
        raise ValueError(
            f"{who}: router_logits must not be NaN, got NaN at token {t}, expert {e}; look at what made it."
        )
    if expert_mask is not None and expert_mask.numel():
        left = int(expert_mask.sum(-1).min())
        if left < config.top_k:
            raise ValueError(
                f"{who}: expert_mask must leave at least top_k={config.top_k} experts to each token, got {left}; "
                "lower top_k or unmask more (token_mask leaves a whole token out)."
            )
    candidates = logits.shape[1] - config.shared_logits
    if ids is not None and bool((stray := (ids < -1) | (ids >= candidates)).any()):
        t, k = stray.nonzero()[0].tolist()
        raise ValueError(
            f"{who}: ids must lie in [-1, {candidates}), got {int(ids[t, k])} at token {t}, choice {k}; use -1 for a "
            "slot to leave out."
        )
