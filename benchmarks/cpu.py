"""The bars of the native CPU path, measured in one run: `python benchmarks/cpu.py [--quick] [--json out.json]`.

Every figure is a median of calls that take turns with those they are compared with, each with a routing of its own, so
that weights come from memory and a noisy neighbour meets all alike. Compared are transformers' `grouped_mm` experts,
the torch implementation and the native one: forward at 1 to 2048 tokens, forward and backward at 512, and the host's
time of a tiny layer. Beside them stand the machine's own limits: the rate at which memory is read, and that of a large
matrix product in each dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F

import moesaic
from moesaic.cases import Case
from moesaic.hardware import cpu_name
from moesaic.ops.fused_experts import _cpu
from moesaic.routing import Routing

# Mixtral's experts at a quarter of their width, which is what fits the memory of a small machine
SHAPES = (
    Case("olmoe", 2048, 1024, 64, 8),
    Case("qwen3-30b-a3b", 2048, 768, 128, 8),
    Case("mixtral-like", 4096, 3584, 8, 2),
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# the least ratio to grouped_mm that is asked for, by (dtype, tokens); decode may instead reach 90% of the memory's rate
BARS = {
    ("bf16", 1): 2.0, ("bf16", 8): 2.0, ("fp32", 1): 1.4, ("fp32", 8): 1.4, ("bf16", 64): 1.5, ("fp32", 64): 1.5,
    ("bf16", 512): 1.3, ("fp32", 512): 1.3, ("bf16", 2048): 1.3, ("fp32", 2048): 1.3,
}  # fmt: skip
DECODE, MEMORY_SHARE, PEAK_SHARE = 8, 0.9, 0.75


def interleaved(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; round i calls every one with i, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def limits() -> dict[str, float]:
    """`read_GBs`: a sum over 2 GiB; `<dtype>_GFs`: a product of 4096² matrices."""
    big = torch.ones(1 << 29)
    out = {"read_GBs": big.nbytes / interleaved({"sum": lambda i, big=big: big.sum()}, 7)["sum"] / 1e9}
    del big
    for name, dtype in DTYPES.items():
        a, b = torch.randn(4096, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
        out[f"{name}_GFs"] = 2 * 4096**3 / interleaved({"mm": lambda i, a=a, b=b: a @ b}, 5)["mm"] / 1e9
    return out


class Layer:
    """Weights of a case, as transformers' experts and as ours."""

    def __init__(self, case: Case, dtype: torch.dtype, grad: bool = False):
        E, H, I = case.num_experts, case.hidden_size, case.intermediate_size
        self.case, self.dtype = case, dtype
        self.gate_up_proj = (torch.randn(E, 2 * I, H) * 0.02).to(dtype).requires_grad_(grad)
        self.down_proj = (torch.randn(E, H, I) * 0.02).to(dtype).requires_grad_(grad)
        self.num_experts, self.act_fn = E, F.silu
        self.has_gate = self.is_concatenated = True
        self.has_bias = self.is_transposed = self.has_post_expert_norm = self._is_expert_parallel = False

    def calls(self) -> dict[str, Callable]:
        from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

        self._apply_gate = types.MethodType(_default_apply_gate, self)

        def ours(x, ids, weights, implementation):
            routing = Routing.from_topk(weights, ids, self.num_experts)
            return moesaic.fused_experts(x, self.gate_up_proj, self.down_proj, routing, implementation=implementation)

        return {
            "grouped_mm": lambda x, ids, w: grouped_mm_experts_forward(self, x, ids, w.to(self.dtype)),
            "torch": lambda x, ids, w: ours(x, ids, w, "torch"),
            "cpu": lambda x, ids, w: ours(x, ids, w, "cpu"),
        }

    def inputs(self, tokens: int, grad: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights, ids = torch.randn(tokens, self.num_experts).topk(self.case.top_k, -1)
        x = torch.randn(tokens, self.case.hidden_size).to(self.dtype)
        return x.requires_grad_(grad), ids, weights.softmax(-1).requires_grad_(grad)


def forward(layer: Layer, dtype: str, tokens: int, rounds: int, limit: dict[str, float]) -> dict:
    inputs = [layer.inputs(tokens) for _ in range(min(rounds, 16))]
    turns = {n: (lambda i, c=c: c(*inputs[i % len(inputs)])) for n, c in layer.calls().items()}
    with torch.no_grad():
        seconds = interleaved(turns, rounds)
    case, size = layer.case, layer.gate_up_proj.element_size()
    live = statistics.mean(len(torch.unique(ids)) for _, ids, _ in inputs)
    bandwidth = live * 3 * case.hidden_size * case.intermediate_size * size / seconds["cpu"] / 1e9
    rate = case.flops(tokens) / seconds["cpu"] / 1e9  # bf16 may also be multiplied in fp32, where that is faster
    peak = max(limit["fp32_GFs"], limit["bf16_GFs"] if dtype == "bf16" else 0)
    ratio, bar = seconds["grouped_mm"] / seconds["cpu"], BARS[dtype, tokens]
    met = ratio >= bar or (tokens <= DECODE and bandwidth >= MEMORY_SHARE * limit["read_GBs"])
    return {
        "what": "forward", "shape": case.name, "dtype": dtype, "tokens": tokens, "bar": bar, "met": met,
        "ratio": ratio, "ms": {n: s * 1e3 for n, s in seconds.items()}, "GBs": bandwidth, "GFs": rate,
        "share_of_peak": rate / peak, "peak_met": rate >= PEAK_SHARE * peak if tokens >= 512 else None,
    }  # fmt: skip


def training(layer: Layer, dtype: str, tokens: int, rounds: int) -> dict:
    x, ids, weights = layer.inputs(tokens, grad=True)
    grad = torch.randn_like(x)

    def turn(call, _):
        for t in (x, weights, layer.gate_up_proj, layer.down_proj):
            t.grad = None
        call(x, ids, weights).backward(grad)

    seconds = interleaved({n: (lambda i, c=c: turn(c, i)) for n, c in layer.calls().items()}, rounds)
    ratio = seconds["grouped_mm"] / seconds["cpu"]
    return {
        "what": "forward + backward", "shape": layer.case.name, "dtype": dtype, "tokens": tokens, "bar": 1.3,
        "met": ratio >= 1.3, "ratio": ratio, "ms": {n: s * 1e3 for n, s in seconds.items()},
    }  # fmt: skip


def tiny() -> dict:
    """Host time of a layer so small that nothing else counts."""
    layer = Layer(Case("tiny", 64, 48, 8, 2), torch.float32)
    x, ids, weights = layer.inputs(1)
    routing = Routing.from_topk(weights, ids, 8)

    def turn(_, implementation):
        moesaic.fused_experts(x, layer.gate_up_proj, layer.down_proj, routing, implementation=implementation)

    with torch.no_grad():
        seconds = interleaved({n: (lambda i, n=n: turn(i, n)) for n in ("torch", "cpu")}, 2000)
    us = {n: s * 1e6 for n, s in seconds.items()}
    return {"what": "host time", "shape": "tiny", "us": us, "bar": 41.0, "met": us["cpu"] <= 41.0}


def show(row: dict) -> None:
    if "us" in row:
        told = "  ".join(f"{n} {v:.1f} us" for n, v in row["us"].items())
    else:
        told = "  ".join(f"{n} {v:.2f} ms" for n, v in row["ms"].items()) + f"  {row['ratio']:.2f}x grouped_mm"
    if "GBs" in row:
        told += f"  {row['GBs']:.1f} GB/s  {row['GFs']:.0f} GFLOP/s ({row['share_of_peak']:.0%} of peak)"
    where = f"{row['what']} {row['shape']} {row.get('dtype', '')} {row.get('tokens', '')}".strip()
    print(f"{where:<44} {told}  bar {row['bar']}: {'met' if row['met'] else 'NOT met'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="OLMoE's shape only, few rounds")
    parser.add_argument("--json", help="write all figures to this file")
    given = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    status = _cpu.status()
    print(f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"native kernels {status}, there after {time.perf_counter() - start:.1f} s")
    limit = limits()
    print("limits: " + "  ".join(f"{name} {value:.1f}" for name, value in limit.items()), flush=True)
    rows = [tiny()]
    show(rows[0])
    for case in SHAPES[:1] if given.quick else SHAPES:
        for dtype in DTYPES:
            layer = Layer(case, DTYPES[dtype])
            for tokens, rounds in ((1, 48), (8, 24), (64, 12), (512, 7), (2048, 5)):
                rows.append(forward(layer, dtype, tokens, max(3, rounds // 4) if given.quick else rounds, limit))
                show(rows[-1])
            del layer
            rows.append(training(Layer(case, DTYPES[dtype], grad=True), dtype, 512, 3 if given.quick else 7))
            show(rows[-1])
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                       "native": status, "limits": limit, "rows": rows}, file, indent=1)  # fmt: skip


if __name__ == "__main__":
    main()
