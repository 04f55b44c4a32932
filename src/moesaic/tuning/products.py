"""What tuning times: a product alone, and a layer whose products are made as told."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, apply
from ..cases import Case
from ..hardware import Gpu
from ..routing import Routing
from ..testing import failure

NEAR, TRIED = 1.12, 5  # how near to the fastest alone, and how many, ways are tried within a layer


def products_of(case: Case, gpu: Gpu) -> list[tuple[Any, bool]]:
    """Both products of a layer in bf16, and whether gathered rows may be sorted first."""
    layer = importlib.import_module("moesaic.ops.fused_experts")
    experts = importlib.import_module("moesaic.ops.fused_experts._triton")
    problem = layer.FusedExpertsProblem(gpu=gpu, **case.problem(64, torch.bfloat16, "cuda"))
    return list(zip(experts._contiguous(problem), (True, False), strict=True))


class Operands:
    """The operands of one product in even routing, and what it should give."""

    batches = 4  # routings in turn: with few tokens each reads other experts, as layer after layer does

    def __init__(self, spec: Any, tokens: int, top_k: int, device: torch.device, blank: bool = False):
        self.spec, E = spec, spec.experts
        g = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            if blank:
                return torch.empty(shape, dtype=spec.dtype, device=device)
            return torch.randn(shape, generator=g, device=device, dtype=spec.dtype)

        ids = [torch.rand(tokens, E, generator=g, device=device).topk(top_k, -1).indices for _ in range(self.batches)]
        self.routings = [Routing.from_topk(None, i, E) for i in ids]
        self.x = draw(tokens if spec.top_k else tokens * top_k, spec.K)
        w = draw(*((E, spec.K, spec.width) if spec.input_major else (E, spec.width, spec.K)))
        self.w = w.mT if spec.input_major else w
        if not blank:
            w.mul_(spec.K**-0.5)
        self.bias = draw(E, spec.width) if spec.epilogue.bias else None
        self.want: Tensor | None = None

    def call(self, choice: Any) -> Callable[..., Tensor]:
        schedule = importlib.import_module("moesaic.ops.grouped_matmul.gpu.schedule")
        moving = importlib.import_module("moesaic.ops.permute._triton")
        products = importlib.import_module("moesaic.ops.grouped_matmul.gpu")
        gemm, top_k = products.make(self.spec.any_rows, choice), self.spec.top_k

        def run(n: int = 0) -> Tensor:
            r = self.routings[n]
            table = schedule.TileTable(r.expert_offsets, r.row_order.shape[0])
            x = moving.spread(self.x, r.row_index, top_k) if choice.sorts else self.x
            return gemm(x, self.w, table, r.row_order if gemm.spec.top_k else None, self.bias)

        return run

    def wrong(self, out: Tensor) -> str | None:
        """Against the first expert with rows, in fp64: tiles differ in where experts end, not in what they add."""
        ends = self.routings[0].expert_offsets.tolist()
        e = next(e for e in range(self.spec.experts) if ends[e + 1] > ends[e])
        some = slice(ends[e], min(ends[e + 1], ends[e] + 512))
        if self.want is None:
            self.want = self._oracle(e, some)
        return failure(out[some], self.want, self.spec.K, 2)

    def _oracle(self, e: int, some: slice) -> Tensor:
        rows = self.routings[0].row_order[some].long() // self.spec.top_k if self.spec.top_k else some
        h = self.x[rows].double() @ self.w[e].double().T
        h = h if self.bias is None else h + self.bias[e].double()
        epilogue = self.spec.epilogue
        if not epilogue.activation:
            return h
        act = ACTIVATIONS[epilogue.activation].with_constants(epilogue.alpha, epilogue.limit)
        return apply(act, h, epilogue.interleaved)


def microseconds(run: Callable[..., Tensor], batches: int, repeats: int = 7) -> float:
    """Median on the device's clock, of replays of a graph that runs each batch once, or often where that is short."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        begin.record()
        run()
        end.record()
    end.synchronize()
    calls = batches * max(1, min(8, round(0.3 / batches / begin.elapsed_time(end))))
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=stream):
        for n in range(calls):
            run(n % batches)
    for _ in range(repeats + 1):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return sorted(times[1:])[repeats // 2]


class LayerOperands:
    """A layer in even routing, from ids to output, whose products are made as told."""

    clock = staticmethod(microseconds)

    def __init__(self, case: Case, gpu: Gpu, device: torch.device):
        self.case, self.gpu, self.device = case, gpu, device
        self.g = torch.Generator(device).manual_seed(0)
        E, H, I = case.num_experts, case.hidden_size, case.intermediate_size
        N = ACTIVATIONS[case.activation].width(I)
        shapes = ((E, H, N), (E, I, H)) if case.transposed else ((E, N, H), (E, H, I))
        self.weights = [self._draw(*shape) for shape in shapes]
        self.biases = [self._draw(E, N), self._draw(E, H)] if case.bias else [None, None]

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g, device=self.device, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)

    def judge(self, octave: int, ups: list[dict[str, Any]], downs: list[dict[str, Any]]) -> None:
        """Give the fastest ways `in_layer`: their own µs and what the layer takes beyond the fastest layer with them.

        First the down products behind the fastest up product, then the up products before the best of those; and both
        by the kernel that needs no tile table, since only together they spare it.
        """
        if not ups or not downs:
            return
        near = [sorted(ways, key=lambda way: way["us"])[:TRIED] for ways in (ups, downs)]
        near = [[way for way in ways if way["us"] <= NEAR * ways[0]["us"] + 5] for ways in near]
        tokens = max(1, octave * self.case.num_experts // self.case.top_k)
        run = self._layer(tokens)
        times = {n: run(near[0][0], way) for n, way in enumerate(near[1])}
        best = min(times, key=times.__getitem__)
        _spread(near[1], times)
        _spread(near[0], {n: times[best] if n == 0 else run(way, near[1][best]) for n, way in enumerate(near[0])})
        bare = [[way for way in ways if way["way"][0] == "pointer"] for ways in (ups, downs)]
        if all(bare):
            up, down = (min(ways, key=lambda way: way["us"]) for ways in bare)
            if (gain := times[best] - run(up, down)) > 0:
                for way, ways in ((up, near[0]), (down, near[1])):
                    way["in_layer"] = min(other["in_layer"] for other in ways) - gain / 2

    def _layer(self, tokens: int) -> Callable[..., float]:
        products = importlib.import_module("moesaic.ops.grouped_matmul.gpu")
        experts = importlib.import_module("moesaic.ops.fused_experts._triton")
        layer = importlib.import_module("moesaic.ops.fused_experts")
        case, E = self.case, self.case.num_experts
        problem = layer.FusedExpertsProblem(gpu=self.gpu, **case.problem(tokens, torch.bfloat16, "cuda"))
        specs = [spec for spec, _ in products_of(case, self.gpu)]
        x = self._draw(tokens, case.hidden_size)
        scores = [torch.rand(tokens, E, generator=self.g, device=self.device) for _ in range(Operands.batches)]
        chosen = [s.topk(case.top_k, -1) for s in scores]

        def time(up: dict[str, Any], down: dict[str, Any]) -> float:
            ways = [products.choice_of(way["way"]) for way in (up, down)]
            fixed = [_Fixed(products.make(spec.any_rows, way)) for spec, way in zip(specs, ways, strict=True)]

            def run(n: int = 0) -> Tensor:
                r = Routing.from_topk(chosen[n].values, chosen[n].indices, E)
                o = layer.Operands(
                    x, *self.weights, r.topk_weights, *self.biases, None, r.row_order, r.row_index, r.expert_offsets
                )
                return experts.run(o, problem, (*fixed, False))[0][0]

            return self.clock(run, Operands.batches, repeats=5)

        return time


class _Fixed:
    """What stands for `Choices` where the choice is made."""

    def __init__(self, gemm: Any):
        self._gemm = gemm

    def gemm(self, rows: int) -> Any:
        return self._gemm


def _spread(ways: list[dict[str, Any]], times: dict[int, float]) -> None:
    """From layers' times to one for each way: the fastest way's own, and what the layer takes beyond the fastest."""
    own, least = min(way["us"] for way in ways), min(times.values())
    for n, way in enumerate(ways):
        way["in_layer"] = round(own + times[n] - least, 2)
