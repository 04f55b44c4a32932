"""What must hold for every routing and every size: laws, not examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import (
    RouterConfig,
    Routing,
    fused_experts,
    grouped_matmul,
    load_balancing_loss,
    permute,
    route,
    unpermute,
    z_loss,
)
from moesaic.cases import CASES, DISTRIBUTIONS
from moesaic.testing import STAGES, adversarial_ids, assert_close, failure, make_inputs

settings.register_profile("moesaic", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("moesaic")


@st.composite
def choices(draw, weights=True):
    """A routing: any E, K, T, with dropped slots and repeated experts."""
    E, K, T = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(0, 9))
    ids = draw(st.lists(st.lists(st.integers(-1, E - 1), min_size=K, max_size=K), min_size=T, max_size=T))
    ids = torch.tensor(ids, dtype=torch.long).reshape(T, K)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(T, K, dtype=torch.float64, generator=g) if weights else None
    return w, ids, E, g


@given(choices())
def test_tables_agree_and_invert(choice):
    w, ids, E, _ = choice
    a, b = (Routing.from_topk(w, ids, E, implementation=i) for i in ("reference", "torch"))
    for name in ("topk_ids", "tokens_per_expert", "expert_offsets", "row_order", "row_index"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype == torch.int32 and torch.equal(x, y), name
    assert sorted(b.row_order.tolist()) == list(range(ids.numel()))
    assert int(b.expert_offsets[-1]) == int((ids >= 0).sum())
    for slot, row in enumerate(b.row_index.tolist()):
        assert (row == -1) == (ids.flatten()[slot] < 0)
        assert row < 0 or b.row_order[row] == slot


@given(choices())
def test_unpermute_of_permute_multiplies_by_the_live_choices(choice):
    w, ids, E, g = choice
    r = Routing.from_topk(w, ids, E)
    x = torch.randn(ids.shape[0], 3, dtype=torch.float64, generator=g)
    live = (ids >= 0).sum(1, keepdim=True)
    assert_close(unpermute(permute(x, r), r, weights=False), live * x, 5)


@given(choices())
def test_permute_and_unpermute_are_adjoint(choice):
    w, ids, E, g = choice
    r = Routing.from_topk(w, ids, E)
    x = torch.randn(ids.shape[0], 3, dtype=torch.float64, generator=g, requires_grad=True)
    y = torch.randn(ids.numel(), 3, dtype=torch.float64, generator=g, requires_grad=True)
    left, right = (permute(x, r) * y).sum(), (x * unpermute(y, r, weights=False)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    if ids.numel():
        gx = torch.autograd.grad(left, x, retain_graph=True)[0]
        torch.testing.assert_close(gx, unpermute(y, r, weights=False), rtol=1e-12, atol=1e-12)


@given(choices(), st.randoms(use_true_random=False))
def test_relabelling_experts_changes_nothing(choice, random):
    w, ids, E, g = choice
    up, down = (torch.randn(E, *s, dtype=torch.float64, generator=g) for s in ((6, 4), (4, 3)))
    x = torch.randn(ids.shape[0], 4, dtype=torch.float64, generator=g)
    new = list(range(E))
    random.shuffle(new)
    new = torch.tensor(new)
    relabelled = torch.where(ids < 0, -1, new[ids.clamp_min(0)])
    inverse = torch.argsort(new)
    y = fused_experts(x, up, down, Routing.from_topk(w, ids, E))
    z = fused_experts(x, up[inverse], down[inverse], Routing.from_topk(w, relabelled, E))
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)


@given(choices())
def test_fused_is_the_composition_of_its_stages(choice):
    w, ids, E, g = choice
    up, down = (torch.randn(E, *s, dtype=torch.float64, generator=g) for s in ((6, 4), (4, 3)))
    x = torch.randn(ids.shape[0], 4, dtype=torch.float64, generator=g)
    r = Routing.from_topk(w, ids, E)
    h = grouped_matmul(permute(x, r), up, r)
    a = torch.nn.functional.silu(h[:, :3]) * h[:, 3:]
    assert_close(fused_experts(x, up, down, r), unpermute(grouped_matmul(a, down, r), r), 8, 2)


@given(choices())
def test_a_token_does_not_feel_its_neighbours(choice):
    """Batch invariance of meaning: a token alone gives what it gives in the batch (here up to rounding)."""
    w, ids, E, g = choice
    if not ids.shape[0]:
        return
    up, down = (torch.randn(E, *s, dtype=torch.float64, generator=g) for s in ((6, 4), (4, 3)))
    x = torch.randn(ids.shape[0], 4, dtype=torch.float64, generator=g)
    y = fused_experts(x, up, down, Routing.from_topk(w, ids, E))
    alone = fused_experts(x[:1], up, down, Routing.from_topk(w[:1], ids[:1], E))
    torch.testing.assert_close(alone, y[:1], rtol=1e-12, atol=1e-12)


@st.composite
def routers(draw):
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    E = groups * draw(st.integers(2, 6))
    kept = draw(st.integers(1, groups))
    reach = E // groups * (kept if groups > 1 else 1)
    order = draw(st.sampled_from(["pre", "pre_renorm"] if groups > 1 else ["pre", "pre_renorm", "post"]))
    config = RouterConfig(
        draw(st.integers(1, reach)), draw(st.sampled_from(["softmax", "sigmoid"])), order,
        draw(st.sampled_from([0.0, 1e-20, 1e-6])), draw(st.sampled_from([1.0, 2.5])), groups, kept,
        draw(st.sampled_from(["max", "top2_sum"])),
    )  # fmt: skip
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(draw(st.integers(0, 6)), E, dtype=torch.float64, generator=g)
    if draw(st.booleans()):
        logits = logits.round()  # many ties
    bias = torch.randn(E, dtype=torch.float64, generator=g) if draw(st.booleans()) else None
    return logits, config, bias


@given(routers())
def test_router_matches_its_reference(router):
    logits, config, bias = router
    out = []
    for implementation in ("reference", "torch"):
        x = logits.clone().requires_grad_()
        r = route(x, config, bias=bias, implementation=implementation)
        cotangent = torch.arange(r.topk_weights.numel(), dtype=torch.float64).view(r.topk_weights.shape).cos()
        out.append((r, *torch.autograd.grad(r.topk_weights, x, cotangent)))
    (ref, dref), (got, dgot) = out
    assert torch.equal(ref.topk_ids, got.topk_ids)
    assert torch.equal(ref.row_order, got.row_order)
    assert_close(got.topk_weights, ref.topk_weights, logits.shape[1], 4)
    torch.testing.assert_close(dgot, dref, rtol=1e-10, atol=1e-14)


def test_router_gradient_by_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for fields in (
        dict(order="pre"),
        dict(order="pre_renorm"),
        dict(order="post"),
        dict(order="pre_renorm", score="sigmoid"),
    ):
        assert torch.autograd.gradcheck(
            lambda v, f=fields: route(v, top_k=2, implementation="torch", **f).topk_weights, x
        )


@pytest.mark.parametrize(
    "case", [CASES["qwen3-30b-a3b"], CASES["gpt-oss-120b"], CASES["nemotron-h"]], ids=lambda c: c.name
)
def test_layer_gradient_by_finite_differences(case):
    torch.manual_seed(0)
    i = make_inputs(case.small(5, 4, 3), 4, torch.float64)
    weights = i.routing.topk_weights.clone().requires_grad_()
    leaves = [t.clone().requires_grad_() for t in (i.x, i.w_gate_up, i.w_down, i.b_gate_up, i.b_down) if t is not None]

    def layer(x, up, down, *rest):
        biases = dict(b_gate_up=rest[0], b_down=rest[1]) if len(rest) == 3 else {}
        return fused_experts(**{**i.arguments(), "x": x, "w_gate_up": up, "w_down": down, **biases}, weights=rest[-1])

    assert torch.autograd.gradcheck(layer, (*leaves, weights))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distributions_are_legal_and_of_their_kind(distribution):
    g = torch.Generator().manual_seed(0)
    ids = DISTRIBUTIONS[distribution](512, 16, 4, g).topk(4).indices
    assert all(len(set(row)) == 4 for row in ids.tolist())
    load = torch.bincount(ids.flatten(), minlength=16) / 512
    if distribution == "uniform":
        assert load.max() < 0.4
    elif distribution == "hot":
        assert 0.5 <= load[0] < 0.75
    else:
        assert load.max() > 2 * load.median()


def test_losses():
    """Balance loss is 1 when even, E when all choose one expert; z-loss is the mean squared logsumexp."""
    E = 8
    even = torch.eye(E).repeat(4, 1) * 50
    assert load_balancing_loss(route(even, top_k=1)).item() == pytest.approx(1.0, rel=1e-5)
    collapsed = torch.zeros(32, E)
    collapsed[:, 3] = 50
    assert load_balancing_loss(route(collapsed, top_k=1)).item() == pytest.approx(E, rel=1e-5)
    flat = torch.zeros(5, E)
    assert z_loss(route(flat, top_k=2)).item() == pytest.approx(torch.log(torch.tensor(8.0)).item() ** 2, rel=1e-5)
    logits = torch.randn(32, E, requires_grad=True)
    (grad,) = torch.autograd.grad(load_balancing_loss(route(logits, top_k=2)), logits)
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0
    assert load_balancing_loss(route(torch.zeros(0, E), top_k=2)).item() == 0


def test_judgement_is_scaled():
    """The rule passes rounding, and fails what a loose absolute tolerance would let through."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 512, generator=g).bfloat16(), torch.randn(512, 64, generator=g).bfloat16()
    exact = a.double() @ b.double()
    assert failure((a.float() @ b.float()).bfloat16(), exact, 512) is None
    assert failure(exact.bfloat16() * 1.01, exact, 512)
    small = exact * 1e-4
    wrong = (small * 0.5).float()
    assert torch.allclose(wrong.double(), small, atol=1e-2, rtol=0), "a bare atol passes a result that is half"
    assert failure(wrong, small, 512)
    one_row = exact.clone()
    one_row[7] = one_row[8]
    assert failure(one_row.bfloat16(), exact, 512)
    holed = exact.float()
    holed[3, 3] = float("nan")
    assert "NaN" in failure(holed, exact, 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", adversarial_ids(6, 3, 7))
def test_layer_under_adversarial_routing(kind, dtype):
    case = replace(CASES["qwen3-30b-a3b"].small(33, 17, 6), top_k=3)
    ids = adversarial_ids(6, 3, 7)[kind]
    i = make_inputs(case, ids.shape[0], dtype, ids=ids)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in i.arguments().items()}
    oracle = fused_experts(**wide, implementation="reference")
    assert_close(fused_experts(**i.arguments(), implementation="torch"), oracle, 33, STAGES["fused_experts"])


def test_nan_stays_in_its_token():
    i = make_inputs(CASES["olmoe"].small(), 6)
    x = i.x.clone()
    x[2, 5] = float("nan")
    x[3, 1] = float("inf")
    y = fused_experts(**{**i.arguments(), "x": x})
    clean = fused_experts(**i.arguments())
    assert torch.isnan(y[2]).all()
    keep = [0, 1, 4, 5]
    assert torch.equal(y[keep], clean[keep])


def test_poisoned_weights_of_dropped_slots_do_not_matter():
    i = make_inputs(CASES["olmoe"].small(), 6)
    ids = i.routing.topk_ids.clone()
    ids[::2, 0] = -1
    weights = i.routing.topk_weights.clone()
    clean = fused_experts(**{**i.arguments(), "routing": Routing.from_topk(weights.masked_fill(ids < 0, 0), ids, 8)})
    poisoned = weights.masked_fill(ids < 0, float("nan"))
    assert torch.equal(fused_experts(**{**i.arguments(), "routing": Routing.from_topk(poisoned, ids, 8)}), clean)


def test_views_and_strides():
    """Expanded, transposed and sliced inputs give what their contiguous copies give, forward and backward.

    Up to the order of sums, which may follow the memory's: both are held against the copies' result in fp64.
    """
    i = make_inputs(CASES["qwen3-30b-a3b"].small(16, 8, 4), 6)
    args = i.arguments()
    wide_x = torch.randn(6, 32)[:, ::2]
    for x in (wide_x, wide_x[:1].expand(6, 16)):
        results = []
        for maker in (lambda t: t, lambda t: t.contiguous(), lambda t: t.contiguous().double()):
            xs = maker(x).detach().requires_grad_()
            up = maker(i.w_gate_up.mT.contiguous().mT).detach().requires_grad_()
            y = fused_experts(**{**args, "x": xs, "w_gate_up": up, "w_down": i.w_down.to(xs.dtype)})
            results.append((y, *torch.autograd.grad(y.sum(), (xs, up))))
        for a, b, oracle in zip(*results, strict=True):
            assert_close(a, oracle, 16, STAGES["fused_experts_backward"])
            assert_close(b, oracle, 16, STAGES["fused_experts_backward"])


def test_runs_are_bitwise_equal():
    i = make_inputs(CASES["olmoe"].small(), 40, torch.bfloat16)
    outs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (i.x, i.w_gate_up, i.w_down)]
        y = fused_experts(**{**i.arguments(), "x": leaves[0], "w_gate_up": leaves[1], "w_down": leaves[2]})
        outs.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
