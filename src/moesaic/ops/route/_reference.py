"""The oracle for `route`: one token at a time, plain loops, fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def why_not(problem) -> str | None:
    return None


def _score(row: Tensor, score: str) -> Tensor:
    return torch.softmax(row, -1) if score == "softmax" else torch.sigmoid(row)


def _ranked(values: list[float]) -> list[int]:
    """Indices from largest to smallest; ties to the lowest index, NaN below every number."""
    keys = [(float("inf") if math.isnan(v) else -v, math.isnan(v), i) for i, v in enumerate(values)]
    return [i for _, _, i in sorted(keys)]


def _weights(chosen: Tensor, score_row: Tensor, logit_row: Tensor, config) -> Tensor:
    if config.order == "post":
        w = _score(logit_row[chosen], config.score)
    else:
        w = score_row[chosen]
        if config.order == "pre_renorm":
            w = w / (w.sum() + config.norm_eps)
    return w * config.scale


def route(logits: Tensor, bias: Tensor | None, config):
    T, E = logits.shape
    ids = torch.zeros(T, config.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.zeros(T, config.top_k, dtype=torch.float64, device=logits.device)
    for t in range(T):
        row = logits[t].double()
        score = _score(row, config.score)
        choice = (row if config.order == "post" else score).tolist()
        if bias is not None:
            choice = [c + b for c, b in zip(choice, bias.double().tolist(), strict=True)]
        if config.num_groups > 1:
            size = E // config.num_groups
            groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(config.num_groups)]
            values = [g[0] if config.group_score == "max" else g[0] + g[1] for g in groups]
            kept = set(_ranked(values)[: config.topk_groups])
            choice = [c if e // size in kept else config.group_mask_value for e, c in enumerate(choice)]
        chosen = torch.tensor(_ranked(choice)[: config.top_k], device=logits.device)
        ids[t] = chosen.int()
        weights[t] = _weights(chosen, score, row, config)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (weights.to(dtype), *expert_index(ids, E))


def expert_index(topk_ids: Tensor, num_experts: int):
    T, K = topk_ids.shape
    flat = topk_ids.reshape(-1).tolist()
    for slot, e in enumerate(flat):
        if not -1 <= e < num_experts:
            raise ValueError(
                f"Routing.from_topk: topk_ids must lie in [-1, {num_experts}), got {e} at token {slot // K}, "
                f"choice {slot % K}; use -1 to drop a slot."
            )
    rows = [[slot for slot, e in enumerate(flat) if e == expert] for expert in range(num_experts)]
    order = [slot for group in rows for slot in group]
    index = [-1] * (T * K)
    for row, slot in enumerate(order):
        index[slot] = row
    order += [slot for slot, e in enumerate(flat) if e < 0]
    offsets = [0]
    for group in rows:
        offsets.append(offsets[-1] + len(group))

    def i32(values):
        return torch.tensor(values, dtype=torch.int32, device=topk_ids.device)

    ids = i32(flat).reshape(T, K)
    return ids, i32([len(group) for group in rows]), i32(offsets), i32(order), i32(index)


def route_backward(grad: Tensor, logits: Tensor, ids: Tensor, config) -> Tensor:
    out = torch.zeros_like(logits, dtype=torch.float64)
    for t in range(logits.shape[0]):
        with torch.enable_grad():
            row = logits[t].double().detach().requires_grad_()
            w = _weights(ids[t].long(), _score(row, config.score), row, config)
            (out[t],) = torch.autograd.grad(w, row, grad[t].double())
    return out.to(logits.dtype)
