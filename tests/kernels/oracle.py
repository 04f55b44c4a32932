"""Running an operator with its gradients, and the same in fp64 on the CPU, for the suite's comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moesaic import Routing, fused_experts
from moesaic.testing import STAGES, Inputs, assert_close

Results = dict[str, Tensor]


def cotangent(shape, dtype: torch.dtype) -> Tensor:
    """A gradient to start from, representable in the dtype under test."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def run(call: Callable[..., Tensor], leaves: Results, start: Tensor | None = None) -> Results:
    """`call(**leaves)` as `"y"`, and the gradient of each leaf under its name."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = call(**leaves)
    start = cotangent(y.shape, y.dtype) if start is None else start
    grads = torch.autograd.grad(y, list(leaves.values()), start.to(y), allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), grads, strict=True))
    return {"y": y.detach(), **dict(zip(leaves, zeros, strict=True))}


def oracle(call: Callable[..., Tensor], leaves: Results, dtype: torch.dtype) -> Results:
    """The same in fp64 on the CPU, from the same rounded values; `call` must use the reference."""
    wide = {name: t.detach().cpu().double() for name, t in leaves.items()}
    with torch.no_grad():
        shape = call(**wide).shape
    return run(call, wide, cotangent(shape, dtype).double())


def layer_leaves(inputs: Inputs, weighted: bool = True) -> Results:
    leaves = {"x": inputs.x, "w_gate_up": inputs.w_gate_up, "w_down": inputs.w_down}
    if weighted:
        leaves["weights"] = inputs.routing.topk_weights
    if inputs.b_gate_up is not None:
        leaves |= {"b_gate_up": inputs.b_gate_up, "b_down": inputs.b_down}
    return leaves


def layer_call(inputs: Inputs, implementation: str, weighted: bool = True, **options) -> Callable[..., Tensor]:
    """The layer as a function of its leaves, its routing on the leaves' device."""
    c = inputs.case
    options = {"activation": c.activation, "layout": c.layout, "transposed": c.transposed, **options}
    if not weighted:
        options |= {"weights": None, "reduce": "sum"}

    def call(x, w_gate_up, w_down, **rest):
        routing = on_device(inputs.routing, x.device)
        return fused_experts(x, w_gate_up, w_down, routing, implementation=implementation, **rest, **options)

    return call


def on_device(routing: Routing, device: torch.device) -> Routing:
    tables = ("topk_ids", "tokens_per_expert", "expert_offsets", "row_order", "row_index")
    return replace(routing, topk_weights=None, logits=None, **{n: getattr(routing, n).to(device) for n in tables})


def check_layer(inputs: Inputs, got: Results, weighted: bool = True, **options) -> None:
    """Compare a layer's output and gradients with the oracle's, each at its contraction length."""
    leaves = layer_leaves(inputs, weighted)
    want = oracle(layer_call(inputs, "reference", weighted, **options), leaves, inputs.x.dtype)
    rows = max(1, int(inputs.routing.tokens_per_expert.max()))
    length = dict.fromkeys(want, max(inputs.case.hidden_size, inputs.case.intermediate_size))
    length |= {name: rows for name in ("w_gate_up", "w_down", "b_gate_up", "b_down") if name in want}
    assert got.keys() == want.keys()
    for name, value in want.items():
        expected_dtype = torch.float32 if name == "weights" else inputs.x.dtype
        assert got[name].dtype == expected_dtype and got[name].shape == value.shape, name
        stages = STAGES["fused_experts" if name == "y" else "fused_experts_backward"]
        assert_close(got[name].cpu(), value, length[name], stages, inputs.x.dtype, name)
