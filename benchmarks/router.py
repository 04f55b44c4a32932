"""Time routing, from logits to the index tables that grouped products need, beside other systems on one GPU.

python benchmarks/router.py --out benchmarks/results/h200/DATE-router.json [--commit X] [--tokens 1,64] [--device cpu]

Medians of CUDA-graph replays; on the CPU of calls, where only torch is there to compare with. Two routers: softmax of
128 experts, 8 chosen, weights normalised; DeepSeek-V3's grouped sigmoid with a bias, 256 experts in 8 groups, 4 groups
kept, 8 chosen. The peers' own entry points, each with what its expert products read. `backward` is each system's
backward function, without autograd around it; `gate` starts at hidden states in bf16.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

import moesaic
from moesaic import RouterConfig
from moesaic.bench import report
from moesaic.ops.gate import gate, router_logits

K = 8
ROUTERS = {
    "softmax": (128, RouterConfig(K)),
    "grouped": (256, RouterConfig(K, "sigmoid", norm_eps=1e-20, scale=2.5, num_groups=8, topk_groups=4)),
}
DEVICE = "cuda"
MODULES = {"vllm": ("vllm_shim", "vllm"), "triton_kernels": ("triton_kernels",), "sonic": ("sonicmoe",)}


def ours(kind, bias, logits):
    return lambda: moesaic.route(logits, ROUTERS[kind][1], bias=bias)


def vllm(kind, bias, logits):
    if importlib.util.find_spec("vllm_shim"):
        importlib.import_module("vllm_shim").fused_experts()
    ops = importlib.import_module("vllm._custom_ops")
    name = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
    align = importlib.import_module(name).moe_align_block_size
    T, E = logits.shape

    def call():
        if kind == "softmax":
            weights = torch.empty(T, K, device=logits.device)
            ids, rows = (torch.empty(T, K, dtype=torch.int32, device=logits.device) for _ in range(2))
            ops.topk_softmax(weights, ids, rows, logits, True)
        else:
            weights, ids = ops.grouped_topk(logits, 8, 4, K, True, 2.5, bias, 1)
        return weights, align(ids.int(), 64 if T > 64 else 16, E)

    return call


def triton_kernels(kind, bias, logits):
    routing = importlib.import_module("triton_kernels.routing").routing
    return None if kind != "softmax" else lambda: routing(logits, K)


def sonic(kind, bias, logits):
    functional = importlib.import_module("sonicmoe.functional")
    T, E = logits.shape

    def call():
        score, ids = functional.TC_Softmax_Topk_Router_Function.apply(logits, E, K, True, False)
        sizes = (E, E + 1, T * K, T * K, T * K)
        tables = [torch.empty(n, dtype=torch.int32, device=logits.device) for n in sizes]
        functional.TC_topk_router_metadata_triton(ids, E, *tables)
        return score, tables

    return None if kind != "softmax" else call


def torch_eager(kind, bias, logits):
    E = logits.shape[1]
    bounds = torch.arange(E + 1, device=logits.device)

    def call():
        p = torch.softmax(logits, -1) if kind == "softmax" else torch.sigmoid(logits)
        choice = p
        if kind != "softmax":
            groups = (p + bias).view(-1, 8, E // 8)
            best = groups.topk(2, -1).values.sum(-1).topk(4, -1).indices
            keep = torch.zeros(p.shape[0], 8, dtype=torch.bool, device=p.device).scatter_(1, best, True)
            choice = groups.masked_fill(~keep[..., None], float("-inf")).view_as(p)
        ids = choice.topk(K, -1).indices
        w = p.gather(1, ids)
        w = w / w.sum(-1, keepdim=True)
        by_expert, order = torch.sort(ids.flatten(), stable=True)
        return w, order, torch.searchsorted(by_expert, bounds)

    return call


PEERS = {"moesaic": ours, "vllm": vllm, "triton_kernels": triton_kernels, "sonic": sonic, "torch": torch_eager}


def microseconds(call) -> float:
    call()
    if DEVICE == "cpu":
        seconds, begin = [], time.perf_counter()
        while len(seconds) < 5 or time.perf_counter() - begin < 1:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) * 1e6
    torch.cuda.synchronize()
    triton = importlib.import_module("triton")
    return triton.testing.do_bench_cudagraph(call, rep=40, return_mode="median") * 1e3


def forward_rows(kind: str, T: int):
    E = ROUTERS[kind][0]
    logits, bias = torch.randn(T, E, device=DEVICE), torch.zeros(E, device=DEVICE)
    for name, build in PEERS.items():
        if name in MODULES and (DEVICE == "cpu" or not any(importlib.util.find_spec(m) for m in MODULES[name])):
            yield dict(what="forward", router=kind, tokens=T, peer=name, why_not=f"not installed, or not for {DEVICE}")
            continue
        with torch.no_grad():
            call = build(kind, bias if kind == "grouped" or name == "vllm" else None, logits)
            if call is not None:
                yield dict(what="forward", router=kind, tokens=T, peer=name, us=microseconds(call))


def our_backward(kind, bias, logits):
    config = ROUTERS[kind][1]
    ids = moesaic.route(logits, config, bias=bias).topk_ids
    grad = torch.randn(ids.shape, device=logits.device)
    rest = (None, None, logits, None, None, ids, *config.core(), logits.shape[1], 1, False, [True], "")
    return lambda: torch.ops.moesaic.route_backward(grad, *rest)


def sonic_backward(kind, bias, logits):
    functional = importlib.import_module("sonicmoe.functional")
    (T, E), Router = logits.shape, functional.TC_Softmax_Topk_Router_Function
    score, ids = Router.apply(logits, E, K, True, False)
    grad = torch.randn_like(score)

    def call():
        out = torch.zeros(T, E, dtype=logits.dtype, device=logits.device)
        functional._topk_softmax_bwd(
            logits, out, None, grad, score, ids, E, K, is_softmax_over_topk=True, norm_topk_probs=False
        )
        return out

    return None if kind != "softmax" else call


def triton_kernels_backward(kind, bias, logits):
    module = importlib.import_module("triton_kernels.topk")
    weights, ids, _ = module.topk_forward(logits, K)
    grad = torch.randn_like(weights)
    return None if kind != "softmax" else lambda: module.topk_backward(logits, ids, grad, K, None, True)


BACKWARD = {"moesaic": our_backward, "sonic": sonic_backward, "triton_kernels": triton_kernels_backward}


def backward_rows(kind: str, T: int):
    E = ROUTERS[kind][0]
    logits, bias = torch.randn(T, E, device=DEVICE), torch.zeros(E, device=DEVICE) if kind == "grouped" else None
    for name, build in BACKWARD.items():
        if name not in MODULES or (DEVICE != "cpu" and any(importlib.util.find_spec(m) for m in MODULES[name])):
            with torch.no_grad():
                call = build(kind, bias, logits)
                if call is not None:
                    yield dict(what="backward", router=kind, tokens=T, peer=name, us=microseconds(call))


def gate_rows(kind: str):
    E, config = ROUTERS[kind]
    H = {"softmax": 2048, "grouped": 7168}[kind]
    w = torch.randn(E, H, device=DEVICE, dtype=torch.bfloat16) * H**-0.5
    for T in (1, 16, 64, 4096):
        x = torch.randn(T, H, device=DEVICE, dtype=torch.bfloat16)
        calls = {
            "moesaic": lambda x=x: gate(x, w, config),
            "moesaic in two steps": lambda x=x: moesaic.route(router_logits(x, w), config),
            "product in fp32, then moesaic.route": lambda x=x: moesaic.route(x.float() @ w.float().mT, config),
        }
        for name, call in calls.items():
            with torch.no_grad():
                yield dict(what="gate", router=kind, tokens=T, peer=name, hidden=H, us=microseconds(call))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="1,64,4096,32768")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    global DEVICE
    DEVICE, rows = args.device, []
    for kind in ROUTERS:
        for T in map(int, args.tokens.split(",")):
            for row in (*forward_rows(kind, T), *backward_rows(kind, T)):
                rows.append(row)
                print(row, flush=True)
        for row in gate_rows(kind):
            rows.append(row)
            print(row, flush=True)
    if args.out:
        record = dict(
            what="router", date=datetime.now(UTC).isoformat(timespec="seconds"), commit=args.commit,
            command=f"python benchmarks/router.py --device {DEVICE} --tokens {args.tokens}",
            machine=report.machine(torch.device(DEVICE)),
            versions=report.versions(), rows=rows,
        )  # fmt: skip
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
