"""What happens around the routing kernel: noise, policies that choose in their own way, rare weights, capacity.

Plain torch on any device, differentiable, without host synchronisation. To add a policy, write `choose(z, config, ...)`
and put it in `CHOOSE`; its ids then pass through the same operator as everyone's.

Legend: T tokens, E experts, K choices, C slots that an expert keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _torch
from .config import RouterConfig

NEG_INF = float("-inf")
Generator = torch.Generator | int | None


# ---------------------------------------------------------------- noise
def generator_of(generator: Generator, device: torch.device) -> torch.Generator | None:
    """An int seeds a generator made for this call, so that the same call draws the same numbers again."""
    if generator is None:
        return None
    if isinstance(generator, int):
        return torch.Generator(device).manual_seed(generator)
    if not isinstance(generator, torch.Generator) or generator.device.type != device.type:
        have = generator.device if isinstance(generator, torch.Generator) else repr(generator)
        raise ValueError(f"route: generator must be a torch.Generator on {device}, an int or None, got {have}.")
    return generator


def _draw(make: Callable, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """`make` is `torch.rand` or `torch.randn`. Even `generator=None` keeps a traced call from having dynamic shapes."""
    given = {} if generator is None else {"generator": generator}
    return make(like.shape, dtype=like.dtype, device=like.device, **given)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """U(0, 1) that is never 0, so that its logarithm is finite."""
    return _draw(torch.rand, like, generator).clamp_min(torch.finfo(like.dtype).tiny)


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise `-ln(-ln U)`: the argmax of logits plus it is a sample of their softmax."""
    # 1 - eps / 2 keeps the inner logarithm away from 0
    u = _uniform(like, generator).clamp_max(1 - torch.finfo(like.dtype).eps / 2)
    return -torch.log(-torch.log(u))


def noisy(logits: Tensor, config: RouterConfig, noise_logits: Tensor | None, generator: torch.Generator | None):
    """`(noisy logits, standard deviation or None)`; the deviation is noisy top-k's, for its load loss."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    std = None
    if config.noise == "gumbel":
        x = x + gumbel(x, generator)
    elif config.noise == "jitter":
        width = config.noise_std
        factor = 1 - width + 2 * width * _draw(torch.rand, x, generator)
        x = (x * factor).masked_fill(x == NEG_INF, NEG_INF)  # the factor may be 0, and negative past a width of 1
    elif config.noise != "none":
        normal = _draw(torch.randn, x, generator)
        if config.noise == "noisy_topk":
            assert noise_logits is not None
            std = F.softplus(noise_logits.to(x.dtype)) + 1e-2  # Shazeer's floor, which keeps the load loss finite
            x = x + normal * std
        else:
            x = x + config.noise_std * normal
    return (x / config.temperature if config.temperature != 1.0 else x), std


def sample_experts(logits: Tensor, config: RouterConfig, generator: torch.Generator | None) -> Tensor:
    """`(T, E)` bool: each expert with probability `expert_sampling`, the same for all tokens, but never fewer than K.

    Where a mask leaves a token fewer than K of those, it gets the ones whose draw came nearest to being kept.
    """
    u, order = _draw(torch.rand, logits.new_empty(logits.shape[-1], dtype=torch.float32), generator).sort()
    alive = (logits != NEG_INF)[:, order]
    kept = alive & ((u < config.expert_sampling) | (alive.cumsum(-1) <= config.top_k))
    return kept[:, order.argsort()]


# ---------------------------------------------------------------- policies
def expert_choice(z: Tensor, config: RouterConfig, bias: Tensor | None, **_: Any) -> Tensor:
    """Each expert takes its C best tokens: `(T, max_choices)`, -1 where a token has no further expert.

    Every expert gets exactly C tokens (fewer only if `max_choices` cuts). Ties go to the lowest token.
    """
    T, E = z.shape
    factor = config.capacity_factor or 1.0
    C = config.replace(capacity_factor=factor, eval_capacity_factor=None).capacity(T, E, True) or 0
    on_logits = config.bias_on == "logits" or config.order == "post"
    choice = z if on_logits else _torch._scores(z, config.score)
    if bias is not None:
        choice = choice + bias.to(z.dtype)
    choice = choice.masked_fill(z == NEG_INF, NEG_INF)
    tokens = _torch._topk(choice.mT, C)
    taken = torch.zeros_like(choice, dtype=torch.bool).mT.scatter(1, tokens, True).mT & (choice != NEG_INF)
    ids = _torch._topk(choice.masked_fill(~taken, NEG_INF), min(config.max_choices or E, E))
    return ids.masked_fill(~taken.gather(1, ids), -1)


def balanced(z: Tensor) -> Tensor:
    """Logarithm of the matrix `d0 · exp(z) · d1` whose rows sum to 1 and columns to T/E; masked rows and columns to 0.

    Iterates a fixed number of times: watching for convergence would wait for the device. Source: Megatron-LM.
    """
    log = z.nan_to_num(NEG_INF, neginf=NEG_INF)  # a NaN takes no part, and keeps to its token
    for dim in (1, *(0, 1) * 20):
        log = log - _torch._logsumexp(log, dim)
    return log.masked_fill(z.isnan(), float("nan"))


def sinkhorn(z: Tensor, config: RouterConfig, **_: Any) -> Tensor:
    """K largest of the balanced matrix. For training; in evaluation the kernel makes the plain choice."""
    log = balanced(z)
    ids = _torch._topk(log, config.top_k)
    return ids.masked_fill(log.gather(1, ids) == NEG_INF, -1)


CHOOSE = {"expert_choice": expert_choice, "sinkhorn": sinkhorn}


class _Heun(torch.autograd.Function):
    """Scales the multiplier forward; backward gives the scores Heun's third-order estimate (arXiv 2409.12136)."""

    @staticmethod
    def forward(ctx, z: Tensor, multiplier: Tensor, ids: Tensor, gates: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(multiplier, ids, gates)
        return multiplier * factor

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        multiplier, ids, gates = ctx.saved_tensors
        grad = grad * multiplier
        return (-gates * grad).scatter_add(-1, ids, grad), None, None, None, None


def sparsemixer(
    z: Tensor, config: RouterConfig, training: bool, generator: torch.Generator | None, given: Tensor | None = None
):
    """`(weights, ids)` of Phi-MoE's router: K experts one after another, each sampled from those within the jitter.

    For choice k the candidates are the experts whose logit lies within `2 · noise_std` (the jitter) of the largest of
    the remaining ones, relative to the larger magnitude. The weight is the chosen one's softmax among the candidates.
    With `given` ids `(T, K)` those are chosen, from the same random numbers.
    """
    weights, ids, rest = [], [], z
    for k in range(config.top_k):
        with torch.no_grad():
            top, chosen = rest.max(-1, keepdim=True)
            dead = top == NEG_INF  # nobody is left
            scale = torch.maximum(z.abs(), top)
            far = (top - z) / scale > 2 * config.noise_std
        near = rest.masked_fill(far, NEG_INF).masked_fill(dead, 0.0)
        if training:
            chosen = (near + gumbel(near, generator)).argmax(-1, keepdim=True)
        if given is not None:
            chosen = given[:, k : k + 1].long()
            dead = dead | (chosen < 0)
            chosen = chosen.clamp_min(0)
        gates = torch.softmax(near, -1)
        weight = gates.gather(-1, chosen)
        if training:
            likely = gates.argmax(-1, keepdim=True)
            keep = (chosen == likely) | (_uniform(weight, generator) > 0.75)
            weight = _Heun.apply(z, weight, chosen, gates, torch.where(keep, 1.0, 1.0 / 3.0).to(z.dtype))
        weights.append(weight.masked_fill(dead, 0.0))
        ids.append(chosen.masked_fill(dead, -1))
        rest = torch.where(dead, rest, rest.scatter(-1, chosen, NEG_INF))
    return torch.cat(weights, -1), torch.cat(ids, -1).int()


# ---------------------------------------------------------------- weights
class _StraightThrough(torch.autograd.Function):
    """Exactly 1 for every choice; the gradient passes to the soft weight."""

    @staticmethod
    def forward(ctx, weights: Tensor, live: Tensor) -> Tensor:
        ctx.save_for_backward(live)
        return live.to(weights.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (live,) = ctx.saved_tensors
        return grad * live, None


def finish_weights(weights: Tensor, ids: Tensor, shared: Tensor | None, config: RouterConfig, scaled: bool):
    """What the kernel left out: `(weights, shared weights)` from the plain scores of the choices.

    `shared` holds the logits of shared experts, whose scores join the normalisation. `scaled`: the weights already are.
    """
    live = ids >= 0
    factor = config.scale / (config.top_k if config.divide_by_k else 1)
    shared_scores = None if shared is None else _torch._scores(_torch._transform(shared, config), config.score)
    if config.weights_later:
        every = weights if shared_scores is None else torch.cat((weights, shared_scores), -1)
        alive = live if shared_scores is None else F.pad(live, (0, shared_scores.shape[1]), value=True)
        if config.norm == "softmax":
            every = _torch._softmax(every.masked_fill(~alive, NEG_INF))
        else:
            powers = every.abs().pow(config.norm_p).sum(-1, keepdim=True)
            none = powers == 0  # where a root has no derivative
            norm = powers.masked_fill(none, 1.0).pow(1 / config.norm_p).masked_fill(none, 0.0)
            norm = norm.clamp_min(config.norm_min) + config.norm_eps
            every = every / norm.masked_fill(norm == 0, 1.0)
        every = every.masked_fill(~alive, 0.0)
        weights = every[:, : ids.shape[1]]
        shared_scores = None if shared is None else every[:, ids.shape[1] :]
    if config.straight_through:
        weights = _StraightThrough.apply(weights, live)
    return weights if scaled else weights * factor, None if shared_scores is None else shared_scores * factor


def expected_load(clean: Tensor, noisy_logits: Tensor, std: Tensor, top_k: int) -> Tensor:
    """`(E,)`: how many tokens would choose each expert if its own noise were drawn again (arXiv 1701.06538, eq. 8-9).

    `P = Φ((clean_e - threshold) / std_e)` with the K-th largest noisy logit among the other experts as threshold; 0 for
    a masked expert, 1 where no more than K are left. Differentiable in the clean logits and in std.
    """
    E, alive = clean.shape[-1], clean != NEG_INF
    if top_k >= E:
        return alive.sum(0).to(std.dtype)
    top = noisy_logits.detach().topk(top_k + 1, -1).values
    threshold = torch.where(noisy_logits > top[:, -1:], top[:, -1:], top[:, -2:-1])
    contested = alive & (threshold != NEG_INF)
    gap = torch.where(contested, clean.to(std.dtype) - threshold, 0.0) / std
    return torch.where(contested, torch.special.ndtr(gap), alive.to(std.dtype)).sum(0)
