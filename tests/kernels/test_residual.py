"""The residual of `fused_experts`: added once to each token, before the one rounding, by every implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_edges import CASE, LEAVES, apart, assert_same, layer, run

from moesaic import fused_experts
from moesaic.testing import STAGES, adversarial_ids, assert_close, make_inputs

BF16, FP32 = torch.bfloat16, torch.float32


def residual_of(inputs, seed=5):
    x = inputs.x
    return (torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * 2).to(x.device, x.dtype)


def with_residual(inputs, implementation, residual=None):
    """The layer as a function of its leaves, the residual among them, and the leaves."""
    call, leaves = layer(inputs, implementation)
    return call, {**leaves, "residual": residual_of(inputs) if residual is None else residual}


def wide(inputs):
    tensors = {name: t.double() for name in LEAVES[:-1] if (t := getattr(inputs, name)) is not None}
    weights = inputs.routing.topk_weights.double()
    return replace(inputs, **tensors, routing=replace(inputs.routing, topk_weights=weights))


def check(inputs, implementation):
    residual = residual_of(inputs)
    got = run(*with_residual(inputs, implementation, residual))
    want = run(*with_residual(wide(inputs), "reference", residual.double()))
    contraction = max(CASE.hidden_size, CASE.intermediate_size, inputs.routing.topk_ids.numel())
    for name, value in got.items():
        assert value.dtype == (FP32 if name == "weights" else inputs.x.dtype), name
        stages = STAGES["fused_experts" if name == "y" else "fused_experts_backward"]
        assert_close(value, want[name], contraction, stages, inputs.x.dtype, name)
    # of the oracle itself, lest all leave the residual out together
    bare, leaves = layer(wide(inputs), "reference")
    assert_close(want["y"], bare(**leaves) + residual.double(), 1, name="oracle")
    return got, residual


# ---------------------------------------------------------------- against the oracle
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", adversarial_ids(5, 3, 7))
def test_residual(kind, dtype, implementation, device):
    """The values, and every gradient; a token without experts gets its residual, and its gradient the incoming one."""
    ids = adversarial_ids(5, 3, 7)[kind]
    got, residual = check(make_inputs(CASE, ids.shape[0], dtype, device, ids=ids), implementation)
    lost = (ids < 0).all(1).to(device)
    assert torch.equal(got["y"][lost], residual[lost])
    start = torch.sin(torch.arange(residual.numel(), device=device)).view(residual.shape).to(dtype)
    assert torch.equal(got["residual"], start)


def test_residual_of_many_blocks(implementation, device):
    """Longer rows than a program of the combine has columns, more tokens than one pass in torch takes."""
    case = replace(CASE, hidden_size=1100, intermediate_size=4, num_experts=3, top_k=2)
    inputs = make_inputs(case, 70, BF16, device, ids=adversarial_ids(3, 2, 70)["dropped slots"])
    call, leaves = with_residual(inputs, implementation)
    want = run(*with_residual(wide(inputs), "reference", leaves["residual"].double()))["y"]
    assert_close(call(**leaves), want, 1100, STAGES["fused_experts"])


def test_sum_is_rounded_once(implementation, device):
    """What rounding to bf16 before the addition would lose: experts give 1 + 2^-9, the residual takes the 1 away."""
    case = replace(CASE, hidden_size=16, intermediate_size=16, num_experts=2, top_k=2, bias=True)
    inputs = make_inputs(case, 3, BF16, device, ids=torch.tensor([[0, 1]] * 3))
    weights = torch.ones(3, 2, device=device)
    inputs.w_down.zero_()
    inputs.b_down[0], inputs.b_down[1] = 1.0, 2**-9
    residual = torch.full((3, 16), -1.0, dtype=BF16, device=device)
    given = {**inputs.arguments(), "weights": weights, "implementation": implementation}
    assert (fused_experts(**given) + residual == 0).all()
    assert (fused_experts(**given, residual=residual) == 2**-9).all()


def test_unweighted_sum_with_residual(implementation, device):
    inputs = make_inputs(CASE, 6, FP32, device)
    given = {**inputs.arguments(), "weights": None, "reduce": "sum"}
    residual = residual_of(inputs)
    got = fused_experts(**given, residual=residual, implementation=implementation)
    bare = fused_experts(**given, implementation=implementation)
    assert_close(got, (bare.double() + residual.double()), 37, 2)
    ones = {**given, "weights": torch.ones_like(inputs.routing.topk_weights), "reduce": "weighted_sum"}
    assert torch.equal(got, fused_experts(**ones, residual=residual, implementation=implementation))


# ---------------------------------------------------------------- memory and gradients
def test_residual_of_any_strides(implementation, device):
    inputs = make_inputs(CASE, 6, BF16, device)
    call, leaves = with_residual(inputs, implementation)
    want, r = run(call, leaves), leaves["residual"]
    wider = torch.cat([r, torch.full_like(r, float("nan"))], 1)[:, :37]  # unit last stride, rows apart
    for strided in (apart(r), r.T.contiguous().T, wider):
        assert not strided.is_contiguous()
        assert_same(run(call, {**leaves, "residual": strided}), want)
    one = r[:1].expand(6, 37)
    got, same = (call(**{**leaves, "residual": t}) for t in (one, one.contiguous()))
    assert torch.equal(got, same)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 3), (4, 0)], ids=["no token", "no choice"])
def test_residual_where_there_are_no_rows(tokens, top_k, implementation, device):
    inputs = make_inputs(replace(CASE, top_k=top_k), tokens, FP32, device)
    assert inputs.routing.row_order.numel() == 0
    call, leaves = with_residual(inputs, implementation)
    for residual in (leaves["residual"], apart(leaves["residual"])):
        got = run(call, {**leaves, "residual": residual})
        assert torch.equal(got["y"], residual) and got["y"].is_contiguous() and got["residual"].shape == residual.shape
        assert not got["w_down"].any() and not got["x"].any()
        with torch.no_grad():
            y = call(**{**leaves, "residual": residual})
        before = residual.clone()
        assert torch.equal(y.fill_(7.0), y) and torch.equal(residual, before)


def test_residual_is_not_written(implementation, device):
    inputs = make_inputs(CASE, 6, FP32, device)
    call, leaves = with_residual(inputs, implementation)
    before = leaves["residual"].clone()
    assert call(**leaves).data_ptr() != leaves["residual"].data_ptr()
    assert torch.equal(leaves["residual"], before)


def test_bad_residual_stays_in_its_token(implementation, device):
    inputs = make_inputs(CASE, 6, FP32, device)
    call, leaves = with_residual(inputs, implementation)
    dirty = leaves["residual"].clone()
    dirty[2] = float("nan")
    clean, got = run(call, leaves), run(call, {**leaves, "residual": dirty})
    assert got["y"][2].isnan().all()
    got["y"][2] = clean["y"][2]
    assert_same(got, clean)  # no gradient reads the residual


@pytest.mark.parametrize("only", [*LEAVES, "residual"])
def test_gradient_of_one_alone(only, implementation, device):
    """Frozen parts change no gradient; for the residual alone nothing but the output is made."""
    call, leaves = with_residual(make_inputs(CASE, 6, FP32, device), implementation)
    full = run(call, leaves)
    frozen = {name: t for name, t in leaves.items() if name != only}
    assert_same(run(lambda **given: call(**frozen, **given), {only: leaves[only]}), {n: full[n] for n in ("y", only)})


def test_tokens_are_their_own_residual(implementation, device):
    """One tensor in two places, and the incoming gradient, which is also the residual's, left as it came."""
    inputs = make_inputs(CASE, 6, FP32, device)
    call, leaves = with_residual(inputs, implementation, inputs.x)
    apart_, rest = run(call, leaves), {n: t for n, t in leaves.items() if n not in ("x", "residual")}
    x = inputs.x.clone().requires_grad_()
    y = call(**rest, x=x, residual=x)
    assert torch.equal(y, apart_["y"])
    start = torch.sin(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    before = start.clone()
    y.backward(start)
    assert torch.equal(x.grad, apart_["x"] + apart_["residual"]) and torch.equal(start, before)
    x.grad.zero_()
    assert torch.equal(start, before)


def test_residual_under_compile_and_autocast(implementation, device):
    inputs = make_inputs(CASE, 6, FP32, device)
    call, leaves = with_residual(inputs, implementation)
    backend = "inductor" if device == "cuda" else "aot_eager"  # inductor on the CPU wants a C++ compiler
    want, got = run(call, leaves), run(torch.compile(call, fullgraph=True, backend=backend), leaves)
    for name, value in want.items():
        assert_close(got[name], value.double(), 64, 4, name=name)
    low = {name: t if name == "weights" else t.bfloat16() for name, t in leaves.items()}
    with torch.autocast(device, BF16):
        y = call(**leaves)
    assert torch.equal(y, call(**low))
