"""What tiles.py has to try: the ways to make a layer's products, and their kernels compiled ahead in many processes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from tile_table import ROLES, product_of

from moesaic.activations import ACTIVATIONS
from moesaic.bench.layer import weight_bytes
from moesaic.cases import CASES, Case
from moesaic.ops.grouped_matmul import _triton as products
from moesaic.ops.grouped_matmul._configs import SORTED, TILES, estimates
from moesaic.ops.permute._triton import spread
from moesaic.problem import Problem

DEVICE = torch.device("cuda", 0)
PLAIN = "plain32"  # whose bits the others must have
NEAR = 1.2  # times the model's best: ways that it puts behind this are not tried
Job = tuple[str, int, str, str]  # shape, tokens, role, way


def problem_of(case: Case, tokens: int) -> Problem:
    return case.problem(tokens, torch.bfloat16, "cuda", "sm_90")


def planned(case: Case, tokens: int, role: str, way: str) -> products.Gemm:
    """A product as `fused_experts` plans it, with the tile of a way."""
    p, act, up = problem_of(case, tokens), ACTIVATIONS[case.activation], role == "up"
    gathers, (N, K) = up and not way.startswith(SORTED), (p.intermediate_size, p.hidden_size)[:: 1 if up else -1]
    width = act.width(N) if up else N
    strides = (K, width * K, *((width, 1) if case.transposed else (K, 1)))
    return products.plan(
        p, TILES[way.removeprefix(SORTED)], p.num_slots, tokens if gathers else p.num_slots, N, K, case.transposed,
        strides, True, DEVICE.index, case.top_k if gathers else 0, case.bias,
        (case.activation, act.alpha, act.limit) if up else None,
    )  # fmt: skip


def ways(case: Case, tokens: int, role: str) -> list[str]:
    """The ways to make a product that are worth a try."""
    p, product = problem_of(case, tokens), product_of(case, tokens, role)
    times, rows = estimates(product), product.rows_per_expert
    for way in list(times):
        sorts, gated, tile = way.startswith(SORTED), role == "up" and case.gated, TILES[way.removeprefix(SORTED)]
        swaps = products.swaps(p, K=product.depth, gathered=role == "up" and not sorts, gated=gated)
        grouped = rows > tile.group_m * tile.block_m or tile.group_m == products.Config.group_m
        if (tile.kernel == "swapped" and not swaps) or (sorts and rows < 64) or tile.block_m > 64 * rows or not grouped:
            del times[way]
    return [way for way, us in times.items() if us <= NEAR * min(times.values())]


def batches(case: Case, tokens: Iterable[int]) -> list[int]:
    """Those numbers of tokens that the table tells apart, and that fit a GPU with every way's result."""
    out: dict[int, int] = {}
    for T in tokens:
        results = 32 * T * case.top_k * max(case.hidden_size, case.intermediate_size)
        octave = product_of(case, T, "up").octave
        if 0 < octave <= 8192 and weight_bytes(case, torch.bfloat16) + results < 100 << 30:
            out.setdefault(octave, T)
    return list(out.values())


# ---------------------------------------------------------------- compiling ahead
class Ahead:
    """Stands in for a launch's kernel, and compiles what that would run."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)


def compile_ahead(shape: str, tokens: int, role: str, way: str) -> None:
    """Fill Triton's cache with what a way needs. A kernel depends on no tensor's size, so these have next to none."""
    torch.set_num_threads(1)
    case, sorts = CASES[shape], way.startswith(SORTED)
    gemm = planned(case, tokens, role, way)
    half, index = (torch.zeros(case.num_experts + 1, dtype=d, device=DEVICE) for d in (torch.bfloat16, torch.int32))
    launch = copy.copy(gemm.launch)
    launch.kernel, launch._entries = Ahead(launch.kernel), {}
    gather, bias = index if role == "up" and not sorts else None, half if case.bias else None
    pointers = (half, gather, half, bias, half, None, index)
    launch(pointers if gemm.ups is None else (*pointers, None), gemm.numbers)
    if gemm.tiles is not None:
        products.TileTable(index, 1).of(*gemm.tiles)
    if sorts:
        spread(half.new_zeros(1, case.hidden_size), index.new_zeros(case.top_k), case.top_k)
    torch.cuda.synchronize()


def jobs(shapes: Sequence[str], tokens: Sequence[int]) -> list[Job]:
    """Every kernel once, what takes longest to compile first."""
    out: dict[tuple, Job] = {}
    for shape in shapes:
        for T in batches(CASES[shape], tokens):
            for role in ROLES:
                for way in (PLAIN, *ways(CASES[shape], T, role)):
                    gemm = planned(CASES[shape], T, role, way)
                    out.setdefault((shape, role, gemm.launch.constants, gemm.tiles), (shape, T, role, way))
    order = ("swapped", "persistent", "plain")
    return sorted(out.values(), key=lambda job: order.index(TILES[job[3].removeprefix(SORTED)].kernel))


def compile_all(todo: Sequence[Job], processes: int) -> None:
    """What fails here is tried again, and recorded, where it is to be timed."""
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures: dict[Future, Job] = {pool.submit(compile_ahead, *job): job for job in todo}
        for future in as_completed(futures):
            if error := future.exception():
                print(*futures[future], f"{type(error).__name__}: {error}", flush=True)
    print(f"compiled {len(todo)} kernels in {time.perf_counter() - start:.0f} s", flush=True)
