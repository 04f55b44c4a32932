"""Routing weights on the experts' input: `y[t] = sum_k down(act(gate_up(w[t, k] · x[t])))`, by every implementation."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from test_edges import CASE, layer, run

from moesaic.activations import ACTIVATIONS, apply
from moesaic.testing import STAGES, adversarial_ids, assert_close, make_inputs

BF16, FP32 = torch.bfloat16, torch.float32


def oracle(inputs, rounded: torch.dtype):
    """A loop over the choices in fp64; the products `w · x` are rounded as the operator promises."""
    case, r = inputs.case, inputs.routing
    act, interleaved = ACTIVATIONS[case.activation], case.layout == "interleaved"

    def call(x, w_gate_up, w_down, b_gate_up=None, b_down=None, weights=None, residual=None):
        y = [torch.zeros_like(row) for row in x]
        for t in range(x.shape[0]):
            for k, e in enumerate(r.topk_ids[t].tolist()):
                if e < 0:
                    continue
                v = weights[t, k] * x[t]
                v = v + (v.to(rounded).double() - v).detach()
                up, down = (w[e].T if case.transposed else w[e] for w in (w_gate_up, w_down))
                h = up @ v + (0 if b_gate_up is None else b_gate_up[e])
                y[t] = y[t] + down @ apply(act, h, interleaved) + (0 if b_down is None else b_down[e])
        return torch.stack(y) + (0 if residual is None else residual)

    return call


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kind", ["random", "dropped slots", "half of the experts empty"])
def test_weights_on_input(kind, top_k, dtype, implementation, device):
    ids = adversarial_ids(5, top_k, 7)[kind]
    inputs = make_inputs(replace(CASE, top_k=top_k), ids.shape[0], dtype, device, ids=ids)
    outside, leaves = layer(inputs, implementation)
    call = functools.partial(outside, weights_on="input")
    g = torch.Generator().manual_seed(1)
    leaves["weights"] = (torch.rand(ids.shape, generator=g) + 0.3).to(device)
    leaves["residual"] = torch.randn(inputs.x.shape, generator=g).to(device, dtype)
    want = run(oracle(inputs, dtype), {name: t.double() for name, t in leaves.items()})
    got, contraction = run(call, leaves), max(CASE.hidden_size, CASE.intermediate_size, ids.numel())
    for name, value in got.items():
        stages = (
            STAGES["fused_experts"] + 1 if name == "y" else STAGES["fused_experts_backward"] + 2
        )  # w · x, and its gradient
        assert_close(value, want[name], contraction, stages, dtype, name)
    assert not torch.allclose(outside(**leaves), got["y"], rtol=0.05), "weights on the output make another layer"


def test_weights_on_input_of_no_rows(implementation, device):
    for tokens, top_k in ((0, 1), (0, 3), (4, 0)):
        inputs = make_inputs(replace(CASE, top_k=top_k), tokens, FP32, device)
        call, leaves = layer(inputs, implementation)
        y = call(**leaves, weights_on="input", residual=inputs.x)
        assert torch.equal(y, inputs.x)
