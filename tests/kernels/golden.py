"""The golden record: the bits of every layer's outputs and gradients on one GPU, what was chosen for them, and times.

python tests/kernels/golden.py --out tests/kernels/golden/h100.json      records every layer of `moesaic.cases.CASES`
python tests/kernels/golden.py --check tests/kernels/golden/h100.json    computes again and says what is equal

A change that should leave the numbers alone is checked against the record of the commit before it; only the public API
is used, so that the script can outlive what it checks. Inputs are drawn on the GPU, where the numbers depend on its
count of multiprocessors: the inputs' own hash says whether two records speak of the same ones.

Several processes compute hashes and fill Triton's cache, each holding one layer at one dtype; then one process takes
the times. Those are from ids to output. `fwd_us` replays a CUDA graph up to 1024 tokens, with whatever stays in the L2;
`fwd_bwd_us` enqueues call by call, so that with few tokens it is the host's time. A file given by --out that exists is
completed, not overwritten.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

import moesaic
from moesaic.cases import CASES, DISTRIBUTIONS, Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (1, 16, 256, 4096)
GIB = 1 << 30
# What weights and their gradients may take; layers that need more get fewer experts. In half precision only kimi-k2
# does: there the tile depends on the number of experts, in fp32 hardly.
LIMIT = {2: 44 * GIB, 4: 22 * GIB}
GRAPH_TOKENS = 1024
_WORDS = 1 << 24  # hashed at a time
_SPREAD, _MIX = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)


@dataclass(frozen=True)
class Job:
    """A layer at one dtype, and the numbers of tokens that it is run with."""

    case: Case
    dtype: str
    tokens: tuple[int, ...]
    device: str

    @classmethod
    def of(cls, name: str, dtype: str, tokens: tuple[int, ...], device: str) -> Job:
        base = CASES[name.removesuffix("-small")]
        case = base if base.name == name else base.small()
        size = DTYPES[dtype].itemsize
        matrices = (3 if case.gated else 2) * case.hidden_size * case.intermediate_size * size
        fits = LIMIT[size] // (2 * matrices)
        if case.num_experts > fits:
            case = replace(case, num_experts=max(fits // 8 * 8, case.top_k))
        return cls(case, dtype, tokens, device)

    @property
    def bytes(self) -> int:
        """About what the job takes of the device: weights, gradients, activations."""
        c, size = self.case, DTYPES[self.dtype].itemsize
        rows, width = max(self.tokens, default=0) * c.top_k, (2 if c.gated else 1) * c.intermediate_size
        weights = c.num_experts * c.hidden_size * (width + c.intermediate_size)
        return size * (2 * weights + rows * (2 * c.hidden_size + 2 * width + 3 * c.intermediate_size)) + GIB // 2

    def name(self, tokens: int) -> str:
        return f"{self.case.name}/{tokens}/{self.dtype}"


# ---------------------------------------------------------------- inputs
def generator(device: str, *key: object) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


class Layer:
    """The weights of a job, and the calls on them."""

    def __init__(self, job: Job):
        case, self.job = job.case, job
        E, H, I = case.num_experts, case.hidden_size, case.intermediate_size
        N, g = (2 if case.gated else 1) * I, generator(job.device, case.name, job.dtype)

        def normal(*shape: int, scale: float) -> Tensor:
            t = torch.empty(shape, dtype=DTYPES[job.dtype], device=job.device)
            for expert in t:  # a draw an expert: what the generator gives depends on how much it is asked for
                expert.normal_(generator=g)
            return t.mul_(scale).requires_grad_()

        self.w_gate_up = normal(*((E, H, N) if case.transposed else (E, N, H)), scale=H**-0.5)
        self.w_down = normal(*((E, I, H) if case.transposed else (E, H, I)), scale=I**-0.5)
        self.b_gate_up = normal(E, N, scale=0.5) if case.bias else None
        self.b_down = normal(E, H, scale=0.5) if case.bias else None

    def batch(self, tokens: int) -> Batch:
        return Batch(self, tokens)


class Batch:
    """Tokens, what a router chose for them, and the gradient that backward starts from."""

    def __init__(self, layer: Layer, tokens: int):
        job, case = layer.job, layer.job.case
        key, self.layer = (case.name, job.dtype, tokens), layer
        g, like = generator(job.device, *key, "x"), dict(dtype=DTYPES[job.dtype], device=job.device)
        self.x = torch.empty(tokens, case.hidden_size, **like).normal_(generator=g).requires_grad_()
        self.grad = torch.empty(tokens, case.hidden_size, **like).normal_(generator=g)
        logits = DISTRIBUTIONS["uniform"](tokens, case.num_experts, case.top_k, generator("cpu", *key, "routing"))
        values, ids = logits.topk(case.top_k, -1)
        self.weights = values.softmax(-1).to(job.device).requires_grad_()
        self.ids = ids.int().to(job.device)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What gradients are taken of."""
        layer = self.layer
        named = dict(x=self.x, w_gate_up=layer.w_gate_up, w_down=layer.w_down, weights=self.weights,
                     b_gate_up=layer.b_gate_up, b_down=layer.b_down)  # fmt: skip
        return {name: t for name, t in named.items() if t is not None}

    def forward(self) -> Tensor:
        case, layer = self.layer.job.case, self.layer
        return moesaic.fused_experts(
            self.x, layer.w_gate_up, layer.w_down, moesaic.Routing.from_topk(self.weights, self.ids, case.num_experts),
            activation=case.activation, layout=case.layout, transposed=case.transposed, b_gate_up=layer.b_gate_up,
            b_down=layer.b_down,
        )  # fmt: skip

    def forward_only(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def forward_backward(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = self.forward()
        return y.detach(), torch.autograd.grad(y, tuple(self.inputs.values()), self.grad)


# ---------------------------------------------------------------- what is recorded
def digest(t: Tensor) -> str:
    """A hash of all bits and their order: every eight bytes with their place, mixed, and summed modulo 2^64."""
    flat = t.detach().contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    tail = torch.zeros(8, dtype=torch.uint8, device=t.device)
    tail[: flat.numel() - whole] = flat[whole:]
    words = flat[:whole].view(torch.int64)
    places = torch.arange(min(_WORDS, max(words.numel(), 1)), device=t.device).mul_(_SPREAD)
    total = torch.full((), flat.numel(), dtype=torch.int64, device=t.device)
    for start, part in ((i, words[i : i + _WORDS]) for i in range(0, words.numel(), _WORDS)):
        total += _mixed(part + places[: part.numel()], start)
    total += _mixed(tail.view(torch.int64).clone(), words.numel())
    return f"{total.item() & (1 << 64) - 1:016x}"


def _mixed(words: Tensor, start: int) -> Tensor:
    words += (start * _SPREAD + (1 << 63)) % (1 << 64) - (1 << 63)
    words ^= words >> 29
    words *= _MIX
    words ^= words >> 32
    return words.sum()


NAMES = {"pointer": "plain", "persistent_tma": "persistent", "swap_ab_sm90": "swapped"}  # as the first record has them


def choice(job: Job, tokens: int, training: bool) -> str:
    """What the library chose for a call, in words: its tiles, or where Triton does not run, what it explains."""
    case, act = job.case, moesaic.ACTIVATIONS[job.case.activation]
    given = dict(
        device=job.device, dtype=DTYPES[job.dtype], num_tokens=tokens, top_k=case.top_k, num_experts=case.num_experts,
        hidden_size=case.hidden_size, intermediate_size=case.intermediate_size, bias=case.bias,
        activation=case.activation, alpha=act.alpha, limit=act.limit, interleaved=case.layout == "interleaved",
        transposed=case.transposed, training=training,
    )  # fmt: skip
    explained = moesaic.explain("fused_experts", **given)
    if explained.chosen != "triton":
        return str(explained)
    experts = importlib.import_module("moesaic.ops.fused_experts._triton")
    parts = []
    for what, spec in zip(("up", "down"), experts._contiguous(explained.problem), strict=True):
        found = experts.gpu.choices(spec, what == "up").choice(tokens * case.top_k)
        c, sorts = found.config, "sorted " * found.sorts
        tile = f"{c.block_m}x{c.block_n}x{c.block_k} warps={c.num_warps} stages={c.num_stages} group={c.group_m}"
        parts.append(f"{what}: {sorts}{NAMES[found.kernel]} {tile}")
    return "; ".join(parts)


def hashes(job: Job) -> dict[str, dict]:
    """The cells of a job, without times. A cell that cannot be computed says why."""
    if job.device == "cuda":
        torch.set_num_threads(1)
    layer, cells = Layer(job), {}
    weights = "+".join(digest(t) for t in (layer.w_gate_up, layer.w_down))
    for tokens in job.tokens:
        cell = cells[job.name(tokens)] = dict(experts=job.case.num_experts)
        try:
            batch = layer.batch(tokens)
            cell["choice"], cell["choice_training"] = (choice(job, tokens, training) for training in (False, True))
            found = dict(inputs=f"{digest(batch.x)}+{digest(batch.weights)}+{digest(batch.ids)}+{weights}")
            found["y"] = digest(batch.forward_only())
            y, grads = batch.forward_backward()
            found["y_training"] = digest(y)
            found |= {f"d{name}": digest(t) for name, t in zip(batch.inputs, grads, strict=True)}
            cell["bits"] = {name: bits if len(bits) == 16 else f"{zlib.crc32(bits.encode()):08x}"
                            for name, bits in found.items()}  # fmt: skip
            del batch, y, grads
        except Exception as error:  # it belongs in the record
            cell["error"] = f"{type(error).__name__}: {error}"[:300]
        _empty(job.device)
    del layer
    _empty(job.device)
    return cells


def _empty(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def times(job: Job, cells: dict[str, dict]) -> None:
    """Put the times of a job in its cells."""
    layer = Layer(job)
    for tokens in job.tokens:
        cell = cells[job.name(tokens)]
        if "error" in cell:
            continue
        batch = layer.batch(tokens)
        cell["fwd_us"] = microseconds(batch.forward_only, job.device, graph=tokens <= GRAPH_TOKENS)
        cell["fwd_bwd_us"] = microseconds(batch.forward_backward, job.device, graph=False)
        del batch
        _empty(job.device)
    del layer
    _empty(job.device)


def microseconds(call, device: str, graph: bool) -> float:
    """The median of a call's time."""
    call()
    if device == "cpu":
        begins = time.perf_counter()
        call()
        return round((time.perf_counter() - begins) * 1e6, 1)
    torch.cuda.synchronize()
    begins = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats, inside, run = max(3, min(20, int(0.08 / (time.perf_counter() - begins)))), 1, call
    if graph:
        captured, inside = torch.cuda.CUDAGraph(), 5
        with torch.cuda.graph(captured):
            for _ in range(inside):
                call()
        run = captured.replay
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    spent = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return round(statistics.median(spent) / inside * 1e3, 1)


# ---------------------------------------------------------------- all jobs
def run_hashes(jobs: list[Job], workers: int, deadline: float):
    """The cells of each job as it ends. Large jobs first, and as many at a time as the device's memory holds."""
    if workers == 0:
        for job in jobs:
            yield hashes(job)
        return
    room = float("inf")
    if jobs and jobs[0].device == "cuda":
        room = torch.cuda.mem_get_info()[1] - (workers + 1) * 0.7 * GIB - 2 * GIB  # contexts, fragments
    waiting, running = sorted(jobs, key=lambda job: -job.bytes), {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            for job in list(waiting):
                free = room - sum(other.bytes for other in running.values())
                if len(running) < workers and (job.bytes <= free or not running):
                    running[pool.submit(hashes, job)] = job
                    waiting.remove(job)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                yield done.result()
            if time.monotonic() > deadline:
                waiting.clear()


def write(path: Path, head: dict, cells: dict[str, dict]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(cells[name])}" for name in sorted(cells, key=_order))
    whole = json.dumps(head, indent=1).removesuffix("\n}") + f',\n"cells": {{\n{lines}\n}}\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(whole)
    new.replace(path)


def _order(name: str) -> tuple:
    case, tokens, dtype = name.split("/")
    names = list(CASES)
    return names.index(case.removesuffix("-small")), case, list(DTYPES).index(dtype), int(tokens)


def compare(cells: dict[str, dict], old: dict[str, dict]) -> int:
    """Print how cells stand to recorded ones; how many differ or are missing there."""
    counts: dict[str, dict[str, int]] = {}
    bad = 0
    for name in sorted(cells, key=_order):
        new, was = cells[name], old.get(name, {})
        if "bits" not in new or "bits" not in was:
            print(f"{name}: {new.get('error') or was.get('error') or 'not in the record'}")
            bad += 1
            continue
        other = any(new[key] != was.get(key) for key in ("choice", "choice_training"))
        said = []
        for tensor in new["bits"] | was["bits"]:
            same = new["bits"].get(tensor) == was["bits"].get(tensor)
            verdict = "equal" if same else "differ, other choice" if other else "differ"
            tally = counts.setdefault(tensor, {})
            tally[verdict] = tally.get(verdict, 0) + 1
            said += [] if same else [tensor]
        bad += bool(said)
        if said:
            print(f"{name}: {', '.join(said)} differ{' (other choice)' if other else ''}")
        for key in ("fwd_us", "fwd_bwd_us"):
            if key in new and key in was and new[key] > 1.05 * was[key]:
                print(f"{name}: {key} {was[key]} before, {new[key]} now")
    for tensor, tally in counts.items():
        print(f"{tensor:12}", ", ".join(f"{n} {verdict}" for verdict, n in sorted(tally.items())))
    print(f"{len(cells)} cells, {bad} not equal")
    return bad


def commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parent)  # fmt: skip
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the record to write or to complete, with times")
    parser.add_argument("--check", type=Path, help="a record to compare with")
    parser.add_argument("--cases", default=",".join(CASES), help="NAME-small shrinks one")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--workers", type=int, default=12, help="processes that compute hashes; 0 for none beside this")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which nothing more is begun")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    begins, cells = time.monotonic(), {}
    deadline = begins + args.limit
    if args.out and args.out.exists():
        cells = json.loads(args.out.read_text())["cells"]
    tokens = tuple(map(int, args.tokens.split(",")))
    jobs = [Job.of(name, dtype, tokens, args.device) for dtype in args.dtypes.split(",")
            for name in args.cases.split(",")]  # fmt: skip
    cuda = args.device == "cuda"
    head = dict(
        what="golden", date=datetime.now(UTC).isoformat(timespec="seconds"), commit=args.commit or commit(),
        command="python " + " ".join(sys.argv), device=torch.cuda.get_device_name() if cuda else "cpu",
        torch=torch.__version__, triton=importlib.import_module("triton").__version__,
    )  # fmt: skip

    def save() -> None:
        if args.out:
            write(args.out, head, cells)

    todo = [job for job in jobs if any("bits" not in cells.get(job.name(t), {}) for t in tokens)]
    for count, done in enumerate(run_hashes(todo, args.workers, deadline), 1):
        for name, cell in done.items():
            cells.setdefault(name, {}).update(cell)
        save()
        print(f"{time.monotonic() - begins:6.1f} s  bits of {count}/{len(todo)}: {next(iter(done))}", flush=True)
    if args.out:
        todo = [job for job in jobs if all(job.name(t) in cells for t in tokens)]
        todo = [job for job in todo if any("fwd_bwd_us" not in cells[job.name(t)] for t in tokens)]
        for count, job in enumerate(todo, 1):
            if time.monotonic() > deadline:
                break
            times(job, cells)
            save()
            print(f"{time.monotonic() - begins:6.1f} s  times of {count}/{len(todo)}: {job.case.name} {job.dtype}",
                  flush=True)  # fmt: skip
    for name, cell in cells.items():
        if "error" in cell:
            print(f"{name}: {cell['error']}")
    if args.check:
        wanted = {job.name(t) for job in jobs for t in tokens}
        sys.exit(compare({n: c for n, c in cells.items() if n in wanted},
                         json.loads(args.check.read_text())["cells"]) > 0)  # fmt: skip


if __name__ == "__main__":
    main()
