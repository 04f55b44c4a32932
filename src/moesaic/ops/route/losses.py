"""Auxiliary losses: functions of a `Routing` that keep a router balanced and its logits small. Plain torch, any device.

Legend: T tokens, E experts, K choices; P mean router probability per expert, f share of choices per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...routing import Routing


def _logits(routing: Routing, who: str) -> Tensor:
    if routing.logits is None:
        raise ValueError(f"{who}: routing must hold the router's logits, got None; build it with moesaic.route.")
    return routing.logits.float() if routing.logits.dtype != torch.float64 else routing.logits


def load_balancing_loss(routing: Routing, score: str = "softmax") -> Tensor:
    """Switch Transformer's balance loss `E · sum_e f_e · P_e`: 1 when even, E when every token picks one expert.

    `f_e` is the share of the T·K choices that went to e (before any drop), `P_e` the mean probability of e: the softmax
    of the logits, or sigmoids scaled to sum to one when `score="sigmoid"`. Hugging Face's form is K times this one.
    The gradient flows through P alone. T = 0 gives 0.
    """
    logits = _logits(routing, "load_balancing_loss")
    T, E = logits.shape
    if score == "sigmoid":
        p = torch.sigmoid(logits)
        p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    else:
        p = torch.softmax(logits, -1)
    f = routing.tokens_per_expert.to(p.dtype) / max(T * routing.top_k, 1)
    return E * (f * (p.sum(0) / max(T, 1))).sum()


def z_loss(routing: Routing) -> Tensor:
    """ST-MoE's z-loss `mean_t logsumexp(logits_t)²`: keeps router logits small. T = 0 gives 0."""
    logits = _logits(routing, "z_loss")
    return torch.logsumexp(logits, -1).square().sum() / max(logits.shape[0], 1)
