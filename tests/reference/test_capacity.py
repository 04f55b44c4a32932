"""Capacity by hand: how many slots an expert keeps, which ones, what becomes of the weights, and the padded layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moesaic import RouterConfig, Routing, fused_experts, grouped_matmul, permute, route, unpermute
from moesaic.ops.index import expert_index
from moesaic.ops.route import capacity as queues

IMPLEMENTATIONS = ("reference", "torch")
DROPPED = -1


# ---------------------------------------------------------------- how many
@pytest.mark.parametrize(
    ("tokens", "experts", "fields", "want"),
    [
        (2048, 8, dict(capacity_factor=1.25, capacity_counts_k=False), 320),
        (2048, 8, dict(capacity_factor=2.0, capacity_counts_k=False), 512),
        (2048, 8, dict(capacity_factor=1.25), 640),
        (2048, 8, dict(capacity_factor=2.0), 1024),
        (10, 1, dict(top_k=1, capacity_factor=1.1), 10),  # never more than there are tokens
        (100, 2, dict(top_k=1, capacity_factor=1.1), 55),  # 55.00000000000001 in floating point
        (100, 2, dict(top_k=1, capacity_factor=1.11), 56),
        (7, 3, dict(top_k=1, capacity_factor=1.0), 3),  # rounded up
        (7, 3, dict(top_k=1, capacity_factor=0.01), 1),
        (7, 3, dict(top_k=1, capacity_factor=0.01, min_capacity=4), 4),
        (7, 3, dict(top_k=1, capacity_factor=0.01, min_capacity=40), 7),
        (0, 3, dict(capacity_factor=1.0, min_capacity=4), 0),
        (7, 3, dict(), None),
    ],
)
def test_capacity(tokens, experts, fields, want):
    config = RouterConfig(**{"top_k": 2, **fields})
    assert config.capacity(tokens, experts, training=True) == want
    assert config.capacity(tokens, experts, training=False) == want


def test_training_and_evaluation_have_factors_of_their_own():
    config = RouterConfig(2, capacity_factor=1.25, eval_capacity_factor=2.0)
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assert route(logits, config, training=True).capacity == 20
    assert route(logits, config).capacity == 32
    only_eval = RouterConfig(2, eval_capacity_factor=2.0)
    assert route(logits, only_eval, training=True).capacity is None
    assert route(logits, only_eval).capacity == 32


def test_columns_of_other_experts_have_no_room_of_their_own():
    """8 tokens, 4 experts with matrices, 1 zero expert: ceil(8 · 1 / 4 · 0.5) = 1."""
    logits = torch.zeros(8, 5)
    logits[:, 4] = 9.0
    logits[:2] = torch.tensor([9.0, 0, 0, 0, 0])
    r = route(logits, top_k=1, zero_experts=1, capacity_factor=0.5)
    assert r.capacity == 1
    assert r.topk_ids.flatten().tolist() == [0, *[DROPPED] * 7]
    assert r.choices is None
    assert route(logits, top_k=1, zero_experts=1, statistics=True).choices.tolist() == [[2, 0, 0, 0, 6]]


# ---------------------------------------------------------------- which ones
# Four tokens, two choices of three experts, of which expert 0 is wanted four times. Rows are softmax weights.
WANTED = [[0, 1], [0, 2], [1, 0], [0, 1]]
SHARES = [[0.50, 0.30], [0.70, 0.20], [0.60, 0.25], [0.80, 0.15]]


def logits_of(ids, shares, experts=3):
    """Logits whose softmax gives each token's choices these shares."""
    p = torch.zeros(len(ids), experts, dtype=torch.float64)
    for t, (row, values) in enumerate(zip(ids, shares, strict=True)):
        for e, value in zip(row, values, strict=True):
            p[t, e] = value
        p[t, [e for e in range(experts) if e not in row]] = 1 - sum(values)
    return p.log()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("policy", "want"),
    [
        # expert 0 keeps the slots of tokens 0 and 1, expert 1 those of tokens 0 and 2
        ("position", [[0, 1], [0, 2], [1, -1], [-1, -1]]),
        # first choices before second: expert 1 takes token 2, whose first choice it is, then token 0
        ("choice", [[0, 1], [0, 2], [1, -1], [-1, -1]]),
        # expert 0: .8 and .7 before .5 and .25; expert 1: .6 and .3 before .15
        ("probability", [[-1, 1], [0, 2], [1, -1], [0, -1]]),
    ],
)
def test_drop_sets(policy, want, implementation):
    config = RouterConfig(2, order="pre", capacity_factor=0.75, drop_policy=policy)
    r = route(logits_of(WANTED, SHARES), config, implementation=implementation, statistics=True)
    assert r.capacity == 2
    assert r.topk_ids.tolist() == want
    shares = torch.tensor(SHARES, dtype=torch.float64)
    torch.testing.assert_close(r.topk_weights, shares.where(r.topk_ids >= 0, 0.0))
    assert r.tokens_per_expert.tolist() == [sum(row.count(e) for row in want) for e in range(3)]
    assert r.choices.tolist() == [[4, 3, 1]], "counted before any drop"
    tables = Routing.from_topk(r.topk_weights, r.topk_ids, 3)
    for name in ("expert_offsets", "row_order", "row_index"):
        assert torch.equal(getattr(r, name), getattr(tables, name)), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_position_and_choice_differ_where_a_second_choice_comes_early(implementation):
    """Room for one. By position token 0's second choice of expert 1 wins, by choice token 1's first one."""
    logits = logits_of([[0, 1], [1, 0]], [[0.6, 0.3], [0.6, 0.3]])
    ids = {}
    for policy in ("position", "choice"):
        config = RouterConfig(2, capacity_factor=0.5, drop_policy=policy)
        ids[policy] = route(logits, config, implementation=implementation).topk_ids.tolist()
    assert ids == {"position": [[0, 1], [-1, -1]], "choice": [[0, -1], [1, -1]]}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_of_probability_fall_to_the_earlier_slot(implementation):
    config = RouterConfig(1, order="pre", capacity_factor=0.5, drop_policy="probability")
    r = route(torch.zeros(4, 2), config, implementation=implementation)
    assert r.topk_ids.flatten().tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("policy", ["position", "choice", "probability"])
def test_no_expert_keeps_more_than_its_room_and_it_keeps_the_first(policy):
    g = torch.Generator().manual_seed(1)
    T, E, K = 50, 6, 3
    logits = torch.randn(T, E, generator=g) + torch.tensor([3.0, 1, 0, 0, 0, -3])
    free = route(logits, top_k=K)
    held = route(logits, top_k=K, capacity_factor=0.8, drop_policy=policy)
    C = held.capacity
    assert C == 20 and int(held.tokens_per_expert.max()) == C
    for e in range(E):
        slots = [(t, k) for t in range(T) for k in range(K) if free.topk_ids[t, k] == e]
        if policy == "choice":
            slots.sort(key=lambda s: (s[1], s[0]))
        elif policy == "probability":
            slots.sort(key=lambda s: -free.topk_weights[s].item())
        kept = {(t, k) for t in range(T) for k in range(K) if held.topk_ids[t, k] == e}
        assert kept == set(slots[:C])


@pytest.mark.parametrize("policy", ["position", "choice", "probability"])
def test_places_are_the_order_of_the_queue(policy):
    ids = torch.tensor([[0, 1], [-1, 0], [1, 0], [0, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.1, 0.9], [0.0, 0.2], [0.8, 0.4], [0.3, 0.0]])

    def index(topk_ids):
        return expert_index(topk_ids, 2, implementation="torch")

    want = {
        "position": [[0, 0], [-1, 1], [1, 2], [3, -1]],
        "choice": [[0, 1], [-1, 2], [0, 3], [1, -1]],
        "probability": [[3, 0], [-1, 2], [1, 0], [1, -1]],
    }
    assert queues.places(ids, weights, policy, index).tolist() == want[policy]


# ---------------------------------------------------------------- the weights
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_after_a_drop(implementation):
    """They stay; or the survivors take what the token had: .85 and .95 over what is left."""
    logits = logits_of(WANTED, SHARES)
    config = RouterConfig(2, order="pre", capacity_factor=0.75, drop_policy="probability", scale=2.0)
    plain = route(logits, config, implementation=implementation).topk_weights
    torch.testing.assert_close(plain, torch.tensor([[0, 0.6], [1.4, 0.4], [1.2, 0], [1.6, 0]], dtype=torch.float64))
    r = route(logits, config.replace(renorm_after_drop=True), implementation=implementation)
    want = torch.tensor([[0, 1.6], [1.4, 0.4], [1.7, 0], [1.9, 0]], dtype=torch.float64)
    torch.testing.assert_close(r.topk_weights, want)


def test_renormalised_weights_have_the_gradient_of_their_formula():
    logits = logits_of(WANTED, SHARES).requires_grad_()
    config = RouterConfig(2, order="pre", capacity_factor=0.75, renorm_after_drop=True)

    def weights(x):
        return route(x, config, implementation="torch").topk_weights

    assert route(logits, config).topk_ids.tolist() == [[0, 1], [0, 2], [1, -1], [-1, -1]]
    assert torch.autograd.gradcheck(weights, logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_that_lost_every_slot_gets_a_zero_row(implementation):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64, generator=g, requires_grad=True)
    up, down = (torch.randn(3, *s, dtype=torch.float64, generator=g) for s in ((8, 5), (5, 4)))
    for renorm in (False, True):
        logits = logits_of(WANTED, SHARES).requires_grad_()
        config = RouterConfig(2, capacity_factor=0.75, renorm_after_drop=renorm)
        r = route(logits, config, implementation=implementation)
        y = fused_experts(x, up, down, r, implementation=implementation)
        assert r.topk_ids[3].tolist() == [DROPPED, DROPPED] and r.topk_weights[3].tolist() == [0.0, 0.0]
        assert (y[3] == 0).all() and (y[:3] != 0).any(1).all()
        dx, dlogits = torch.autograd.grad(y.sum(), (x, logits))
        assert (dx[3] == 0).all() and (dlogits[3] == 0).all()
        assert torch.isfinite(dx).all() and torch.isfinite(dlogits).all()


def test_no_expert_drops_without_need():
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    free, roomy = route(logits, top_k=2), route(logits, top_k=2, capacity_factor=4.0)
    assert roomy.capacity == 40
    for name in ("topk_weights", "topk_ids", "row_order", "row_index", "expert_offsets", "tokens_per_expert"):
        assert torch.equal(getattr(free, name), getattr(roomy, name)), name


# ---------------------------------------------------------------- the padded layout
def routed(tokens=9, experts=4, top_k=2, seed=0, dropped=True):
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=g).topk(top_k).indices if tokens else torch.zeros(0, top_k).long()
    if dropped and tokens:
        ids[torch.rand(ids.shape, generator=g) < 0.2] = -1
    weights = torch.rand(ids.shape, generator=g, dtype=torch.float64)
    return Routing.from_topk(weights, ids, experts)


def test_padded_layout_by_hand():
    """CANN's golden: ids [[2, 0], [2, 1], [0, 1]], room for one. Slots 1, 3 and 0 keep rows 0, 1 and 2."""
    r = Routing.from_topk(torch.ones(3, 2), torch.tensor([[2, 0], [2, 1], [0, 1]]), 3).to_capacity(1)
    assert r.row_index.tolist() == [2, 0, -1, 1, -1, -1]
    assert r.row_order.tolist() == [1, 3, 0]
    assert r.tokens_per_expert.tolist() == [1, 1, 1] and r.expert_offsets.tolist() == [0, 1, 2, 3]
    assert r.topk_ids.tolist() == [[2, 0], [-1, 1], [-1, -1]]
    assert r.padded == r.capacity == 1
    wide = Routing.from_topk(torch.ones(3, 2), torch.tensor([[2, 0], [2, 1], [0, 1]]), 3).to_capacity(3)
    assert wide.row_order.tolist() == [1, 4, -1, 3, 5, -1, 0, 2, -1]
    assert wide.row_index.tolist() == [6, 0, 7, 3, 1, 4]
    assert wide.expert_offsets.tolist() == [0, 3, 6, 9] and wide.tokens_per_expert.tolist() == [2, 2, 2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "capacity"), [(9, 1), (9, 3), (9, 9), (9, 20), (1, 2), (0, 3), (9, 0)])
def test_padded_rows_are_the_experts_tokens_bit_for_bit(tokens, capacity, dtype, implementation):
    r = routed(tokens)
    p, E, H = r.to_capacity(capacity), 4, 5
    x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(3)).to(dtype)
    batch = permute(x, p, implementation=implementation).view(E, capacity, H)
    for e in range(E):
        mine = [slot for slot, expert in enumerate(r.topk_ids.flatten().tolist()) if expert == e][:capacity]
        assert p.row_order.view(E, capacity)[e].tolist() == mine + [-1] * (capacity - len(mine))
        assert torch.equal(batch[e, : len(mine)], x[[slot // 2 for slot in mine]])
        assert (batch[e, len(mine) :] == 0).all()
        assert int(p.tokens_per_expert[e]) == len(mine)
    rows, weights = batch.view(E * capacity, H).detach().requires_grad_(), torch.ones(tokens, 2, requires_grad=True)
    y = unpermute(rows, p, weights=weights, implementation=implementation)
    live = (p.topk_ids >= 0).sum(1, keepdim=True)
    assert torch.equal(y, (x.double() * live).to(dtype))
    drows, dweights = torch.autograd.grad(y.sum(), (rows, weights))
    assert torch.equal(drows, (p.row_order >= 0).to(dtype)[:, None].expand(-1, H))
    dots = x.double().sum(1, keepdim=True) * (p.topk_ids >= 0)
    torch.testing.assert_close(dweights.double(), dots, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_padded_path_is_the_packed_path(implementation):
    """With room for all: outputs and every gradient, through biases that padding must not feel."""
    g = torch.Generator().manual_seed(5)
    r = routed(11)
    leaves = [torch.randn(*s, dtype=torch.float64, generator=g).requires_grad_() for s in ((11, 5), (4, 3, 5), (4, 3))]
    results = []
    for routing in (r, r.to_capacity(11)):
        weights = r.topk_weights.clone().requires_grad_()
        x, w, b = leaves
        rows = permute(x, routing, implementation=implementation)
        rows = grouped_matmul(rows, w, routing, bias=b, implementation=implementation)
        y = unpermute(rows, replace(routing, topk_weights=weights), implementation=implementation)
        plain = unpermute(rows, routing, weights=False, implementation=implementation)
        loss = (y * torch.sin(y.detach())).sum() + plain.square().sum()
        results.append((y, plain, *torch.autograd.grad(loss, [*leaves, weights])))
    for name, packed, padded in zip(("y", "plain", "x", "w", "b", "weights"), *results, strict=True):
        torch.testing.assert_close(padded, packed, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_too_little_room_in_the_layout_is_a_drop_by_position(implementation):
    r = routed(12, dropped=False)
    C = 4
    kept = r.row_index < r.expert_offsets[r.topk_ids.flatten().clamp_min(0)] + C
    packed = Routing.from_topk(r.topk_weights, r.topk_ids.masked_fill(~kept.view(12, 2), -1), 4)
    assert torch.equal(r.to_capacity(C).topk_ids, packed.topk_ids) and not kept.all()
    g = torch.Generator().manual_seed(5)
    x = torch.randn(12, 5, dtype=torch.float64, generator=g).requires_grad_()
    results = []
    for routing in (r.to_capacity(C), packed):
        weights = r.topk_weights.clone().requires_grad_()
        rows = permute(x, routing, implementation=implementation)
        y = unpermute(rows.square(), replace(routing, topk_weights=weights), implementation=implementation)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weights))))
    for padded, want in zip(*results, strict=True):
        torch.testing.assert_close(padded, want, rtol=1e-12, atol=1e-12)


def test_a_router_with_capacity_pads_to_its_own():
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    r = route(logits, top_k=2, capacity_factor=0.8)
    p = r.to_capacity()
    assert p.padded == r.capacity == 4 and torch.equal(p.topk_ids, r.topk_ids)
    assert permute(torch.randn(10, 3), p).shape == (16, 3)


def test_what_the_padded_layout_refuses():
    r = routed()
    with pytest.raises(ValueError, match="must be given where the router had no capacity factor, got None"):
        r.to_capacity()
    with pytest.raises(ValueError, match="got -1"):
        r.to_capacity(-1)
    with pytest.raises(ValueError, match="must be packed, got one padded to 3"):
        r.to_capacity(3).to_capacity(3)
    x, up, down = torch.randn(9, 5), torch.randn(4, 8, 5), torch.randn(4, 5, 4)
    with pytest.raises(ValueError, match="must be packed, got one padded to 3 rows"):
        fused_experts(x, up, down, r.to_capacity(3))


def test_the_choice_before_drops_is_kept_and_replays_exactly():
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(5), requires_grad=True)
    config = RouterConfig(3, capacity_factor=0.5, identity_experts=2)
    first = route(logits, config, training=True)
    again = route(logits, config, ids=first.chosen_ids, training=True)
    assert (first.topk_ids < 0).any() and (first.chosen_ids >= 0).all()
    for name in ("topk_weights", "topk_ids", "row_order", "row_index", "identity_weight"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    grads = [torch.autograd.grad(r.topk_weights.square().sum(), logits)[0] for r in (first, again)]
    assert torch.equal(*grads)
