"""Each way to choose and to weigh, by hand or against its source: policies, given ids, masks, noise, estimators."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moesaic import RouterConfig, Routing, fused_experts, route
from moesaic.ops.route import policies

IMPLEMENTATIONS = ("reference", "torch")
INF = float("inf")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def slopes(routing, leaf):
    """The gradient of the weights' sum with a different factor for each."""
    w = routing.topk_weights
    factor = torch.sin(torch.arange(1, w.numel() + 1, dtype=w.dtype)).view(w.shape)
    return torch.autograd.grad((w * factor).sum(), leaf, retain_graph=True)[0]


# ---------------------------------------------------------------- expert choice
def test_expert_choice_by_hand(implementation):
    """Six tokens, three experts, C = 2. Token 0 is the best of two experts, token 5 of none."""
    s = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3], [0.6, 0.7, 0.2], [0.1, 0.1, 0.9], [0.5, 0.3, 0.6],
                      [0.4, 0.1, 0.1]], dtype=torch.float64)  # fmt: skip
    config = RouterConfig(1, "sigmoid", "pre", policy="expert_choice")
    r = route(s.logit(), config, implementation=implementation)
    assert r.topk_ids.tolist() == [[0, 1, -1], [0, -1, -1], [1, -1, -1], [2, -1, -1], [2, -1, -1], [-1, -1, -1]]
    want = torch.tensor([[0.9, 0.8, 0], [0.7, 0, 0], [0.7, 0, 0], [0.9, 0, 0], [0.6, 0, 0], [0, 0, 0]]).double()
    torch.testing.assert_close(r.topk_weights, want)
    assert r.tokens_per_expert.tolist() == [2, 2, 2]
    one = route(s.logit(), config.replace(max_choices=1), implementation=implementation)
    assert one.topk_ids.flatten().tolist() == [0, 0, 1, 2, 2, -1], "token 0 keeps the larger of its two"
    assert one.tokens_per_expert.tolist() == [2, 1, 2]
    renormalised = route(s.logit(), config.replace(order="pre_renorm"), implementation=implementation)
    torch.testing.assert_close(renormalised.topk_weights[0], torch.tensor([9 / 17, 8 / 17, 0]).double())


@pytest.mark.parametrize(("tokens", "experts", "top_k", "factor"), [(24, 5, 2, None), (17, 3, 1, 1.5), (7, 7, 3, 0.5)])
def test_in_expert_choice_every_expert_takes_exactly_its_capacity(tokens, experts, top_k, factor):
    config = RouterConfig(top_k, policy="expert_choice", capacity_factor=factor)
    r = route(randn(tokens, experts), config)
    C = min(tokens, math.ceil(tokens * top_k / experts * (factor or 1)))
    assert r.tokens_per_expert.tolist() == [C] * experts
    assert r.topk_ids.shape == (tokens, experts) and r.capacity is None


def test_expert_choice_breaks_ties_to_the_lowest_token_and_takes_no_masked_one(implementation):
    config = RouterConfig(1, policy="expert_choice", max_choices=1)
    r = route(torch.zeros(6, 2), config, implementation=implementation)
    assert r.topk_ids.flatten().tolist() == [0, 0, 0, -1, -1, -1]
    seen = torch.tensor([False, True, False, True, False, False])
    r = route(torch.zeros(6, 2), config.replace(max_choices=0), token_mask=seen, implementation=implementation)
    assert r.topk_ids.tolist() == [[-1, -1], [0, 1], [-1, -1], [0, 1], [-1, -1], [-1, -1]]
    assert r.tokens_per_expert.tolist() == [2, 2], "room for 3, but only two tokens are there"


def test_expert_choice_on_logits():
    """Scores of softmax compare a token's experts, z and its bias compare tokens: the two differ."""
    logits = torch.tensor([[5.0, 5.0], [1.0, -1.0], [0.0, 0.0], [2.0, 1.9]], dtype=torch.float64)
    base = RouterConfig(1, order="pre", policy="expert_choice", capacity_factor=0.5)
    assert route(logits, base).topk_ids.tolist() == [[1, -1], [0, -1], [-1, -1], [-1, -1]]
    for on_logits in (base.replace(bias_on="logits"), base.replace(order="post")):
        assert route(logits, on_logits).topk_ids.tolist() == [[0, 1], [-1, -1], [-1, -1], [-1, -1]]


# ---------------------------------------------------------------- ragged choices
@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.2, 1), (0.25, 1), (0.2501, 2), (0.5, 2), (0.5001, 3), (0.75, 3), (0.7501, 4), (1.0, 4)]
)
def test_top_p_takes_as_many_as_it_takes(threshold, kept, implementation):
    """Four experts of a quarter each; the share may be held exactly."""
    for top_k in (4, 2):
        config = RouterConfig(top_k, order="pre", policy="top_p", threshold=threshold)
        r = route(torch.zeros(1, 4), config, implementation=implementation)
        want = [e if e < kept else -1 for e in range(top_k)]
        assert r.topk_ids[0].tolist() == want
        assert r.topk_weights[0].tolist() == [0.25 if e >= 0 else 0.0 for e in want]


def test_top_p_of_scores_and_of_a_biased_choice(implementation):
    s = torch.tensor([[0.8, 0.4, 0.2, 0.2]], dtype=torch.float64).logit()  # shares .5, .25, .125, .125
    config = RouterConfig(4, "sigmoid", "pre", policy="top_p", threshold=0.7)
    assert route(s, config, implementation=implementation).topk_ids[0].tolist() == [0, 1, -1, -1]
    # the bias puts 3 first; its share stays .125, so that .125 + .5 does not hold .7 and .125 + .5 + .25 does
    bias = torch.tensor([0.0, 0, 0, 0.9])
    assert route(s, config, bias=bias, implementation=implementation).topk_ids[0].tolist() == [3, 0, 1, -1]
    renormalised = route(s, config.replace(order="pre_renorm"), implementation=implementation)
    torch.testing.assert_close(renormalised.topk_weights[0], torch.tensor([2 / 3, 1 / 3, 0, 0]).double())


@pytest.mark.parametrize(
    ("threshold", "want"),
    [
        (0.694, [0, -1, -1]),  # ln 2 < t
        (0.693, [0, 1, -1]),  # t <= ln 2 < 2t
        (0.347, [0, 1, -1]),
        (0.346, [0, 1, 2]),  # 2t <= ln 2
    ],
)
def test_entropy_decides_between_one_two_and_all(threshold, want, implementation):
    """Half a share to expert 0, the rest so spread that the entropy is ln 2 up to 1e-6, over all experts in nats."""
    p = torch.tensor([0.5, 0.5 - 2e-8, 1e-8, 1e-8], dtype=torch.float64)
    config = RouterConfig(3, policy="entropy", threshold=threshold)
    ids = route(p.log()[None], config, implementation=implementation).topk_ids[0].tolist()
    assert ids == want
    one = route(p.log()[None], config.replace(top_k=1), implementation=implementation).topk_ids[0].tolist()
    assert one == want[:1], "never more than K"


def test_entropy_counts_experts_that_are_not_chosen(implementation):
    """One of K = 1 is sure of itself only if the other experts say so too."""
    logits = torch.zeros(1, 8)
    logits[0, 0] = 0.5
    config = RouterConfig(2, policy="entropy", threshold=1.5)
    assert route(logits, config, implementation=implementation).topk_ids[0].tolist() == [0, 1]
    logits[0, 0] = 5.0
    assert route(logits, config, implementation=implementation).topk_ids[0].tolist() == [0, -1]


@pytest.mark.parametrize("policy", ["top_p", "entropy", "expert_choice"])
def test_a_ragged_layer_is_the_loop_over_its_choices(policy):
    logits, x = randn(9, 5) * 2, randn(9, 4, seed=1)
    up, down = randn(5, 6, 4, seed=2), randn(5, 4, 3, seed=3)
    r = route(logits, RouterConfig(3, policy=policy, threshold=0.6))
    assert (r.topk_ids < 0).any()
    want = torch.zeros_like(x)
    for t in range(9):
        for w, e in zip(r.topk_weights[t], r.topk_ids[t].tolist(), strict=True):
            if e >= 0:
                gate, value = (up[e] @ x[t]).chunk(2)
                want[t] += w * (down[e] @ (F.silu(gate) * value))
    torch.testing.assert_close(fused_experts(x, up, down, r), want, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- ids from elsewhere
def test_hash_routing(implementation):
    """Ids by token id, weights from the logits."""
    table = torch.tensor([[0, 3], [2, 1], [1, 0], [3, 2]])
    input_ids = torch.tensor([2, 2, 0, 3, 1])
    logits = randn(5, 4).requires_grad_()
    r = route(logits, top_k=2, order="pre", score="sigmoid", ids=table[input_ids], implementation=implementation)
    assert torch.equal(r.topk_ids.long(), table[input_ids]) and r.topk_ids.dtype == torch.int32
    torch.testing.assert_close(r.topk_weights, torch.sigmoid(logits).gather(1, table[input_ids]), rtol=1e-14, atol=0)
    gradient = slopes(r, logits)
    assert ((gradient != 0).sum(1) == 2).all()


REPLAYED = {
    "plain": RouterConfig(2),
    "post": RouterConfig(2, order="post"),
    "groups": RouterConfig(2, "sigmoid", "pre_renorm", 1e-20, 2.5, 3, 2),
    "top_p": RouterConfig(4, policy="top_p", threshold=0.6),
    "entropy": RouterConfig(4, order="pre", policy="entropy", threshold=0.8),
    "expert choice": RouterConfig(2, policy="expert_choice", max_choices=3),
    "sinkhorn": RouterConfig(2, policy="sinkhorn"),
    "sparsemixer": RouterConfig(2, order="pre", policy="sparsemixer", noise_std=0.3),
    "straight through": RouterConfig(2, straight_through=True, scale=2.0),
    "length 2": RouterConfig(2, "sigmoid", norm_p=2.0, shared_logits=2),
    "soft cap": RouterConfig(2, "sqrt_softplus", multiplier=0.5, soft_cap=2.0),
    "noise": RouterConfig(2, noise="gaussian", noise_std=0.5),
    "Gumbel-softmax": RouterConfig(2, noise="gumbel", temperature=0.7, noise_in_weights=True),
    "sampled experts": RouterConfig(2, order="pre", expert_sampling=0.6),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", REPLAYED)
def test_record_and_replay(name, training, implementation):
    """The recorded ids give the same weights to the bit, and the same gradients."""
    config = REPLAYED[name]
    logits = (randn(7, config.columns(6)) * 2).requires_grad_()
    seen = torch.tensor([True] * 6 + [False])
    common = dict(training=training, generator=5, token_mask=seen, statistics=True, implementation=implementation)
    first = route(logits, config, **common)
    again = route(logits, config, **common, ids=first.topk_ids)
    assert first.topk_ids[6].tolist() == [-1] * first.top_k
    for field in ("topk_ids", "topk_weights", "row_order", "row_index", "expert_offsets", "choices",
                  "probability_sums", "shared_weights"):  # fmt: skip
        a, b = getattr(first, field), getattr(again, field)
        assert (a is None and b is None) or torch.equal(a, b), field
    assert torch.equal(slopes(first, logits), slopes(again, logits))


def test_replay_with_slots_left_out(implementation):
    """-1 leaves a slot out; the rest share the normalisation among themselves."""
    logits = randn(3, 5).requires_grad_()
    ids = torch.tensor([[4, -1, 0], [-1, -1, -1], [2, 1, 3]])
    r = route(logits, top_k=3, ids=ids, implementation=implementation)
    p = torch.softmax(logits, -1)
    torch.testing.assert_close(r.topk_weights[0, [0, 2]], p[0, [4, 0]] / p[0, [4, 0]].sum())
    assert r.topk_weights[1].tolist() == [0, 0, 0] and r.topk_weights[0, 1] == 0
    gradient = slopes(r, logits)
    assert torch.isfinite(gradient).all() and (gradient[1] == 0).all() and (gradient[0, [4, 0]] != 0).all()


# ---------------------------------------------------------------- masks
@pytest.mark.parametrize("name", REPLAYED)
def test_a_finished_token_goes_nowhere_and_changes_nobody(name, implementation):
    config = REPLAYED[name]
    if config.policy == "expert_choice":
        config = config.replace(capacity_factor=1.0, max_choices=0)
    logits = (randn(6, config.columns(6)) * 2).requires_grad_()
    seen = torch.tensor([True, False, True, True, False, True])
    common = dict(statistics=True, implementation=implementation)
    r = route(logits, config, token_mask=seen, **common)
    assert (r.topk_ids[~seen] == -1).all() and (r.topk_weights[~seen] == 0).all()
    assert int(r.expert_offsets[-1]) == int((r.topk_ids >= 0).sum())
    gradient = slopes(r, logits)
    assert torch.isfinite(gradient).all() and (gradient[~seen] == 0).all()
    if config.policy == "expert_choice":  # the room is counted with all tokens
        return
    alone = route(logits[seen], config, **common)
    assert torch.equal(r.topk_ids[seen], alone.topk_ids)
    torch.testing.assert_close(r.topk_weights[seen], alone.topk_weights, rtol=1e-14, atol=0)
    torch.testing.assert_close(r.probability_sums, alone.probability_sums)
    torch.testing.assert_close(r.logsumexp_squares, alone.logsumexp_squares)
    assert torch.equal(r.choices, alone.choices)


@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.parametrize("training", [False, True])
def test_masked_experts_are_experts_of_logit_minus_infinity(name, training, implementation):
    config = REPLAYED[name]
    logits = randn(6, config.columns(6)) * 2
    common = dict(training=training, generator=5, statistics=True, implementation=implementation)
    closed = torch.tensor([False, True, False, False, True, False])
    each = torch.rand(6, 6, generator=torch.Generator().manual_seed(2)).argsort(1) >= 2
    for mask in (~closed, each, each & True):
        masked = logits.clone()
        masked[:, :6] = masked[:, :6].masked_fill(~mask, -INF)
        if config.top_k > int(mask.sum(-1).min()):
            continue
        a, b = route(logits, config, expert_mask=mask, **common), route(masked, config, **common)
        assert torch.equal(a.topk_ids, b.topk_ids) and torch.equal(a.topk_weights, b.topk_weights)
        assert torch.equal(a.probability_sums, b.probability_sums)
        open_ = mask.expand(6, 6).gather(1, a.topk_ids.long().clamp_min(0))
        assert (open_ | (a.topk_ids < 0)).all(), "a masked expert was chosen"


def test_a_mask_is_stronger_than_a_given_id(implementation):
    ids = torch.tensor([[0, 1], [2, 3], [1, 3]])
    seen, open_ = torch.tensor([True, True, False]), torch.tensor([True, True, True, False])
    r = route(randn(3, 4), top_k=2, ids=ids, token_mask=seen, expert_mask=open_, implementation=implementation)
    assert r.topk_ids.tolist() == [[0, 1], [2, -1], [-1, -1]]
    assert r.topk_weights[1].tolist() == [1.0, 0.0] and r.topk_weights[2].tolist() == [0.0, 0.0]
    assert r.tokens_per_expert.tolist() == [1, 1, 1, 0]


def test_too_few_experts_left_give_empty_slots(implementation):
    """Logits of -inf are a mask too, one that is not looked at."""
    logits = torch.tensor([[1.0, -INF, -INF, 2.0], [-INF] * 4, [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    for fields in (
        dict(order="pre"), dict(order="post"), dict(score="sigmoid"), dict(score="log_sigmoid", order="pre"),
        dict(score="sigmoid", norm_p=2.0), dict(norm="softmax"), dict(policy="sinkhorn"),
        dict(policy="sparsemixer", order="pre"), dict(policy="sparsemixer", order="pre", training=True),
    ):  # fmt: skip
        r = route(logits, top_k=3, implementation=implementation, **fields)
        if fields.get("training"):  # sampled
            assert set(r.topk_ids[0, :2].tolist()) == {0, 3} and (r.topk_ids[2] >= 0).all()
            assert r.topk_ids[0, 2] == -1 and (r.topk_ids[1] == -1).all()
        else:
            assert r.topk_ids.tolist() == [[3, 0, -1], [-1, -1, -1], [3, 2, 1]]
        assert r.topk_weights[0, 2] == 0 and (r.topk_weights[1] == 0).all()
        gradient = slopes(r, logits)
        assert torch.isfinite(gradient).all() and (gradient[1] == 0).all()


# ---------------------------------------------------------------- ties, NaN and large logits
@pytest.mark.parametrize(
    "fields",
    [dict(), dict(order="post"), dict(score="sigmoid"), dict(num_groups=2, topk_groups=2), dict(score="sqrt_softplus")],
)
def test_ties_go_to_the_lowest_expert(fields, implementation):
    logits = torch.tensor([[0.0, 2, 1, 2, 1, 2], [3, 3, 3, 3, 3, 3]])
    r = route(logits, top_k=4, implementation=implementation, **fields)
    assert r.topk_ids.tolist() == [[1, 3, 5, 2], [0, 1, 2, 3]]


def test_tied_groups_go_to_the_lowest_group(implementation):
    logits = torch.tensor([[0.0, 1, 1, 0, 1, 0]])
    for score in ("max", "top2_sum"):
        r = route(logits, top_k=2, num_groups=3, topk_groups=2, group_score=score, implementation=implementation)
        assert r.topk_ids.tolist() == [[1, 2]]


def test_weights_of_length_zero_have_a_gradient(implementation):
    """Forced experts whose scores are all 0: there is nothing to normalise."""
    logits = torch.tensor([[-1e4, -1e4, 3.0], [1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1], [2, 0]])
    for norm_p in (1.0, 2.0, 3.0):
        r = route(logits, top_k=2, score="sigmoid", norm_p=norm_p, ids=ids, implementation=implementation)
        assert r.topk_weights[0].tolist() == [0.0, 0.0]
        gradient = slopes(r, logits)
        assert (gradient[0] == 0).all() and torch.isfinite(gradient).all() and (gradient[1, [0, 2]] != 0).all()


def test_experts_whose_probabilities_round_to_zero_keep_their_order(implementation):
    """exp(-1000) is 0 in every precision; z still knows which is larger. Nothing overflows at 1e4."""
    logits = torch.tensor([[0.0, -3000, -1000, -2000], [1e4, 0, -1e4, 5e3]])
    for order in ("pre", "pre_renorm", "post"):
        r = route(logits, top_k=3, order=order, implementation=implementation)
        assert r.topk_ids.tolist() == [[0, 2, 3], [0, 3, 1]]
        assert torch.equal(r.topk_weights, torch.tensor([[1.0, 0, 0], [1, 0, 0]]))


def test_nan_ranks_below_every_number_and_keeps_to_its_token(implementation):
    logits = randn(4, 6, dtype=torch.float32)
    logits[1, 2] = float("nan")
    for fields in (
        dict(score="sigmoid"), dict(order="post"), dict(score="sigmoid", num_groups=2, group_score="max"),
        dict(score="sigmoid", num_groups=3, topk_groups=2), dict(policy="sinkhorn", score="sigmoid"),
        dict(score="sigmoid", policy="expert_choice", capacity_factor=2.0, max_choices=2),
    ):  # fmt: skip
        r = route(logits, top_k=2, training=True, implementation=implementation, **fields)
        clean = route(logits.nan_to_num(-50.0), top_k=2, training=True, implementation=implementation, **fields)
        assert 2 not in r.topk_ids[1].tolist(), fields
        keep = [0, 2, 3]
        if fields.get("policy") == "sinkhorn":  # where it takes no part
            clean = route(logits.nan_to_num(-INF), top_k=2, training=True, implementation=implementation, **fields)
        assert torch.equal(r.topk_ids[keep], clean.topk_ids[keep]), fields
        assert torch.equal(r.topk_weights[keep], clean.topk_weights[keep]), fields
    grouped = torch.tensor([[float("nan"), 5.0, 0.0, 1.0]])
    for score in ("max", "top2_sum"):
        r = route(grouped, top_k=1, score="sigmoid", order="pre", num_groups=2, group_score=score)
        assert r.topk_ids.tolist() == [[1 if score == "max" else 3]], "a group's best is its best number"


# ---------------------------------------------------------------- sinkhorn
def test_sinkhorn_matrix_has_even_rows_and_columns():
    z = randn(40, 6) + torch.tensor([2.0, 1, 0, 0, -1, -2], dtype=torch.float64)
    p = policies.balanced(z).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(40, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(p.sum(0), torch.full((6,), 40 / 6, dtype=torch.float64), rtol=1e-5, atol=0)
    # it is d0 · exp(z) · d1: what is left after taking z away has rank one
    rest = policies.balanced(z) - z
    torch.testing.assert_close(rest - rest[:1] - rest[:, :1] + rest[0, 0], torch.zeros(40, 6).double(), atol=1e-10,
                               rtol=0)  # fmt: skip


def test_sinkhorn_evens_the_load_in_training_and_is_plain_in_evaluation(implementation):
    z = randn(200, 6) + torch.tensor([3.0, 1, 0, 0, -1, -3], dtype=torch.float64)
    plain = route(z, top_k=1, implementation=implementation)
    trained = route(z, top_k=1, policy="sinkhorn", training=True, implementation=implementation)
    evaluated = route(z, top_k=1, policy="sinkhorn", implementation=implementation)
    assert torch.equal(evaluated.topk_ids, plain.topk_ids)
    assert int(plain.tokens_per_expert.max()) > 120
    assert int(trained.tokens_per_expert.max()) < 50 and int(trained.tokens_per_expert.min()) > 18


def test_sinkhorn_is_not_disturbed_by_what_is_masked():
    """A masked token or expert takes no part: the others choose as if it were not there."""
    z = randn(30, 5) * 2
    seen, open_ = torch.ones(30).bool(), torch.tensor([True, False, True, True, True])
    seen[[3, 17]] = False
    common = dict(top_k=2, policy="sinkhorn", training=True)
    r = route(z, **common, token_mask=seen, expert_mask=open_)
    alone = route(z[seen][:, open_], **common)
    names = torch.tensor([0, 2, 3, 4])
    assert torch.equal(r.topk_ids[seen].long(), names[alone.topk_ids.long()])
    assert (r.topk_ids[~seen] == -1).all()


# ---------------------------------------------------------------- sparsemixer
@pytest.fixture(scope="module")
def phimoe():
    return pytest.importorskip("transformers.models.phimoe.modeling_phimoe")


MIXER = RouterConfig(2, order="pre", policy="sparsemixer", noise_std=0.1)


def test_sparsemixer_in_evaluation_is_transformers(phimoe, implementation):
    config = phimoe.PhimoeConfig(hidden_size=8, num_local_experts=7, num_experts_per_tok=2, router_jitter_noise=0.1)
    router = phimoe.PhimoeTopKRouter(config).double().eval()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    x = randn(50, 8).requires_grad_()
    logits, weights, ids = router(x)
    r = route(logits, MIXER, implementation=implementation)
    assert torch.equal(r.topk_ids.long(), ids)
    torch.testing.assert_close(r.topk_weights, weights, rtol=1e-12, atol=0)
    assert (weights < 1).any() and (weights == 1).any(), "some tokens have a rival within the jitter, some have none"
    factor = randn(50, 2, seed=3)
    (want,) = torch.autograd.grad((weights * factor).sum(), logits, retain_graph=True)
    (got,) = torch.autograd.grad((r.topk_weights * factor).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_sparsemixer_in_training_is_transformers_formula(phimoe):
    """The same random numbers by hand through PhimoeMultiplier: choices, weights and gradients."""
    config = MIXER.replace(noise_std=0.4, scale=2.0, divide_by_k=True)
    scores = randn(60, 5).requires_grad_()
    r = route(scores, config, training=True, generator=9)
    g, parts, rest = torch.Generator().manual_seed(9), [], scores
    for k in range(2):
        with torch.no_grad():
            top = rest.max(-1, keepdim=True).values
            far = (top - scores) / scores.abs().clamp(min=top) > 2 * 0.4
        near = rest.masked_fill(far, -INF)
        u = torch.rand(60, 5, dtype=torch.float64, generator=g)
        chosen = (near - (-u.log()).log()).argmax(-1, keepdim=True)
        assert torch.equal(chosen[:, 0], r.topk_ids[:, k].long())
        gates = torch.softmax(near, -1)
        keep = (chosen == gates.argmax(-1, keepdim=True)) | (torch.rand(60, 1, dtype=torch.float64, generator=g) > 0.75)
        factor = torch.where(keep, 1.0, 1 / 3).double()
        parts.append(phimoe.PhimoeMultiplier.apply(scores, gates.gather(-1, chosen), chosen, gates, factor))
        rest = rest.scatter(-1, chosen, -INF)
    want = torch.cat(parts, -1)  # scale 2, divided by K = 2
    torch.testing.assert_close(r.topk_weights, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes(r, scores), torch.autograd.grad(
        (want * torch.sin(torch.arange(1.0, 121, dtype=torch.float64)).view(60, 2)).sum(), scores)[0],
        rtol=1e-12, atol=1e-15)  # fmt: skip
    assert (r.topk_ids != route(scores, config).topk_ids).any()


def test_sparsemixer_samples_among_the_near():
    """First picks come as often as the softmax over those within the jitter says; nobody else is picked."""
    logits = torch.tensor([2.0, 1.9, 1.5, 0.3])
    config = MIXER.replace(top_k=1, noise_std=0.15)  # within 30 %: 2, 1.9 and 1.5
    r = route(logits.expand(20000, 4), config, training=True, generator=0)
    want = torch.softmax(logits[:3], -1) * 20000
    count = r.tokens_per_expert.double()
    assert count[3] == 0
    assert ((count[:3] - want).square() / want).sum() < 13.8, "chi², 2 degrees of freedom, 1 in 1000"


# ---------------------------------------------------------------- experts without matrices, shared experts
def test_experts_without_matrices(implementation):
    """Columns: 3 experts, 1 zero, 2 identity, 2 constant. Each of the last has its weight in a place of its own."""
    p = torch.tensor([[0.05, 0.3, 0.05, 0.1, 0.2, 0.05, 0.05, 0.2], [0.1, 0.1, 0.3, 0.25, 0.05, 0.15, 0.03, 0.02]])
    config = RouterConfig(4, order="pre", zero_experts=1, identity_experts=2, constant_experts=2, scale=2.0)
    logits = p.double().log().requires_grad_()
    r = route(logits, config, implementation=implementation, statistics=True)
    assert r.num_experts == 3
    assert r.topk_ids.tolist() == [[1, -1, -1, -1], [2, -1, -1, 0]]
    torch.testing.assert_close(r.topk_weights, torch.tensor([[0.6, 0, 0, 0], [0.6, 0, 0, 0.2]]).double())
    torch.testing.assert_close(r.identity_weight, torch.tensor([0.4, 0.3]).double())
    torch.testing.assert_close(r.constant_weights, torch.tensor([[0, 0.4], [0, 0]]).double())
    assert r.choices.tolist() == [[1, 1, 1, 2, 1, 1, 0, 1]]
    (gradient,) = torch.autograd.grad(r.identity_weight.sum() + r.constant_weights.sum(), logits)
    q = torch.softmax(logits.detach(), -1)
    mine = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 0]]).double()
    torch.testing.assert_close(gradient, 2 * q * (mine - (mine * q).sum(-1, keepdim=True)))


def test_all_identity_experts_together_weigh_what_was_chosen(implementation):
    config = RouterConfig(3, identity_experts=4)
    r = route(randn(50, 9), config, implementation=implementation)
    total = r.topk_weights.sum(-1) + r.identity_weight
    torch.testing.assert_close(total, torch.ones(50, dtype=torch.float64))


def test_shared_experts_take_part_in_the_normalisation(implementation):
    """Scores .8 and .5 are chosen, the shared expert's is .7: each over their sum, times the scale."""
    s = torch.tensor([[0.8, 0.1, 0.5, 0.7]], dtype=torch.float64).logit().requires_grad_()
    config = RouterConfig(2, "sigmoid", scale=4.0, shared_logits=1)
    r = route(s, config, implementation=implementation)
    assert r.num_experts == 3 and r.topk_ids.tolist() == [[0, 2]]
    torch.testing.assert_close(r.topk_weights, torch.tensor([[1.6, 1.0]]).double())
    torch.testing.assert_close(r.shared_weights, torch.tensor([[1.4]]).double())
    assert torch.autograd.gradcheck(
        lambda x: torch.cat((route(x, config).topk_weights, route(x, config).shared_weights), 1), s
    )
    plain = route(s, config.replace(order="pre"), implementation=implementation)
    torch.testing.assert_close(plain.shared_weights, torch.tensor([[2.8]]).double())
    softly = route(s, config.replace(norm="softmax"), implementation=implementation)
    want = 4 * torch.softmax(torch.tensor([0.8, 0.5, 0.7]).double(), -1)
    torch.testing.assert_close(torch.cat((softly.topk_weights, softly.shared_weights), 1)[0], want)


def test_expert_scale(implementation):
    """One factor each or one for all, after the normalisation; its gradient is the weights'."""
    logits = randn(6, 4).requires_grad_()
    base = route(logits, top_k=2, implementation=implementation)
    for scale in (randn(4, seed=1).requires_grad_(), randn(1, seed=2).requires_grad_()):
        r = route(logits, top_k=2, expert_scale=scale, implementation=implementation)
        each = scale.expand(4)[base.topk_ids.long()]
        torch.testing.assert_close(r.topk_weights, base.topk_weights * each)
        (gradient,) = torch.autograd.grad(r.topk_weights.sum(), scale)
        want = torch.zeros(4).double().index_add(0, base.topk_ids.flatten(), base.topk_weights.flatten())
        torch.testing.assert_close(gradient, want if scale.numel() > 1 else want.sum()[None])
    half = route(logits.float(), top_k=2, expert_scale=torch.ones(4, dtype=torch.float64))
    assert half.topk_weights.dtype == torch.float32


# ---------------------------------------------------------------- noise
def test_gaussian_noise_and_jitter_have_the_moments_that_they_claim():
    x = torch.full((4000, 5), 2.0)
    make = torch.Generator().manual_seed
    noise = policies.noisy(x, RouterConfig(1, noise="gaussian", noise_std=0.3), None, make(0))[0] - x
    error = 0.3 / math.sqrt(noise.numel())
    assert abs(noise.mean()) < 4 * error and abs(noise.std() - 0.3) < 4 * error
    factor = policies.noisy(x, RouterConfig(1, noise="jitter", noise_std=0.1), None, make(0))[0] / x
    assert factor.min() >= 0.9 - 1e-6 and factor.max() <= 1.1 + 1e-6
    assert abs(factor.mean() - 1) < 4 * 0.1 / math.sqrt(3 * noise.numel())
    assert abs(factor.std() - 0.1 / math.sqrt(3)) < 1e-3
    spread = torch.full((4000, 5), -1.0)
    noise, std = policies.noisy(x, RouterConfig(1, noise="noisy_topk"), spread, make(0))
    torch.testing.assert_close(std, F.softplus(spread) + 1e-2)
    assert abs((noise - x).std() / std.mean() - 1) < 0.03
    g = policies.gumbel(x, make(0))
    assert abs(g.mean() - 0.5772) < 0.04 and abs(g.std() - math.pi / math.sqrt(6)) < 0.04


@pytest.mark.parametrize("noise", ["gaussian", "jitter", "noisy_topk", "gumbel"])
def test_noise_is_of_training_alone_and_leaves_the_weights_clean(noise, implementation):
    logits, config = randn(40, 6), RouterConfig(2, noise=noise, noise_std=0.8)
    plain = route(logits, RouterConfig(2), implementation=implementation)
    common = dict(noise_logits=randn(40, 6, seed=1), implementation=implementation)
    evaluated = route(logits, config, **common)
    assert torch.equal(evaluated.topk_ids, plain.topk_ids)
    assert torch.equal(evaluated.topk_weights, plain.topk_weights)
    trained = route(logits, config, **common, training=True, generator=6)
    assert (trained.topk_ids != plain.topk_ids).any()
    p = torch.softmax(logits, -1).gather(1, trained.topk_ids.long())
    torch.testing.assert_close(trained.topk_weights, p / p.sum(-1, keepdim=True))
    kept = route(logits, config.replace(noise_in_weights=True), **common, training=True, generator=6)
    assert torch.equal(kept.topk_ids, trained.topk_ids) and (kept.topk_weights != trained.topk_weights).any()


@pytest.mark.parametrize("noise", ["gaussian", "jitter"])
def test_noise_of_no_width_is_none(noise):
    logits = randn(40, 6)
    logits[3, 2] = -INF
    config = RouterConfig(2, noise=noise, noise_std=0.0, noise_in_weights=True)
    trained, plain = route(logits, config, training=True), route(logits, RouterConfig(2))
    assert torch.equal(trained.topk_ids, plain.topk_ids) and torch.equal(trained.topk_weights, plain.topk_weights)


@pytest.mark.parametrize("noise", ["gaussian", "jitter", "noisy_topk", "gumbel"])
def test_noise_lifts_no_mask(noise):
    """A width beyond 1 turns signs about, but not that of -inf."""
    config = RouterConfig(2, noise=noise, noise_std=3.0)
    open_ = torch.tensor([True, False, True, False, True])
    common = dict(training=True, generator=0, noise_logits=randn(500, 5, seed=1), statistics=True)
    r = route(randn(500, 5), config, expert_mask=open_, **common)
    assert set(r.topk_ids.flatten().tolist()) == {0, 2, 4}


def test_the_first_pick_with_gumbel_noise_is_a_sample_of_the_softmax(implementation):
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, -2.0])
    N = 20000 if implementation == "torch" else 2000
    config = RouterConfig(2, noise="gumbel")
    r = route(logits.expand(N, 6), config, training=True, generator=1, implementation=implementation)
    count = torch.bincount(r.topk_ids[:, 0].long(), minlength=6).double()
    want = torch.softmax(logits.double(), -1) * N
    assert ((count - want).square() / want).sum() < 20.5, "chi², 5 degrees of freedom, 1 in 1000"


def test_gumbel_softmax_hardens_as_it_cools_and_reaches_every_logit():
    logits = randn(30, 5).requires_grad_()
    config = RouterConfig(1, order="pre", noise="gumbel", noise_in_weights=True)
    weights = {}
    for temperature in (5.0, 1.0, 0.1, 1e-4):
        r = route(logits, config.replace(temperature=temperature), training=True, generator=2)
        weights[temperature] = r.topk_weights.mean().item()
        if temperature == 1.0:
            gradient = slopes(r, logits)
            assert (gradient != 0).all() and torch.isfinite(gradient).all()
    assert weights[5.0] < weights[1.0] < weights[0.1] < weights[1e-4] == 1.0
    cold = route(logits, config.replace(temperature=1e-4), training=True, generator=2)
    warm = route(logits, config.replace(temperature=5.0), training=True, generator=2)
    assert torch.equal(cold.topk_ids, warm.topk_ids), "the temperature alone changes no choice"


# ---------------------------------------------------------------- straight through
SOFT = {
    "pre": RouterConfig(2, order="pre", scale=3.0),
    "pre_renorm": RouterConfig(2, scale=3.0, divide_by_k=True),
    "post": RouterConfig(2, order="post", scale=3.0),
    "length 2": RouterConfig(2, "sigmoid", norm_p=2.0, scale=3.0),
    "softmax of scores": RouterConfig(2, "sigmoid", norm="softmax", scale=3.0, divide_by_k=True),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SOFT)
def test_straight_through_is_hard_forward_and_soft_backward(name, training, implementation):
    config, x = SOFT[name], randn(6, 5).requires_grad_()
    factor = config.scale / (2 if config.divide_by_k else 1)
    common = dict(training=training, implementation=implementation)
    hard = route(x, config.replace(straight_through=True), **common)
    soft = route(x, config, **common)
    assert (hard.topk_weights == factor).all(), "exactly"
    assert torch.equal(hard.topk_ids, soft.topk_ids)
    torch.testing.assert_close(slopes(hard, x), slopes(soft, x), rtol=1e-12, atol=1e-15)
    step, direction = 1e-6, randn(6, 5, seed=4)
    weigh = torch.sin(torch.arange(1.0, 13, dtype=torch.float64)).view(6, 2)
    high, low = ((route(x + s * direction, config).topk_weights * weigh).sum() for s in (step, -step))
    slope = (slopes(hard, x) * direction).sum()
    torch.testing.assert_close(slope, ((high - low) / (2 * step)).detach(), rtol=1e-7, atol=1e-9)
    seen = torch.tensor([True, False, True, True, True, True])
    masked = route(x, config.replace(straight_through=True), token_mask=seen, **common)
    assert (masked.topk_weights[1] == 0).all() and (masked.topk_weights[0] == factor).all()


# ---------------------------------------------------------------- expert sampling
def test_expert_sampling_leaves_experts_out_but_never_too_many():
    logits = randn(30, 8)
    sizes = []
    for seed in range(60):
        r = route(logits, top_k=3, expert_sampling=0.5, training=True, generator=seed)
        assert (r.topk_ids >= 0).all()
        p = route(logits, top_k=3, expert_sampling=0.5, training=True, generator=seed, statistics=True)
        sizes.append(int((p.probability_sums[0] > 0).sum()))
        assert torch.equal(p.topk_ids, r.topk_ids), "an int seeds the call"
        chosen = set(r.topk_ids.flatten().tolist())
        assert len(chosen) <= sizes[-1]
    assert min(sizes) == 3 and max(sizes) > 4
    # never fewer than 3: the mean of max(3, binomial(8, 1/2)) is 4.19
    assert abs(sum(sizes) / 60 - 4.19) < 4 * 1.2 / math.sqrt(60)


def test_expert_sampling_off_in_evaluation_and_where_it_keeps_all():
    logits = randn(30, 8)
    plain = route(logits, top_k=3)
    for extra in (dict(expert_sampling=0.3), dict(expert_sampling=1.0, training=True)):
        assert torch.equal(route(logits, top_k=3, **extra).topk_ids, plain.topk_ids)
    torch.manual_seed(0)
    seen = {tuple(route(logits, top_k=3, expert_sampling=0.3, training=True).topk_ids.flatten().tolist())
            for _ in range(5)}  # fmt: skip
    assert len(seen) > 1


def test_expert_sampling_beside_a_mask_leaves_each_token_its_k():
    """Whichever experts the draw leaves out, a token keeps K of those that its mask leaves it."""
    g = torch.Generator().manual_seed(0)
    open_ = torch.rand(40, 8, generator=g).argsort(1) < 4
    for seed in range(20):
        r = route(randn(40, 8), top_k=3, expert_sampling=0.1, training=True, generator=seed, expert_mask=open_)
        assert (r.topk_ids >= 0).all() and open_.gather(1, r.topk_ids.long()).all()


# ---------------------------------------------------------------- the same numbers again
NOISES = {
    "gaussian": RouterConfig(2, noise="gaussian"),
    "gumbel": RouterConfig(2, noise="gumbel", noise_in_weights=True, temperature=0.5),
    "noisy_topk": RouterConfig(2, noise="noisy_topk", noise_in_weights=True),
    "sampling": RouterConfig(2, order="pre", expert_sampling=0.5),
    "sparsemixer": RouterConfig(2, order="pre", policy="sparsemixer", noise_std=0.5),
}


@pytest.mark.parametrize("name", NOISES)
def test_seeds_repeat(name):
    logits, spread = randn(50, 6), randn(50, 6, seed=1)

    def ids(generator):
        r = route(logits, NOISES[name], noise_logits=spread, training=True, generator=generator)
        return r.topk_ids

    assert torch.equal(ids(7), ids(7)) and not torch.equal(ids(7), ids(8))
    a, b = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    first = ids(a)
    assert torch.equal(first, ids(b)) and torch.equal(first, ids(7))
    assert not torch.equal(first, ids(a)), "a generator moves on"
    torch.manual_seed(3)
    first = ids(None)
    assert not torch.equal(first, ids(None))
    torch.manual_seed(3)
    assert torch.equal(first, ids(None))


@pytest.mark.parametrize("generator", [None, 5])
@pytest.mark.parametrize("name", NOISES)
def test_activation_checkpointing_repeats_the_noise(name, generator):
    x, w = randn(12, 4, seed=2), randn(6, 4, seed=3).requires_grad_()
    up, down = randn(6, 6, 4, seed=4), randn(6, 4, 3, seed=5)

    def layer(x):
        logits = x @ w.T
        r = route(logits, NOISES[name], noise_logits=logits * 0.3, training=True, generator=generator)
        return fused_experts(x, up, down, r)

    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(11)
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (leaf, w))))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    assert results[0][2].abs().sum() > 0, "the router learns"


# ---------------------------------------------------------------- noisy top-k's load
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_load_is_what_drawing_again_gives(temperature):
    """One expert's noise drawn again 4000 times, the others' kept: how often is it among the K?"""
    T, E, K, N = 5, 6, 2, 4000
    logits, spread = randn(T, E), randn(T, E, seed=1) * 0.5
    config = RouterConfig(K, noise="noisy_topk", temperature=temperature)
    r = route(logits, config, noise_logits=spread, training=True, generator=4, statistics=True)
    std = F.softplus(spread) + 1e-2
    fixed = logits + std * torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    again = torch.randn(N, T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * std + logits
    for e in range(E):
        tried = fixed.expand(N, T, E).clone()
        tried[..., e] = again[..., e]
        hits = (tried.topk(K, -1).indices == e).any(-1).double()
        error = (hits.var(0).sum() / N).sqrt().item()
        assert abs(hits.mean(0).sum().item() - r.load[e].item()) < 4 * error + 1e-3, e


def test_the_gradient_of_the_load():
    clean, noise = randn(4, 5).requires_grad_(), randn(4, 5, seed=1)
    std = (randn(4, 5, seed=2).abs() + 0.3).requires_grad_()
    noisy = (clean + noise * std).detach()
    assert torch.autograd.gradcheck(lambda c, s: policies.expected_load(c, noisy, s, 2), (clean, std))


def test_the_load_of_masked_tokens_and_experts_is_zero():
    logits, spread = randn(6, 5).requires_grad_(), randn(6, 5, seed=1).requires_grad_()
    seen, open_ = torch.tensor([True] * 4 + [False] * 2), torch.tensor([True, False, True, True, True])
    config = RouterConfig(2, noise="noisy_topk")
    common = dict(noise_logits=spread, training=True, generator=0, token_mask=seen)
    r = route(logits, config, **common, expert_mask=open_)
    assert r.load[1] == 0 and 0 < r.load.sum() <= 4 * 5
    two = route(logits, config, **common, expert_mask=torch.tensor([True, False, False, False, True]))
    assert two.load.tolist() == [4, 0, 0, 0, 4], "who is alone with K is chosen for certain"
    for load in (r.load, two.load):
        for gradient in torch.autograd.grad(load.square().sum(), (logits, spread)):
            assert torch.isfinite(gradient).all() and (gradient[4:] == 0).all() and (gradient[:, 1] == 0).all()


# ---------------------------------------------------------------- torch.compile
COMPILED = {
    "capacity": (RouterConfig(2, capacity_factor=1.0, drop_policy="choice", renorm_after_drop=True), ("token_mask",)),
    "probability": (
        RouterConfig(2, "sigmoid", capacity_factor=0.7, drop_policy="probability"),
        ("expert_mask", "bias"),
    ),
    "given ids": (RouterConfig(2, order="pre", capacity_factor=0.7), ("ids", "token_mask", "expert_scale")),
    "others": (RouterConfig(3, zero_experts=1, identity_experts=1, constant_experts=1, straight_through=True), ()),
    "expert choice": (RouterConfig(2, policy="expert_choice", max_choices=2), ("token_mask",)),
    "noise": (RouterConfig(2, noise="gumbel", noise_in_weights=True, expert_sampling=0.8), ("expert_mask",)),
    "sparsemixer": (MIXER, ()),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_whole_step_compiles_without_a_break(name):
    """Router, choice, experts and a loss, with gradients; a second number of tokens needs no other code path."""
    config, given = COMPILED[name]
    E, H = 6 - config.extra_experts, 4
    w, up, down = randn(6, H, seed=1), randn(E, 6, H, seed=2), randn(E, H, 3, seed=3)
    tensors = dict(bias=randn(6, seed=4), expert_scale=randn(6, seed=5), expert_mask=torch.arange(6) < 5)

    def step(x, w):
        T = x.shape[0]
        t = torch.arange(T)
        here = dict(tensors, token_mask=t < T - 2, ids=torch.stack((t % 3, 5 - t % 4), 1).where(t[:, None] != 3, -1))
        r = route(x @ w.T, config, **{k: here[k] for k in given}, training=True, statistics=True)
        y = fused_experts(x, up, down, r)
        return y, (y.square().sum() + r.probability_sums.square().sum() + r.logsumexp_squares.sum())

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (8, 11):
        results = []
        for run in (step, compiled):
            torch.manual_seed(0)
            leaves = [randn(T, H).requires_grad_(), w.clone().requires_grad_()]
            y, loss = run(*leaves)
            results.append((y.detach(), loss.detach(), *torch.autograd.grad(loss, leaves)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-10, atol=1e-12)


def test_padding_compiles():
    def rows(weights, ids):
        return Routing.from_topk(weights, ids, 4).to_capacity(3).row_order

    ids = torch.tensor([[0, 1], [0, 2], [0, -1], [0, 3]])
    compiled = torch.compile(rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(4, 2), ids), rows(torch.ones(4, 2), ids))
