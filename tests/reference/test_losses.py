"""Auxiliary losses: their values by hand, against naive loops and other libraries' formulas, and their gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.autograd import gradcheck

import moesaic
from moesaic import RouterConfig, Routing, route

E, K = 8, 2
SCORES = ("softmax", "sigmoid", "sqrt_softplus")
LOSSES = {
    "load_balancing": moesaic.load_balancing_loss,
    "load_balancing, token": lambda r: moesaic.load_balancing_loss(r, normalize="token"),
    "load_balancing, first": lambda r: moesaic.load_balancing_loss(r, normalize="first"),
    "sequence_balance": moesaic.sequence_balance_loss,
    "device_balance": lambda r: moesaic.device_balance_loss(r, 4),
    "uniform_cross_entropy": moesaic.uniform_cross_entropy_loss,
    "cross_entropy_balance": moesaic.cross_entropy_balance_loss,
    "importance": moesaic.importance_loss,
    "z": moesaic.z_loss,
}
SEQUENCE_ONLY = "sequence_balance"


def logits_of(T: int = 24, seed: int = 0, experts: int = E) -> torch.Tensor:
    """fp64 and far from ties, so that a small step changes no choice."""
    return 2 * torch.randn(T, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def even_logits(experts: int, top_k: int, high: float = 40.0) -> torch.Tensor:
    """Every group of `top_k` consecutive experts is the choice of as many tokens."""
    groups = torch.arange(experts).view(-1, top_k).repeat(3, 1)
    return torch.zeros(len(groups), experts, dtype=torch.float64).scatter_(1, groups, high)


def one_group_logits(experts: int, top_k: int, high: float = 40.0) -> torch.Tensor:
    logits = torch.zeros(12, experts, dtype=torch.float64)
    logits[:, :top_k] = high
    return logits


def naive(logits: torch.Tensor, ids: torch.Tensor, score: str) -> tuple[list[int], list[float]]:
    """`(n, P)` by loops: how often each expert is in `ids`, and the mean of its normalised scores."""
    T, columns = logits.shape
    n, P = [0] * columns, [0.0] * columns
    for t in range(T):
        for e in ids[t].tolist():
            n[e] += 1
        z = logits[t].tolist()
        if score == "softmax":
            s = [math.exp(v - max(z)) for v in z]
        elif score == "sigmoid":
            s = [1 / (1 + math.exp(-v)) for v in z]
        else:
            s = [math.sqrt(math.log1p(math.exp(v))) for v in z]
        for e in range(columns):
            P[e] += s[e] / sum(s) / T
    return n, P


def close(got: torch.Tensor, want: float, rel: float = 1e-12) -> None:
    assert got.shape == ()
    assert got.item() == pytest.approx(want, rel=rel, abs=1e-15)


# ---------------------------------------------------------------- values by hand
@pytest.mark.parametrize("top_k", (1, 2, 4))
def test_even_choices_give_1(top_k):
    r = route(even_logits(E, top_k), top_k=top_k, statistics=True)
    close(moesaic.load_balancing_loss(r), 1)
    close(moesaic.load_balancing_loss(r, normalize="token"), top_k)
    close(moesaic.sequence_balance_loss(r), 1)
    close(moesaic.device_balance_loss(r, 4), 1)
    close(moesaic.importance_loss(r), 0)
    close(moesaic.uniform_cross_entropy_loss(r, eps=0), math.log(E))
    close(moesaic.cross_entropy_balance_loss(r, eps=0), top_k * math.log(E))


def test_one_expert_for_all_gives_the_number_of_experts():
    r = route(one_group_logits(E, 1), top_k=1, statistics=True)
    for loss in (moesaic.load_balancing_loss, moesaic.sequence_balance_loss):
        close(loss(r), E)
    close(moesaic.load_balancing_loss(r, normalize="first"), E)
    close(moesaic.device_balance_loss(r, 4), 4)
    close(moesaic.importance_loss(r), E - 1)
    close(moesaic.uniform_cross_entropy_loss(r), -((E - 1) * math.log(1e-6) + math.log1p(1e-6)) / E, rel=1e-9)
    assert abs(moesaic.cross_entropy_balance_loss(r).item()) < 2e-6, "the literal form calls collapse its best"


def test_k_experts_for_all():
    r = route(one_group_logits(E, K), top_k=K, statistics=True)
    close(moesaic.load_balancing_loss(r), E / K)
    close(moesaic.load_balancing_loss(r, normalize="token"), E)
    close(moesaic.load_balancing_loss(r, normalize="first"), E / K)
    close(moesaic.importance_loss(r), E / K - 1)


def test_devices_are_even_though_their_experts_are_not():
    r = route(even_logits(4, 1).repeat(1, 2)[:, [0, 4, 1, 5, 2, 6, 3, 7]] - torch.tensor([0, 50.0] * 4), top_k=1)
    assert r.tokens_per_expert.tolist() == [3, 0] * 4
    close(moesaic.device_balance_loss(r, 4), 1, rel=1e-9)
    close(moesaic.load_balancing_loss(r), 2, rel=1e-9)


def test_z_loss_of_equal_logits():
    r = route(torch.zeros(5, E), top_k=K)
    assert moesaic.z_loss(r).item() == pytest.approx(math.log(E) ** 2, rel=1e-6)
    capped = route(torch.full((5, E), 1e4), top_k=K, soft_cap=3.0, multiplier=0.5)
    assert moesaic.z_loss(capped).item() == pytest.approx((3 + math.log(E)) ** 2, rel=1e-6), "z are the capped logits"


def test_literal_cross_entropy_is_reproduced():
    """Worked from the published text: f = count / batch, not divided by K; loss = -sum f log(P + 1e-6)."""
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2], [3, 0, 1]], dtype=torch.float64)
    P, f = torch.softmax(logits, -1).mean(0).tolist(), [2 / 3, 2 / 3, 2 / 3]
    want = -sum(a * math.log(b + 1e-6) for a, b in zip(f, P, strict=True))
    close(moesaic.cross_entropy_balance_loss(route(logits, top_k=2, statistics=True)), want)


# ---------------------------------------------------------------- against formulas written out
@pytest.mark.parametrize("score", SCORES)
def test_switch_and_its_normalisers_against_loops(score):
    logits = logits_of()
    r = route(logits, top_k=K, score=score, statistics=True)
    n, P = naive(logits, r.topk_ids, score)
    T = len(logits)
    close(moesaic.load_balancing_loss(r), E * sum(a / (T * K) * b for a, b in zip(n, P, strict=True)))
    close(moesaic.load_balancing_loss(r, normalize="token"), E * sum(a / T * b for a, b in zip(n, P, strict=True)))
    first, _ = naive(logits, r.topk_ids[:, :1], score)
    close(moesaic.load_balancing_loss(r, normalize="first"), E * sum(a / T * b for a, b in zip(first, P, strict=True)))


@pytest.mark.parametrize("score", SCORES)
def test_sequence_wise_is_deepseek_v3s_formula(score):
    logits, S = logits_of(T=21), 3
    r = route(logits, top_k=K, score=score, sequences=S, statistics=True)
    want = 0.0
    for rows in torch.arange(21).view(S, -1):
        N = len(rows)
        n, P = naive(logits[rows], r.topk_ids[rows], score)
        f = [E / (K * N) * count for count in n]
        want += sum(a * b for a, b in zip(f, P, strict=True)) / S
    close(moesaic.sequence_balance_loss(r), want)
    whole = moesaic.load_balancing_loss(route(logits, top_k=K, score=score, sequences=1, statistics=True))
    close(moesaic.load_balancing_loss(r), whole.item())
    assert abs(want - whole.item()) > 1e-3, "the inputs must tell sequences from the batch"


def test_device_level_is_deepseek_v2s_formula():
    logits, D = logits_of(), 4
    r = route(logits, top_k=K, statistics=True)
    n, P = naive(logits, r.topk_ids, "softmax")
    f = [E / (K * len(logits)) * count for count in n]
    want = 0.0
    for d in range(D):
        group = range(d * E // D, (d + 1) * E // D)
        want += sum(f[i] for i in group) / len(group) * sum(P[i] for i in group)
    close(moesaic.device_balance_loss(r, D), want)


def test_hugging_faces_loss_is_k_times_ours():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = logits_of().float()
    theirs = modeling.load_balancing_loss_func((logits,), E, K)
    r = route(logits, top_k=K)
    assert theirs.item() == pytest.approx(K * moesaic.load_balancing_loss(r).item(), rel=1e-6)
    assert theirs.item() == pytest.approx(moesaic.load_balancing_loss(r, normalize="token").item(), rel=1e-6)


def test_hugging_faces_loss_with_padding_is_ours_with_a_mask():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = logits_of().float()
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    theirs = modeling.load_balancing_loss_func((logits,), E, K, mask)
    for statistics in (True, False):
        r = route(logits, top_k=K, token_mask=mask.view(-1) > 0, statistics=statistics)
        assert theirs.item() == pytest.approx(moesaic.load_balancing_loss(r, normalize="token").item(), rel=1e-6)


def test_importance_and_load_are_shazeers_formulas():
    g = torch.Generator().manual_seed(0)
    logits, noise = logits_of(), torch.randn(24, E, dtype=torch.float64, generator=g)
    r = route(logits, top_k=K, noise="noisy_topk", noise_logits=noise, training=True, generator=3, statistics=True)
    importance = [0.0] * E
    for t in range(24):
        for k in range(K):
            importance[r.topk_ids[t, k]] += r.topk_weights[t, k].item()

    def cv_squared(values):
        mean = sum(values) / E
        return sum((v - mean) ** 2 for v in values) / E / mean**2

    close(moesaic.importance_loss(r), cv_squared(importance))
    close(moesaic.load_loss(r), cv_squared(r.load.tolist()))


def test_padding_tokens_take_no_part():
    logits = logits_of()
    mask = torch.arange(24) % 3 > 0
    masked = route(logits, top_k=K, token_mask=mask, statistics=True)
    alone = route(logits[mask], top_k=K, statistics=True)
    for name, loss in LOSSES.items():
        assert loss(masked).item() == pytest.approx(loss(alone).item(), rel=1e-12), name


def test_a_sequence_of_padding_does_not_count():
    logits = logits_of()
    mask = torch.arange(24) < 16
    masked = route(logits, top_k=K, token_mask=mask, sequences=3, statistics=True)
    alone = route(logits[:16], top_k=K, sequences=2, statistics=True)
    close(moesaic.sequence_balance_loss(masked), moesaic.sequence_balance_loss(alone).item())


# ---------------------------------------------------------------- paths, drops, edges
CONFIGS = [
    *(dict(score=score) for score in (*SCORES,)),
    dict(score="softmax", order="post"), dict(score="sigmoid", order="post"), dict(score="log_sigmoid", order="pre"),
    dict(soft_cap=5.0, multiplier=0.7), dict(score="sigmoid", num_groups=4, topk_groups=2),
    dict(score="sigmoid", shared_logits=1), dict(policy="top_p", threshold=0.6), dict(policy="expert_choice"),
]  # fmt: skip


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_sums_kept_and_sums_made_from_logits_agree(fields):
    config = RouterConfig(top_k=K, **fields)
    logits = logits_of(experts=config.columns(E)).requires_grad_()
    kept, bare = (route(logits, config, statistics=keep) for keep in (True, False))
    assert kept.probability_sums is not None and bare.probability_sums is None
    for name, loss in LOSSES.items():
        if name == SEQUENCE_ONLY:
            continue
        a, b = loss(kept), loss(bare)
        close(a, b.item())
        (ga,), (gb,) = (torch.autograd.grad(v, logits, retain_graph=True) for v in (a, b))
        torch.testing.assert_close(ga, gb, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("policy", ("position", "probability"))
def test_drops_do_not_change_f(policy):
    logits = logits_of().requires_grad_()
    free = route(logits, top_k=K, training=True)
    tight = route(logits, top_k=K, training=True, capacity_factor=0.5, drop_policy=policy)
    assert tight.tokens_per_expert.sum() < free.tokens_per_expert.sum()
    for name in ("load_balancing", "load_balancing, token", "sequence_balance", "device_balance",
                 "cross_entropy_balance", "uniform_cross_entropy", "z"):  # fmt: skip
        close(LOSSES[name](tight), LOSSES[name](free).item())


@pytest.mark.parametrize("normalize", ["topk", "token", "first"])
@pytest.mark.parametrize("statistics", [False, True])
def test_drops_and_experts_without_matrices_do_not_change_f(normalize, statistics):
    logits = logits_of()
    for extra in ({}, dict(identity_experts=2)):
        free, tight = (
            route(logits, top_k=K, statistics=statistics, capacity_factor=factor, **extra) for factor in (None, 0.4)
        )
        assert (tight.topk_ids < 0).sum() > (free.topk_ids < 0).sum()
        assert torch.equal(tight.chosen_ids, free.chosen_ids)
        loss = moesaic.load_balancing_loss(free, normalize=normalize)
        close(moesaic.load_balancing_loss(tight, normalize=normalize), loss.item())


def test_what_cannot_be_known_is_refused():
    logits = logits_of()
    with pytest.raises(ValueError, match="pass sequences=S"):
        moesaic.sequence_balance_loss(route(logits, top_k=K, sequences=3))
    with pytest.raises(ValueError, match="normalize must be one of"):
        moesaic.load_balancing_loss(route(logits, top_k=K), normalize="sigmoid")
    for D in (0, 3):
        with pytest.raises(ValueError, match="num_devices must divide"):
            moesaic.device_balance_loss(route(logits, top_k=K), D)
    with pytest.raises(ValueError, match="noise='noisy_topk'"):
        moesaic.load_loss(route(logits, top_k=K, statistics=True))
    theirs = Routing.from_topk(None, torch.zeros(3, 1, dtype=torch.int32), E)
    with pytest.raises(ValueError, match="topk_weights"):
        moesaic.importance_loss(theirs)
    for loss in (moesaic.load_balancing_loss, moesaic.z_loss, moesaic.uniform_cross_entropy_loss):
        with pytest.raises(ValueError, match=r"build it with moesaic\.route"):
            loss(theirs)


def test_importance_of_a_routing_of_ones_own():
    weights = torch.tensor([[1.0, 3.0], [2.0, 5.0]])
    r = Routing.from_topk(weights, torch.tensor([[0, 1], [2, -1]]), 4)
    mean, sums = 6 / 4, [1.0, 3, 2, 0]
    want = sum((s - mean) ** 2 for s in sums) / 4 / mean**2
    assert moesaic.importance_loss(r).item() == pytest.approx(want, rel=1e-6)


def test_zero_experts_count_among_the_candidates():
    logits = even_logits(E, 1)
    r = route(logits, top_k=1, zero_experts=2, statistics=True)
    assert r.num_experts == E - 2 and r.choices.sum() == len(logits)
    close(moesaic.load_balancing_loss(r), 1)
    close(moesaic.device_balance_loss(r, 2), (E - 2) / E)
    close(moesaic.load_balancing_loss(route(logits, top_k=1, zero_experts=2)), 1)


@pytest.mark.parametrize("keep", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_no_tokens_give_0(dtype, keep):
    logits = torch.zeros(0, E, dtype=dtype, requires_grad=True)
    r = route(logits, top_k=K, statistics=keep)
    for name, loss in LOSSES.items():
        if name == SEQUENCE_ONLY and not keep:
            continue
        value = loss(r)
        assert value.item() == 0, name
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        value.backward(retain_graph=True)
    r = dataclasses.replace(r, load=torch.zeros(E, dtype=dtype))
    assert moesaic.load_loss(r).item() == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_the_dtype_stays(dtype):
    r = route(logits_of().to(dtype).requires_grad_(), top_k=K)
    assert all(loss(r).dtype == dtype for loss in LOSSES.values())


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name, score):
    config = RouterConfig(top_k=K, score=score, order="pre")
    logits = logits_of(T=6).requires_grad_()
    assert gradcheck(lambda x: LOSSES[name](route(x, config, sequences=3, statistics=True)), logits)


def test_gradients_of_the_smooth_load():
    noise = torch.randn(12, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits = logits_of(T=12).requires_grad_()
    r = route(logits, top_k=K, noise="noisy_topk", noise_logits=noise, training=True, generator=3)
    for grad in torch.autograd.grad(moesaic.load_loss(r), (logits, noise)):
        assert grad.isfinite().all() and grad.abs().max() > 1e-4
    assert gradcheck(
        lambda load: moesaic.load_loss(dataclasses.replace(r, load=load)), r.load.detach().requires_grad_()
    )


def test_the_gradient_of_switch_is_f():
    """`d loss / d P_e = E · f_e`, and P_e's gradient is the softmax's."""
    logits = logits_of().requires_grad_()
    r = route(logits, top_k=K)
    (grad,) = torch.autograd.grad(moesaic.load_balancing_loss(r), logits)
    p = torch.softmax(logits.detach(), -1)
    g = E * r.choices.sum(0).double() / (24 * K) / 24
    torch.testing.assert_close(grad, p * (g - (p * g).sum(-1, keepdim=True)), rtol=1e-10, atol=1e-15)


# ---------------------------------------------------------------- several ranks
SPLIT = (5, 19)  # tokens of rank 0 and rank 1


def _rank(rank: int, file: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    got = {}
    for tokens in (SPLIT, (0, 24)):
        for normalize in ("topk", "token", "first"):
            logits = logits_of().split(tokens)[rank].clone().requires_grad_()
            r = route(logits, top_k=K, score="sigmoid")
            loss = moesaic.load_balancing_loss(r, normalize=normalize, group=dist.group.WORLD)
            (grad,) = torch.autograd.grad(loss, logits)
            got[tokens, normalize] = (loss.detach(), grad)
    torch.save(got, f"{out}.{rank}")
    dist.destroy_process_group()


def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(tmp_path):
    mp.spawn(_rank, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    ranks = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    for tokens, normalize in ranks[0]:
        logits = logits_of().requires_grad_()
        want = moesaic.load_balancing_loss(route(logits, top_k=K, score="sigmoid"), normalize=normalize)
        (grad,) = torch.autograd.grad(want, logits)
        losses, grads = zip(*(got[tokens, normalize] for got in ranks), strict=True)
        close(sum(losses) / 2, want.item())
        torch.testing.assert_close(torch.cat(grads) / 2, grad, rtol=1e-10, atol=1e-15)
        local = [
            moesaic.load_balancing_loss(route(part, top_k=K, score="sigmoid"), normalize=normalize)
            for part in logits.detach().split(SPLIT)
        ]
        assert abs(sum(local).item() / 2 - want.item()) > 1e-3, "the ranks must differ for this to say anything"


# ---------------------------------------------------------------- what they do to a router
def trained(loss, steps: int = 120) -> tuple[float, float]:
    """Max over mean load of a linear router, before and after training on one loss."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(8, generator=g)
    w = (torch.randn(E, 8, generator=g) / 8**0.5).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=0.02)
    loads = []
    for _ in range(steps):
        r = route((torch.randn(1024, 8, generator=g) + 0.6 * mean) @ w.T, top_k=K)
        loads.append((r.tokens_per_expert.max() * E / r.tokens_per_expert.sum()).item())
        optimizer.zero_grad()
        loss(r).backward()
        optimizer.step()
    return loads[0], sum(loads[-10:]) / 10


def test_what_each_loss_drives_at():
    before, switch = trained(moesaic.load_balancing_loss)
    assert 1.5 < before < 2.5, "the router must start uneven, but far from collapse"
    assert switch < 1.2
    assert trained(moesaic.uniform_cross_entropy_loss)[1] < 1.2
    assert trained(moesaic.cross_entropy_balance_loss)[1] > 3, "the literal form rewards collapse"
