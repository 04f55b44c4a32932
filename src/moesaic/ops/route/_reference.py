"""The oracle for `route`: one token at a time, plain loops, fp64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..index._reference import tables
from .gradients import incoming

NEEDS = ""


def why_not(problem: Any) -> str | None:
    return None


def _score(row: Tensor, score: str) -> Tensor:
    if score == "softmax":
        top = max(row.tolist(), default=0.0)
        return torch.zeros_like(row) if top == -math.inf else torch.softmax(row, -1)
    if score == "sigmoid":
        return torch.sigmoid(row)
    if score == "log_sigmoid":
        return -torch.log1p(torch.exp(-row))
    return torch.sqrt(torch.log1p(torch.exp(row)))


def _transform(row: Tensor, config) -> Tensor:
    z = row * config.multiplier
    if not config.soft_cap:
        return z
    return torch.where(row == -math.inf, row, config.soft_cap * torch.tanh(z / config.soft_cap))


def _ranked(values: list[float]) -> list[int]:
    """Indices from largest to smallest; ties to the lowest index, NaN after every number but -inf."""
    lowest = torch.finfo(torch.float64).min
    return sorted(range(len(values)), key=lambda i: (-(lowest if math.isnan(values[i]) else values[i]), i))


def _probabilities(z: Tensor, config) -> Tensor:
    if config.score in ("softmax", "log_sigmoid"):
        return _score(z, "softmax")
    s = _score(z, config.score)
    return s / s.sum() if s.sum() > 0 else s


def _choose(z: Tensor, bias: list[float] | None, config) -> list[int]:
    """The experts of one token; -1 for a choice that finds none."""
    E = z.shape[0]
    on_logits = config.order == "post" or config.bias_on == "logits"
    # softmax keeps the order of z, which tells also those apart whose probabilities round to one number
    on_logits |= config.score == "softmax" and bias is None and config.num_groups == 1
    choice = (z if on_logits else _score(z, config.score)).tolist()
    choice = [-math.inf if v == -math.inf else c for c, v in zip(choice, z.tolist(), strict=True)]
    if bias is not None:
        choice = [c + b for c, b in zip(choice, bias, strict=True)]
    if config.num_groups > 1:
        choice = [torch.finfo(torch.float64).min if math.isnan(c) else c for c in choice]
        size = E // config.num_groups
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(config.num_groups)]
        values = [g[0] if config.group_score == "max" else g[0] + g[1] for g in groups]
        kept = set(_ranked(values)[: config.topk_groups])
        masked = config.group_mask_value
        choice = [c if e // size in kept or c == -math.inf else masked for e, c in enumerate(choice)]
    ids = [e if choice[e] != -math.inf else -1 for e in _ranked(choice)[: config.top_k]]
    if config.policy == "top_p":
        p, mass, kept = _probabilities(z, config).tolist(), 0.0, 0
        while kept < len(ids) and ids[kept] >= 0 and mass < config.threshold:
            mass += p[ids[kept]]
            kept += 1
        ids = [e if k < kept else -1 for k, e in enumerate(ids)]
    elif config.policy == "entropy":
        entropy = -sum(p * math.log(p) for p in _score(z, "softmax").tolist() if p != 0)
        kept = 1 if entropy < config.threshold else 2 if entropy < 2 * config.threshold else config.top_k
        ids = [e if k < kept else -1 for k, e in enumerate(ids)]
    return ids


def _weights(z: Tensor, ids: list[int], config) -> Tensor:
    """The weights of one token's choices, differentiable in z."""
    live = [k for k, e in enumerate(ids) if e >= 0]
    out = z.new_zeros(len(ids))
    if not live:
        return out
    chosen = torch.tensor([ids[k] for k in live], device=z.device)
    if config.order == "post":
        w = _score(z[chosen], config.score)
    else:
        w = _score(z, config.score)[chosen]
        if config.order == "pre_renorm":
            total = w.sum()
            total = (config.norm_min if total < config.norm_min else total) + config.norm_eps
            w = w if total == 0 else w / total
    return out.index_copy(0, torch.tensor(live, device=z.device), w * config.scale)


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor, ...], None]:
    (logits, bias, ids), config, sequences = o, problem.config, problem.sequences
    T, E = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    bias = None if bias is None else bias.double().tolist()
    rows = [_transform(logits[t].double(), config) for t in range(T)]
    if ids is None:
        chosen = [_choose(z, bias, config) for z in rows]
    else:
        chosen = [[e if 0 <= e < E else -1 for e in row] for row in ids.tolist()]
    K = config.top_k if ids is None else ids.shape[1]
    weights = torch.zeros(T, K, dtype=torch.float64, device=logits.device)
    for t, z in enumerate(rows):
        weights[t] = _weights(z, chosen[t], config)
    ids = torch.tensor(chosen, dtype=torch.int32, device=logits.device).reshape(T, K)
    made = tables(torch.where(ids < problem.num_experts, ids, -1), problem.num_experts)
    if not problem.statistics:
        empty = weights.new_empty(0).to(dtype)
        return (weights.to(dtype), ids, *made[1:], empty, empty.clone(), ids.new_empty(0)), None
    p_sum = torch.zeros(sequences, E, dtype=torch.float64, device=logits.device)
    lse_sq = torch.zeros(sequences, dtype=torch.float64, device=logits.device)
    choices = torch.zeros(sequences, E, dtype=torch.int32, device=logits.device)
    for t, z in enumerate(rows):
        s = t * sequences // T
        p_sum[s] += _probabilities(z, config)
        lse_sq[s] += _logsumexp(z).square()
        for e in chosen[t]:
            if e >= 0:
                choices[s, e] += 1
    return (weights.to(dtype), ids, *made[1:], p_sum.to(dtype), lse_sq.to(dtype), choices), None


def _logsumexp(z: Tensor) -> Tensor:
    lse = torch.logsumexp(z, -1)
    return torch.zeros_like(lse) if lse.item() == -math.inf else lse


def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    logits, ids, config = o.logits, saved.ids, problem.config
    grad, grad_p, grad_lse = incoming(grads, logits, ids, problem.statistics)
    T = logits.shape[0]
    out = torch.zeros_like(logits, dtype=torch.float64)
    for t in range(T):
        with torch.enable_grad():
            row = logits[t].double().detach().requires_grad_()
            z = _transform(row, config)
            total = (_weights(z, ids[t].tolist(), config) * grad[t].double()).sum()
            if grad_p is not None and grad_lse is not None:
                s = t * grad_p.shape[0] // T
                total = total + (_probabilities(z, config) * grad_p[s].double()).sum()
                total = total + _logsumexp(z).square() * grad_lse[s].double()
            if total.requires_grad:
                (out[t],) = torch.autograd.grad(total, row, allow_unused=True, materialize_grads=True)
    return {"logits": torch.nan_to_num(out, nan=0.0).where(logits == -math.inf, out).to(logits.dtype)}
