"""What `moesaic verify` compares: every implementation that can run here against the fp64 oracle, with gradients.

The oracle is `implementation="reference"` on the same rounded inputs cast to fp64, always on the CPU. A verdict's
`ratio` is the error over the bound that `testing.bounds` allows for the dtype and the contraction: above 1 is a
failure, and NaN or inf in the wrong place is an infinite ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..cases import CASES, Case
from ..hardware import interpreting
from ..op import explain
from ..ops.fused_experts import fused_experts
from ..ops.grouped_matmul import grouped_matmul
from ..ops.permute import permute, unpermute
from ..ops.route import RouterConfig, route
from ..routing import Routing
from ..testing import STAGES, Inputs, adversarial_ids, bounds, error_report, make_inputs

INTERPRETER_NOTE = (
    "Triton runs in its CPU interpreter, which multiplies the raw bits of bf16: products in bf16 are left out for it."
)

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Verdict:
    """One tensor of one call. `where` names the case, `what` the tensor."""

    implementation: str
    operator: str
    dtype: str
    where: str
    what: str
    norm: float
    ratio: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1

    def __str__(self) -> str:
        return f"{self.operator} [{self.implementation}, {self.dtype}] {self.where}: {self.what}"


def judge(
    out: Tensor, oracle: Tensor, contraction: int, stages: int, dtype: torch.dtype | None = None
) -> tuple[float, float, str]:
    """`(norm error, ratio to the bound, report)`; the rule is that of `testing.assert_close`."""
    report = error_report(out, oracle)
    norm, worst = bounds(dtype or out.dtype, contraction, stages)
    ratio = max(report.norm / norm, report.worst / worst)
    return report.norm, math.inf if report.finite_mismatch or math.isnan(ratio) else ratio, str(report)


def same(out: Tensor, oracle: Tensor) -> tuple[float, float, str]:
    """The verdict on values that must be equal bit for bit."""
    if out.shape == oracle.shape and torch.equal(out.cpu(), oracle.cpu().to(out.dtype)):
        return 0.0, 0.0, ""
    return math.inf, math.inf, "differs, and must be equal"


def all_checks(device: torch.device, full: bool) -> Iterator[Verdict]:
    """Every comparison, in the order of the operators."""
    yield from tables(device, full)
    yield from routers(device, full)
    yield from movers(device, full)
    yield from products(device, full)
    yield from layers(device, full)
    yield from repeats(device)


def can_run(op: str, **fields: Any) -> list[str]:
    """The implementations of `op` that have no reason against a problem, and that can be judged."""
    names = [name for name, reason in explain(op, **fields).reasons if reason is None]
    if interpreting() and fields["dtype"] == BF16 and op in ("grouped_matmul", "fused_experts"):
        names.remove("triton")  # see INTERPRETER_NOTE
    return names


def _where(device: torch.device) -> dict[str, Any]:
    return dict(device=device.type)


def _name(dtype: torch.dtype) -> str:
    return {FP16: "fp16", BF16: "bf16", FP32: "fp32", FP64: "fp64"}[dtype]


def _grads(y: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    got = torch.autograd.grad(y, inputs, cotangent.to(y), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(got, inputs, strict=True)]


def _cotangent(y: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient to start from, representable in the dtype under test."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=FP32).to(y.device, dtype)


# ---------------------------------------------------------------- routing
_SIZES = ((8, 2, 7), (5, 5, 9), (1, 1, 3), (60, 4, 33))


def tables(device: torch.device, full: bool) -> Iterator[Verdict]:
    """The index tables, which must equal the reference's."""
    for E, K, T in _SIZES if full else _SIZES[:3]:
        for name, ids in adversarial_ids(E, K, T).items():
            want = Routing.from_topk(None, ids, E, implementation="reference")
            for implementation in can_run(
                "route", **_where(device), dtype=torch.int32, num_tokens=T, top_k=K, num_experts=E
            ):
                got = Routing.from_topk(None, ids.to(device), E, implementation=implementation)
                for field in ("topk_ids", "tokens_per_expert", "expert_offsets", "row_order", "row_index"):
                    found = same(getattr(got, field), getattr(want, field))
                    yield Verdict(
                        implementation, "Routing.from_topk", "int32", f"E={E} K={K} T={T} {name}", field, *found
                    )


_ROUTERS = (
    RouterConfig(2, order="pre"),
    RouterConfig(4),
    RouterConfig(3, order="post"),
    RouterConfig(2, score="sigmoid", norm_eps=1e-20, scale=2.5),
    RouterConfig(3, score="sigmoid", num_groups=4, topk_groups=2),
    RouterConfig(2, num_groups=4, topk_groups=1, group_score="max"),
)


def _logits(kind: str, E: int) -> Tensor:
    x = 2 * torch.randn(9, E, generator=torch.Generator().manual_seed(3), dtype=FP64)
    if kind == "ties":
        return x.round()
    if kind == "all equal":
        return torch.zeros_like(x)
    if kind == "shifted":
        return x + 1e4  # exp overflows unless the largest logit is taken off first
    return x[:0] if kind == "no token" else x


def routers(device: torch.device, full: bool) -> Iterator[Verdict]:
    """Choices equal, weights and the gradient of the logits within bounds."""
    E = 16
    bias = 0.3 * torch.randn(E, generator=torch.Generator().manual_seed(5))
    for config in _ROUTERS:
        for dtype in (FP32, BF16, FP64) if full else (FP32, BF16):
            for kind in ("random", "ties", "all equal", "shifted", "no token"):
                for b in (None, bias):
                    yield from _router(
                        device, config, _logits(kind, E).to(dtype), b, f"{kind}{', bias' if b is not None else ''}"
                    )


def _router(
    device: torch.device, config: RouterConfig, logits: Tensor, bias: Tensor | None, kind: str
) -> Iterator[Verdict]:
    T, E = logits.shape
    want, want_weights, dwant = _routed(logits.double(), config, bias, "reference")
    where = f"{config.score} {config.order} K={config.top_k} groups={config.num_groups}/{config.topk_groups} {kind}"
    fields = dict(dtype=logits.dtype, num_tokens=T, top_k=config.top_k, num_experts=E, config=config)
    for implementation in can_run("route", **_where(device), **fields):
        here = None if bias is None else bias.to(device)
        got, weights, dgot = _routed(logits.to(device), config, here, implementation)
        common = (implementation, "route", _name(logits.dtype), where)
        yield Verdict(*common, "ids", *same(got.topk_ids, want.topk_ids))
        yield Verdict(*common, "weights", *judge(weights, want_weights, E, STAGES["route"]))
        # all tokens as one row: where one expert is certain, a token's gradient is a difference of nearly equal numbers
        yield Verdict(*common, "grad logits", *judge(dgot.reshape(1, -1), dwant.reshape(1, -1), E, 2 * STAGES["route"]))


def _routed(logits: Tensor, config: RouterConfig, bias: Tensor | None, implementation: str):
    """The routing, its weights, and the gradient of the logits."""
    x = logits.detach().requires_grad_()
    routing = route(x, config, bias=bias, implementation=implementation)
    weights = routing.topk_weights
    assert weights is not None
    return routing, weights.detach(), _grads(weights, [x], _cotangent(weights, FP32).to(weights.device))[0]


# ---------------------------------------------------------------- permute, unpermute
def movers(device: torch.device, full: bool) -> Iterator[Verdict]:
    """`permute` copies exactly; its gradient, `unpermute` and the gradients of that within bounds."""
    for E, K, T in _SIZES[:3]:
        for kind, ids in adversarial_ids(E, K, T).items():
            for dtype in (FP32, BF16, FP16, FP64) if full else (FP32, BF16):
                yield from _mover(device, E, ids, dtype, f"E={E} K={K} T={ids.shape[0]} H=33 {kind}")


def _mover(device: torch.device, E: int, ids: Tensor, dtype: torch.dtype, where: str) -> Iterator[Verdict]:
    H, (T, K), g = 33, ids.shape, torch.Generator().manual_seed(2)
    x, rows = (torch.randn(n, H, generator=g).to(dtype) for n in (T, T * K))
    weights = torch.rand(T, K, generator=g).to(FP64 if dtype == FP64 else FP32)

    def run(x: Tensor, rows: Tensor, weights: Tensor, implementation: str) -> list[Tensor]:
        x, rows, weights = (t.detach().requires_grad_() for t in (x, rows, weights))
        routing = Routing.from_topk(weights, ids.to(x.device), E)
        moved = permute(x, routing, implementation=implementation)
        y = unpermute(rows, routing, weights=weights, implementation=implementation)
        back = _grads(moved, [x], _cotangent(moved, dtype)) + _grads(y, [rows, weights], _cotangent(y, dtype))
        return [moved.detach(), y.detach(), *back]

    want = run(x.double(), rows.double(), weights.double(), "reference")
    for implementation in can_run("permute", **_where(device), dtype=dtype, top_k=K, hidden_size=H):
        got = run(x.to(device), rows.to(device), weights.to(device), implementation)
        common = (implementation, "permute", _name(dtype), where)
        yield Verdict(*common, "rows", *same(got[0], want[0]))
        yield Verdict(*common, "grad x", *judge(got[2], want[2], K, STAGES["permute"]))
        common = (implementation, "unpermute", _name(dtype), where)
        yield Verdict(*common, "y", *judge(got[1], want[1], K, STAGES["unpermute"]))
        yield Verdict(*common, "grad rows", *judge(got[3], want[3], 1, STAGES["unpermute"]))
        yield Verdict(*common, "grad weights", *judge(got[4], want[4], H, STAGES["unpermute"]))


# ---------------------------------------------------------------- grouped_matmul
def products(device: torch.device, full: bool) -> Iterator[Verdict]:
    """`grouped_matmul`, its dgrad, wgrad and bias gradient; odd sizes, both layouts, with and without bias."""
    for E, K, T in _SIZES[:3]:
        for kind, ids in adversarial_ids(E, K, T).items():
            for dtype in (FP32, BF16, FP16, FP64) if full else (FP32, BF16):
                for transposed in (False, True):
                    yield from _product(device, E, ids, dtype, transposed, f"E={E} K={K} T={ids.shape[0]} {kind}")


def _product(
    device: torch.device, E: int, ids: Tensor, dtype: torch.dtype, transposed: bool, where: str
) -> Iterator[Verdict]:
    width, out, rows_n, g = 33, 17, ids.numel(), torch.Generator().manual_seed(4)
    rows = torch.randn(rows_n, width, generator=g).to(dtype)
    w = (torch.randn(E, *((width, out) if transposed else (out, width)), generator=g) * width**-0.5).to(dtype)
    bias = torch.randn(E, out, generator=g).to(dtype) if transposed else None

    def run(inputs: list[Tensor], implementation: str) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        routing = Routing.from_topk(None, ids.to(inputs[0].device), E)
        b = inputs[2] if len(inputs) == 3 else None
        y = grouped_matmul(inputs[0], inputs[1], routing, bias=b, transposed=transposed, implementation=implementation)
        return [y.detach(), *_grads(y, inputs, _cotangent(y, dtype))]

    inputs = [rows, w] + ([bias] if bias is not None else [])
    want = run([t.double() for t in inputs], "reference")
    fields = dict(dtype=dtype, num_rows=rows_n, num_experts=E, hidden_size=width, intermediate_size=out)
    for implementation in can_run(
        "grouped_matmul", **_where(device), **fields, transposed=transposed, bias=bias is not None
    ):
        got = run([t.to(device) for t in inputs], implementation)
        text = where + (" transposed, bias" if transposed else "")
        lengths = (width, out, _mean_rows(ids), _mean_rows(ids))
        for what, a, b, length in zip(("y", "grad rows", "grad w", "grad bias"), got, want, lengths, strict=False):
            verdict = judge(a, b, length, STAGES["grouped_matmul"])
            yield Verdict(implementation, "grouped_matmul", _name(dtype), text, what, *verdict)


def _mean_rows(ids: Tensor) -> int:
    """Rows of a live expert, on average: the length of the sums behind a weight gradient."""
    live = ids[ids >= 0]
    return max(1, round(live.numel() / max(1, live.unique().numel())))


# ---------------------------------------------------------------- fused_experts
def _variants(full: bool) -> list[Case]:
    """Small layers that differ in every property a model can differ in."""
    odd = dict(hidden_size=33, intermediate_size=17)
    picked = [
        CASES["mixtral-8x7b"].small(),
        CASES["qwen3-30b-a3b"].small(),  # K = E
        CASES["gpt-oss-120b"].small(**odd, num_experts=5),
        CASES["llama4-scout"].small(40, 24, 3),
        CASES["nemotron-h"].small(**odd, num_experts=6),
        replace(CASES["mixtral-8x7b"], name="one-expert", num_experts=1, top_k=1, **odd),
    ]
    if full:
        picked += [case.small(96, 80, 12) for case in CASES.values()] + [case.small(**odd) for case in CASES.values()]
    return picked


def layers(device: torch.device, full: bool) -> Iterator[Verdict]:
    """The whole layer: cases × routings × dtypes, then every activation, then hostile inputs."""
    for case in _variants(full):
        for kind, ids in adversarial_ids(case.num_experts, case.top_k, 7).items():
            for dtype in (FP32, BF16, FP16, FP64) if full else (FP32, BF16):
                yield from layer(device, make_inputs(case, ids.shape[0], dtype, ids=ids), kind)
    base = CASES["mixtral-8x7b"].small(48, 32, 4)
    for name in ACTIVATIONS:
        for kind in ("random", "dropped slots"):
            for dtype in (FP32, BF16, FP16, FP64) if full else (FP32, BF16, FP16):
                ids = adversarial_ids(4, 2, 6)[kind]
                yield from layer(
                    device, make_inputs(replace(base, name=name, activation=name), 6, dtype, ids=ids), kind
                )
    for dtype in (FP32, BF16):
        inputs = make_inputs(base, 6, dtype)
        strided = torch.stack((inputs.x, inputs.x), -1)[..., 0]
        yield from layer(device, replace(inputs, x=strided), "strided x")
        x = inputs.x.clone()
        x[2, 5], x[4, 0] = math.nan, math.inf
        yield from layer(device, replace(inputs, x=x), "NaN and inf in two tokens", gradients=False)


def layer(device: torch.device, inputs: Inputs, kind: str, gradients: bool = True) -> Iterator[Verdict]:
    """One layer, every implementation."""
    case, dtype = inputs.case, inputs.x.dtype
    H, I, rows = case.hidden_size, case.intermediate_size, _mean_rows(inputs.routing.topk_ids)
    lengths: dict[str, int] = dict(zip(NAMES, (max(H, 2 * I), rows, rows, H, rows, rows), strict=True))
    want = evaluate(inputs, torch.device("cpu"), "reference", FP64, gradients)
    start = around(want["y"], dtype)
    fields = dict(
        dtype=dtype, num_tokens=inputs.x.shape[0], top_k=case.top_k, num_experts=case.num_experts, hidden_size=H,
        intermediate_size=I, activation=case.activation, interleaved=case.layout == "interleaved",
        transposed=case.transposed, bias=case.bias, training=gradients,
    )  # fmt: skip
    where = f"{case.name} H={H} I={I} E={case.num_experts} K={case.top_k} T={inputs.x.shape[0]} {kind}"
    for implementation in can_run("fused_experts", **_where(device), **fields):
        got = evaluate(inputs, device, implementation, None, gradients, start)
        for what, value in got.items():
            stages = STAGES["fused_experts" if what == "y" else "fused_experts_backward"]
            length = max(H, I) if what == "y" else lengths[what.removeprefix("grad ")]
            oracle = want[what]
            if what.startswith("grad w_"):
                # an expert at a time: a column whose derivative crosses zero is all rounding error, and no mistake
                value, oracle = value.flatten(1), oracle.flatten(1)
            verdict = judge(value, oracle, length, stages, dtype)
            yield Verdict(implementation, "fused_experts", _name(dtype), where, what, *verdict)


NAMES = ("x", "w_gate_up", "w_down", "weights", "b_gate_up", "b_down")


def evaluate(
    inputs: Inputs,
    device: torch.device,
    implementation: str | None,
    dtype: torch.dtype | None,
    gradients: bool,
    start: Tensor | None = None,
) -> dict[str, Tensor]:
    """`y` and `grad <input>` of a layer by an implementation on a device; inputs cast to `dtype` if one is given.

    Backward begins with `start`, by default `around(y)`.
    """
    arguments, routing = inputs.arguments(), inputs.routing
    given = (inputs.x, inputs.w_gate_up, inputs.w_down, routing.topk_weights, inputs.b_gate_up, inputs.b_down)
    leaves = {
        name: (t if dtype is None else t.to(dtype)).detach().to(device)
        for name, t in zip(NAMES, given, strict=True)
        if t is not None
    }
    if inputs.x.stride(-1) != 1:  # moving made it dense
        leaves["x"] = torch.stack((leaves["x"], leaves["x"]), -1)[..., 0]
    for t in leaves.values():
        t.requires_grad_(gradients)
    here = Routing.from_topk(leaves["weights"], routing.topk_ids.to(device), inputs.case.num_experts)
    tensors = {n: t for n, t in leaves.items() if n != "weights"}
    y = fused_experts(
        **{**arguments, **tensors, "routing": here}, weights=leaves["weights"], implementation=implementation
    )
    out = {"y": y.detach()}
    if gradients:
        got = _grads(y, list(leaves.values()), around(y, inputs.x.dtype) if start is None else start.to(device))
        out |= {f"grad {n}": g for n, g in zip(leaves, got, strict=True)}
    return out


def around(y: Tensor, dtype: torch.dtype) -> Tensor:
    """A random gradient that leans towards y, lest a routing weight's gradient `<grad, out_k>` cancel to nothing."""
    y = y.detach().double()
    return (_cotangent(y, dtype).double() + y / y.square().mean().sqrt().clamp_min(1e-30)).to(dtype)


def repeats(device: torch.device) -> Iterator[Verdict]:
    """The same call twice gives the same bits, forward and backward."""
    case = CASES["qwen3-30b-a3b"].small()
    for dtype in (FP32, BF16):
        inputs = make_inputs(case, 40, dtype)
        fields = dict(dtype=dtype, num_tokens=40, top_k=case.top_k, num_experts=case.num_experts, hidden_size=64,
                      intermediate_size=48, activation=case.activation, training=True)  # fmt: skip
        for implementation in can_run("fused_experts", **_where(device), **fields):
            if implementation == "reference":
                continue
            first, second = (evaluate(inputs, device, implementation, None, True) for _ in range(2))
            for what in first:
                verdict = same(first[what], second[what])
                yield Verdict(implementation, "fused_experts", _name(dtype), f"{case.name} T=40, twice", what, *verdict)
