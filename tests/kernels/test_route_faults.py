"""Faults of routing that were found: sentinels inside the data, ids of other dtypes, ids that repeat."""

from __future__ import annotations

import pytest
import torch

from moesaic import Routing, route

LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("order", ["pre", "pre_renorm", "post"])
def test_the_lowest_finite_number_is_a_number(order, top_k, device, implementation):
    """Masks made of finfo.min, or by `nan_to_num(-inf)`; a NaN stays one, in its own row."""
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    logits[:3, 2:] = LOWEST
    logits[3, 1:] = float("nan")
    made = route(logits.to(device), top_k=top_k, order=order, implementation=implementation)
    want = route(logits, top_k=top_k, order=order, implementation="reference")
    assert torch.equal(made.topk_ids.cpu(), want.topk_ids)
    assert bool(made.topk_weights[:3].isfinite().all())
    torch.testing.assert_close(made.topk_weights.cpu(), want.topk_weights.float(), equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_soft_cap_of_the_lowest_finite_number(score, device, implementation):
    """It is the cap, with the other sign; only -inf stays what it is."""
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    logits[0, 2:], logits[1, 1:], logits[2, 3:] = LOWEST, LOWEST, -torch.inf
    config = dict(top_k=4, score=score, soft_cap=20.0)
    made = route(logits.to(device), **config, implementation=implementation)
    want = route(logits, **config, implementation="reference")
    assert torch.equal(made.topk_ids.cpu(), want.topk_ids)
    torch.testing.assert_close(made.topk_weights.cpu(), want.topk_weights.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"])
def test_ids_of_any_integer_dtype(dtype, device, implementation):
    E, ids = 200, torch.tensor([[3, 120], [7, 0]])
    given = ids.to(getattr(torch, dtype)).to(device)
    made, want = Routing.from_topk(None, given, E, implementation=implementation), Routing.from_topk(None, ids, E)
    assert torch.equal(made.topk_ids.cpu(), want.topk_ids) and torch.equal(made.row_order.cpu(), want.row_order)
    logits = torch.randn(2, E, generator=torch.Generator().manual_seed(0))
    routed = route(logits.to(device), top_k=2, ids=given, implementation=implementation)
    assert torch.equal(routed.topk_ids.cpu(), want.topk_ids)


@pytest.mark.parametrize("value", [2**32 + 3, -(2**32) + 3])
def test_wide_ids_do_not_wrap(value, device, implementation):
    ids = torch.tensor([[value]], device=device)
    if implementation == "torch" and device == "cpu":
        with pytest.raises(ValueError, match="topk_ids must lie in"):
            Routing.from_topk(None, ids, 8, implementation=implementation)
        return
    assert Routing.from_topk(None, ids, 8, implementation=implementation).topk_ids.item() == -1


@pytest.mark.parametrize("value", [2**32 + 3, -(2**32) + 3, 2**63 + 1])
def test_wide_ids_of_route_do_not_wrap(value, device, implementation):
    """On a CPU they are named before anything is cast; a GPU takes them for no expert, since looking would stall it."""
    dtype = torch.uint64 if value >= 2**63 else torch.int64
    ids = torch.tensor([[value, 1]], dtype=dtype).to(device)
    logits = torch.zeros(1, 8, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"ids must lie in \[-1, 8\)"):
            route(logits, top_k=2, ids=ids, implementation=implementation)
        return
    assert route(logits, top_k=2, ids=ids, implementation=implementation).topk_ids.tolist() == [[-1, 1]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_ids_of_8_bits_with_more_experts_than_they_count(dtype, device, implementation):
    ids = torch.tensor([[3, 120], [7, 0]])
    given = ids.to(dtype).to(device)
    made = Routing.from_topk(None, given, 700, implementation=implementation)
    assert torch.equal(made.topk_ids.cpu().long(), ids)
    routed = route(torch.zeros(2, 700, device=device), top_k=2, ids=given, implementation=implementation)
    assert torch.equal(routed.topk_ids.cpu().long(), ids)


def test_the_highest_unsigned_id_is_no_dropped_slot():
    ids = torch.tensor([[-1]]).view(torch.uint64)
    with pytest.raises(ValueError, match="topk_ids must lie in"):
        Routing.from_topk(None, ids, 8, implementation="torch")


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", ["pre", "pre_renorm", "post"])
def test_given_ids_may_repeat(order, score, statistics, device, implementation):
    """A hash router's table names an expert twice: each slot has its row, its weight and its share of the gradient."""
    T, E = 5, 6
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(T, E, generator=g), torch.tensor([[5, 5], [1, 2], [0, 0], [3, -1], [4, 4]])
    grad = torch.randn(T, 2, generator=g)
    outcomes = []
    for where, name in ((device, implementation), ("cpu", "reference")):
        x = logits.to(where).requires_grad_()
        made = route(x, top_k=2, score=score, order=order, ids=ids.to(where), statistics=statistics,
                     implementation=name)  # fmt: skip
        (dx,) = torch.autograd.grad((made.topk_weights * grad.to(where)).sum(), x)
        outcomes.append((made, dx.cpu()))
    (made, dx), (want, wanted) = outcomes
    for name in ("topk_ids", "tokens_per_expert", "expert_offsets", "row_order", "row_index"):
        assert torch.equal(getattr(made, name).cpu(), getattr(want, name)), name
    torch.testing.assert_close(made.topk_weights.detach().cpu(), want.topk_weights.detach().float())
    torch.testing.assert_close(dx, wanted.float(), rtol=1e-5, atol=1e-6)


REPEATS = {
    "capacity": dict(capacity_factor=0.5),
    "capacity by weight": dict(capacity_factor=0.5, drop_policy="probability", renorm_after_drop=True),
    "identity experts": dict(identity_experts=1),
    "constant experts": dict(constant_experts=2),
    "sparsemixer": dict(policy="sparsemixer", order="pre"),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_ids_in_everything_that_reads_them(name, device, implementation):
    T, E = 6, 6
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(T, E, generator=g), torch.tensor([[5, 5], [1, 2], [0, 0], [3, -1], [4, 4], [0, 5]])
    outcomes = []
    for where, which in ((device, implementation), ("cpu", "reference")):
        x = logits.to(where).requires_grad_()
        made = route(x, top_k=2, ids=ids.to(where), implementation=which, **REPEATS[name])
        parts = [made.topk_weights, made.identity_weight, made.constant_weights]
        total = sum(((i + 1) * p).sin().sum() for i, p in enumerate(parts) if p is not None)
        (dx,) = torch.autograd.grad(total, x)
        outcomes.append((made, total.detach().cpu(), dx.cpu()))
    (made, total, dx), (want, whole, wanted) = outcomes
    for table in ("topk_ids", "tokens_per_expert", "expert_offsets", "row_order", "row_index", "chosen_ids"):
        assert torch.equal(getattr(made, table).cpu(), getattr(want, table)), table
    torch.testing.assert_close(total, whole.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx, wanted.float(), rtol=1e-5, atol=1e-6)


def test_repeated_ids_with_a_scale_of_each_expert(device, implementation):
    logits = torch.zeros(1, 4, device=device)
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device, requires_grad=True)
    ids = torch.tensor([[3, 3]], device=device)
    made = route(logits, top_k=2, ids=ids, expert_scale=scale, implementation=implementation)
    torch.testing.assert_close(made.topk_weights.detach().cpu(), torch.tensor([[2.0, 2.0]]))
    made.topk_weights.sum().backward()
    torch.testing.assert_close(scale.grad.cpu(), torch.tensor([0.0, 0.0, 0.0, 1.0]))
