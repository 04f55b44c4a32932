"""Bad input gets a `ValueError` that says who, what must hold, what came and what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moesaic
from moesaic import RouterConfig, Routing, Unsupported, fused_experts, grouped_matmul, permute, route, unpermute
from moesaic.cases import CASES
from moesaic.testing import make_inputs

LAYER = make_inputs(CASES["qwen3-30b-a3b"].small(16, 10, 4), 5)
GPT = make_inputs(CASES["gpt-oss-120b"].small(16, 10, 4), 5)
META = torch.device("meta")


def layer(**changes):
    return fused_experts(**{**LAYER.arguments(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.randn(2, 5, 16)), r"x must have shape \(T, H\)"),
        (dict(x=torch.randn(4, 16)), r"x must have shape \(5, H\), got \(4, 16\)"),
        (dict(x=torch.randn(5, 12)), r"w_down must have shape"),
        (dict(x=torch.ones(5, 16, dtype=torch.int64)), "x must be floating point"),
        (dict(x=torch.randn(5, 16).bfloat16()), "must have the dtype of x"),
        (dict(x=torch.empty(5, 16, device=META)), "must have the device of x"),
        (dict(w_gate_up=LAYER.w_gate_up.mT), "pass transposed=True"),
        (dict(w_gate_up=LAYER.w_gate_up[:, :10]), "w_gate_up must have shape"),
        (dict(w_gate_up=LAYER.w_gate_up[:2]), "w_gate_up must have shape"),
        (dict(w_down=LAYER.w_down[0]), r"w_down must have shape \(E, H, I\)"),
        (dict(transposed=True), "is it really input-major"),
        (dict(activation="relu2"), "I columns for activation 'relu2'"),
        (dict(activation="swish"), "activation must be one of"),
        (dict(layout="mixed"), "layout must be one of 'concatenated', 'interleaved'"),
        (dict(reduce="mean"), "reduce must be one of"),
        (dict(reduce="sum"), "needs weights=None"),
        (dict(weights_on="gate"), "weights_on must be one of 'output', 'input'"),
        (dict(weights_on="input", reduce="sum", weights=None), "weights_on='input' needs weights"),
        (dict(weights_on="input", x=torch.ones(4, 16)), r"x must have shape \(5, "),
        (dict(weights=None), "routing weights must be given"),
        (dict(weights=torch.ones(5, 3)), "weights must have shape"),
        (dict(b_gate_up=torch.ones(4, 15)), "b_gate_up must have shape"),
        (dict(b_down=torch.ones(3, 16)), "b_down must have shape"),
        (dict(b_down=torch.ones(4, 16).half()), "b_down must have the dtype of x"),
        (
            dict(residual=torch.ones(5, 15)),
            r"residual must have shape \(5, 16\), got \(5, 15\); one row for each token",
        ),
        (dict(residual=torch.ones(1, 16)), r"residual must have shape \(5, 16\), got \(1, 16\)"),
        (dict(residual=torch.ones(16)), r"residual must have shape \(5, 16\), got \(16,\)"),
        (
            dict(residual=torch.ones(5, 16).half()),
            r"residual must have the dtype of x \(torch.float32\), got torch.float16",
        ),
        (dict(residual=torch.ones(5, 16, dtype=torch.int64)), "residual must have the dtype of x"),
        (
            dict(residual=torch.empty(5, 16, device=META)),
            r"residual must have the device of x \(cpu\), got meta; convert",
        ),
    ],
)
def test_fused_experts(changes, message):
    with pytest.raises(ValueError, match="fused_experts") as error:
        layer(**changes)
    assert __import__("re").search(message, str(error.value)), str(error.value)


@pytest.mark.parametrize(
    ("weights", "ids", "experts", "message"),
    [
        (None, torch.tensor([[0, 4]]), 4, r"must lie in \[-1, 4\), got 4 at token 0, choice 1"),
        (None, torch.tensor([[0, -2]]), 4, "got -2"),
        (None, torch.tensor([0, 1]), 4, r"must have shape \(T, K\)"),
        (None, torch.tensor([[0.0, 1]]), 4, "must be integers"),
        (torch.ones(1, 3), torch.tensor([[0, 1]]), 4, "topk_weights must have shape"),
        (torch.ones(1, 2, device=META), torch.tensor([[0, 1]]), 4, "must share a device"),
        (None, torch.tensor([[0, 1]]), 0, "num_experts must be at least 1"),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_from_topk(weights, ids, experts, message, implementation):
    with pytest.raises(ValueError, match=r"Routing\.from_topk.*" + message):
        Routing.from_topk(weights, ids, experts, implementation=implementation)


@pytest.mark.parametrize(
    ("logits", "fields", "message"),
    [
        (torch.randn(3), dict(top_k=2), r"must have shape \(T, E\)"),
        (torch.ones(3, 4, dtype=torch.long), dict(top_k=2), "must be floating point"),
        (torch.randn(3, 4), dict(top_k=5), "top_k must be between 1 and the 4"),
        (torch.randn(3, 4), dict(top_k=0), "top_k must be between 1"),
        (torch.randn(3, 4), dict(top_k=2, score="tanh"), "score must be one of"),
        (torch.randn(3, 4), dict(top_k=2, order="after"), "order must be one of"),
        (torch.randn(3, 4), dict(top_k=2, num_groups=3), "must divide the number of experts E=4, got 3"),
        (
            torch.randn(3, 4),
            dict(top_k=2, num_groups=2, topk_groups=3),
            "topk_groups must be between 1 and num_groups=2",
        ),
        (torch.randn(3, 4), dict(top_k=3, num_groups=2, topk_groups=1), "the 2 experts that can be chosen"),
        (torch.randn(3, 4), dict(top_k=1, num_groups=4, topk_groups=2), "needs groups of at least 2 experts"),
        (torch.randn(3, 4), dict(top_k=1, num_groups=2, order="post"), "has no group form"),
        (torch.randn(3, 4), dict(top_k=2, bias=torch.ones(3)), "bias must have shape"),
        (torch.randn(3, 4), dict(config=RouterConfig(2), top_k=2), "not both"),
    ],
)
def test_route(logits, fields, message):
    with pytest.raises(ValueError, match=message):
        route(logits, **fields)


LOGITS = torch.randn(6, 8)
SCORED = dict(top_k=2, score="sigmoid")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # fields of the configuration, each alone
        (dict(policy="best"), "policy must be one of 'topk', 'top_p'"),
        (dict(norm="max"), "norm must be one of 'sum', 'softmax'"),
        (dict(noise="uniform"), "noise must be one of"),
        (dict(bias_on="weights"), "bias_on must be one of"),
        (dict(group_score="mean"), "group_score must be one of"),
        (dict(drop_policy="last"), "drop_policy must be one of 'position', 'choice', 'probability'"),
        (dict(shared_logits=-1), "shared_logits must not be negative, got -1"),
        (dict(identity_experts=-2), "identity_experts must not be negative, got -2"),
        (dict(max_choices=-1), "max_choices must not be negative"),
        (dict(min_capacity=-1), "min_capacity must not be negative"),
        (dict(zero_experts=8), r"must have more columns than the 8 of zero.*got 8"),
        (dict(multiplier=0.0), "multiplier must be positive, got 0.0; negate"),
        (dict(multiplier=float("nan")), "multiplier must be positive"),
        (dict(soft_cap=-1.0), "soft_cap, norm_eps and norm_min must not be negative"),
        (dict(norm_p=0.0), "norm_p must be positive"),
        (dict(norm_eps=-1e-9), "must not be negative"),
        (dict(num_groups=0), "num_groups must divide the number of experts E=8, got 0"),
        (dict(num_groups=2, group_mask_value=float("nan")), "group_mask_value must be a number, got nan"),
        # thresholds
        (dict(policy="top_p"), "needs 0 < threshold <= 1, got 0.0; it is a share"),
        (dict(policy="top_p", threshold=1.01), "needs 0 < threshold <= 1, got 1.01"),
        (dict(policy="entropy"), r"needs 0 < threshold < ln\(E\) = 2.079"),
        (dict(policy="entropy", threshold=2.08), "which no entropy exceeds, got 2.08"),
        (dict(policy="entropy", threshold=float("nan")), "needs 0 < threshold"),
        # fields that exclude each other
        (dict(policy="sinkhorn", num_groups=2), "have no group form, got num_groups=2"),
        (dict(policy="expert_choice", num_groups=2), "have no group form"),
        (dict(policy="sparsemixer"), "needs score='softmax', order='pre', got 'softmax', 'pre_renorm'"),
        (dict(policy="sparsemixer", order="pre", noise="gumbel"), "draws its own noise and needs noise='none'"),
        (dict(policy="sparsemixer", order="pre", temperature=2.0), "temperature=1.0, got 'none', 2.0"),
        (dict(shared_logits=1), "shared_logits needs an elementwise score .* got 'softmax'"),
        (
            dict(shared_logits=1, score="sigmoid", order="post"),
            "and order 'pre' or 'pre_renorm', got 'sigmoid' and 'post'",
        ),
        (dict(score="log_sigmoid"), "is negative and needs norm='softmax'"),
        # training and capacity
        (dict(noise_std=-0.1), "noise_std must not be negative"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(expert_sampling=0.0), r"expert_sampling must lie in \(0, 1\], got 0.0; it is a rate"),
        (dict(expert_sampling=1.5), "expert_sampling must lie in"),
        (dict(capacity_factor=0.0), "capacity_factor must be positive and finite, got 0.0; use None"),
        (dict(eval_capacity_factor=-1.0), "eval_capacity_factor must be positive"),
        (dict(capacity_factor=float("inf")), "must be positive and finite, got inf"),
        (dict(capacity_factor=float("nan")), "must be positive and finite, got nan"),
    ],
)
def test_router_config(fields, message):
    with pytest.raises(ValueError, match="route: .*" + message):
        route(LOGITS, RouterConfig(**{"top_k": 2, **fields}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bias=torch.ones(8, dtype=torch.long)), "bias must be floating point, got torch.int64"),
        (dict(bias=torch.ones(8, device=META)), "bias must be on cpu, got meta"),
        (dict(bias=torch.ones(8), policy="sinkhorn"), "bias must be None with policy='sinkhorn'"),
        (dict(bias=torch.ones(8), policy="sparsemixer", order="pre"), "bias must be None with policy='sparsemixer'"),
        (dict(bias=torch.ones(9), zero_experts=2, shared_logits=1, **SCORED), r"bias must have shape \(7\)"),
        (dict(expert_scale=torch.ones(2)), r"expert_scale must have shape \(8\), got \(2,\); or \(1,\)"),
        (dict(expert_scale=torch.ones(8).bool()), "expert_scale must be floating point"),
        (dict(expert_scale=torch.ones(1, device=META)), "expert_scale must be on cpu"),
        (dict(ids=torch.zeros(6, 3).long()), r"ids must have shape \(6, 2\), got \(6, 3\); one expert for each choice"),
        (dict(ids=torch.zeros(6).long()), r"ids must have shape \(6, 2\)"),
        (dict(ids=torch.zeros(6, 2)), "ids must be integers, got torch.float32"),
        (dict(ids=torch.zeros(6, 2, dtype=torch.complex64)), "ids must be integers, got torch.complex64"),
        (dict(ids=torch.zeros(6, 2).bool()), "ids must be integers, got torch.bool"),
        (dict(ids=torch.zeros(6, 2, device=META).long()), "ids must be on cpu, got meta"),
        (dict(ids=torch.zeros(6, 2).long(), policy="expert_choice"), r"ids must have shape \(6, 8\)"),
        (dict(ids=torch.zeros(6, 2).long(), policy="expert_choice", max_choices=30), r"ids must have shape \(6, 8\)"),
        (dict(ids=torch.tensor([[0, 8]] * 6)), r"ids must lie in \[-1, 8\), got 8 at token 0, choice 1"),
        (dict(ids=torch.tensor([[0, 1]] * 5 + [[-2, 1]])), "got -2 at token 5, choice 0; use -1"),
        (dict(token_mask=torch.ones(5).bool()), r"token_mask must have shape \(6\), got \(5,\)"),
        (dict(token_mask=torch.ones(6)), "token_mask must be bool, got torch.float32; compare it"),
        (dict(token_mask=torch.ones(6, device=META).bool()), "token_mask must be on cpu"),
        (dict(expert_mask=torch.ones(6).bool()), r"expert_mask must have shape \(6, 8\), got \(6,\); or \(8,\)"),
        (dict(expert_mask=torch.ones(8)), "expert_mask must be bool"),
        (dict(expert_mask=torch.ones(8, device=META).bool()), "expert_mask must be on cpu"),
        (
            dict(expert_mask=torch.arange(8) < 1),
            "must leave at least top_k=2 experts to each token, got 1; lower top_k",
        ),
        (dict(expert_mask=torch.ones(6, 8).bool().tril()), "must leave at least top_k=2 experts to each token, got 1"),
        (dict(noise="noisy_topk", training=True), r"noise='noisy_topk' needs noise_logits of shape \(6, 8\), got None"),
        (
            dict(noise="noisy_topk", training=True, noise_logits=torch.ones(6, 7)),
            r"noise_logits must have shape \(6, 8\), got \(6, 7\)",
        ),
        (dict(noise="noisy_topk", training=True, noise_logits=torch.ones(6, 8).int()), "noise_logits must be floating"),
        (dict(noise="noisy_topk", noise_logits=torch.ones(6, 8, device=META)), "noise_logits must be on cpu"),
        (dict(sequences=4), "sequences must be positive and divide the number of tokens T=6, got 4; pad them"),
        (dict(sequences=0), "sequences must be positive"),
        (
            dict(noise="gumbel", training=True, generator="seed"),
            "generator must be a torch.Generator on cpu, an int or None",
        ),
        (dict(implementation="cuda-cores"), None),
    ],
)
def test_arguments_of_route(arguments, message):
    """Each argument's shape, dtype, device and values."""
    fields = {"top_k": 2, **arguments}
    if message is None:
        with pytest.raises(Unsupported, match="'cuda-cores' cannot run"):
            route(LOGITS, **fields)
        return
    with pytest.raises(ValueError, match="route: .*" + message):
        route(LOGITS, **fields)


def test_nan_logits_are_found_when_asked_for():
    logits = LOGITS.clone()
    logits[4, 3] = float("nan")
    with pytest.raises(ValueError, match="must not be NaN, got NaN at token 4, expert 3; look at what made it"):
        route(logits, top_k=2, checked=True)
    assert route(logits, top_k=2).topk_ids.shape == (6, 2), "not looked at otherwise"
    assert route(LOGITS, top_k=2, checked=True).topk_ids.shape == (6, 2)


def test_an_evaluation_needs_no_noise_logits():
    assert route(LOGITS, top_k=2, noise="noisy_topk").topk_ids.shape == (6, 2)


def test_permute_unpermute_grouped_matmul():
    routing = LAYER.routing
    with pytest.raises(ValueError, match=r"permute: x must have shape \(5, H\)"):
        permute(torch.randn(4, 16), routing)
    with pytest.raises(ValueError, match="unpermute: rows must have shape"):
        unpermute(torch.randn(5, 16), routing)
    for weights, message in (
        (torch.ones(5, 3), r"weights must have shape \(5, 4\)"),
        (torch.ones(5, 4).long(), "weights must be floating point"),
        (torch.ones(5, 4, device=META), "weights must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=f"unpermute: {message}"):
            unpermute(permute(LAYER.x, routing), routing, weights=weights)
    with pytest.raises(ValueError, match="permute: x must be on cpu, got meta"):
        permute(torch.empty(5, 16, device=META), routing)
    with pytest.raises(ValueError, match="permute: x must be floating point"):
        permute(torch.ones(5, 16).int(), routing)
    with pytest.raises(ValueError, match="pass weights=False"):
        unpermute(permute(LAYER.x, routing), replace(routing, topk_weights=None))
    rows = permute(LAYER.x, routing)
    with pytest.raises(ValueError, match="grouped_matmul: rows must have shape"):
        grouped_matmul(rows[:, :8], LAYER.w_gate_up, routing)
    with pytest.raises(ValueError, match="grouped_matmul: w must have shape"):
        grouped_matmul(rows, LAYER.w_gate_up[0], routing)
    with pytest.raises(ValueError, match="must have the dtype of rows"):
        grouped_matmul(rows, LAYER.w_gate_up.half(), routing)
    with pytest.raises(ValueError, match="bias must have shape"):
        grouped_matmul(rows, LAYER.w_gate_up, routing, bias=torch.ones(4, 3))


def test_nothing_is_half_done_on_bad_input():
    """A refused call leaves its inputs as they were and the next good call is right."""
    before = {k: v.clone() for k, v in LAYER.arguments().items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError):
        layer(w_down=LAYER.w_down[:, :3])
    for name, value in before.items():
        assert torch.equal(value, LAYER.arguments()[name])
    assert torch.equal(layer(), layer())


def test_forced_implementation_that_cannot_run():
    with pytest.raises(Unsupported, match="'cuda-cores' cannot run"):
        layer(implementation="cuda-cores")
    with pytest.raises(Unsupported, match="'triton' cannot run"), moesaic.use("triton"):
        layer()
    table = str(moesaic.explain("fused_experts"))
    assert "torch" in table and "chosen" in table and "triton" in table and "no: " in table
    with pytest.raises(ValueError, match="op must be one of"):
        moesaic.explain("attention")


def test_use_is_restored_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), moesaic.use("reference"):
        raise RuntimeError("inside")
    assert moesaic.op.forced(None) == ""
