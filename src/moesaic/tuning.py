"""Tuning and warming up: what a machine's own measurements add to the choice, and compiling before the first request.

`tune` times every way to make a layer's products, keeps those that agree with the fp64 oracle, and writes what beats
the model's choice to `tuned/<gpu>.json` of a cache folder, which choice reads beside the tables that come with moesaic.
`warmup` compiles what a range of token counts will need, several kernels at a time.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS, apply
from .cases import Case
from .errors import Unsupported
from .hardware import gpu_of, triton_why_not
from .launcher import dry
from .ops.fused_experts import fused_experts
from .routing import Routing
from .testing import failure

LEAD = 1.02  # what a measured way must be ahead of the model's choice to be written
OCTAVES = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)  # rows an expert


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
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "top_k")
    top_k = next((k for n in names if isinstance(k := getattr(config, n, None), int)), 1)
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
def tune(cases: Iterable[Case], *, device: str = "cuda", folder: Path | None = None) -> Path:
    """Time every way to make the products of these layers, and write those that lead the model's choice.

    Args:
        cases: layer shapes, e.g. from `moesaic.cases.CASES.values()`.
        device: a GPU.
        folder: where `<gpu>.json` is written or completed; by default the user's cache folder.

    Returns:
        The file.

    Raises:
        Unsupported: there is no GPU that Triton runs on.
    """
    here = torch.device(device)
    gpu = gpu_of(here)
    if reason := triton_why_not(here.type, gpu.arch if here.type == "cuda" else here.type):
        raise Unsupported(f"tune: {reason}.")
    products = importlib.import_module("moesaic.ops.grouped_matmul.gpu")
    experts = importlib.import_module("moesaic.ops.fused_experts._triton")
    layer = importlib.import_module("moesaic.ops.fused_experts")
    path = (folder or products.cache_folder()) / f"{gpu.name.lower().replace(' ', '-')}.json"
    known = json.loads(path.read_text()) if path.is_file() else {"gpu": gpu.name, "products": {}}
    for case in cases:
        fields = case.problem(64, torch.bfloat16, here.type)
        problem = layer.FusedExpertsProblem(gpu=gpu, **fields)
        for spec, sorts in zip(experts._contiguous(problem), (True, False), strict=True):
            entries = {
                str(octave): products.tuned_values(way)
                for octave in OCTAVES
                if (way := _leader(products, spec.of(octave * case.num_experts), sorts, here)) is not None
            }
            if entries:
                known["products"][products.tuned_key(spec)] = entries
            known["date"] = date.today().isoformat()
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(known, indent=1) + "\n")
            part.replace(path)
    products.tuned.cache_clear()
    return path


def _leader(products: Any, spec: Any, sorts: bool, device: torch.device) -> Any:
    """The way that is measured to lead the model's choice by more than 2%, or None."""
    found = products.ways(spec, sorts)
    model, times = next(iter(found)), {}
    call = _Product(spec, device)
    for way in found:
        run = call.way(products, way)
        if call.wrong(run()) is None:
            times[way] = _milliseconds(run)
    best = min(times, key=times.__getitem__, default=model)
    return best if best != model and times[model] > LEAD * times[best] else None


class _Product:
    """The operands of one product, in even routing, and what it should give."""

    def __init__(self, spec: Any, device: torch.device):
        self.spec, E, R, K = spec, spec.experts, spec.rows, max(spec.top_k, 1)
        g = torch.Generator(device).manual_seed(0)
        tokens = -(-R // K)
        ids = torch.rand(tokens, E, generator=g, device=device).topk(K, -1).indices
        self.routing = Routing.from_topk(None, ids, E)
        rows = tokens if spec.top_k else tokens * K
        self.x = torch.randn(rows, spec.K, generator=g, device=device).to(spec.dtype)
        shape = (E, spec.K, spec.width) if spec.input_major else (E, spec.width, spec.K)
        w = torch.randn(shape, generator=g, device=device).mul_(spec.K**-0.5).to(spec.dtype)
        self.w = w.mT if spec.input_major else w
        self.bias = torch.randn(E, spec.width, device=device).to(spec.dtype) if spec.epilogue.bias else None
        self.want: Tensor | None = None

    def way(self, products: Any, choice: Any) -> Any:
        schedule = importlib.import_module("moesaic.ops.grouped_matmul.gpu.schedule")
        moving = importlib.import_module("moesaic.ops.permute._triton")
        gemm, r, top_k = products.make(self.spec.any_rows, choice), self.routing, self.spec.top_k

        def run() -> Tensor:
            table = schedule.TileTable(r.expert_offsets, r.row_order.shape[0])
            x = moving.spread(self.x, r.row_index, top_k) if choice.sorts else self.x
            return gemm(x, self.w, table, r.row_order if gemm.spec.top_k else None, self.bias)

        return run

    def wrong(self, out: Tensor) -> str | None:
        """Against the first expert with rows, in fp64: tiles differ in where experts end, not in what they add."""
        ends = self.routing.expert_offsets.tolist()
        e = next(e for e in range(self.spec.experts) if ends[e + 1] > ends[e])
        some = slice(ends[e], ends[e + 1])
        if self.want is None:
            self.want = self._oracle(e, some)
        return failure(out[some], self.want, self.spec.K, 2)

    def _oracle(self, e: int, some: slice) -> Tensor:
        rows = self.routing.row_order[some].long() // self.spec.top_k if self.spec.top_k else some
        h = self.x[rows].double() @ self.w[e].double().T
        h = h if self.bias is None else h + self.bias[e].double()
        epilogue = self.spec.epilogue
        if not epilogue.activation:
            return h
        act = ACTIVATIONS[epilogue.activation].with_constants(epilogue.alpha, epilogue.limit)
        return apply(act, h, epilogue.interleaved)


def _milliseconds(run: Any, repeats: int = 7) -> float:
    """Median of a few, on the device's clock."""
    run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in marks)[repeats // 2]
