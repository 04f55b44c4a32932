"""`fused_experts`: forward and every gradient against the fp64 oracle, over a set that covers every axis once or more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import check_layer, layer_call, layer_leaves, run

from moesaic.activations import ACTIVATIONS
from moesaic.cases import CASES, Case
from moesaic.testing import adversarial_ids, make_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = Case("plain", 32, 16, 4, 2)
ODD = Case("odd", 37, 19, 5, 3)
ROUTINGS = tuple(adversarial_ids(4, 2, 1))


def compare(case: Case, dtype: torch.dtype, device, implementation: str, ids=None, tokens=7, weighted=True, **options):
    inputs = make_inputs(case, tokens if ids is None else ids.shape[0], dtype, device, ids=ids)
    got = run(layer_call(inputs, implementation, weighted, **options), layer_leaves(inputs, weighted))
    check_layer(inputs, got, weighted, **options)
    return inputs, got


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", [PLAIN, replace(ODD, bias=True)], ids=lambda c: c.name)
def test_hostile_routings(case, routing, device, implementation):
    ids = adversarial_ids(case.num_experts, case.top_k, 9)[routing]
    dtype = BF16 if case is PLAIN else FP32
    inputs, got = compare(case, dtype, device, implementation, ids)
    dropped = (inputs.routing.topk_ids < 0).all(1)
    assert not got["y"][dropped].any() and not got["x"][dropped].any(), "a dropped token has a zero row"
    assert not got["weights"][inputs.routing.topk_ids < 0].any(), "a dropped slot's weight has no gradient"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_weight_formats(dtype, layout, transposed, bias, device, implementation):
    compare(replace(ODD, layout=layout, transposed=transposed, bias=bias), dtype, device, implementation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_activations(activation, dtype, device, implementation):
    compare(replace(PLAIN, activation=activation), dtype, device, implementation)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-120b", "llama4-scout", "nemotron-h", "qwen3-next-80b"])
def test_real_layers_made_small(name, device, implementation):
    compare(CASES[name].small(), BF16, device, implementation, tokens=5)


def test_activation_constants(device, implementation):
    act = ACTIVATIONS["swiglu_clamped"].with_constants(limit=0.3)
    compare(PLAIN, FP32, device, implementation, activation=act)


def test_sum_without_weights(device, implementation):
    compare(replace(ODD, bias=True), FP32, device, implementation, weighted=False)


@pytest.mark.parametrize("E,K,T", [(1, 1, 5), (4, 4, 3), (9, 1, 4), (3, 2, 70)])
def test_numbers_of_experts_and_choices(E, K, T, device, implementation):
    compare(Case("shape", 24, 20, E, K), BF16, device, implementation, tokens=T)


@pytest.mark.parametrize("wanted", ["x", "w_gate_up", "w_down", "weights", "b_gate_up", "b_down"])
def test_only_the_gradient_that_is_needed(wanted, device, implementation):
    inputs = make_inputs(replace(ODD, bias=True), 6, FP32, device)
    leaves, call = layer_leaves(inputs), layer_call(inputs, implementation)
    every = run(call, leaves)[wanted]
    alone = run(lambda **leaf: call(**{**leaves, **leaf}), {wanted: leaves[wanted]})[wanted]
    assert torch.equal(alone, every)


def test_no_gradient_saves_nothing(device, implementation):
    inputs = make_inputs(PLAIN, 5, BF16, device)
    routing, act = inputs.routing, ACTIVATIONS["swiglu"]
    y, hidden = torch.ops.moesaic.fused_experts(
        inputs.x, inputs.w_gate_up, inputs.w_down, routing.topk_weights, None, None, routing.row_order,
        routing.row_index, routing.expert_offsets, "swiglu", act.alpha, act.limit, False, False, False, False,
        implementation,
    )  # fmt: skip
    assert hidden.numel() == 0
    assert torch.equal(y, run(layer_call(inputs, implementation), layer_leaves(inputs))["y"])


# ---------------------------------------------------------------- memory
def test_strides(device, implementation):
    """Rows, matrices and experts a stride apart, and a stride of zero, give what their copies give."""
    inputs = make_inputs(ODD, 6, BF16, device)
    call, leaves = layer_call(inputs, implementation), layer_leaves(inputs)
    want = run(call, leaves)

    def apart(t):  # every dimension twice as long underneath
        wide = t.new_full([2 * n for n in t.shape], float("nan"))
        view = wide[tuple(slice(0, None, 2) for _ in t.shape)]
        return view.copy_(t)

    got = run(call, {name: apart(t) for name, t in leaves.items()})
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    swapped = run(call, {**leaves, "w_gate_up": leaves["w_gate_up"].mT.contiguous().mT})
    for name, value in want.items():
        assert torch.equal(swapped[name], value), name
    one = leaves["x"][:1]
    expanded = call(**{**leaves, "x": one.expand_as(leaves["x"])})
    assert torch.equal(expanded, call(**{**leaves, "x": one.repeat(6, 1)}))


def test_unwritten_memory_is_not_read(device, implementation, poisoned_memory):
    ids = adversarial_ids(4, 2, 9)["dropped slots"]
    ids[ids == 3] = -1  # an expert without rows, and rows at the end without an expert
    for case in (PLAIN, replace(PLAIN, activation="relu2", bias=True)):
        compare(case, BF16, device, implementation, ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(bad, device, implementation):
    inputs = make_inputs(PLAIN, 8, BF16, device)
    call, leaves = layer_call(inputs, implementation), layer_leaves(inputs)
    x = leaves["x"].clone()
    x[3] = bad
    clean, dirty = run(call, leaves), run(call, {**leaves, "x": x})
    others = torch.arange(8, device=device) != 3
    assert not torch.isfinite(dirty["y"][3]).any()
    for name in ("y", "x", "weights"):
        assert torch.equal(dirty[name][others], clean[name][others]), name


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_bitwise_equal_twice(dtype, device, implementation):
    inputs = make_inputs(replace(ODD, bias=True), 33, dtype, device, "one_hot_expert")
    first, second = (run(layer_call(inputs, implementation), layer_leaves(inputs)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name
