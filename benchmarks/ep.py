"""Check and time expert parallelism on the GPUs of one host, beside a plain all-to-all layer and the experts alone.

    python benchmarks/ep.py --out FILE.jsonl      # every section on all GPUs, each in processes of its own
    python benchmarks/ep.py --sections check,wire --ranks 2 --limit 120
    torchrun --nproc-per-node 2 benchmarks/ep.py --section check   # one section by hand

Sections: `check` (oracle, bitwise equality with AllToAll, repetitions, no host synchronisation, graphs with changed
routing, gradients), `wire` (push against a copy of the same size), `decode` (T = 1, 16, 64, captured), `forward` and
`train` (T = 4096, 16384), `peers` (Hugging Face's all-to-all). Every line is one JSON object, printed and appended to
the file as soon as it is known, so that a limit of time loses only what comes after it.

Times are medians of microseconds of the slowest rank; parts and layers as CUDA graphs where `graph` is said. `plain` is
what a layer over collectives usually is: permute, counts to the host, two uneven all-to-alls, one row a choice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moesaic
from moesaic import Routing, fused_experts
from moesaic.cases import CASES, DISTRIBUTIONS
from moesaic.parallel import AllToAll, Push
from moesaic.parallel.dispatcher import TokenDispatcher

SECTIONS = ("check", "wire", "decode", "forward", "train", "peers")
SHAPES = ("qwen3-30b-a3b", "deepseek-v3")
SIZES: dict[str, tuple[int, int, int, int]] = {  # H, I, E, K
    n: (c.hidden_size, c.intermediate_size, c.num_experts, c.top_k) for n, c in CASES.items()
} | {"tiny": (64, 32, 8, 3)}


class Bench:
    """One rank: its device, its lines, its clock."""

    def __init__(self, out: Path | None, device: str):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda = device == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.out = out
        if self.cuda:
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", device_id=self.device)
        elif not dist.is_initialized():
            dist.init_process_group("gloo")

    def say(self, **line: Any) -> None:
        """One line, from rank 0."""
        if self.rank:
            return
        text = json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()})
        print(text, flush=True)
        if self.out:
            with self.out.open("a") as file:
                file.write(text + "\n")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()

    def empty(self) -> None:
        torch.cuda.empty_cache()  # does nothing where there is no GPU

    def time(self, call: Callable[[], Any], rounds: int = 20, warm: int = 4) -> float:
        """Median microseconds of calls that follow each other, of the slowest rank."""
        for _ in range(warm):
            call()
        self.wait()
        if self.cuda:
            marks = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(rounds)]
            for begin, end in marks:
                begin.record()
                call()
                end.record()
            torch.cuda.synchronize()
            took = [b.elapsed_time(e) * 1e3 for b, e in marks]
        else:
            marks = [time.perf_counter()] + [(call(), time.perf_counter())[1] for _ in range(rounds)]
            took = [(b - a) * 1e6 for a, b in pairwise(marks)]
        slowest = torch.tensor(statistics.median(took), device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item()

    def captured(self, call: Callable[[], Any], times: int = 1) -> Callable[[], None]:
        """The call in a CUDA graph; on CPU the call."""
        if not self.cuda:

            def repeat() -> None:
                for _ in range(times):
                    call()

            return repeat
        for _ in range(3):
            call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(times):
                call()
        self.wait()
        return graph.replay

    def graph_time(self, call: Callable[[], Any], times: int = 4) -> float:
        return self.time(self.captured(call, times)) / times


class Layer:
    """This rank's part of a layer, its batch, and the transports over it."""

    def __init__(self, bench: Bench, name: str, T: int, spread: str = "uniform", seed: int = 0):
        self.bench, self.name, self.T, self.spread = bench, name, T, spread
        self.H, self.I, self.E, self.K = SIZES[name]
        self.L = self.E // bench.size
        H, I, L = self.H, self.I, self.L
        make = dict(device=bench.device, dtype=bench.dtype)
        g = torch.Generator(bench.device).manual_seed(7 + bench.rank)
        self.up = torch.empty(L, 2 * I, H, **make).normal_(0, H**-0.5, generator=g)
        self.down = torch.empty(L, H, I, **make).normal_(0, I**-0.5, generator=g)
        self.x, self.routing = self.batch(seed)
        self.grad = torch.empty(T, H, **make).normal_(generator=g)

    def batch(self, seed: int) -> tuple[Tensor, Routing]:
        g = torch.Generator().manual_seed(1000 * seed + self.bench.rank)
        popular = torch.Generator().manual_seed(seed)  # which experts are popular all ranks agree on
        if self.spread == "zipf":
            order = torch.randperm(self.E, generator=popular)
            bias = -torch.log(torch.arange(1, self.E + 1).float())[order]
            noise = torch.rand(self.T, self.E, generator=g).clamp(1e-9, 1 - 1e-7)
            scores = bias - torch.log(-torch.log(noise))
        else:
            scores = DISTRIBUTIONS[self.spread](self.T, self.E, self.K, g)
        weights, ids = scores.softmax(-1).topk(self.K)
        weights = weights / weights.sum(-1, keepdim=True)
        x = torch.randn(self.T, self.H, generator=g).to(self.bench.device, self.bench.dtype)
        return x, Routing.from_topk(weights.to(self.bench.device), ids.int().to(self.bench.device), self.E)

    def experts(self, rows: Tensor, local: Routing) -> Tensor:
        return fused_experts(rows, self.up, self.down, local)

    def push(self) -> TokenDispatcher:
        return make_push(self)

    def plain(self, x: Tensor, routing: Routing, group: Any = None) -> Tensor:
        """Permute, counts to the host, two uneven all-to-alls (differentiable), one row a choice."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd as move
        from torch.distributed._functional_collectives import wait_tensor

        W, group = self.bench.size, dist.group.WORLD
        rows = moesaic.permute(x, routing)
        counts = routing.tokens_per_expert.view(W, self.L)
        got = torch.empty_like(counts)
        dist.all_to_all_single(got, counts)
        ins, outs = counts.sum(1).tolist(), got.sum(1).tolist()
        came = wait_tensor(move(rows[: sum(ins)], outs, ins, group))
        e = torch.arange(self.L, device=x.device, dtype=torch.int32).repeat(W)
        e = e.repeat_interleave(got.view(-1).long(), output_size=sum(outs))[:, None]
        ones = torch.ones(e.shape, device=x.device)
        y = self.experts(came, Routing.from_topk(ones, e, self.L))
        back = wait_tensor(move(y, ins, outs, group))
        if back.shape[0] < rows.shape[0]:
            back = torch.cat([back, back.new_zeros(rows.shape[0] - back.shape[0], self.H)])
        return moesaic.unpermute(back, routing, weights=True)


def make_push(layer: Layer) -> TokenDispatcher:
    return Push(layer.E, max_tokens=layer.T, hidden_size=layer.H, top_k=layer.K, dtype=layer.bench.dtype)


# ---------------------------------------------------------------- sections
def oracle(layer: Layer) -> Tensor:
    """This rank's outputs from all ranks' weights, in fp32 products of gathered experts."""
    W, x = layer.bench.size, layer.x.float()
    ups = torch.empty(W, *layer.up.shape, device=x.device, dtype=layer.up.dtype)
    downs = torch.empty(W, *layer.down.shape, device=x.device, dtype=layer.down.dtype)
    dist.all_gather_into_tensor(ups.flatten(0, 1), layer.up)
    dist.all_gather_into_tensor(downs.flatten(0, 1), layer.down)
    out = torch.zeros_like(x)
    for e in range(layer.E):
        t, k = (layer.routing.topk_ids == e).nonzero(as_tuple=True)
        gate, up = (x[t] @ ups.flatten(0, 1)[e].float().T).chunk(2, -1)
        assert layer.routing.topk_weights is not None
        y = (torch.nn.functional.silu(gate) * up) @ downs.flatten(0, 1)[e].float().T
        out.index_add_(0, t, layer.routing.topk_weights[t, k, None] * y)
    return out


def backward(layer: Layer, call: Callable[[Tensor, Routing], Tensor]) -> list[Tensor]:
    """Output and all gradients of one call."""
    x = layer.x.detach().requires_grad_()
    w = layer.routing.topk_weights.detach().requires_grad_()  # pyright: ignore[reportOptionalMemberAccess]
    up, down = layer.up, layer.down
    layer.up, layer.down = up.detach().requires_grad_(), down.detach().requires_grad_()
    y = call(x, Routing.from_topk(w, layer.routing.topk_ids, layer.E))
    y.backward(layer.grad)
    grads = [x.grad, w.grad, layer.up.grad, layer.down.grad]
    layer.up, layer.down = up, down
    return [y.detach(), *grads]  # pyright: ignore[reportReturnType]


def check(bench: Bench, small: bool) -> None:
    """Right, repeatable, captured, without a wait for the device; forward and backward."""
    name, tokens = ("tiny", 6) if small else ("qwen3-30b-a3b", 96)
    for spread in ("hot",) if small else ("uniform", "zipf", "hot"):
        layer = Layer(bench, name, tokens, spread)
        push, plain = layer.push(), AllToAll(layer.E)
        with torch.no_grad():
            first = push(layer.x, layer.routing, layer.experts)
            if bench.cuda:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            again = [push(layer.x, layer.routing, layer.experts) for _ in range(5)]
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("default")
            want = oracle(layer)
            same = plain(layer.x, layer.routing, layer.experts)
            other = layer.plain(layer.x, layer.routing)
        error = ((first.float() - want).norm() / want.norm()).item()
        assert error < 8e-3 and all(torch.equal(first, y) for y in again), error
        assert ((other.float() - want).norm() / want.norm()).item() < 8e-3
        equal = torch.equal(first, same)
        with torch.no_grad():
            out = torch.empty_like(first)
            x, ids, w = layer.x.clone(), layer.routing.topk_ids.clone(), layer.routing.topk_weights.clone()
            replay = bench.captured(
                lambda: out.copy_(push(x, Routing.from_topk(w, ids, layer.E), layer.experts))  # noqa: B023
            )
            for seed in (60, 70, 80):
                new, routing = layer.batch(seed)
                x.copy_(new), ids.copy_(routing.topk_ids), w.copy_(routing.topk_weights)  # pyright: ignore
                replay()
                assert torch.equal(out, push(new, routing, layer.experts)), "a replayed graph differs"
        ours = backward(layer, lambda x, r: push(x, r, layer.experts))  # noqa: B023
        for a, b in zip(ours, backward(layer, lambda x, r: push(x, r, layer.experts)), strict=True):  # noqa: B023
            assert torch.equal(a, b), "gradients of two runs differ"
        theirs = backward(layer, lambda x, r: layer.plain(x, r))  # noqa: B023
        off = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(ours, theirs, strict=True)]
        assert max(off) < 2e-2, off
        push.synchronize()  # pyright: ignore[reportAttributeAccessIssue]
        bench.say(section="check", shape=name, tokens=tokens, spread=spread, error=f"{error:.1e}", repeats="equal",
                  graph="equal", synchronisation="none", equals_all_to_all=equal,
                  gradients_against_plain=[f"{v:.1e}" for v in off])  # fmt: skip


def wire(bench: Bench, small: bool) -> None:
    """The send alone against the copy engine, barrier included and subtracted."""
    for name, T in [("tiny", 16)] if small else [(n, t) for n in SHAPES for t in (64, 1024, 4096, 16384)]:
        layer = Layer(bench, name, T)
        channel = layer.push().channel  # pyright: ignore[reportAttributeAccessIssue]
        ids, weights = layer.routing.topk_ids, layer.routing.topk_weights
        sent = sum((ids // layer.L == p).any(1).sum().item() for p in range(bench.size) if p != bench.rank)
        size = int(sent) * layer.H * layer.x.element_size()

        def send(channel=channel, layer=layer, ids=ids, weights=weights) -> None:
            channel.open = False
            channel.send(layer.x, ids, weights)

        send(), bench.wait()
        us, barrier = bench.graph_time(send), bench.graph_time(channel.barrier)
        y = torch.zeros_like(channel.xs[-1])
        back = bench.graph_time(lambda: channel.give_back(y, channel.ids[-1]))  # noqa: B023
        rows = size // (layer.H * layer.x.element_size())
        copy = bench.graph_time(lambda: channel.backs[0][:rows].copy_(channel.xs[-1][:rows]))  # noqa: B023
        rates = {n: size / max(t, 1e-3) / 1e3 for n, t in
                 dict(send=us, send_less_barrier=us - barrier, give_back=back, copy=copy).items()}  # fmt: skip
        bench.say(section="wire", shape=name, tokens=T, megabytes=size / 1e6, send_us=us, give_back_us=back,
                  barrier_us=barrier, copy_us=copy, **{f"{n}_gbs": v for n, v in rates.items()},
                  bar="send >= 85% of copy (barrier included from 50 MB, subtracted below)",
                  share=(rates["send"] if size >= 50e6 else rates["send_less_barrier"]) / rates["copy"])  # fmt: skip
        channel.open = False


def cell(bench: Bench, section: str, name: str, T: int, spread: str, bar: str | None) -> None:
    """Forward: push, eager and captured, beside the experts alone, the plain layer and AllToAll."""
    layer, times = Layer(bench, name, T, spread), 4 if T < 1024 else 1
    push, ours, x, routing = layer.push(), AllToAll(layer.E), layer.x, layer.routing
    with torch.no_grad():
        rows, local, metadata = push.dispatch(x, routing)
        experts = bench.graph_time(lambda: layer.experts(rows, local), times)
        push.combine(layer.experts(rows, local), metadata)
        us = dict(
            experts=experts, push_graph=bench.graph_time(lambda: push(x, routing, layer.experts), times),
            push_eager=bench.time(lambda: push(x, routing, layer.experts)),
            all_to_all=bench.time(lambda: ours(x, routing, layer.experts)),
            plain=bench.time(lambda: layer.plain(x, routing)),
        )  # fmt: skip
    push.synchronize()  # pyright: ignore[reportAttributeAccessIssue]
    bench.say(section=section, shape=name, tokens=T, spread=spread, **{f"{n}_us": v for n, v in us.items()},
              over_experts_us=us["push_graph"] - us["experts"], times_experts=us["push_graph"] / us["experts"],
              speedup=us["plain"] / us["push_graph"], bar=bar)  # fmt: skip


def decode(bench: Bench, small: bool) -> None:
    for name, T in each((1, 4) if small else (1, 16, 64), small):
        for spread in ("uniform", "zipf"):
            cell(bench, "decode", name, T, spread, "push_graph <= experts + 15 us")
            bench.empty()


def forward(bench: Bench, small: bool) -> None:
    bars = {"qwen3-30b-a3b": "at 4096 push <= 1.15 x experts, plain >= 1.8 x push",
            "deepseek-v3": "at 4096 push <= 1.06 x experts, plain >= 1.3 x push"}  # fmt: skip
    for name, T in each((16,) if small else (4096, 16384), small):
        for spread in ("uniform", "zipf"):
            cell(bench, "forward", name, T, spread, bars.get(name))
            bench.empty()


def each(tokens: tuple[int, ...], small: bool) -> list[tuple[str, int]]:
    return [(name, T) for T in tokens for name in (("tiny",) if small else SHAPES)]


def train_cell(bench: Bench, name: str, T: int, spread: str) -> None:
    """Forward and backward, against the experts' own on the rows that they get."""
    layer = Layer(bench, name, T, spread)
    push, ours = layer.push(), AllToAll(layer.E)
    with torch.no_grad():
        rows, local, metadata = push.dispatch(layer.x, layer.routing)
        rows = torch.where((local.topk_ids >= 0).any(1, keepdim=True), rows, 0)
        ids, w = local.topk_ids.clone(), local.topk_weights.clone()  # pyright: ignore[reportOptionalMemberAccess]
        push.combine(rows, metadata)
    grad = torch.randn_like(rows)

    def alone() -> None:
        leaves = [t.detach().requires_grad_() for t in (rows, w, layer.up, layer.down)]
        r = Routing.from_topk(leaves[1], ids, layer.L)
        fused_experts(leaves[0], leaves[2], leaves[3], r).backward(grad)

    us, peaks = {}, {}
    for kind, call in dict(
        experts=alone,
        push=lambda: backward(layer, lambda x, r: push(x, r, layer.experts)),
        all_to_all=lambda: backward(layer, lambda x, r: ours(x, r, layer.experts)),
        plain=lambda: backward(layer, layer.plain),
    ).items():
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        us[kind] = bench.time(call, 12)
        peaks[kind] = torch.cuda.max_memory_allocated() / 2**30 if bench.cuda else 0.0
    push.synchronize()  # pyright: ignore[reportAttributeAccessIssue]
    bench.say(section="train", shape=name, tokens=T, spread=spread, **{f"{n}_us": v for n, v in us.items()},
              times_experts=us["push"] / us["experts"], speedup=us["plain"] / us["push"],
              **{f"{n}_peak_gib": v for n, v in peaks.items()}, bar="push <= 1.2 x experts at 4096")  # fmt: skip


def train(bench: Bench, small: bool) -> None:
    for name, T in each((16,) if small else (4096, 16384), small):
        if (name, T) == ("deepseek-v3", 16384):  # its gradients and rows leave no room
            continue
        for spread in ("uniform", "zipf"):
            train_cell(bench, name, T, spread)
            bench.empty()


def peers(bench: Bench, small: bool) -> None:
    """Hugging Face's all-to-all around the same experts, where transformers has it."""
    try:
        from transformers.distributed.expert_parallel import AllToAllEP
    except ImportError as error:
        bench.say(section="peers", peer="transformers AllToAllEP", missing=str(error)[:200])
        return
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cuda" if bench.cuda else "cpu", (bench.size, 1), mesh_dim_names=("ep", "tp"))
    for name, T in [("tiny", 16)] if small else [("qwen3-30b-a3b", 64), ("qwen3-30b-a3b", 4096), ("deepseek-v3", 4096)]:
        layer = Layer(bench, name, T)

        class Module(torch.nn.Module):
            num_experts = layer.L

            def forward(self, x, ids, weights, layer=layer):
                return layer.experts(x, Routing.from_topk(weights, ids.int(), layer.L))

        theirs = AllToAllEP(Module(), mesh["ep"], mesh["tp"])
        ids, weights = layer.routing.topk_ids.long(), layer.routing.topk_weights
        with torch.no_grad():
            us = bench.time(lambda: theirs(layer.x, ids, weights))  # noqa: B023
            push = layer.push()
            ours = bench.graph_time(lambda: push(layer.x, layer.routing, layer.experts))  # noqa: B023
        bench.say(section="peers", peer="transformers AllToAllEP", shape=name, tokens=T, peer_us=us, push_graph_us=ours)


# ---------------------------------------------------------------- driver
def drive(args: argparse.Namespace) -> int:
    """Every section in processes of its own, so that one that fails or is slow does not cost the others."""
    ranks = args.ranks or max(torch.cuda.device_count(), 1)
    failed = 0
    for section in args.sections.split(","):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port",
                   str(29400 + SECTIONS.index(section)), __file__, "--section", section,
                   *(["--out", str(args.out)] if args.out else [])]  # fmt: skip
        start = time.monotonic()
        try:
            code = subprocess.run(command, timeout=args.limit).returncode
        except subprocess.TimeoutExpired:
            code = -1
        failed += code != 0
        print(json.dumps(dict(section=section, seconds=round(time.monotonic() - start), exit=code)), flush=True)
    return int(failed > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", choices=SECTIONS, help="one section, under torchrun")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--limit", type=float, default=150, help="seconds of a section")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(drive(args))
    bench = Bench(args.out, args.device)
    if args.section == "check" and bench.cuda:
        bench.say(torch=torch.__version__, device=torch.cuda.get_device_name(), ranks=bench.size)
    globals()[args.section](bench, args.small)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
