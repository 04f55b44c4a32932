"""Every implementation of every operator against the fp64 oracle: forward, all gradients, and the contracts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moesaic
from moesaic import RouterConfig, Routing, fused_experts, grouped_matmul, permute, route, unpermute
from moesaic.cases import CASES
from moesaic.testing import STAGES, adversarial_ids, assert_close, make_inputs

QWEN, GPT, NEMOTRON = CASES["qwen3-30b-a3b"], CASES["gpt-oss-120b"], CASES["nemotron-h"]
TABLES = ("topk_ids", "tokens_per_expert", "expert_offsets", "row_order", "row_index")


def case_of(model, hidden, intermediate, experts, top_k):
    return replace(model.small(hidden, intermediate, experts), top_k=top_k)


ODD = {m.name: case_of(m, 33, 17, 6, 3) for m in (QWEN, GPT, NEMOTRON)}
EVEN = {m.name: case_of(m, 128, 128, 3, 2) for m in (QWEN, GPT)}  # tiles without masks
KINDS = tuple(adversarial_ids(6, 3, 7))


def leaves(inputs, dtype=None):
    """The layer's arguments with fresh leaves, and the leaves by name."""
    args = inputs.arguments()
    named = {k: args[k] for k in ("x", "w_gate_up", "w_down", "b_gate_up", "b_down") if args[k] is not None}
    named["weights"] = args["routing"].topk_weights
    named = {k: v.detach().to(dtype or v.dtype).clone().requires_grad_() for k, v in named.items()}
    return {**args, **named}, named


def layer_and_gradients(inputs, implementation, dtype=None):
    args, named = leaves(inputs, dtype)
    y = fused_experts(**args, implementation=implementation)
    cotangent = torch.sin(torch.arange(y.numel(), device=y.device, dtype=torch.float64)).view(y.shape)
    cotangent = cotangent.to(inputs.x.dtype).to(y.dtype)
    return {"y": y.detach(), **dict(zip(named, torch.autograd.grad(y, list(named.values()), cotangent), strict=True))}


def check_layer(inputs, implementation):
    got, want = layer_and_gradients(inputs, implementation), layer_and_gradients(inputs, "reference", torch.float64)
    case = inputs.case
    rows = inputs.routing.topk_ids.numel()
    contraction = max(case.hidden_size, case.intermediate_size, rows)
    for name, value in got.items():
        op = "fused_experts" if name == "y" else "fused_experts_backward"
        assert value.dtype == (torch.float32 if name == "weights" else inputs.x.dtype)
        assert_close(value, want[name], contraction, STAGES[op], inputs.x.dtype, name)


# ---------------------------------------------------------------- the layer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ODD)
def test_layer_fp32(model, kind, implementation, device):
    ids = adversarial_ids(6, 3, 7)[kind]
    check_layer(make_inputs(ODD[model], ids.shape[0], torch.float32, device, ids=ids), implementation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "dropped slots", "one token", "no token"])
@pytest.mark.parametrize("model", ["qwen3-30b-a3b-small", "gpt-oss-120b-small"])
def test_layer_half(model, kind, dtype, implementation, device):
    ids = adversarial_ids(6, 3, 7)[kind]
    case = {c.name: c for c in ODD.values()}[model]
    check_layer(make_inputs(case, ids.shape[0], dtype, device, ids=ids), implementation)


@pytest.mark.parametrize("model", EVEN)
@pytest.mark.parametrize("tokens", [5, 150])
def test_layer_of_whole_tiles(model, tokens, implementation, device):
    check_layer(make_inputs(EVEN[model], tokens, torch.bfloat16, device), implementation)


@pytest.mark.parametrize("activation", moesaic.ACTIVATIONS)
def test_every_activation(activation, implementation, device):
    case = replace(ODD[QWEN.name], activation=activation)
    check_layer(make_inputs(case, 6, torch.float32, device), implementation)


def test_constants_of_an_activation(implementation, device):
    inputs = make_inputs(ODD[QWEN.name], 6, torch.float32, device)
    act = moesaic.ACTIVATIONS["swiglu_oai"].with_constants(alpha=1.3, limit=0.5)
    args = {**inputs.arguments(), "activation": act}
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    y = fused_experts(**args, implementation=implementation)
    assert_close(y, fused_experts(**wide, implementation="reference"), 33, STAGES["fused_experts"])


def test_one_expert_and_all_experts(implementation, device):
    check_layer(make_inputs(case_of(QWEN, 17, 8, 1, 1), 5, torch.float32, device), implementation)
    check_layer(make_inputs(case_of(QWEN, 17, 8, 4, 4), 5, torch.float32, device), implementation)


def test_unweighted_sum(implementation, device):
    inputs = make_inputs(ODD[QWEN.name], 6, torch.float32, device)
    args = {**inputs.arguments(), "weights": None, "reduce": "sum"}
    ones = {**inputs.arguments(), "weights": torch.ones_like(inputs.routing.topk_weights)}
    x = inputs.x.clone().requires_grad_()
    y = fused_experts(**{**args, "x": x}, implementation=implementation)
    z = fused_experts(**ones, implementation=implementation)
    assert torch.equal(y, z)
    (grad,) = torch.autograd.grad(y.sum(), x)
    x2 = inputs.x.clone().requires_grad_()
    (want,) = torch.autograd.grad(fused_experts(**{**ones, "x": x2}, implementation=implementation).sum(), x2)
    assert torch.equal(grad, want)


def test_frozen_parts_get_no_gradient_and_change_none(implementation, device):
    inputs = make_inputs(ODD[GPT.name], 6, torch.float32, device)
    full = layer_and_gradients(inputs, implementation)
    for only in ("x", "w_gate_up", "w_down", "b_gate_up", "b_down", "weights"):
        args, named = leaves(inputs)
        for name, leaf in named.items():
            leaf.requires_grad_(name == only)
        y = fused_experts(**args, implementation=implementation)
        cotangent = torch.sin(torch.arange(y.numel(), device=y.device, dtype=torch.float64)).view(y.shape).to(y.dtype)
        (grad,) = torch.autograd.grad(y, named[only], cotangent)
        assert torch.equal(grad, full[only]), only


# ---------------------------------------------------------------- contracts
def test_runs_are_bitwise_equal(implementation, device):
    inputs = make_inputs(EVEN[QWEN.name], 70, torch.bfloat16, device)
    first, second = (layer_and_gradients(inputs, implementation) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_nan_stays_in_its_token(implementation, device):
    inputs = make_inputs(ODD[QWEN.name], 7, torch.float32, device)
    x = inputs.x.clone()
    x[2, 5], x[3, 1] = float("nan"), float("inf")
    y = fused_experts(**{**inputs.arguments(), "x": x}, implementation=implementation)
    clean = fused_experts(**inputs.arguments(), implementation=implementation)
    assert torch.isnan(y[2]).all() and not torch.isfinite(y[3]).all()
    keep = [0, 1, 4, 5, 6]
    assert torch.equal(y[keep], clean[keep])


def test_poison_in_what_must_not_be_read(implementation, device):
    """Weights of dropped slots and of experts that nobody chose are NaN, and nobody notices."""
    ids = adversarial_ids(6, 3, 7)["dropped slots"].clamp_max(4)
    inputs = make_inputs(ODD[QWEN.name], 7, torch.float32, device, ids=ids)
    clean = layer_and_gradients(inputs, implementation)
    poisoned = make_inputs(ODD[QWEN.name], 7, torch.float32, device, ids=ids)
    poisoned.w_gate_up[5:] = poisoned.w_down[5:] = float("nan")
    poisoned.routing.topk_weights[poisoned.routing.topk_ids < 0] = float("nan")
    got = layer_and_gradients(poisoned, implementation)
    for name in ("y", "x", "w_gate_up", "w_down", "weights"):
        assert torch.equal(got[name], clean[name]), name


def test_strides(implementation, device):
    """Sliced, expanded and transposed inputs, and an expanded gradient, give what their copies give."""
    inputs = make_inputs(ODD[QWEN.name], 6, torch.float32, device)
    wide = torch.randn(6, 66, device=device)
    variants = [
        {"x": wide[:, ::2]},
        {"x": wide[:1, :33].expand(6, 33)},
        {"w_gate_up": inputs.w_gate_up.mT.contiguous().mT, "w_down": inputs.w_down.mT.contiguous().mT},
        {"w_gate_up": torch.cat([inputs.w_gate_up, inputs.w_gate_up], -1)[..., :33]},
    ]
    for variant in variants:
        results = []
        for make in (lambda t: t, lambda t: t.contiguous()):
            args = {**inputs.arguments(), **{k: make(v).detach().requires_grad_() for k, v in variant.items()}}
            y = fused_experts(**args, implementation=implementation)
            grads = torch.autograd.grad(y.sum(), [args[k] for k in variant])
            results.append((y, *grads))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- route and its tables
CONFIGS = {
    "softmax pre": RouterConfig(3, order="pre"),
    "softmax renorm": RouterConfig(3, scale=2.5),
    "softmax post": RouterConfig(3, order="post"),
    "sigmoid pre": RouterConfig(1, "sigmoid", "pre"),
    "sigmoid renorm": RouterConfig(4, "sigmoid", "pre_renorm", 1e-20, 2.5),
    "sigmoid post": RouterConfig(2, "sigmoid", "post"),
    "groups top2": RouterConfig(3, "sigmoid", "pre_renorm", 1e-20, 2.5, 4, 2),
    "groups max": RouterConfig(3, "softmax", "pre", 0.0, 1.0, 2, 1, "max"),
    "groups masked by zero": RouterConfig(4, "sigmoid", "pre_renorm", 0.0, 1.0, 4, 1, "max", 0.0),
    "five groups": RouterConfig(5, "sqrt_softplus", "pre_renorm", 1e-20, 1.5, 5, 3),
    "sqrt softplus": RouterConfig(3, "sqrt_softplus", norm_min=2.5),
    "log sigmoid pre": RouterConfig(3, "log_sigmoid", "pre", multiplier=0.7),
    "log sigmoid, softmax": RouterConfig(3, "log_sigmoid", norm="softmax", bias_on="logits"),
    "sqrt softplus post": RouterConfig(5, "sqrt_softplus", "post", soft_cap=1.5),
    "capped": RouterConfig(7, multiplier=1.5, soft_cap=2.0, bias_on="logits", divide_by_k=True),
    "top-p": RouterConfig(6, order="pre", policy="top_p", threshold=0.6),
    "top-p of sigmoids": RouterConfig(6, "sigmoid", policy="top_p", threshold=0.3),
    "top-p post": RouterConfig(6, "log_sigmoid", "post", policy="top_p", threshold=0.5),
    "top-p of groups": RouterConfig(6, "sqrt_softplus", "pre", 0.0, 1.0, 4, 2, policy="top_p", threshold=0.3),
    "entropy": RouterConfig(4, policy="entropy", threshold=1.25),
    "entropy post": RouterConfig(4, "sigmoid", "post", policy="entropy", threshold=2.4),
    "length 2": RouterConfig(3, "sigmoid", norm_p=2.0, norm_eps=1e-6),
    "straight through": RouterConfig(3, straight_through=True, scale=2.0),
    "all of them": RouterConfig(20, "sigmoid"),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_route(name, biased, implementation, device):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 20, generator=g)
    bias = torch.randn(20, generator=g).to(device) * 0.1 if biased else None
    results = []
    for impl, dtype in ((implementation, torch.float32), ("reference", torch.float64)):
        x = logits.to(device, dtype).requires_grad_()
        r = route(x, CONFIGS[name], bias=bias, implementation=impl)
        cotangent = torch.cos(torch.arange(r.topk_weights.numel(), device=device)).view(r.topk_weights.shape)
        results.append((r, torch.autograd.grad(r.topk_weights, x, cotangent.to(r.topk_weights.dtype))[0]))
    (got, dgot), (want, dwant) = results
    for table in TABLES:
        assert torch.equal(getattr(got, table), getattr(want, table)), table
    assert got.topk_weights.dtype == torch.float32
    assert_close(got.topk_weights, want.topk_weights, 20, 4)
    assert_close(dgot, dwant, 20, 16)


def route_both(implementation, logits, config, **options):
    """`(routing, gradient of all that is differentiable)` of an implementation and, in fp64, of the reference."""
    for impl, dtype in ((implementation, torch.float32), ("reference", torch.float64)):
        x = logits.to(dtype).requires_grad_()
        r = route(x, config, implementation=impl, **options)
        values = [r.topk_weights, r.probability_sums, r.logsumexp_squares, r.shared_weights, r.identity_weight,
                  r.constant_weights]  # fmt: skip
        values = [v for v in values if v is not None]
        starts = [torch.cos(torch.arange(v.numel(), device=v.device, dtype=v.dtype)).view(v.shape) for v in values]
        yield r, values, torch.autograd.grad(values, x, starts)[0]


def check_route(implementation, logits, config, **options):
    (got, values, dgot), (want, wanted, dwant) = route_both(implementation, logits, config, **options)
    for table in TABLES:
        assert torch.equal(getattr(got, table), getattr(want, table)), table
    assert torch.equal(got.choices, want.choices)
    for value, other in zip(values, wanted, strict=True):
        assert value.dtype == torch.float32
        assert_close(value, other, 20, 16)
    assert_close(dgot, dwant, 20, 32)
    return got


@pytest.mark.parametrize("tokens", [9, 51])
@pytest.mark.parametrize("name", CONFIGS)
def test_route_with_statistics_and_masks(name, tokens, implementation, device):
    """Three sequences, finished tokens, masked experts: what remains, the sums over tokens and all gradients."""
    g = torch.Generator().manual_seed(tokens)
    logits = (torch.randn(tokens, 20, generator=g) * 1.5).to(device)
    if CONFIGS[name].score == "log_sigmoid" and CONFIGS[name].norm == "softmax":
        logits = logits.clamp_min(-2.0) + torch.rand(tokens, 20, generator=g).to(device) * 1e-2
    masks = {}
    if CONFIGS[name].top_k < 18:
        masks["expert_mask"] = (torch.arange(20) % 9 != 4).to(device)
    masks["token_mask"] = (torch.rand(tokens, generator=g) < 0.8).to(device)
    got = check_route(implementation, logits, CONFIGS[name], sequences=3, **masks)
    assert (got.topk_ids[~masks["token_mask"]] == -1).all()


@pytest.mark.parametrize("name", ["softmax pre", "softmax renorm", "softmax post", "sqrt softplus", "log sigmoid pre"])
def test_route_of_given_ids(name, implementation, device):
    """Recorded, hashed or forced ids with slots left out; what was chosen gives itself again, to the bit."""
    config = CONFIGS[name]
    logits = torch.randn(20, 20, generator=torch.Generator().manual_seed(1)).to(device)
    kinds = adversarial_ids(20, config.top_k, 20)
    for kind, dtype in (("random", torch.int32), ("dropped slots", torch.int64), ("all dropped", torch.int32)):
        check_route(implementation, logits, config, ids=kinds[kind].to(device, dtype))
    first = route(logits, config, implementation=implementation)
    again = route(logits, config, ids=first.topk_ids, implementation=implementation)
    for field in (*TABLES, "topk_weights"):
        assert torch.equal(getattr(first, field), getattr(again, field)), field


AROUND = {
    "capacity": RouterConfig(3, capacity_factor=0.8, renorm_after_drop=True),
    "capacity by choice": RouterConfig(3, "sigmoid", capacity_factor=0.6, drop_policy="choice"),
    "capacity by probability": RouterConfig(3, order="pre", capacity_factor=0.6, drop_policy="probability"),
    "other experts": RouterConfig(6, zero_experts=2, identity_experts=3, constant_experts=2, capacity_factor=1.0),
    "other experts, groups": RouterConfig(4, "sigmoid", "pre_renorm", 0.0, 1.0, 4, 2, identity_experts=8),
    "shared experts": RouterConfig(4, "sigmoid", shared_logits=2, scale=2.0),
    "expert choice": RouterConfig(2, policy="expert_choice", max_choices=3),
    "sparsemixer": RouterConfig(2, order="pre", policy="sparsemixer", noise_std=0.2),
    "sinkhorn": RouterConfig(2, "sigmoid", policy="sinkhorn"),
}


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("name", AROUND)
def test_route_with_what_is_composed_around_it(name, tokens, implementation, device):
    logits = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(4)).to(device)
    got = check_route(implementation, logits, AROUND[name], statistics=True)
    assert got.num_experts == AROUND[name].num_experts(20)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (7, 7), (60, 4), (130, 6), (257, 8)])
def test_route_of_any_size(experts, top_k, implementation, device):
    logits = torch.randn(4, experts, generator=torch.Generator().manual_seed(0)).to(device)
    got, want = (route(logits, top_k=top_k, implementation=i) for i in (implementation, "reference"))
    for table in TABLES:
        assert torch.equal(getattr(got, table), getattr(want, table)), table
    assert_close(got.topk_weights, want.topk_weights.double(), experts, 4)


def test_route_edges(implementation, device):
    """Ties to the lowest expert, half-precision and strided logits, NaN in one row, no token."""
    ids = route(torch.zeros(2, 9, device=device), top_k=4, implementation=implementation).topk_ids
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    half = torch.randn(5, 32, device=device).bfloat16()[:, ::2]
    a, b = (route(t, top_k=2, implementation=implementation) for t in (half, half.float().contiguous()))
    assert torch.equal(a.topk_ids, b.topk_ids) and torch.equal(a.topk_weights, b.topk_weights)
    logits = torch.randn(3, 8, device=device)
    logits[1, 2] = float("nan")
    r = route(logits, top_k=2, score="sigmoid", implementation=implementation)
    assert 2 not in r.topk_ids[1].tolist() and torch.isfinite(r.topk_weights).all()
    none = torch.nan
    nan = torch.tensor([[none, 5.0, 0, 1], [none, none, 0, 1], [0, none, none, -3]], device=device)
    for config in (
        RouterConfig(3), RouterConfig(3, order="post"), RouterConfig(3, policy="top_p", threshold=0.9),
        RouterConfig(3, policy="entropy", threshold=0.5), RouterConfig(2, "sigmoid", num_groups=2),
        RouterConfig(2, "sigmoid", num_groups=2, group_score="max"),
    ):  # fmt: skip
        got, want = (route(nan, config, implementation=i) for i in (implementation, "reference"))
        for table in TABLES:
            assert torch.equal(getattr(got, table), getattr(want, table)), (table, config)
    inf = float("-inf")
    logits = torch.tensor([[1.0, inf, inf, 2], [inf] * 4, [0, 1, 2, 3]], device=device, requires_grad=True)
    for order, score in (("pre", "softmax"), ("pre_renorm", "sigmoid"), ("post", "softmax"), ("pre", "log_sigmoid")):
        r = route(logits, top_k=3, order=order, score=score, implementation=implementation)
        assert r.topk_ids.tolist() == [[3, 0, -1], [-1, -1, -1], [3, 2, 1]]
        (grad,) = torch.autograd.grad(r.topk_weights[:, 0].sum() + r.logsumexp_squares.sum(), logits)
        assert r.topk_weights[0, 2] == 0 and (r.topk_weights[1] == 0).all()
        assert torch.isfinite(grad).all() and (grad[1] == 0).all()
    # probabilities that round to zero keep the order of their logits
    far = torch.tensor([[0.0, -3000, -1000, -2000], [1e4, 0, -1e4, 5e3]], device=device)
    assert route(far, top_k=3, implementation=implementation).topk_ids.tolist() == [[0, 2, 3], [0, 3, 1]]
    empty = route(torch.zeros(0, 8, device=device), top_k=2, implementation=implementation)
    assert empty.expert_offsets.tolist() == [0] * 9 and empty.row_order.numel() == 0


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(3, 2, 9), (8, 4, 32), (8, 4, 33), (300, 3, 130)])
def test_tables(experts, top_k, tokens, implementation, device):
    for kind, ids in adversarial_ids(experts, top_k, tokens).items():
        got = Routing.from_topk(None, ids.to(device), experts, implementation=implementation)
        want = Routing.from_topk(None, ids.to(device), experts, implementation="reference")
        for table in TABLES:
            assert torch.equal(getattr(got, table), getattr(want, table)), (kind, table)


# ---------------------------------------------------------------- permute and grouped_matmul
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_permute_and_unpermute(kind, dtype, implementation, device):
    ids = adversarial_ids(6, 3, 7)[kind].to(device)
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(ids.shape, generator=g).to(device)
    r = Routing.from_topk(weights, ids, 6)
    x = torch.randn(ids.shape[0], 37, generator=g).to(device, dtype)
    rows = permute(x, r, implementation=implementation)
    assert torch.equal(rows, permute(x, r, implementation="reference"))
    results = []
    for impl, wide in ((implementation, dtype), ("reference", torch.float64)):
        x_, rows_ = (t.detach().to(wide).requires_grad_() for t in (x, rows))
        w_ = weights.to(torch.float64 if wide == torch.float64 else torch.float32).requires_grad_()
        y = unpermute(rows_, r, weights=w_, implementation=impl)
        plain = unpermute(rows_, r, weights=False, implementation=impl)
        back = permute(x_, r, implementation=impl)
        grads = torch.autograd.grad([y, back], [rows_, w_, x_], [torch.ones_like(y), torch.ones_like(back)])
        results.append((y, plain, *grads))
    for name, got, want in zip(("y", "plain", "drows", "dweights", "dx"), *results, strict=True):
        assert_close(got, want, 37, 1, dtype, name)


@pytest.mark.parametrize("capacity", [0, 1, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_permute_and_unpermute_of_padded_rows(kind, capacity, implementation, device):
    """E batches of C rows: bit for bit the reference's, and the gradients of slots that found no room are zero."""
    ids = adversarial_ids(6, 3, 7)[kind].to(device)
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(ids.shape, generator=g).to(device)
    x = torch.randn(ids.shape[0], 37, generator=g).to(device)
    r = Routing.from_topk(weights, ids, 6, implementation=implementation).to_capacity(capacity)
    results = []
    for impl in (implementation, "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weights)]
        rows = permute(leaves[0], r, implementation=impl)
        y = unpermute(rows.square(), replace(r, topk_weights=leaves[1]), implementation=impl)
        results.append((rows.detach(), y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    (rows, *got), (same, *want) = results
    assert torch.equal(rows, same) and rows.shape == (6 * capacity, 37)
    for name, a, b in zip(("y", "dx", "dweights"), got, want, strict=True):
        assert_close(a, b.double(), 37, 8, name=name)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["random", "all to one", "dropped slots", "no token"])
def test_grouped_matmul(kind, transposed, bias, implementation, device):
    ids = adversarial_ids(5, 2, 11)[kind].to(device)
    r = Routing.from_topk(None, ids, 5)
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(ids.numel(), 19, generator=g).to(device)
    w = torch.randn(5, *((19, 23) if transposed else (23, 19)), generator=g).to(device)
    b = torch.randn(5, 23, generator=g).to(device) if bias else None
    results = []
    for impl, wide in ((implementation, torch.float32), ("reference", torch.float64)):
        args = [None if t is None else t.detach().to(wide).requires_grad_() for t in (rows, w, b)]
        out = grouped_matmul(args[0], args[1], r, bias=args[2], transposed=transposed, implementation=impl)
        wanted = [t for t in args if t is not None]
        results.append((out, *torch.autograd.grad(out, wanted, torch.sin(out.detach()))))
    live = int(r.expert_offsets[-1])
    assert (results[0][0][live:] == 0).all() and (results[0][1][live:] == 0).all()
    for name, got, want in zip(("out", "drows", "dw", "dbias"), *results, strict=False):
        assert_close(got, want, 23, 2, name=name)


# ---------------------------------------------------------------- torch's own rules for operators
def op_calls(device, implementation):
    inputs = make_inputs(case_of(GPT, 17, 8, 3, 2), 5, torch.float32, device)
    r, ops = inputs.routing, torch.ops.moesaic
    tables = {"row_order": r.row_order, "row_index": r.row_index, "expert_offsets": r.expert_offsets}

    def leaf(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    def named(**arguments):
        return {**arguments, **tables, "implementation": implementation}

    args, _ = leaves(inputs)
    layer = {k: args[k] for k in ("x", "w_gate_up", "w_down", "weights", "b_gate_up", "b_down")}
    plain = {k: t.detach() for k, t in layer.items()}
    options = dict(
        activation="swiglu_oai", alpha=1.702, limit=7.0, interleaved=True, transposed=True, allow_tf32=False,
        batch_invariant=False,
    )  # fmt: skip
    config = RouterConfig(2).core()
    for residual in (None, leaf(5, 17)):
        yield ops.fused_experts, (), named(**layer, residual=residual, **options, keep=True)
    # only the residual has a gradient, and nothing is kept for the others
    yield ops.fused_experts, (), named(**plain, residual=leaf(5, 17), **options, keep=False)
    yield (
        ops.fused_experts_backward,
        (),
        named(
            grad_y=leaf(5, 17).detach(),
            saved_preact=torch.randn(10, 16, device=device),
            **plain,
            residual=None,
            **options,
            needs=[True] * 6 + [False],
        ),
    )
    yield ops.route, (leaf(5, 6), None, None, *config, 6, 1, False, True, implementation), {}
    yield (
        ops.route,
        (leaf(6, 6), None, r.topk_ids.new_tensor([[0, 1]] * 6), *config, 5, 2, True, True, implementation),
        {},
    )
    ragged = RouterConfig(3, "sigmoid", policy="top_p", threshold=0.4).core()
    yield ops.route, (leaf(6, 8), leaf(8).detach(), None, *ragged, 8, 3, True, True, implementation), {}
    yield ops.expert_index, (r.topk_ids, 3, False, implementation), {}
    yield ops.permute, (), named(x=leaf(5, 7), top_k=2, keep=True)
    yield ops.unpermute, (), named(rows=leaf(10, 7), weights=leaf(5, 2), top_k=2, keep=True)
    p = r.to_capacity(4)
    padded = {"row_order": p.row_order, "row_index": p.row_index, "expert_offsets": p.expert_offsets}
    yield ops.permute, (), named(x=leaf(5, 7), top_k=2, keep=True) | padded
    yield ops.unpermute, (), named(rows=leaf(12, 7), weights=leaf(5, 2), top_k=2, keep=True) | padded
    product = dict(transposed=False, allow_tf32=False, batch_invariant=False, keep=True, implementation=implementation)
    yield (
        ops.grouped_matmul,
        (leaf(10, 7), leaf(3, 8, 7), leaf(3, 8), r.expert_offsets),
        product,
    )


def test_opcheck(implementation, device):
    for op, args, kwargs in op_calls(device, implementation):
        torch.library.opcheck(op, args, kwargs)
