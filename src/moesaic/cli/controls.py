"""Negative controls of `moesaic verify`: mistakes that people have shipped, each of which the rule must catch.

A check that cannot fail proves nothing. Each control computes a result with one mistake in it and without, and asks
`testing.failure` about both: the first must be caught, the second must pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cases import CASES
from ..ops.fused_experts import fused_experts
from ..routing import Routing
from ..testing import STAGES, Inputs, failure, make_inputs
from .checks import FP16, FP32, FP64, evaluate

TOKENS = 16
LONG = 512  # a sum long enough for an fp16 accumulator to lose


@dataclass(frozen=True)
class Control:
    """A wrong variant. `caught` is the rule's reason against it, None where it slipped through; `right` is the rule's
    reason against the same without the mistake, which should be None."""

    name: str
    mistake: str
    caught: str | None
    right: str | None = None

    @property
    def ok(self) -> bool:
        return self.caught is not None and self.right is None


def all_controls(device: torch.device) -> list[Control]:
    """Every control, on a device."""
    return [control(device) for control in CONTROLS]


def _inputs(dtype: torch.dtype) -> Inputs:
    return make_inputs(CASES["mixtral-8x7b"].small(64, 48, 8), TOKENS, dtype)


def _run(inputs: Inputs, device: torch.device) -> Tensor:
    return evaluate(inputs, device, None, None, False)["y"]


def _layer(name: str, mistake: str, inputs: Inputs, wrong: Tensor, device: torch.device) -> Control:
    """A control on a whole layer: `wrong` in place of what `inputs` give."""
    oracle = evaluate(inputs, torch.device("cpu"), "reference", FP64, False)["y"]
    reasons = (
        failure(y, oracle, inputs.case.hidden_size, STAGES["fused_experts"]) for y in (wrong, _run(inputs, device))
    )
    return Control(name, mistake, *reasons)


def _weights_omitted(device: torch.device) -> Control:
    inputs = _inputs(FP16)
    routing = Routing.from_topk(None, inputs.routing.topk_ids.to(device), inputs.case.num_experts)
    x, up, down = (t.to(device) for t in (inputs.x, inputs.w_gate_up, inputs.w_down))
    wrong = fused_experts(x, up, down, routing, weights=None, reduce="sum")
    mistake = "the experts' outputs are added without the router's weights"
    return _layer("routing weights omitted", mistake, inputs, wrong, device)


def _tf32(device: torch.device) -> Control:
    def rounded(t: Tensor) -> Tensor:
        """fp32 to TF32's 10 bits of mantissa, to nearest."""
        return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(FP32)

    inputs = _inputs(FP32)
    narrow = replace(inputs, x=rounded(inputs.x), w_gate_up=rounded(inputs.w_gate_up), w_down=rounded(inputs.w_down))
    mistake = "fp32 factors are rounded to 10 bits of mantissa before they are multiplied"
    return _layer("TF32 taken for fp32", mistake, inputs, _run(narrow, device), device)


def _swapped(device: torch.device) -> Control:
    inputs = _inputs(FP16)
    swapped = torch.cat(inputs.w_gate_up.chunk(2, 1)[::-1], 1)
    wrong = _run(replace(inputs, w_gate_up=swapped), device)
    return _layer("gate and up swapped", "gate·silu(up) is computed in place of silu(gate)·up", inputs, wrong, device)


def _one_expert_off(device: torch.device) -> Control:
    inputs = _inputs(FP16)
    moved = inputs.w_down.clone()
    moved[3] = inputs.w_down[4]
    wrong = _run(replace(inputs, w_down=moved), device)
    return _layer("one expert off", "one expert of eight reads its neighbour's second matrix", inputs, wrong, device)


def _loose_atol(device: torch.device) -> Control:
    inputs = _inputs(FP32)
    inputs = replace(inputs, w_gate_up=inputs.w_gate_up * 0.02, w_down=inputs.w_down * 0.02)
    y = _run(inputs, device)
    wrong = torch.where(torch.arange(TOKENS, device=device)[:, None] % 2 == 0, 0.5 * y, y)
    passes = torch.allclose(wrong, y, rtol=0, atol=1e-2)
    says = "torch.allclose(atol=1e-2) passes it" if passes else "torch.allclose(atol=1e-2) fails it: shows nothing"
    mistake = f"half of the tokens are half of what they should be, about {y.abs().max():.0e}: {says}"
    control = _layer("loose atol", mistake, inputs, wrong, device)
    return control if passes else replace(control, caught=None)


def _fp16_accumulator(device: torch.device) -> Control:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(TOKENS, LONG, generator=g).to(FP16)
    b = (torch.randn(LONG, 24, generator=g) * LONG**-0.5).to(FP16)
    oracle, total = a.double() @ b.double(), torch.zeros(TOKENS, 24, dtype=FP16, device=device)
    right = (a.to(device).float() @ b.to(device).float()).to(FP16)
    for column, row in zip(a.to(device).T, b.to(device), strict=True):
        total += column[:, None] * row
    reasons = (failure(y, oracle, LONG, STAGES["grouped_matmul"]) for y in (total, right))
    return Control("fp16 accumulator", f"a sum of {LONG} products is kept in fp16 instead of fp32", *reasons)


CONTROLS: tuple[Callable[[torch.device], Control], ...] = (
    _weights_omitted, _tf32, _swapped, _one_expert_off, _loose_atol, _fp16_accumulator,
)  # fmt: skip
