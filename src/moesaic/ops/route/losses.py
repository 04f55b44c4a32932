"""Auxiliary losses: functions of a `Routing` that keep a router balanced and its logits small. Plain torch, any device.

They read what `route` kept: sums over the tokens of each sequence, so no loss passes over the logits again. A routing
without these sums (made without gradient, or with `statistics=False`) is summed up here from its logits, as the
configuration says; what lives outside logits and configuration (noise, a mask of experts) is then missing, and what
cannot be known (choices that a capacity dropped, the bounds of sequences) raises `ValueError`.

Legend: T tokens that take part (masked ones do not), E experts that can be chosen, K choices, S sequences of N tokens;
n_e how often expert e was chosen before any drop; p_t,e probability of e for token t: the softmax, or elementwise
scores divided by their sum; P_e its mean over tokens.

| loss | even | all on one expert (K = 1) | gradient through |
|---|---|---|---|
| `load_balancing_loss` | 1 | E | P |
| `sequence_balance_loss` | 1 | E | P |
| `device_balance_loss` | 1 | D devices | P |
| `uniform_cross_entropy_loss` | ln E | about -ln(eps) · (E - 1) / E | P |
| `cross_entropy_balance_loss` | ln E | 0, its minimum | P |
| `importance_loss` | 0 | E - 1 | weights |
| `load_loss` | 0 | E - 1 | smooth load |
| `z_loss` | ln² E for logits 0 | | logits |

Every loss is a scalar in fp32 (fp64 from fp64 logits), unscaled, 0 for T = 0, deterministic, and waits for no device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import check_choice
from ...routing import Routing
from . import _torch

NORMALIZE = ("topk", "token", "first")


# ---------------------------------------------------------------- balance of the choices
def load_balancing_loss(routing: Routing, *, normalize: str = "topk", group: Any = None) -> Tensor:
    """Balance loss of Switch Transformer and GShard: `E · sum_e f_e · P_e`.

    Args:
        routing: from `route`.
        normalize: what f is a share of. `"topk"`: `f_e = n_e / (T·K)`, the share of all choices; the loss is 1 when
            even and E when all go to one expert (arXiv 2101.03961 with K choices, Megatron-LM). `"token"`: `n_e / T`,
            K times that (Hugging Face). `"first"`: only first choices count (GShard, arXiv 2006.16668).
        group: a `torch.distributed` process group whose ranks hold parts of one batch. Counts and tokens are summed
            over it, P stays local: the mean over the ranks of this loss, and of its gradients, is the loss of the whole
            batch, also where ranks hold different numbers of tokens. Experts may then specialise within a rank's
            batch (arXiv 2501.11873). Every rank must call, one without tokens too.

    Raises:
        ValueError: unknown `normalize`; no statistics and no logits.

    Differentiable through P alone; f is a count.
    """
    who = "load_balancing_loss"
    check_choice(who, "normalize", normalize, NORMALIZE)
    sums, _, tokens = _sums(routing, who)
    counts = _first_choices(routing, sums.shape[1]) if normalize == "first" else _choices(routing).sum(0)
    here = tokens.sum()
    ranks = 1
    if group is not None:
        ranks = dist.get_world_size(group)
        whole = torch.cat((counts, here.to(counts.dtype)[None]))
        dist.all_reduce(whole, group=group)
        counts, here = whole[:-1], whole[-1].to(here.dtype)
    counts = counts.to(sums.dtype)
    f = counts / (here if normalize == "token" else counts.sum()).clamp_min(1)
    return sums.shape[1] * ranks * (f * sums.sum(0)).sum() / here.clamp_min(1)


def sequence_balance_loss(routing: Routing) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss (arXiv 2412.19437, eq. 17-20): mean over sequences of `sum_e f_e · P_e`.

    In a sequence of N tokens `f_e = E / (K·N) · n_e` and `P_e = 1/N · sum_t p_t,e`: 1 when every sequence is even, E
    when each goes to one expert. Counts are those of the choices made, a selection bias included. A sequence whose
    tokens are all masked does not count.

    Args:
        routing: from `route(..., sequences=S)`.

    Raises:
        ValueError: the routing holds no statistics; only they know where sequences end.

    Differentiable through P alone.
    """
    who = "sequence_balance_loss"
    if routing.choices is None:
        raise ValueError(
            f"{who}: routing must hold its statistics, which know the sequences, got none; pass sequences=S and "
            "statistics=True to moesaic.route."
        )
    sums, _, tokens = _sums(routing, who)
    counts = routing.choices.to(sums.dtype)
    f = sums.shape[1] * counts / counts.sum(-1, keepdim=True).clamp_min(1)
    each = (f * sums).sum(-1) / tokens.clamp_min(1)
    return each.sum() / (tokens > 0).sum().clamp_min(1)


def device_balance_loss(routing: Routing, num_devices: int) -> Tensor:
    """DeepSeek-V2's device-level balance loss (arXiv 2405.04434, section 2.2.3): `sum_d f'_d · P'_d`.

    Experts form D equal consecutive groups, one a device. `f'_d` is the mean over the group of `f_e = E / (K·T) · n_e`,
    `P'_d` the sum over the group of P_e: 1 when devices are even, D when one device gets everything. Experts of one
    device may differ. Zero, identity and constant experts, which live on no device, are left out.

    Args:
        routing: from `route`.
        num_devices: D, a divisor of the number of experts.

    Raises:
        ValueError: D does not divide E; the choices are not known (see `load_balancing_loss`).

    Differentiable through P alone.
    """
    who, E = "device_balance_loss", routing.num_experts
    if num_devices < 1 or E % num_devices:
        raise ValueError(f"{who}: num_devices must divide the number of experts E={E}, got {num_devices}.")
    sums, _, tokens = _sums(routing, who)
    counts = _choices(routing).sum(0)[:E].to(sums.dtype)
    f = E * counts / counts.sum().clamp_min(1)
    p = sums.sum(0)[:E] / tokens.sum().clamp_min(1)
    return (f.view(num_devices, -1).mean(-1) * p.view(num_devices, -1).sum(-1)).sum()


def uniform_cross_entropy_loss(routing: Routing, eps: float = 1e-6) -> Tensor:
    """Cross entropy of the uniform distribution and P: `-(1/E) sum_e log(P_e + eps)`.

    About ln E when P is even, its minimum, and `-(E - 1) / E · ln eps` when P lies on one expert. No choice is counted:
    unlike `load_balancing_loss` it pulls at P even where the choices are even.

    Differentiable through P.
    """
    sums, _, tokens = _sums(routing, "uniform_cross_entropy_loss")
    T = tokens.sum()
    return -(sums.sum(0) / T.clamp_min(1) + eps).log().mean() * (T > 0)


def cross_entropy_balance_loss(routing: Routing, eps: float = 1e-6) -> Tensor:
    """A form found in the literature, `-sum_e f_e log(P_e + eps)` with `f_e = n_e / T`. **It rewards collapse.**

    With f held fixed it is least at P = f / K: it makes the router surer of what it already does, so the busiest expert
    gets busier. `K · ln E` when even, 0 when every token picks one expert with certainty (K = 1). Provided to
    reproduce published numbers; to balance use `load_balancing_loss` or `uniform_cross_entropy_loss`.

    Differentiable through P alone.
    """
    who = "cross_entropy_balance_loss"
    sums, _, tokens = _sums(routing, who)
    T = tokens.sum().clamp_min(1)
    f = _choices(routing).sum(0).to(sums.dtype) / T
    return -(f * (sums.sum(0) / T + eps).log()).sum()


# ---------------------------------------------------------------- balance of weights and of the smooth load
def importance_loss(routing: Routing) -> Tensor:
    """Importance loss of Shazeer et al. (arXiv 1701.06538, eq. 6-7): CV² over the experts of their weights' sums.

    `CV² = variance / mean²` of `sum_t w_t,e`, the weight that tokens give expert e: 0 when even, E / K - 1 when all
    choose the same K experts alike. Of a routing with capacity the kept choices count.

    Args:
        routing: from `route` or `Routing.from_topk`, with weights.

    Differentiable in `topk_weights`. With K = 1 and normalised weights these are constant, and so is the loss.
    """
    if routing.topk_weights is None:
        raise ValueError("importance_loss: routing must hold topk_weights, got None; build it with moesaic.route.")
    w, ids, E = routing.topk_weights, routing.topk_ids, routing.num_experts
    # a token has an expert once at most: no two additions meet but those of dropped slots, in the column behind
    dense = w.new_zeros(w.shape[0], E + 1).scatter_add(1, ids.masked_fill(ids < 0, E).long(), w)
    return _cv_squared(dense[:, :E].sum(0))


def load_loss(routing: Routing) -> Tensor:
    """Load loss of Shazeer et al. (arXiv 1701.06538, eq. 8-11): CV² of the smooth load of noisy top-k.

    `load_e` is the number of tokens that would choose e if its noise were drawn again; 0 when even, E / K - 1 when
    all choose the same K experts. The only loss here whose counts carry a gradient.

    Args:
        routing: from `route(..., noise="noisy_topk", training=True)` with the statistics kept.

    Differentiable in the logits and the noise logits.
    """
    if routing.load is None:
        raise ValueError(
            "load_loss: routing must hold the smooth load, got None; route with noise='noisy_topk', training=True and "
            "the statistics kept (statistics=True)."
        )
    return _cv_squared(routing.load)


def _cv_squared(x: Tensor) -> Tensor:
    mean = x.mean()
    return (x - mean).square().mean() / mean.square().clamp_min(torch.finfo(x.dtype).tiny)


# ---------------------------------------------------------------- size of the logits
def z_loss(routing: Routing) -> Tensor:
    """Router z-loss of ST-MoE (arXiv 2202.08906, eq. 5): `1/T · sum_t logsumexp(z_t)²`; it keeps logits small.

    z are the logits as scored: multiplied and capped where the configuration says so. `ln² E` for logits of 0.

    Differentiable in the logits.
    """
    _, squares, tokens = _sums(routing, "z_loss")
    return squares.sum() / tokens.sum().clamp_min(1)


# ---------------------------------------------------------------- what they read
def _sums(routing: Routing, who: str) -> tuple[Tensor, Tensor, Tensor]:
    """Per sequence: sums of probabilities `(S, E)` and of logsumexp² `(S,)`, and the number of tokens `(S,)`."""
    sums, squares = routing.probability_sums, routing.logsumexp_squares
    if sums is None or squares is None:
        sums, squares = _from_logits(routing, who)
    # the probabilities of a token sum to 1, those of a masked one to 0
    return sums, squares, sums.detach().sum(-1).round()


def _from_logits(routing: Routing, who: str) -> tuple[Tensor, Tensor]:
    """The sums of one sequence, T tokens long, from a routing that did not keep them."""
    config, logits = routing.config, routing.logits
    if config is None or logits is None:
        raise ValueError(
            f"{who}: routing must hold its statistics or its logits and configuration, got neither; build it with "
            "moesaic.route."
        )
    if config.shared_logits:
        logits = logits[:, : -config.shared_logits]
    z = _torch._transform(logits, config)
    if config.policy != "expert_choice":
        masked = (routing.chosen_ids < 0).all(-1, keepdim=True)  # here nothing else leaves a token without a choice
        z = z.masked_fill(masked, _torch.NEG_INF)
    scores = z if config.order == "post" else _torch._scores(z, config.score)
    p = _torch._probabilities(z, scores, config)
    return p.sum(0, keepdim=True), _torch._logsumexp(z).square().sum(0, keepdim=True)


def _choices(routing: Routing) -> Tensor:
    """`(S, E)`: n, how often each expert was chosen before any drop."""
    if routing.choices is not None:
        return routing.choices
    if routing.undropped_ids is None:
        return routing.tokens_per_expert[None]
    columns = routing.num_experts + routing.config.extra_experts
    return _counts(routing.undropped_ids.reshape(-1), columns).int()[None]


def _counts(ids: Tensor, columns: int) -> Tensor:
    """How often each id below `columns` occurs; negative ones are left out."""
    ids = ids.long()
    counts = ids.new_zeros(columns + 1)
    return counts.scatter_add(0, ids.masked_fill(ids < 0, columns), torch.ones_like(ids))[:columns]


def _first_choices(routing: Routing, columns: int) -> Tensor:
    """`(E,)`: how many tokens have expert e as their first choice."""
    return _counts(routing.chosen_ids[:, 0], columns)
