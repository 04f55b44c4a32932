"""`route` in vectorised torch: any device, no host synchronisation but the id check on the CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..index._torch import tables, valid
from .gradients import incoming

NEG_INF = float("-inf")
FULL_SORT = 4096  # elements below which one sort costs less than the four operations that spare it


NEEDS = ""


def why_not(problem: Any) -> str | None:
    return None


# ---------------------------------------------------------------- scores
def _transform(logits: Tensor, config) -> Tensor:
    """z: the logits in fp32 (fp64 stays), multiplied and capped."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if config.multiplier != 1.0:
        z = z * config.multiplier
    if config.soft_cap:
        z = (config.soft_cap * torch.tanh(z / config.soft_cap)).masked_fill(logits == NEG_INF, NEG_INF)
    return z


def _softmax(z: Tensor) -> Tensor:
    """Softmax over the last dimension in which a row of nothing but -inf gets zeros."""
    return torch.softmax(z, -1).masked_fill(z == NEG_INF, 0.0)


_ELEMENTWISE = {
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda z: F.softplus(z, threshold=50.0).sqrt(),
    "log_sigmoid": F.logsigmoid,
}
_DERIVATIVE = {
    "sigmoid": lambda z, s: s * (1 - s),
    "sqrt_softplus": lambda z, s: torch.where(s > 0, torch.sigmoid(z) / (2 * s), 0.0),
    "log_sigmoid": lambda z, s: torch.sigmoid(-z),
}


def _scores(z: Tensor, score: str) -> Tensor:
    return _softmax(z) if score == "softmax" else _ELEMENTWISE[score](z)


def _probabilities(z: Tensor, scores: Tensor, config) -> Tensor:
    """Scores as a distribution: as they are or divided by their sum; of log_sigmoid, which is negative, the softmax."""
    if config.score in ("softmax", "log_sigmoid"):
        return scores if config.score == "softmax" and config.order != "post" else _softmax(z)
    s = _scores(z, config.score) if config.order == "post" else scores
    return s / s.sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)


# ---------------------------------------------------------------- choice
def _topk(values: Tensor, k: int, sound: bool = False) -> Tensor:
    """The k largest per row, ties to the lowest index, NaN after all but -inf (`torch.topk` promises neither)."""
    if not sound:
        values = torch.where(values.isnan(), torch.finfo(values.dtype).min, values)
    if values.device.type == "cpu" and values.numel() >= FULL_SORT and 0 < k < values.shape[-1]:
        best, ids = torch.topk(values, k, -1)
        # its choice is ours but for ties at the edge, which only a look at the data shows: it is free on the CPU
        if not bool(((values >= best[..., -1:]).sum(-1) > k).any()):
            ids = ids.sort(-1).values
            order = torch.sort(values.gather(-1, ids), dim=-1, descending=True, stable=True).indices
            return ids.gather(-1, order)
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]


def _sound(z: Tensor, bias: Tensor | None) -> bool:
    """Nothing is infinite or NaN. Only the CPU may look, where it spares several passes over the logits."""
    tensors = (z,) if bias is None else (z, bias)
    return z.device.type == "cpu" and all(math.isfinite(t.sum().item()) for t in tensors)


def _ordered(bias: Tensor | None, config) -> bool:
    """Softmax keeps the order of z, which tells also those apart whose probabilities round to one number."""
    return config.score == "softmax" and bias is None and config.num_groups == 1


def _choose(z: Tensor, scores: Tensor, bias: Tensor | None, config, sound: bool) -> Tensor:
    T, E = z.shape
    choice = z if _ordered(bias, config) or config.bias_on == "logits" else scores
    if bias is not None:
        choice = choice + bias.to(z.dtype)
    gone = None if sound else (z == NEG_INF) | (choice == NEG_INF)
    if config.num_groups > 1:
        grouped = choice.view(T, config.num_groups, E // config.num_groups)
        if gone is not None:
            grouped = grouped.nan_to_num(torch.finfo(choice.dtype).min, torch.inf, NEG_INF)
            grouped = grouped.masked_fill(gone.view(grouped.shape), NEG_INF)
        best = grouped.topk(1 if config.group_score == "max" else 2, -1).values.sum(-1)
        keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _topk(best, config.topk_groups), True)
        choice = grouped.masked_fill(~keep[..., None], config.group_mask_value).view(T, E)
    if gone is not None:
        choice = choice.masked_fill(gone, NEG_INF)
    ids = _topk(choice, config.top_k, sound)
    if sound and config.policy == "topk":
        return ids
    dead = choice.gather(1, ids) == NEG_INF
    if config.policy == "top_p":
        p = _probabilities(z, scores, config).gather(1, ids)
        dead |= ~(F.pad(p.cumsum(-1)[:, :-1], (1, 0)) < config.threshold)  # what stands before holds the share
    elif config.policy == "entropy":
        p = _softmax(z)
        entropy = -torch.xlogy(p, p).sum(-1, keepdim=True)
        most = torch.where(entropy < config.threshold, 1, torch.where(entropy < 2 * config.threshold, 2, config.top_k))
        dead |= torch.arange(config.top_k, device=z.device) >= most
    return ids.masked_fill(dead, -1)


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor, ...], None]:
    (logits, bias, ids), config, statistics = o, problem.config, problem.statistics
    z = _transform(logits, config)
    E = z.shape[1]
    sound = ids is None and _sound(z, bias)
    renorm, chosen_only = config.order == "pre_renorm", config.order == "post"
    if renorm and sound and not statistics and config.policy == "topk" and _ordered(bias, config):
        chosen_only = config.norm_eps == config.norm_min == 0  # divided by its sum it is the softmax of the chosen
        renorm = not chosen_only
    scores = z if chosen_only else _scores(z, config.score)
    ids = _choose(z, scores, bias, config, sound) if ids is None else valid(ids.long(), E)
    dead = None if sound and config.policy == "topk" else ids < 0
    weights = scores.gather(1, ids if dead is None else ids.clamp_min(0))
    if chosen_only:
        weights = _scores(weights if dead is None else weights.masked_fill(dead, NEG_INF), config.score)
    if dead is not None:
        weights = weights.masked_fill(dead, 0.0)
    if renorm:
        weights = weights / _norm(weights, config)
    if config.scale != 1.0:
        weights = weights * config.scale
    rows = problem.num_experts  # the others have none
    made = tables(ids.masked_fill(ids >= rows, -1) if E > rows else ids, rows)
    sums, ids = _statistics(z, scores, ids, config, problem.sequences, statistics), ids.int()
    return (weights, ids, *made[1:], *sums), None


def _norm(weights: Tensor, config) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    if config.norm_min:
        total = total.clamp_min(config.norm_min)
    if config.norm_eps:
        total = total + config.norm_eps
    return total.masked_fill(total == 0, 1.0)  # no expert was chosen


def _statistics(z: Tensor, scores: Tensor, ids: Tensor, config, sequences: int, wanted: bool):
    """Per sequence: the sum of the probabilities, of logsumexp(z)², and how often each expert was chosen."""
    T, E = z.shape
    if not wanted:
        return z.new_empty(0), z.new_empty(0), ids.new_empty(0, dtype=torch.int32)
    S = sequences
    p = _probabilities(z, scores, config).view(S, -1, E).sum(1) if T else z.new_zeros(S, E)
    lse = _logsumexp(z).square().view(S, -1).sum(1) if T else z.new_zeros(S)
    choices = torch.zeros(S, E + 1, dtype=torch.int32, device=z.device)
    slots = ids.masked_fill(ids < 0, E).reshape(S, -1) if T else ids.new_zeros(S, 0)
    choices.scatter_add_(1, slots, torch.ones_like(slots, dtype=torch.int32))
    return p, lse, choices[:, :E].contiguous()


def _logsumexp(z: Tensor, dim: int | None = None) -> Tensor:
    """0 for a row of nothing but -inf: a masked token. Along `dim` (by default the last) kept as a dimension."""
    lse = torch.logsumexp(z, -1 if dim is None else dim, keepdim=dim is not None)
    return lse.masked_fill(lse == NEG_INF, 0.0)


# ---------------------------------------------------------------- backward
def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    came = incoming(grads, o.logits, saved.ids, problem.statistics)
    return {"logits": gradient(*came, o.logits, saved.ids, problem.config)}


def gradient(
    grad: Tensor, grad_p: Tensor | None, grad_lse: Tensor | None, logits: Tensor, ids: Tensor, config: Any
) -> Tensor:
    """In operations that can be differentiated again."""
    z = _transform(logits, config)
    dead, index = ids < 0, ids.long().clamp_min(0)
    g = (grad.to(z.dtype) * config.scale).masked_fill(dead, 0.0)
    dz = torch.zeros_like(z)
    scores = _scores(z, config.score)
    if config.order == "post":
        chosen = z.gather(1, index).masked_fill(dead, NEG_INF)
        w = _scores(chosen, config.score)
        inner = w * (g - (g * w).sum(-1, keepdim=True)) if config.score == "softmax" else (
            g * _DERIVATIVE[config.score](chosen, w)
        )  # fmt: skip
        dz.scatter_add_(1, index, inner.masked_fill(dead, 0.0))
        ds = torch.zeros_like(z)
    else:
        if config.order == "pre_renorm":
            chosen = scores.gather(1, index).masked_fill(dead, 0.0)
            norm = _norm(chosen, config)
            drag = (g * chosen).sum(-1, keepdim=True) / norm
            if config.norm_min:
                drag = drag.masked_fill(chosen.sum(-1, keepdim=True) < config.norm_min, 0.0)
            g = ((g - drag) / norm).masked_fill(dead, 0.0)
        ds = torch.zeros_like(z).scatter_add_(1, index, g)
    if grad_p is not None and grad_lse is not None:
        each = z.shape[0] // grad_p.shape[0]
        gp = grad_p.to(z.dtype).repeat_interleave(each, 0)
        p = _probabilities(z, z if config.order == "post" else scores, config)
        if config.score == "softmax":
            ds = ds + gp
        elif config.score == "log_sigmoid":
            dz += p * (gp - (gp * p).sum(-1, keepdim=True))
        else:
            total = scores.sum(-1, keepdim=True)
            ds = ds + torch.where(total > 0, (gp - (gp * p).sum(-1, keepdim=True)) / total, 0.0)
        gl = grad_lse.to(z.dtype).repeat_interleave(each, 0)
        dz += (2 * gl * _logsumexp(z))[:, None] * _softmax(z)
    if config.score == "softmax":
        dz += scores * (ds - (ds * scores).sum(-1, keepdim=True))
    else:
        dz += ds * _DERIVATIVE[config.score](z, scores)
    if config.soft_cap:
        dz = dz * (1 - (z / config.soft_cap).square())
    dz = dz.masked_fill(z == NEG_INF, 0.0)
    return (dz * config.multiplier if config.multiplier != 1.0 else dz).to(logits.dtype)
