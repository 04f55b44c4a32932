"""Derivatives that are right or refused by name, and settings that one thread or autocast must not leak into."""

from __future__ import annotations

import threading

import pytest
import torch

import moesaic
from moesaic import Routing, Unsupported, fused_experts, grouped_matmul, permute, route, unpermute
from moesaic.ops.gate import router_logits

E, K, T, H, I = 4, 2, 6, 8, 5


def routing(weights: torch.Tensor | None = None) -> Routing:
    ids = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).topk(K, -1).indices
    ids[1, 0] = -1
    return Routing.from_topk(torch.rand(T, K) if weights is None else weights, ids, E)


def layer(x: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    up, down = (torch.randn(s, generator=g) for s in ((E, 2 * I, H), (E, H, I)))
    return fused_experts(x, up, down, routing())


# ---------------------------------------------------------------- second derivatives
@pytest.mark.parametrize("order", ["pre", "pre_renorm", "post"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route_has_second_derivatives(score, order):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)

    def f(z):
        made = route(z, top_k=K, score=score, order=order, scale=1.5)
        return made.topk_weights, moesaic.z_loss(made), moesaic.load_balancing_loss(made)

    assert torch.autograd.gradgradcheck(f, (logits,))


def test_permute_and_unpermute_have_second_derivatives():
    made = routing()
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(T * K, H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: permute(x, made), (x,))
    assert torch.autograd.gradgradcheck(lambda r, w: unpermute(r, made, weights=w), (rows, weights))
    assert torch.autograd.gradgradcheck(lambda r: unpermute(r, made, weights=False), (rows,))


@pytest.mark.parametrize("what", ["fused_experts", "grouped_matmul", "router_logits"])
def test_other_second_derivatives_are_refused_by_name(what):
    x = torch.randn(T * K if what == "grouped_matmul" else T, H, requires_grad=True)
    w = torch.randn(E, I, H)
    call = {
        "fused_experts": lambda: layer(x),
        "grouped_matmul": lambda: grouped_matmul(x, w, routing()),
        "router_logits": lambda: router_logits(x, w[0]),
    }[what]
    (dx,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{what}: its gradient must not be differentiated again"):
        dx.square().sum().backward()


# ---------------------------------------------------------------- transforms
CALLS = {
    "fused_experts": (T, layer),
    "permute": (T, lambda x: permute(x, routing())),
    "unpermute": (T * K, lambda x: unpermute(x, routing())),
    "grouped_matmul": (T * K, lambda x: grouped_matmul(x, torch.ones(E, I, H), routing())),
    "router_logits": (T, lambda x: router_logits(x, torch.ones(E, H))),
    "route": (T, lambda x: route(x, top_k=K).topk_weights),
}


@pytest.mark.parametrize("name", CALLS)
def test_tangents_are_refused_by_name(name):
    rows, call = CALLS[name]
    x = torch.randn(rows, H)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(Unsupported, match=f"{name}: forward-mode derivatives"):
            call(dual)
        call(x)  # what carries no tangent is nobody's business


@pytest.mark.parametrize("name", CALLS)
def test_func_transforms_are_refused_by_name(name):
    rows, call = CALLS[name]
    with pytest.raises(Unsupported, match=f"{name}: must not be called inside a torch.func transform"):
        torch.func.grad(lambda x: call(x).sum())(torch.randn(rows, H))


# ---------------------------------------------------------------- threads and autocast
def test_use_is_a_threads_own():
    inside, left, seen = threading.Event(), threading.Event(), []

    def other():
        seen.append(moesaic.op.forced(None))
        with moesaic.use("reference"):
            inside.set()
            left.wait()
            seen.append(moesaic.op.forced(None))
        seen.append(moesaic.op.forced(None))

    with moesaic.use("torch"):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
        assert moesaic.op.forced(None) == "torch"
    left.set()
    thread.join()
    assert seen == ["", "reference", ""] and moesaic.op.forced(None) == ""


def test_a_traced_call_sees_what_is_forced():
    x = torch.randn(T, H)
    made = routing()

    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        return permute(x, made)

    with moesaic.use("nothing of that name"), pytest.raises(Exception, match="nothing of that name"):
        f(x)
    assert torch.equal(f(x), permute(x, made))


@pytest.mark.parametrize("what", ["router_logits", "fused_experts"])
def test_a_backward_inside_autocast_is_that_outside(what):
    def grads(inside: bool):
        torch.manual_seed(0)
        x, w = torch.randn(T, H, requires_grad=True), torch.randn(E, H, requires_grad=True)
        y = router_logits(x, w) if what == "router_logits" else layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            y.square().sum().backward()
        return [t.grad for t in (x, w) if t.grad is not None]

    for a, b in zip(grads(False), grads(True), strict=True):
        assert torch.equal(a, b)
