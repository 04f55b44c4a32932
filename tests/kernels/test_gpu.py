"""What only a GPU shows: no host synchronisation, CUDA graphs, fullgraph compilation, long offsets, real shapes."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from moesaic import Routing, fused_experts, grouped_matmul, launcher, permute, route, unpermute
from moesaic.bench import timing
from moesaic.cases import CASES
from moesaic.testing import STAGES, assert_close, make_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def layer(inputs, logits):
    routing = route(logits, top_k=inputs.case.top_k, implementation="triton")
    return fused_experts(**{**inputs.arguments(), "routing": routing}, implementation="triton")


@pytest.fixture
def olmoe():
    inputs = make_inputs(CASES["olmoe"].small(256, 128, 16), 64, torch.bfloat16, "cuda")
    return inputs, torch.randn(64, 16, device="cuda")


def test_no_host_synchronisation(olmoe):
    inputs, logits = olmoe
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.w_gate_up, inputs.w_down, logits)]
    torch.autograd.grad(layer(inputs, logits).sum(), leaves)  # compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(layer(inputs, logits).sum(), leaves)
        rows = permute(inputs.x.detach(), inputs.routing)
        unpermute(grouped_matmul(rows, inputs.w_gate_up.detach(), inputs.routing), inputs.routing)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["olmoe", "gpt-oss-120b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_batch_invariance(name, dtype):
    """A token's output has the same bits alone, in any part of a batch and in the whole one."""
    case = replace(CASES[name], num_experts=16)
    inputs = make_inputs(case, 3000, dtype, "cuda")
    chosen = route(torch.randn(3000, 16, device="cuda"), top_k=case.top_k, implementation="triton")

    def run(tokens):
        routing = Routing.from_topk(chosen.topk_weights[tokens], chosen.topk_ids[tokens], 16)
        arguments = {**inputs.arguments(), "x": inputs.x[tokens], "routing": routing}
        return fused_experts(**arguments, batch_invariant=True)

    with torch.no_grad():
        whole = run(slice(None))
        for part in (slice(0, 1), slice(7, 8), slice(5, 25), slice(100, 164), slice(1000, 1500), slice(0, 2999)):
            assert torch.equal(run(part), whole[part]), part


def test_cuda_graph(olmoe):
    """Captured once, replayed on other tokens and another routing."""
    inputs, logits = olmoe
    with torch.no_grad():
        layer(inputs, logits)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(inputs, logits)
        logits.copy_(torch.randn_like(logits))
        inputs.x.copy_(torch.randn_like(inputs.x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(inputs, logits))


@pytest.mark.parametrize("tokens", [1, 16, 300, 3000])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_overlapping_launches(tokens, captured):
    """Layers in a row, each on the result of the one before it, among copies, fills and others' kernels: the bits that
    launches give which wait for each other."""
    inputs = make_inputs(CASES["olmoe"].small(512, 256, 16), tokens, torch.bfloat16, "cuda")
    gate = torch.randn(512, 16, device="cuda", dtype=torch.bfloat16)
    x, copy = torch.empty_like(inputs.x), torch.empty_like(inputs.x)

    def chain():
        x.copy_(inputs.x)
        for _ in range(40):
            routing = route(x @ gate, top_k=8, implementation="triton")
            y = fused_experts(**{**inputs.arguments(), "x": x, "routing": routing}, implementation="triton")
            copy.copy_(y)
            x.zero_()
            x.add_(torch.nn.functional.layer_norm(copy, (512,)))
        return x.clone()

    def run(overlap: bool):
        with launcher.overlap(overlap):
            chain()  # compiled
            if not captured:
                return [chain() for _ in range(5)]
            torch.cuda.synchronize()
            graph, out = torch.cuda.CUDAGraph(), []
            with torch.cuda.graph(graph):
                y = chain()
        for _ in range(5):
            graph.replay()
            out.append(y.clone())
        return out

    with torch.no_grad():
        want, *others = run(False)
        assert want.isfinite().all() and want.std() > 0.1
        for y in (*others, *run(True)):
            assert torch.equal(y, want)


def test_compile_fullgraph(olmoe):
    inputs, logits = olmoe
    compiled = torch.compile(layer, fullgraph=True)
    logits.requires_grad_()
    inputs.w_gate_up.requires_grad_()
    leaves = (logits, inputs.w_gate_up)
    results = []
    for f in (compiled, layer):
        y = f(inputs, logits)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "olmoe", "gpt-oss-120b"])
@pytest.mark.parametrize(("tokens", "distribution"), [(1, "uniform"), (16, "decode"), (500, "zipf"), (2000, "hot")])
def test_real_shapes(name, tokens, distribution):
    case = CASES[name]
    inputs = make_inputs(case, tokens, torch.bfloat16, "cuda", distribution)
    y = fused_experts(**inputs.arguments(), implementation="triton")
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.arguments().items()}
    oracle = fused_experts(**wide, implementation="torch")
    assert_close(y, oracle, case.hidden_size, STAGES["fused_experts"])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_views_that_begin_between_16_bytes(implementation):
    """Weights and tokens two bytes off: the same numbers, and no error from a library that wants them aligned."""
    inputs = make_inputs(CASES["olmoe"].small(256, 128, 32), 64, torch.bfloat16, "cuda")
    args = inputs.arguments()
    want = fused_experts(**args, implementation=implementation)
    for name in ("x", "w_gate_up", "w_down"):
        memory = torch.empty(args[name].numel() + 1, dtype=torch.bfloat16, device="cuda")
        moved = memory[1:].view(args[name].shape).copy_(args[name])
        assert moved.data_ptr() % 16
        got = fused_experts(**{**args, name: moved}, implementation=implementation)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_offsets_past_two_to_the_31():
    """More than 2^31 elements in rows, in weights and in a gathered operand; the last of each is checked."""
    H, I, E, T = 4096, 512, 600, 300_000
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    w_gate_up = torch.randn(E, 2 * I, H, device="cuda", dtype=torch.bfloat16) * H**-0.5
    w_down = torch.randn(E, H, I, device="cuda", dtype=torch.bfloat16) * I**-0.5
    ids = torch.randint(0, E, (T, 2), device="cuda")
    ids[-8:] = torch.tensor([E - 1, E - 2], device="cuda")
    assert w_gate_up.numel() > 2**30 and T * 2 * H > 2**31
    weights = torch.rand(T, 2, device="cuda")
    y = fused_experts(x, w_gate_up, w_down, Routing.from_topk(weights, ids, E), implementation="triton")
    tail = slice(T - 8, T)
    few = Routing.from_topk(weights[tail], ids[tail], E)
    oracle = fused_experts(x[tail].float(), w_gate_up.float(), w_down.float(), few, implementation="torch")
    assert_close(y[tail], oracle, H, STAGES["fused_experts"])


def test_host_time():
    """A call costs the host little: under 60 µs, or on a slower host what a dozen of torch's own products cost it."""
    inputs = make_inputs(CASES["olmoe"].small(256, 128, 16), 4, torch.bfloat16, "cuda")
    args = inputs.arguments()

    def host(call) -> float:
        for _ in range(20):
            call()
        best = float("inf")
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                call()
            best = min(best, (time.perf_counter() - start) / 20)
        return best * 1e6

    with torch.no_grad():
        ours = host(lambda: fused_experts(**args, implementation="triton"))
        theirs = host(lambda: torch.mm(inputs.x, inputs.w_gate_up[0].mT))
    assert ours < max(60, 12 * theirs), f"{ours:.1f} µs; torch.mm {theirs:.1f} µs"


@pytest.mark.parametrize("clocks", timing.PROTOCOLS)
@pytest.mark.parametrize("graphs", [frozenset(), frozenset({"both"})], ids=["event", "graph"])
def test_bench_times_a_call_under_each_protocol(clocks, graphs):
    """Pauses and the untimed half are in no sample: 32 MiB read and written twice take far less than a millisecond."""
    x = torch.zeros(8 << 20, device="cuda")
    sample = timing.interleave(
        {"both": lambda i: x.add_(1).mul_(0.5)}, 2, x.device, 0.0, 3, graphs=graphs, clocks=clocks
    )["both"]
    assert sample.mode == ("graph" if graphs else "event") and len(sample.seconds) == 3
    assert all(1e-6 < s < 1e-3 for s in sample.seconds)


def test_launches_are_counted_also_behind_a_pause():
    x = torch.zeros(1 << 20, device="cuda")
    for _ in range(3):
        assert timing.launches(lambda i: x.add_(1).mul_(2), x.device) == 2
        time.sleep(0.2)
