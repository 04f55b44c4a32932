"""Edges where careless kernels break: memory not theirs, strides, signed zeros, NaN, ids out of range, tracing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic import RouterConfig, Routing, fused_experts, grouped_matmul, permute, route, unpermute
from moesaic.activations import ACTIVATIONS
from moesaic.cases import Case
from moesaic.testing import adversarial_ids, assert_close, make_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASE = Case("edges", 37, 19, 5, 3, bias=True)
TABLES = ("topk_ids", "tokens_per_expert", "expert_offsets", "row_order", "row_index")
LEAVES = ("x", "w_gate_up", "w_down", "b_gate_up", "b_down", "weights")
Results = dict[str, Tensor]


@pytest.fixture
def poisoned_memory():
    """Memory that is allocated and not written holds NaN (the largest integer in tables)."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def run(call, leaves: Results) -> Results:
    """`call(**leaves)` as `"y"`, and the gradient of each leaf under its name."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = call(**leaves)
    start = torch.sin(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), start), strict=True))}


def layer(inputs, implementation: str):
    """A layer as a function of its leaves, and the leaves."""
    arguments = {**inputs.arguments(), "weights": inputs.routing.topk_weights}
    leaves = {name: arguments.pop(name) for name in LEAVES if arguments[name] is not None}
    return lambda **given: fused_experts(**arguments, **given, implementation=implementation), leaves


def assert_same(got: Results, want: Results) -> None:
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def assert_same_tables(got: Routing, want: Routing, where: str = "") -> None:
    for name in TABLES:
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == torch.int32 and a.is_contiguous() and torch.equal(a.cpu(), b.cpu()), f"{name} {where}"


def apart(t: Tensor) -> Tensor:
    """The same values, every dimension twice as far apart, NaN between."""
    wide = t.new_full([2 * n for n in t.shape], float("nan"))
    return wide[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


# ---------------------------------------------------------------- memory
def test_layer_of_strided_leaves(implementation, device):
    """Every leaf, biases and weights of the routing too, may have any strides."""
    call, leaves = layer(make_inputs(CASE, 6, BF16, device), implementation)
    want = run(call, leaves)
    assert_same(run(call, {name: apart(t) for name, t in leaves.items()}), want)
    for name, t in leaves.items():
        assert_same(run(call, {**leaves, name: t.mT.contiguous().mT}), want)


def test_weights_in_fp64_beside_a_layer_in_fp32(implementation, device):
    call, leaves = layer(make_inputs(CASE, 6, FP32, device), implementation)
    want = run(call, leaves)
    got = run(call, {**leaves, "weights": leaves["weights"].double()})
    assert got["weights"].dtype == torch.float64
    for name, value in want.items():
        assert_close(got[name].float(), value.double(), 64, 4, name=name)


def test_product_of_strided_leaves(implementation, device):
    r = Routing.from_topk(None, adversarial_ids(3, 2, 5)["random"].to(device), 3)
    leaves = {"rows": torch.randn(10, 24), "w": torch.randn(3, 20, 24), "bias": torch.randn(3, 20)}
    leaves = {name: t.to(device, BF16) for name, t in leaves.items()}

    def call(rows, w, bias):
        return grouped_matmul(rows, w, r, bias=bias, implementation=implementation)

    want = run(call, leaves)
    assert_same(run(call, {name: apart(t) for name, t in leaves.items()}), want)
    assert_same(run(call, {**leaves, "w": leaves["w"].mT.contiguous().mT}), want)
    one = leaves["rows"][:1].expand(10, 24)
    assert torch.equal(call(one, leaves["w"], leaves["bias"]), call(one.contiguous(), leaves["w"], leaves["bias"]))


def test_moves_of_strided_rows(implementation, device):
    weights, ids = torch.rand(6, 2, device=device), adversarial_ids(4, 2, 6)["random"].to(device)
    r = Routing.from_topk(weights, ids, 4)
    x, rows = torch.randn(6, 80, device=device), torch.randn(12, 80, device=device)
    for move, t in ((permute, x), (unpermute, rows)):
        for a in (t[:, ::2], t[:, :40], t.T.contiguous().T, t[:1].expand_as(t)):
            got, want = (move(b, r, implementation=implementation) for b in (a, a.contiguous()))
            assert torch.equal(got, want)
    got, want = (
        unpermute(rows, r, weights=w, implementation=implementation) for w in (weights.T.contiguous().T, weights)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_layer_reads_no_unwritten_memory(activation, implementation, device, poisoned_memory):
    ids = adversarial_ids(5, 3, 9)["dropped slots"]
    ids[ids == 3] = -1  # an expert without rows, beside the rows at the end that have no expert
    inputs = make_inputs(replace(CASE, activation=activation), 9, FP32, device, ids=ids)
    for name, value in run(*layer(inputs, implementation)).items():
        assert torch.isfinite(value).all(), name
    wide = replace(inputs, **{n: t.double() for n in LEAVES[:-1] if (t := getattr(inputs, n)) is not None},
                   routing=replace(inputs.routing, topk_weights=inputs.routing.topk_weights.double()))  # fmt: skip
    for name, value in run(*layer(wide, "reference")).items():
        assert_close(run(*layer(inputs, implementation))[name], value, 64, 10, name=name)


def test_rows_without_an_expert_are_not_read(implementation, device, poisoned_memory):
    ids = adversarial_ids(4, 2, 30)["dropped slots"].to(device)
    r = Routing.from_topk(None, ids, 4)
    live = int(r.expert_offsets[-1])
    leaves = {"rows": torch.randn(60, 16, device=device), "w": torch.randn(4, 24, 16, device=device),
              "bias": torch.randn(4, 24, device=device)}  # fmt: skip

    def call(rows, w, bias):
        return grouped_matmul(rows, w, r, bias=bias, implementation=implementation)

    clean = run(call, leaves)
    assert not clean["y"][live:].any() and not clean["rows"][live:].any()
    leaves["rows"][live:] = float("nan")
    assert_same(run(call, leaves), clean)
    y = unpermute(leaves["rows"], r, weights=False, implementation=implementation)
    assert torch.isfinite(y).all()
    x = torch.ones(30, 8, device=device)
    x[(ids < 0).all(1)] = float("nan")
    assert torch.isfinite(permute(x, r, implementation=implementation)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_of_other_tokens_survive_a_bad_one(bad, implementation, device):
    call, leaves = layer(make_inputs(CASE, 8, BF16, device), implementation)
    x = leaves["x"].clone()
    x[3] = bad
    clean, dirty = run(call, leaves), run(call, {**leaves, "x": x})
    assert not torch.isfinite(dirty["y"][3]).all()
    others = torch.arange(8, device=device) != 3
    assert_same(
        {n: dirty[n][others] for n in ("y", "x", "weights")}, {n: clean[n][others] for n in ("y", "x", "weights")}
    )


def test_tf32_is_only_taken_when_asked_for(implementation, device):
    r = Routing.from_topk(None, torch.zeros(40, 1, dtype=torch.long, device=device), 1)
    rows, w = torch.randn(40, 256, device=device), torch.randn(1, 32, 256, device=device)
    want = rows.double() @ w[0].double().T
    assert_close(grouped_matmul(rows, w, r, implementation=implementation), want, 256)
    loose = grouped_matmul(rows, w, r, allow_tf32=True, implementation=implementation)
    # TF32 keeps as many bits as fp16, but the H200 cuts both operands, not rounds them (2026-11-22: norm 7.7e-4)
    assert_close(loose, want, 256, stages=6, dtype=FP16)
    if device == "cuda" and implementation == "triton":
        assert not torch.equal(loose, grouped_matmul(rows, w, r, implementation=implementation))


# ---------------------------------------------------------------- router and tables
@pytest.mark.parametrize("order", ["pre_renorm", "post"])
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, under the interpreter
def test_ties_of_zeros_and_nan(order, implementation, device):
    """Zeros of both signs are equal, NaN ranks below minus infinity's neighbours, other rows are untouched."""
    x = torch.tensor(
        [[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0], [1.0, 2.0, 3.0, 4.0], [1.0, float("nan"), 2.0, -1.0]]
    )
    bias = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    config = RouterConfig(3, order=order)
    for b in (None, bias):
        got = route(x.to(device), config, bias=None if b is None else b.to(device), implementation=implementation)
        assert got.topk_ids[:3].tolist() == [[0, 1, 2], [0, 1, 2], [3, 2, 1]]
        if order == "post":
            assert got.topk_ids[3].tolist() == [2, 0, 3]
        assert torch.isfinite(got.topk_weights[:3]).all()
    nothing = route(torch.full((2, 8), float("nan"), device=device), config, implementation=implementation)
    assert nothing.topk_ids.tolist() == [[0, 1, 2]] * 2


def test_logits_too_large_for_exp(implementation, device):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) + 1e4
    got = route(x.to(device), top_k=3, implementation=implementation)
    want = route(x, top_k=3, implementation="reference")
    assert_same_tables(got, want)
    assert torch.isfinite(got.topk_weights).all()


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(7, 3, 1000), (300, 8, 40)])
def test_tables_of_many_blocks_in_poisoned_memory(experts, top_k, tokens, implementation, device, poisoned_memory):
    for kind, ids in adversarial_ids(experts, top_k, tokens).items():
        got = Routing.from_topk(None, ids.to(device), experts, implementation=implementation)
        assert_same_tables(got, Routing.from_topk(None, ids, experts, implementation="torch"), kind)


def test_ids_out_of_range_count_as_dropped(implementation, device):
    if implementation == "torch" and device == "cpu":
        pytest.skip("on the CPU torch raises: tests/reference/test_bad_input.py")
    ids = torch.tensor([[0, 5, 1], [-7, 2, -1], [3, 1 << 20, 0]])
    kept = torch.tensor([[0, -1, 1], [-1, 2, -1], [-1, -1, 0]])
    got = Routing.from_topk(None, ids.to(device), 3, implementation=implementation)
    assert_same_tables(got, Routing.from_topk(None, kept, 3, implementation="torch"))
    strided = Routing.from_topk(None, ids.to(device)[:, ::2], 3, implementation=implementation)
    assert_same_tables(strided, Routing.from_topk(None, kept[:, ::2], 3, implementation="torch"))


# ---------------------------------------------------------------- tracing
def step(x, logits, w_gate_up, w_down, b_gate_up, b_down, implementation):
    """From logits to output through every operator."""
    routing = route(logits, top_k=2, implementation=implementation)
    y = fused_experts(x, w_gate_up, w_down, routing, b_gate_up=b_gate_up, b_down=b_down, implementation=implementation)
    rows = permute(x, routing, implementation=implementation)
    rows = grouped_matmul(rows, w_gate_up, routing, implementation=implementation)[:, : x.shape[1]]
    return y + unpermute(rows, routing, implementation=implementation)


def test_all_operators_trace_into_one_graph(implementation, device):
    inputs = make_inputs(replace(CASE, top_k=2), 6, FP32, device)
    leaves = {name: getattr(inputs, name) for name in LEAVES[:-1]} | {"logits": torch.randn(6, 5, device=device)}

    def call(**leaves):
        return step(**leaves, implementation=implementation)

    backend = "inductor" if device == "cuda" else "aot_eager"  # inductor on the CPU wants a C++ compiler
    want, got = run(call, leaves), run(torch.compile(call, fullgraph=True, backend=backend), leaves)
    for name, value in want.items():
        assert_close(got[name], value.double(), 64, 4, name=name)


@pytest.mark.parametrize("needed", [True, False], ids=["all needed", "nothing needed"])
def test_opcheck_of_backward_operators(needed, implementation, device):
    inputs = make_inputs(replace(CASE, top_k=2), 6, FP32, device)
    r, act, ops = inputs.routing, ACTIVATIONS["swiglu"], torch.ops.moesaic
    tables = {"row_order": r.row_order, "row_index": r.row_index, "expert_offsets": r.expert_offsets}
    weights = r.topk_weights.double()  # in another dtype than x, as their gradient must be
    layer = dict(
        x=inputs.x, w_gate_up=inputs.w_gate_up, w_down=inputs.w_down, weights=weights,
        b_gate_up=inputs.b_gate_up, b_down=inputs.b_down, residual=None,
        activation="swiglu", alpha=act.alpha, limit=act.limit, interleaved=False,
    )  # fmt: skip
    product = dict(transposed=False, allow_tf32=False, batch_invariant=False)
    hidden, rows = torch.randn(12, 38, device=device), torch.randn(12, 37, device=device)
    y = torch.randn_like(inputs.x)
    calls = {
        ops.fused_experts_backward: dict(grad_y=y, saved_preact=hidden, **layer, **product, **tables,
                                         needs=[needed] * 6 + [False]),
        ops.grouped_matmul_backward: dict(grad_out=hidden, rows=rows, w=inputs.w_gate_up, bias=inputs.b_gate_up,
                                          expert_offsets=r.expert_offsets, **product, needs=[needed] * 3),
        ops.unpermute_backward: dict(grad_y=y, rows=rows, weights=r.topk_weights, **tables, top_k=2,
                                     needs=[needed] * 2),
    }  # fmt: skip
    for op, arguments in calls.items():
        torch.library.opcheck(op, (), {**arguments, "implementation": implementation})
    torch.library.opcheck(
        ops.route_backward,
        (),
        dict(
            grad_weights=torch.randn(6, 2, device=device), grad_probability_sums=torch.randn(2, 5, device=device),
            grad_logsumexp_squares=torch.randn(2, device=device), logits=torch.randn(6, 5, device=device), bias=None,
            ids=None, saved_ids=r.topk_ids, **RouterConfig(2).core()._asdict(), num_experts=5, sequences=2,
            statistics=True, needs=[needed], implementation=implementation,
        ),
    )  # fmt: skip
