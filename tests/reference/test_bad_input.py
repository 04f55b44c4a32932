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
        (dict(weights=None), "routing weights must be given"),
        (dict(weights=torch.ones(5, 3)), "weights must have shape"),
        (dict(b_gate_up=torch.ones(4, 15)), "b_gate_up must have shape"),
        (dict(b_down=torch.ones(3, 16)), "b_down must have shape"),
        (dict(b_down=torch.ones(4, 16).half()), "b_down must have the dtype of x"),
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


def test_permute_unpermute_grouped_matmul():
    routing = LAYER.routing
    with pytest.raises(ValueError, match=r"permute: x must have shape \(5, H\)"):
        permute(torch.randn(4, 16), routing)
    with pytest.raises(ValueError, match="unpermute: rows must have shape"):
        unpermute(torch.randn(5, 16), routing)
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
