"""This tree beside an older commit, in one process on one GPU: what became slower?

python benchmarks/against.py pack COMMIT out/old.tar.gz
python benchmarks/against.py run --old out/old.tar.gz --suite forward,router [--json FILE] [--cases a,b] [--tokens 1,64]

`pack` keeps the older package in a file, which may go where there is no git; `run` unpacks it as `moesaic_old`, with
every mention of `moesaic` in it renamed, so that both packages have their own operators. Suites:

forward     from ids to output, bf16: every layer, from 1 to 32768 tokens; CUDA graphs up to 1024 tokens, else calls
router      logits to index tables, and with backward behind it, of two routers; CUDA graphs
backward    forward and backward of six layers in training
host        what one call with one token costs the host
newT        how many kernels all numbers of tokens up to 2048 need, compiled into an empty cache (minutes a layer); and
            what the first call with another number of tokens costs the host, where hardly a kernel is new

Medians, old and new in turns (`moesaic.bench.timing`). A cell whose ratio new / old is above 1.02 is measured five
times more, and fails if the median of these ratios is too; then the exit code is 1. --workers N compiles in N processes
before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from moesaic.bench import report
from moesaic.bench.layer import Layer, case_named, weight_bytes
from moesaic.bench.timing import GRAPH_TOKENS, interleave
from moesaic.cases import CASES

SLOWER, RERUNS = 1.02, 5
GIB = 1 << 30
WEIGHTS = 30 * GIB  # at most; a larger layer gets fewer experts
BF16, K = torch.bfloat16, 8
ROUTERS = {
    "softmax": (128, {}),
    "grouped": (256, dict(score="sigmoid", norm_eps=1e-20, scale=2.5, num_groups=8, topk_groups=4)),
}
TOKENS = {
    "forward": (1, 4, 16, 64, 256, 1024, 4096, 16384, 32768),
    "router": (1, 64, 4096, 32768),
    "backward": (4096, 16384),
}
GROUPS = {
    "forward": tuple(CASES),
    "router": tuple(ROUTERS),
    "backward": ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-next-80b", "gpt-oss-120b", "olmoe", "glm-4.5"),
    "host": ("olmoe-small", "olmoe"),
    "newT": ("olmoe-small", "olmoe"),
}
DEVICE = torch.device("cuda")
Sides = dict[str, ModuleType]


# ---------------------------------------------------------------- the older package
def pack(commit: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).parents[1]
    subprocess.run(
        ["git", "-C", root, "archive", "--format=tar.gz", "-o", path.resolve(), commit, "src/moesaic"], check=True
    )


def unpack(archive: Path, folder: str) -> None:
    """Lay `moesaic_old` in a folder."""
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    package = Path(folder, "src", "moesaic").rename(Path(folder, "moesaic_old"))
    for file in package.rglob("*.py"):
        file.write_text(re.sub(r"\bmoesaic\b", "moesaic_old", file.read_text()))


def sides(folder: str) -> Sides:
    """Both packages, imported."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return {"old": importlib.import_module("moesaic_old"), "new": importlib.import_module("moesaic")}


# ---------------------------------------------------------------- what is called
@dataclass
class Cell:
    """Two calls of the same, by side."""

    column: str
    calls: dict[str, Callable[[int], object]]
    batches: int
    graph: bool = False

    def warm(self) -> None:
        for call in self.calls.values():
            for i in range(self.batches):
                call(i)

    def measure(self, rounds: int) -> dict[str, float]:
        """Median µs by side."""
        graphs = frozenset(self.calls if self.graph else ())
        samples = interleave(self.calls, self.batches, DEVICE, 0.0, rounds, rounds, graphs)
        return {side: sample.median * 1e6 for side, sample in samples.items()}


class HostCell(Cell):
    """Calls of which only the host's time counts: the device is waited for between bouts of fifty."""

    def measure(self, rounds: int) -> dict[str, float]:
        spent: dict[str, list[float]] = {side: [] for side in self.calls}
        for turn in range(2 * rounds):
            for side in list(self.calls)[:: 1 if turn % 2 else -1]:
                synchronize()
                for _ in range(50):
                    spent[side].append(seconds(self.calls[side]))
        synchronize()
        return {side: statistics.median(times) * 1e6 for side, times in spent.items()}


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[int], object]) -> float:
    begins = time.perf_counter()
    call(0)
    return time.perf_counter() - begins


def layer_of(name: str, train: bool = False) -> Layer:
    case = case_named(name)
    fits = WEIGHTS // (weight_bytes(case, BF16) // case.num_experts)
    return Layer.make(replace(case, num_experts=min(case.num_experts, fits)), BF16, DEVICE, train)


def experts(side: ModuleType, layer: Layer, x, routing) -> torch.Tensor:
    case = layer.case
    return side.fused_experts(
        x, layer.w_gate_up, layer.w_down, routing, activation=case.activation, layout=case.layout,
        transposed=case.transposed, b_gate_up=layer.b_gate_up, b_down=layer.b_down,
    )  # fmt: skip


def from_ids(side: ModuleType, layer: Layer, batch) -> torch.Tensor:
    routing = side.Routing.from_topk(batch.weights, batch.ids, layer.case.num_experts)
    return experts(side, layer, batch.x, routing)


def forward_cells(name: str, both: Sides, tokens) -> Iterator[Cell]:
    layer = layer_of(name)
    for T in tokens:
        batches = layer.batches(T)
        calls = {s: lambda i, m=m, b=batches: from_ids(m, layer, b[i]) for s, m in both.items()}
        yield Cell(f"{T}", calls, len(batches), T <= GRAPH_TOKENS)


def backward_cells(name: str, both: Sides, tokens) -> Iterator[Cell]:
    layer = layer_of(name, train=True)
    weights = [t for t in (layer.w_gate_up, layer.w_down, layer.b_gate_up, layer.b_down) if t is not None]

    def call(side: ModuleType, batch):
        with torch.enable_grad():
            return torch.autograd.grad(from_ids(side, layer, batch), (batch.x, batch.weights, *weights), batch.grad)

    for T in tokens:
        batches = layer.batches(T)
        yield Cell(f"{T}", {s: lambda i, m=m, b=batches: call(m, b[i]) for s, m in both.items()}, len(batches))


def router_cells(name: str, both: Sides, tokens) -> Iterator[Cell]:
    E, fields = ROUTERS[name]
    bias, g = torch.zeros(E, device=DEVICE) if name == "grouped" else None, torch.Generator().manual_seed(0)
    configs = {s: m.RouterConfig(K, **fields) for s, m in both.items()}

    def back(side: str, x, grad):
        with torch.enable_grad():
            return torch.autograd.grad(both[side].route(x, configs[side], bias=bias).topk_weights, x, grad)

    for T in tokens:
        logits = [torch.randn(T, E, generator=g).to(DEVICE) for _ in range(2)]
        learnt, grad = [x.clone().requires_grad_() for x in logits], torch.randn(T, K, generator=g).to(DEVICE)
        forward = {s: lambda i, s=s, x=logits: both[s].route(x[i], configs[s], bias=bias) for s in both}
        yield Cell(f"{T}", forward, 2, graph=True)
        backward = {s: lambda i, s=s, x=learnt, grad=grad: back(s, x[i], grad) for s in both}
        yield Cell(f"{T} with backward", backward, 2, graph=True)


def host_cells(name: str, both: Sides, tokens) -> Iterator[Cell]:
    layer = layer_of(name)
    batch, E = layer.batches(1)[0], layer.case.num_experts
    routings = {s: m.Routing.from_topk(batch.weights, batch.ids, E) for s, m in both.items()}
    yield HostCell("fused_experts", {s: lambda i, s=s, m=m: experts(m, layer, batch.x, routings[s])
                                     for s, m in both.items()}, 1)  # fmt: skip
    yield HostCell("from ids", {s: lambda i, m=m: from_ids(m, layer, batch) for s, m in both.items()}, 1)
    yield HostCell("route", {s: lambda i, m=m: m.route(batch.logits, top_k=K) for s, m in both.items()}, 1)
    if not importlib.util.find_spec("transformers"):
        return
    theirs: Any = importlib.import_module("transformers.integrations.moe")
    silu = importlib.import_module("transformers.activations").ACT2FN["silu"]
    # a module of experts as transformers' decorator leaves one
    body = dict(_apply_gate=theirs._default_apply_gate, act_fn=silu, gate_up_proj=layer.w_gate_up,
                down_proj=layer.w_down, num_experts=E, has_gate=True, is_concatenated=True, is_transposed=False,
                has_bias=False)  # fmt: skip
    module = type("Experts", (), body)()
    forwards = {
        s: importlib.import_module(f"{m.__name__}.integrations.transformers").experts_forward for s, m in both.items()
    }
    yield HostCell("experts_forward", {
        s: lambda i, f=f: f(module, batch.x, batch.ids_long, batch.weights_low) for s, f in forwards.items()
    }, 1)  # fmt: skip


CELLS = {"forward": forward_cells, "router": router_cells, "backward": backward_cells, "host": host_cells}


# ---------------------------------------------------------------- numbers of tokens never seen
def any_tokens(name: str, most: int) -> Callable[[ModuleType, int], Callable[[int], object]]:
    """A layer's call by side and number of tokens, of which `most` are made."""
    layer = layer_of(name)
    whole = layer._batch(most, "uniform", 0)

    def make(side: ModuleType, T: int):
        batch = replace(whole, x=whole.x[:T], ids=whole.ids[:T], weights=whole.weights[:T])
        return lambda i: from_ids(side, layer, batch)

    return make


def new_tokens(name: str, both: Sides, most: int) -> dict[str, float]:
    """Host µs of a first call with odd numbers of tokens above most / 2 when the even ones were seen, and of a second
    call. `worst` may have met a new kernel."""
    make = any_tokens(name, most)
    odd = list(range(most // 2 + 1, most, 2))
    random.Random(0).shuffle(odd)
    first: dict[str, list[float]] = {s: [] for s in both}
    known: dict[str, list[float]] = {s: [] for s in both}
    for side in both.values():
        for T in range(most // 2 // 2 * 2, most + 1, 2):
            make(side, T)(0)
    for turn, T in enumerate(odd):
        for s in list(both)[:: 1 if turn % 2 else -1]:
            call = make(both[s], T)
            for where in (first, known):
                synchronize()
                where[s].append(seconds(call) * 1e6)
    out = {f"{s}_first_us": round(statistics.median(first[s]), 1) for s in both}
    out |= {f"{s}_first_worst_us": round(max(first[s]), 1) for s in both}
    return out | {f"{s}_known_us": round(statistics.median(known[s]), 1) for s in both}


def count(name: str, side: ModuleType, most: int) -> None:
    """Print how many kernels of each name all numbers of tokens compile, in a process whose cache was empty."""
    make = any_tokens(name, most)
    for T in range(1, most + 1):
        make(side, T)(0)
    synchronize()
    compiled = Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")
    print(json.dumps(Counter(file.stem for file in compiled)))


def kernels(name: str, folder: str, most: int) -> dict[str, dict[str, int]]:
    """`count` of either side, each in its process; this one goes on with what they compiled."""
    started, caches = {}, {side: tempfile.mkdtemp(dir=folder) for side in ("old", "new", "both")}
    for side in ("old", "new"):
        command = [sys.executable, __file__, "count", folder, side, name, str(most), DEVICE.type]
        environment = os.environ | {"TRITON_CACHE_DIR": caches[side]}
        started[side] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    out = {f"{side}_kernels": json.loads(child.communicate()[0]) for side, child in started.items()}
    for side in started:
        shutil.copytree(caches[side], caches["both"], dirs_exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = caches["both"]
    return out


# ---------------------------------------------------------------- run
def warm(suite: str, name: str, folder: str, tokens, device: str) -> None:
    """What a process does that only compiles."""
    global DEVICE
    DEVICE, both = torch.device(device), sides(folder)
    with torch.no_grad():
        for cell in CELLS[suite](name, both, tokens):
            cell.warm()
    del cell
    empty()


def empty() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def compile_all(suite: str, names, folder: str, tokens, workers: int) -> None:
    """Fill Triton's cache in several processes, as many at a time as the device's memory holds."""

    def need(name: str) -> int:
        if suite == "router":
            return GIB
        case, times = case_named(name), 2 if suite == "backward" else 1
        rows = max(tokens, default=1) * case.top_k * (case.hidden_size + 3 * case.intermediate_size)
        return times * (min(weight_bytes(case, BF16), WEIGHTS) + 3 * rows * BF16.itemsize) + 2 * GIB

    room = torch.cuda.mem_get_info()[0] - workers * GIB if DEVICE.type == "cuda" else float("inf")
    waiting, running = sorted(names, key=need, reverse=True), {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            for name in list(waiting):
                fits = need(name) + sum(map(need, running.values())) <= room
                if not running or (fits and len(running) < workers):
                    running[pool.submit(warm, suite, name, folder, tokens, DEVICE.type)] = name
                    waiting.remove(name)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                print(f"compiled: {suite} {running.pop(done)}", flush=True)
                done.result()


def judge(cell: Cell, rounds: int) -> dict[str, Any]:
    us = cell.measure(rounds)
    row: dict[str, Any] = {f"{side}_us": round(value, 2) for side, value in us.items()}
    row["ratio"] = us["new"] / us["old"]
    if row["ratio"] > SLOWER:
        again = [cell.measure(rounds) for _ in range(RERUNS)]
        row["reruns"] = [round(us["new"] / us["old"], 4) for us in again]
        row["ratio"] = statistics.median(row["reruns"])
    return row | {"ratio": round(row["ratio"], 4), "failed": row["ratio"] > SLOWER}


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios new / old, a line a layer; ! marks what failed."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    at = {(row["name"], row["column"]): f"{row['ratio']:.3f}{'!' if row['failed'] else ' '}" for row in rows}
    width = [max(7, len(column) + 1) for column in columns]
    lines = [" " * 18 + "".join(c.rjust(w) for c, w in zip(columns, width, strict=True))]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = (at.get((name, c), "").rjust(w) for c, w in zip(columns, width, strict=True))
        lines.append(name.ljust(18) + "".join(cells))
    return "\n".join(lines)


def run(args: argparse.Namespace, folder: str) -> int:
    """How many cells failed."""
    both, failed = sides(folder), 0
    record = dict(
        what="against", date=datetime.now(UTC).isoformat(timespec="seconds"), old=args.old.name, commit=args.commit,
        command=f"python benchmarks/against.py {' '.join(sys.argv[1:])}", machine=report.machine(DEVICE),
        versions=report.versions(), suites={},
    )  # fmt: skip

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(record, indent=1))

    for suite in args.suite.split(","):
        names = [name for name in args.cases.split(",") if name] or GROUPS[suite]
        tokens = tuple(map(int, args.tokens.split(","))) if args.tokens else TOKENS.get(suite, ())
        rows = record["suites"][suite] = []
        if suite in CELLS and args.workers:
            compile_all(suite, names, folder, tokens, args.workers)
        for name in names:
            if suite == "newT":
                most = max(tokens, default=2048)
                rows.append(dict(name=name, **kernels(name, folder, most), **new_tokens(name, both, most)))
                print(rows[-1], flush=True)
                save()
                continue
            for cell in CELLS[suite](name, both, tokens):
                cell.warm()
                rows.append(dict(name=name, column=cell.column, **judge(cell, args.rounds)))
                print(suite, rows[-1], flush=True)
                failed += rows[-1]["failed"]
                save()
            del cell
            empty()
    for suite, rows in record["suites"].items():
        if suite in CELLS:
            print(f"\n{suite}: new / old\n{table(rows)}")
    print(f"\n{failed} cells are more than {SLOWER - 1:.0%} slower")
    return failed


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack")
    packing.add_argument("commit")
    packing.add_argument("path", type=Path)
    running = verbs.add_parser("run")
    running.add_argument("--old", type=Path, required=True)
    running.add_argument("--suite", default="forward,router,backward,host,newT")
    running.add_argument("--cases", default="", help="layers (or routers) instead of the suite's")
    running.add_argument("--tokens", default="")
    running.add_argument("--rounds", type=int, default=9)
    running.add_argument("--workers", type=int, default=0)
    running.add_argument("--commit", default=None)
    running.add_argument("--device", default="cuda")
    running.add_argument("--json", type=Path)
    counting = verbs.add_parser("count")  # what newT starts
    for what in ("folder", "side", "name", "most", "device"):
        counting.add_argument(what)
    args = parser.parse_args()
    if args.verb == "pack":
        pack(args.commit, args.path)
        return
    DEVICE = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if args.verb == "count":
            count(args.name, sides(args.folder)[args.side], int(args.most))
            return
        unpack(args.old, folder)
        failed = run(args, folder)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
