"""The gate: fp32 logits from weights of any dtype, their gradients, and the one launch from few tokens to tables."""

from __future__ import annotations

import pytest
import torch

from moesaic import RouterConfig, route
from moesaic.ops.gate import gate, router_logits
from moesaic.testing import assert_close

CONFIGS = {
    "softmax": (20, RouterConfig(3)),
    "grouped sigmoid": (32, RouterConfig(4, "sigmoid", norm_eps=1e-20, scale=2.5, num_groups=4, topk_groups=2)),
    "top-p": (13, RouterConfig(5, policy="top_p", threshold=0.6)),
}
TABLES = ("topk_ids", "tokens_per_expert", "expert_offsets", "row_order", "row_index")


def operands(T, E, H, dtype, device):
    g = torch.Generator().manual_seed(T + E)
    x, w = torch.randn(T, H, generator=g), torch.randn(E, H, generator=g) * H**-0.5
    return x.to(device, dtype), w.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_and_gradients_are_wide(dtype, device):
    x, w = (t.requires_grad_() for t in operands(9, 5, 33, dtype, device))
    bias = torch.randn(5, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = router_logits(x, w, bias)
    want = x.double() @ w.double().mT + bias.double()
    assert got.dtype == torch.float32
    assert_close(got, want, 33, 4)
    grad = torch.randn(9, 5, device=device)
    grads = torch.autograd.grad(got, (x, w, bias), grad)
    for g, o, like in zip(grads, torch.autograd.grad(want, (x, w, bias), grad.double()), (x, w, bias), strict=True):
        assert g.dtype == like.dtype
        assert_close(g, o, 33, 8)


def test_logits_of_doubles(device):
    x, w = (t.requires_grad_() for t in operands(3, 4, 6, torch.float64, device))
    assert torch.autograd.gradcheck(lambda x, w: router_logits(x, w), (x, w))


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_launch_from_hidden_states(name, tokens, implementation, device):
    if implementation != "triton":
        pytest.skip("torch and the reference take two steps")
    from moesaic.ops.gate import _triton as kernels

    E, config = CONFIGS[name]
    x, w = operands(tokens, E, 200, torch.float16, device)
    bias, logit_bias = (torch.linspace(-0.2, 0.3, E, device=device) for _ in range(2))
    for b, lb in ((bias, logit_bias), (None, None)):
        for _ in range(2):  # the counter of programs is zero again
            logits, weights, ids, *tables = kernels.route_few(x, w, lb, b, RouterConfig.of_core(config.core()))
            assert_close(logits, router_logits(x.double(), w.double(), lb), 200, 4)
            want = route(logits, config, bias=b, implementation="torch")
            for table, name in zip((ids, *tables), TABLES, strict=True):
                assert torch.equal(table, getattr(want, name)), name
            assert_close(weights, want.topk_weights.double(), E, 4)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_gate_is_route_of_the_logits(tokens, implementation, device):
    x, w = operands(tokens, 12, 24, torch.float32, device)
    got = gate(x, w, RouterConfig(5), implementation=implementation)
    want = route(router_logits(x, w), RouterConfig(5), implementation="torch")
    for table in TABLES:
        assert torch.equal(getattr(got, table), getattr(want, table)), table


def test_bad_input_and_operators(device):
    x, w = operands(3, 4, 6, torch.float32, device)
    for arguments, message in (
        ((x[0], w), r"x must have shape \(T, H\)"),
        ((x, w[:, :5]), r"weight must have shape \(E, 6\)"),
        ((x.int(), w), "must be floating point"),
        ((x, w, w[0]), r"bias must have shape \(4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            router_logits(*arguments)
    with pytest.raises(ValueError, match=r"gate: logit_bias must have shape \(4\)"):
        gate(x, w, RouterConfig(2), logit_bias=w[0])
    ops = torch.ops.moesaic
    torch.library.opcheck(ops.router_logits, (x.requires_grad_(), w, True, ""))
    torch.library.opcheck(
        ops.router_logits_backward, (torch.randn(3, 4, device=device), x.detach(), w, [True, False], "")
    )
