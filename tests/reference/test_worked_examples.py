"""The oracle against cases worked by hand: a loop is only an oracle if somebody has checked the loop."""

from __future__ import annotations

import math

import pytest
import torch

import moesaic
from moesaic import Routing, fused_experts, permute, route, unpermute
from moesaic.testing import assert_close

IMPLEMENTATIONS = ("reference", "torch")
RTOL = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def two_tokens(dtype):
    """Two tokens, four experts, H = 3, I = 2; expert e's matrices hold e + 1 everywhere."""
    x = torch.tensor([[1.0, 1, 1], [2, 2, 2]], dtype=dtype)
    scale = torch.arange(1, 5, dtype=dtype)[:, None, None]
    w_gate_up, w_down = torch.ones(4, 4, 3, dtype=dtype) * scale, torch.ones(4, 3, 2, dtype=dtype) * scale
    weights = torch.full((2, 2), 0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, w_gate_up, w_down, Routing.from_topk(weights, torch.tensor([[0, 2], [2, 3]]), 4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_worked_example(implementation, dtype):
    x, w_gate_up, w_down, routing = two_tokens(dtype)
    y = fused_experts(x, w_gate_up, w_down, routing, implementation=implementation)
    want = torch.tensor([[251.5431822594] * 3, [3275.9999851095] * 3], dtype=torch.float64)
    torch.testing.assert_close(y.double(), want, rtol=max(RTOL[dtype], 1e-12), atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_expert_of_the_worked_example(implementation):
    """Expert 0 on token 0: g = u = 3, silu(3)·3 = 8.573…, twice summed: 17.146…; the others likewise."""
    x, w_gate_up, w_down, _ = two_tokens(torch.float64)
    for token, expert, want in (
        (0, 0, 17.1463342828),
        (0, 2, 485.9400302361),
        (1, 2, 1943.9999703929),
        (1, 3, 4607.999999826),
    ):
        one = Routing.from_topk(torch.ones(1, 1, dtype=torch.float64), torch.tensor([[expert]]), 4)
        y = fused_experts(x[token : token + 1], w_gate_up, w_down, one, implementation=implementation)
        torch.testing.assert_close(y, torch.full((1, 3), want, dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leaving_the_weights_out_is_another_result_and_must_be_asked_for(implementation):
    x, w_gate_up, w_down, routing = two_tokens(torch.float64)
    y = fused_experts(x, w_gate_up, w_down, routing, weights=None, reduce="sum", implementation=implementation)
    want = torch.tensor([[503.0863645189] * 3, [6551.999970219] * 3], dtype=torch.float64)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=0)
    bare = Routing.from_topk(None, routing.topk_ids, 4)
    with pytest.raises(ValueError, match="routing weights must be given"):
        fused_experts(x, w_gate_up, w_down, bare, implementation=implementation)
    with pytest.raises(ValueError, match="routing weights must be given"):
        fused_experts(x, w_gate_up, w_down, routing, weights=None, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_routing_tables(implementation):
    """The example of the module `routing`, and CANN's golden tables for the same choice."""
    r = Routing.from_topk(None, torch.tensor([[2, 0], [2, 1], [0, -1]]), 3, implementation=implementation)
    assert r.tokens_per_expert.tolist() == [2, 1, 2]
    assert r.expert_offsets.tolist() == [0, 2, 3, 5]
    assert r.row_order.tolist() == [1, 4, 3, 0, 2, 5]
    assert r.row_index.tolist() == [3, 0, 4, 2, 1, -1]
    cann = Routing.from_topk(None, torch.tensor([[2, 0], [2, 1], [0, 1]]), 3, implementation=implementation)
    assert cann.row_index.tolist() == [4, 0, 5, 2, 1, 3]
    assert cann.row_order.tolist() == [1, 4, 3, 5, 0, 2]
    assert cann.expert_offsets[1:].tolist() == [2, 4, 6]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_permute_by_hand(implementation):
    x = torch.tensor([[1.0, 10], [2, 20], [3, 30]])
    r = Routing.from_topk(torch.tensor([[0.5, 2], [1, 1], [3, 7]]), torch.tensor([[2, 0], [2, 1], [0, -1]]), 3)
    rows = permute(x, r, implementation=implementation)
    assert rows[:, 0].tolist() == [1, 3, 2, 1, 2, 0]
    y = unpermute(rows, r, implementation=implementation)
    assert y[:, 0].tolist() == [2.5, 4, 9]
    assert unpermute(rows, r, weights=False, implementation=implementation)[:, 1].tolist() == [20, 40, 30]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_router_by_hand(implementation):
    logits = torch.log(torch.tensor([[4.0, 1, 2, 1]]))  # softmax = [.5, .125, .25, .125]

    def weights(**fields):
        r = route(logits, top_k=2, implementation=implementation, **fields)
        return r.topk_ids.tolist()[0], [round(w, 6) for w in r.topk_weights.tolist()[0]]

    assert weights(order="pre") == ([0, 2], [0.5, 0.25])
    assert weights(order="pre_renorm") == ([0, 2], [0.666667, 0.333333])
    assert weights(order="post") == ([0, 2], [0.666667, 0.333333])
    assert weights(order="pre", scale=2.0) == ([0, 2], [1.0, 0.5])
    assert weights(order="pre", score="sigmoid") == ([0, 2], [0.8, 0.666667])
    # the bias chooses, it does not weigh
    assert weights(order="pre", bias=torch.tensor([0.0, 0.3, 0, 0])) == ([0, 1], [0.5, 0.125])
    # two groups {0, 1} and {2, 3}: by their best .5 > .25; by their two best .625 > .375
    assert weights(order="pre", num_groups=2, topk_groups=1, group_score="max") == ([0, 1], [0.5, 0.125])
    assert weights(order="pre", num_groups=2, topk_groups=1) == ([0, 1], [0.5, 0.125])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_and_nan(implementation):
    ids = route(torch.zeros(2, 7), top_k=3, implementation=implementation).topk_ids
    assert ids.tolist() == [[0, 1, 2]] * 2
    logits = torch.tensor([[1.0, 5, float("nan"), 2], [0, 1, 2, 3]])
    r = route(logits, top_k=2, score="sigmoid", order="pre", implementation=implementation)
    assert r.topk_ids.tolist() == [[1, 3], [3, 2]], "NaN ranks below every number and stays in its row"
    assert torch.isfinite(r.topk_weights[1]).all()


@pytest.mark.parametrize("name", moesaic.ACTIVATIONS)
def test_activation_derivatives(name):
    """Each entry's hand-written derivative against finite differences in fp64 (never on a kink)."""
    act = moesaic.ACTIVATIONS[name].with_constants(limit=1.5 if name.endswith(("oai", "clamped")) else None)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(40, dtype=torch.float64, generator=g) * 2 for _ in range(2 if act.gated else 1)]
    d = torch.randn(40, dtype=torch.float64, generator=g)
    got = act.backward(*inputs, d, act.alpha, act.limit)
    got = got if act.gated else (got,)
    for i, grad in enumerate(got):
        step = 1e-6
        high, low = ([x + s * (j == i) for j, x in enumerate(inputs)] for s in (step, -step))
        slope = (act.forward(*high, act.alpha, act.limit) - act.forward(*low, act.alpha, act.limit)) / (2 * step)
        torch.testing.assert_close(grad, d * slope, rtol=1e-6, atol=1e-8)


def test_activations_by_hand():
    one, two = torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    silu1 = 1 / (1 + math.exp(-1))
    acts = moesaic.ACTIVATIONS

    def value(name, *args, **constants):
        a = acts[name].with_constants(**constants)
        return a.forward(*args, a.alpha, a.limit).item()

    assert value("swiglu", one, two) == pytest.approx(2 * silu1)
    assert value("reglu", -one, two) == 0
    assert value("relu2", 3 * one) == 9
    assert value("geglu", one, two) == pytest.approx(2 * 0.8413447460685429)
    assert value("swiglu_oai", one, two) == pytest.approx(3 / (1 + math.exp(-1.702)))
    assert value("swiglu_oai", 9 * one, 9 * one) == pytest.approx(7 / (1 + math.exp(-1.702 * 7)) * 8)
    assert value("swiglu_clamped", 3 * one, 9 * one, limit=2.0) == pytest.approx(2 / (1 + math.exp(-2)) * 2)
    assert value("swiglu_step", 3 * one, 9 * one, limit=2.0) == pytest.approx(2 * 2)
    assert value("swiglu_step", one, -9 * one, limit=2.0) == pytest.approx(-2 * silu1)
    assert value("reglu2", 3 * one, two) == 18 and value("reglu2", -one, two) == 0
    soft = 4 * math.tanh(0.25) * silu1 * 25 * math.tanh(2 / 25)
    assert value("swiglu_softcapped", one, two) == pytest.approx(soft)


def test_one_expert_is_a_dense_mlp():
    g = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((5, 6), (1, 8, 6), (1, 6, 4)))
    routing = Routing.from_topk(torch.ones(5, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.long), 1)
    h = x @ up[0].T
    want = (torch.nn.functional.silu(h[:, :4]) * h[:, 4:]) @ down[0].T
    for implementation in IMPLEMENTATIONS:
        assert_close(fused_experts(x, up, down, routing, implementation=implementation), want, 6)
