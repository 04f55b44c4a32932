"""Tuning and warming up: what a machine's own measurements add to the choice, and compiling before the first request.

`tune` times the ways to make a layer's products, keeps those that agree with the fp64 oracle, and writes the fastest
to `tuned/<gpu>.json` of a cache folder, which choice reads beside the tables that come with moesaic.
`warmup` compiles what a range of token counts will need, several kernels at a time.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..cases import Case
from ..errors import Unsupported
from ..hardware import Gpu, gpu_of, interpreting, triton_why_not
from ..launcher import dry
from ..nn.config import THEIRS
from ..ops.fused_experts import fused_experts
from ..routing import Routing
from .products import LayerOperands, Operands, microseconds, products_of

LEAD = 1.02  # what a way must be ahead of the others of its table to have a place in it
PRICE = 1.5  # what the model may ask for a way that is tried, over its cheapest
TOKENS = 1 << 15  # at most, in what is timed


# ---------------------------------------------------------------- warm-up
def warmup(
    what: Any, tokens: Iterable[int], *, dtype: torch.dtype = torch.bfloat16, training: bool = False,
    progress: bool = True,
) -> int:  # fmt: skip
    """Compile the Triton kernels that layers will need for these numbers of tokens; nothing is computed.

    Args:
        what: a module whose experts are stacked weights `gate_up_proj` and `down_proj` (a Hugging Face model with
            `experts_implementation="moesaic"`, or `nn.MoE`), or a `Case`, or several of these.
        tokens: numbers of tokens, e.g. `range(1, 2049)`. Their tensors are allocated one after the other.
        dtype: of a case's layer; a module's weights have theirs.
        training: the forward that keeps what a backward needs.
        progress: a line on stderr that counts.

    Returns:
        How many kernels were compiled; 0 where the machine has no GPU that Triton runs on.

    Raises:
        ValueError: a module without experts.
    """
    with dry() as pending:
        for layer in _layers(what, dtype):
            for count in tokens:
                layer.run(count, training)
    total, done = len(pending.requests), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            end = "\n" if done == total else ""
            print(f"\rmoesaic: {done} of {total} kernels compiled", end=end, file=sys.stderr, flush=True)

    pending.compile(step)
    return total


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer of experts, and how they are called."""

    w_gate_up: Tensor
    w_down: Tensor
    top_k: int
    options: dict[str, Any]

    def run(self, tokens: int, training: bool) -> None:
        E, transposed = self.w_down.shape[0], self.options.get("transposed", False)
        H = self.w_down.shape[2 if transposed else 1]
        x = self.w_down.new_empty(tokens, H).requires_grad_(training)
        ids = torch.zeros(tokens, self.top_k, dtype=torch.int32, device=x.device)
        weights = torch.zeros(tokens, self.top_k, device=x.device)
        with torch.set_grad_enabled(training):
            fused_experts(x, self.w_gate_up, self.w_down, Routing.from_topk(weights, ids, E), **self.options)


def _layers(what: Any, dtype: torch.dtype) -> list[_Layer]:
    device = torch.device("cuda") if torch.cuda.is_available() else None
    if isinstance(what, (list, tuple)):
        return [layer for one in what for layer in _layers(one, dtype)]
    if isinstance(what, Case):
        return [] if device is None else [_case_layer(what, dtype, device)]
    found: list[_Layer] = []
    for module in what.modules():
        up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
        if isinstance(up, Tensor) and isinstance(down, Tensor) and up.dim() == down.dim() == 3:
            found.append(_module_layer(what, module, up, down))
    if not found:
        raise ValueError(f"warmup: the module must hold stacked experts, got {type(what).__name__} without any.")
    kinds = {(f.w_gate_up.shape, f.w_down.shape, f.w_down.dtype, f.top_k, str(f.options)): f for f in found}
    return [layer for layer in kinds.values() if layer.w_down.is_cuda]


def _case_layer(case: Case, dtype: torch.dtype, device: torch.device) -> _Layer:
    E, H, I = case.num_experts, case.hidden_size, case.intermediate_size
    N = ACTIVATIONS[case.activation].width(I)
    up, down = ((E, H, N), (E, I, H)) if case.transposed else ((E, N, H), (E, H, I))
    options: dict[str, Any] = dict(activation=case.activation, layout=case.layout, transposed=case.transposed)
    if case.bias:
        options |= dict(
            b_gate_up=torch.empty(E, N, dtype=dtype, device=device),
            b_down=torch.empty(E, H, dtype=dtype, device=device),
        )
    w_gate_up, w_down = (torch.empty(shape, dtype=dtype, device=device) for shape in (up, down))
    return _Layer(w_gate_up, w_down, case.top_k, options)


def _module_layer(model: Any, module: Any, up: Tensor, down: Tensor) -> _Layer:
    """Of Hugging Face's experts modules and of `nn.Experts`, whose names are the same."""
    config = getattr(module, "config", None) or getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    routed = getattr(config, "router", config)  # of `nn.MoEConfig`
    top_k = next((k for n in (*THEIRS["top_k"], "top_k") if isinstance(k := getattr(routed, n, None), int)), 1)
    plan = None
    if getattr(module, "act_fn", None) is not None and hasattr(module, "is_transposed"):
        plan = importlib.import_module("moesaic.integrations.transformers").plan(module)
    flags = {name: bool(getattr(module, name, False)) for name in ("is_transposed", "is_concatenated")}
    activation = plan.activation if plan is not None and plan.activation else getattr(config, "activation", "swiglu")
    interleaved = hasattr(module, "is_concatenated") and not flags["is_concatenated"]
    options: dict[str, Any] = dict(
        activation=activation if not isinstance(activation, str) or activation in ACTIVATIONS else "swiglu",
        layout="interleaved" if interleaved else getattr(config, "layout", "concatenated"),
        transposed=flags["is_transposed"],
    )
    for ours, theirs in (("b_gate_up", "gate_up_proj_bias"), ("b_down", "down_proj_bias")):
        if isinstance(bias := getattr(module, theirs, None), Tensor):
            options[ours] = bias.to(down.dtype)
    return _Layer(up.detach(), down.detach(), top_k, options)


# ---------------------------------------------------------------- tuning
def tune(
    cases: Iterable[Case], *, device: str = "cuda", folder: Path | None = None, record: Path | None = None,
    workers: int = 1,
) -> Path:  # fmt: skip
    """Time the ways to make the products of these layers, and write the fastest.

    A way that the model prices at more than PRICE times its cheapest is not tried. Each product is timed alone, and
    then the few fastest within the layer: there a product begins while the one before it ends, and what that gains or
    loses hangs on both. What runs is captured in a CUDA graph, so that the host's time does not count. Rows are spread
    evenly.

    Args:
        cases: layer shapes, e.g. from `moesaic.cases.CASES.values()`.
        device: a GPU.
        folder: where `<gpu>.json` is written or completed; by default the user's cache folder.
        record: a file to which every time is appended, one JSON object a line.
        workers: processes that compile before anything is timed.

    Returns:
        The file.

    Raises:
        Unsupported: there is no GPU that Triton runs on.
    """
    here, cases = torch.device(device), list(cases)
    gpu = gpu_of(here)
    if reason := triton_why_not(here.type, gpu.arch if here.type == "cuda" else here.type):
        raise Unsupported(f"tune: {reason}.")
    products = importlib.import_module("moesaic.ops.grouped_matmul.gpu")
    path = (folder or products.cache_folder()) / f"{gpu.name.lower().replace(' ', '-')}.json"
    known = json.loads(path.read_text()) if path.is_file() else {"gpu": gpu.name, "products": {}}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for case, _ in zip(cases, pool.map(_prepare, cases, [gpu] * len(cases)), strict=True):
            (up, _), (down, _) = specs = products_of(case, gpu)
            measured: list[dict[int, Any]] = [
                {octave: _times(spec, sorts, case.top_k, octave, here) for octave in _octaves(spec, case.top_k)}
                for spec, sorts in specs
            ]
            layer = LayerOperands(case, gpu, here)
            for octave in measured[0]:
                layer.judge(octave, measured[0][octave], measured[1][octave])
            del layer
            for spec, rows in zip((up, down), measured, strict=True):
                key = products.tuned_key(spec)
                for octave, ways in rows.items():
                    if record is not None:
                        _append(record, dict(gpu=gpu.name, product=key, rows_per_expert=octave, ways=ways))
                known["products"][key] = table(rows)
            known["date"] = date.today().isoformat()
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(known, indent=1) + "\n")
            part.replace(path)
    for cached in (products.tuned, products.choices):
        cached.cache_clear()
    return path


def table(rows: dict[int, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """A product's entry in a tuned file: the fastest way for its rows an expert, out of as few ways as lose under 2%.

    `rows` maps rows an expert to ways and their measured µs, those `in_layer` where there are. Each way is a kernel to
    compile, so that one that gains little over another of the table is left out.
    """
    times: dict[int, dict[tuple[Any, ...], float]] = {}
    for octave, ways in rows.items():
        judged = [way for way in ways if "in_layer" in way] or ways
        if judged:
            times[octave] = {tuple(way["way"]): way.get("in_layer", way["us"]) for way in judged}
    best = {octave: min(ways.values()) for octave, ways in times.items()}
    serves: dict[tuple[Any, ...], set[int]] = {}
    for octave, ways in times.items():
        for way, us in ways.items():
            serves.setdefault(way, set()).update({octave} if us <= LEAD * best[octave] else ())

    def loss(way: tuple[Any, ...]) -> float:
        return sum(ways.get(way, 2 * best[octave]) / best[octave] for octave, ways in times.items())

    kept: list[tuple[Any, ...]] = []
    unserved = set(times)
    while unserved:
        ranks = {way: (-len(served & unserved), loss(way), str(way)) for way, served in serves.items()}
        kept.append(min(ranks, key=ranks.__getitem__))
        unserved -= serves[kept[-1]]
    return {
        str(octave): list(min((way for way in kept if way in ways), key=ways.__getitem__))
        for octave, ways in times.items()
    }


def _append(record: Path, row: dict[str, Any]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _octaves(spec: Any, top_k: int) -> list[int]:
    """Rows an expert, in powers of two, that up to TOKENS tokens give; 0 is less than one."""
    return [0, *(o for o in (2**n for n in range(16)) if top_k <= o * spec.experts <= TOKENS * top_k)]


def _ways(spec: Any, sorts: bool, rows: int) -> dict[Any, float]:
    """What is worth trying, with the model's µs, its choice first."""
    products = importlib.import_module("moesaic.ops.grouped_matmul.gpu")
    found = products.ways(spec.of(rows), sorts)
    cheapest = next(iter(found.values()))
    return {way: us for way, us in found.items() if us <= PRICE * cheapest}


def _prepare(case: Case, gpu: Gpu) -> int:
    """Compile what timing a case will launch, in a process of its own; the operands' memory is never touched."""
    with dry() as pending:
        for spec, sorts in products_of(case, gpu):
            tried: dict[Any, float] = {}
            for octave in _octaves(spec, case.top_k):
                tried |= _ways(spec, sorts, octave * spec.experts or case.top_k)
            operands = Operands(spec, 1, case.top_k, torch.device("cpu"), blank=True)
            for way in tried:
                operands.call(way)()
    if not interpreting():
        pending.compile()
    return len(pending.requests)


def _times(spec: Any, sorts: bool, top_k: int, octave: int, device: torch.device) -> list[dict[str, Any]]:
    """Each way's µs beside the model's, the model's choice first. Less than a row an expert is one token."""
    rows = octave * spec.experts or top_k
    operands, times = Operands(spec, rows // top_k, top_k, device), []
    products = importlib.import_module("moesaic.ops.grouped_matmul.gpu")
    for way, model in _ways(spec, sorts, rows).items():
        run = operands.call(way)
        if (reason := operands.wrong(run())) is None:
            us = microseconds(run, operands.batches)
            times.append(dict(way=products.tuned_values(way), model_us=round(model, 2), us=round(us, 2)))
        else:
            print(f"tune: {spec}: {way} is wrong: {reason}", file=sys.stderr)
    return times
