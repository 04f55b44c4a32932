"""PEERS: what other people run, one adapter each. To add one, write an adapter and put it in the table.

An adapter says why it cannot run a layer, without importing the package it stands for, and builds `call(batch) -> y`.
Packages are imported when their adapter is built. Each call gets the router's answer in the form that the peer takes;
everything that the peer must do with it (sorting, index tables) is inside the timed call, ours included.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS, apply
from ..hardware import MIN_COMPUTE_CAPABILITY, arch_of
from ..op import OPS, explain
from ..ops.experts import fused_experts
from ..problem import Problem
from ..routing import Routing
from . import limits
from .layer import Batch, Layer

Call = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Peer:
    """One candidate.

    Attributes:
        why_not: `layer -> str | None`, the reason why it cannot run it.
        build: `layer -> call(batch) -> y`.
        graph: its call can be captured in a CUDA graph.
        comparable: it computes the same function, so its error means something.
        ours: it is moesaic.
        bound: it skips part of the layer, so ours is not ranked against it.
        limits: what its own tuning was held to; goes with its figures.
    """

    name: str
    title: str
    why_not: Callable[[Layer], str | None]
    build: Callable[[Layer], Call]
    graph: bool = True
    comparable: bool = True
    ours: bool = False
    bound: bool = False
    limits: str = ""


def found(module: str) -> bool:
    """Whether a top-level module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


@functools.cache
def foreign_errors() -> tuple[type[BaseException], ...]:
    """What another package's code may raise at import, compilation or call; reported as the reason, never hidden."""
    errors: list[type[BaseException]] = [
        ImportError, OSError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError,
        NotImplementedError,
    ]  # fmt: skip
    if found("triton"):
        errors.append(importlib.import_module("triton.errors").TritonError)
    return tuple(errors)


# ---------------------------------------------------------------- moesaic
def moesaic(implementation: str = "") -> Peer:
    """Ours: by default the implementation that selection takes, or one that is named."""

    def why_not(layer: Layer) -> str | None:
        if not implementation:
            return None
        if implementation not in fused_experts.implementations:  # type: ignore[attr-defined]
            return f"there is no implementation {implementation!r}"
        return dict(explanation(layer, 1).reasons)[implementation]

    def build(layer: Layer) -> Call:
        case, forced = layer.case, implementation or None

        def call(batch: Batch) -> Tensor:
            routing = Routing.from_topk(batch.weights, batch.ids, case.num_experts)
            return fused_experts(
                batch.x, layer.w_gate_up, layer.w_down, routing, activation=case.activation, b_gate_up=layer.b_gate_up,
                b_down=layer.b_down, layout=case.layout, transposed=case.transposed, implementation=forced,
            )  # fmt: skip

        return call

    name = f"moesaic:{implementation}" if implementation else "moesaic"
    return Peer(name, name, why_not, build, ours=True)


def problem_of(layer: Layer, tokens: int) -> Problem:
    """The call of ours that this layer makes."""
    c = layer.case
    return Problem(
        "fused_experts", layer.device.type, arch_of(layer.device), layer.dtype, tokens, c.top_k, c.num_experts,
        c.hidden_size, c.intermediate_size, c.activation, layer.interleaved, c.transposed, c.bias, layer.train,
    )  # fmt: skip


def explanation(layer: Layer, tokens: int):
    """Which implementation of ours runs this layer, and why."""
    return explain("fused_experts", problem_of(layer, tokens))


def padding(implementation: str, layer: Layer, batches: list[Batch]) -> float | None:
    """Rows that an implementation of ours computes for nobody over real rows, mean of the batches; None without tiles.

    Of the forward pass, and of its up product where tiles differ.
    """
    extra = getattr(OPS["fused_experts"].implementation(implementation), "padding", None)
    if extra is None:
        return None
    loads = [batch.ids_long.flatten().bincount(minlength=layer.case.num_experts).tolist() for batch in batches]
    return statistics.mean(
        extra(problem_of(layer, batch.x.shape[0]), n) for batch, n in zip(batches, loads, strict=True)
    )


# ---------------------------------------------------------------- torch
def _torch_loop(layer: Layer) -> Call:
    """The loop of every tutorial: for each expert, gather its tokens, run it, add the weighted result."""
    case, act = layer.case, ACTIVATIONS[layer.case.activation]
    ups, downs = (w if case.transposed else w.mT for w in (layer.w_gate_up, layer.w_down))

    def call(batch: Batch) -> Tensor:
        y = torch.zeros_like(batch.x)
        counts = torch.bincount(batch.ids_long.flatten(), minlength=case.num_experts).tolist()
        for e, count in enumerate(counts):
            if not count:
                continue
            t, k = torch.where(batch.ids_long == e)
            h = batch.x[t] @ ups[e]
            if layer.b_gate_up is not None:
                h = h + layer.b_gate_up[e]
            out = apply(act, h, layer.interleaved) @ downs[e]
            if layer.b_down is not None:
                out = out + layer.b_down[e]
            y = y.index_add(0, t, out * batch.weights_low[t, k, None])
        return y

    return call


def _torch_grouped_mm_why_not(layer: Layer) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if layer.dtype == torch.float64:
        return "grouped_mm has no fp64"
    c = layer.case
    if any(n * layer.dtype.itemsize % 16 for n in (c.hidden_size, c.intermediate_size)):
        return f"grouped_mm needs rows of a multiple of 16 bytes, got H={c.hidden_size}, I={c.intermediate_size}"
    if layer.device.type == "cuda" and torch.cuda.get_device_capability(layer.device) < MIN_COMPUTE_CAPABILITY:
        return "grouped_mm needs compute capability 8.0 or newer"
    return None


def _torch_grouped_mm(layer: Layer) -> Call:
    """The vectorised layer that plain torch allows: sort, gather, grouped_mm, activation, grouped_mm, weighted sum."""
    case, act = layer.case, ACTIVATIONS[layer.case.activation]
    ups, downs = (w if case.transposed else w.mT for w in (layer.w_gate_up, layer.w_down))
    experts = torch.arange(case.num_experts, device=layer.device)

    def call(batch: Batch) -> Tensor:
        T, K = batch.ids_long.shape
        chosen, order = batch.ids_long.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, experts, right=True, out_int32=True)
        h = F.grouped_mm(batch.x[order // K], ups, offs=ends)
        if layer.b_gate_up is not None:
            h = h + layer.b_gate_up[chosen]
        out = F.grouped_mm(apply(act, h, layer.interleaved), downs, offs=ends)
        if layer.b_down is not None:
            out = out + layer.b_down[chosen]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=layer.device))
        return (out[back].view(T, K, -1) * batch.weights_low[..., None]).sum(1)

    return call


def _dense_bmm(layer: Layer) -> Call:
    """The bound: both products as one cuBLAS batched product each, over even groups, without routing or activation.

    As many groups as experts are hit, all of one length, rounded up. Each batch reads another run of experts, so that
    weights come from memory as often as the layer's do.
    """
    case, E = layer.case, layer.case.num_experts
    ups, downs = (w if case.transposed else w.mT for w in (layer.w_gate_up, layer.w_down))
    rows: list[Tensor] = []  # one random input, cut to every batch's groups
    groups: dict[int, tuple[slice, int]] = {}

    def group(batch: Batch) -> tuple[slice, int]:
        hit = len(batch.ids.unique())
        first = len(groups) * hit % (E - hit + 1)
        return slice(first, first + hit), -(-batch.ids.numel() // hit)

    def call(batch: Batch) -> Tensor:
        if not rows:
            size = batch.ids.numel() + E, case.hidden_size
            rows.append(torch.randn(size, dtype=layer.dtype, device=layer.device))
        if id(batch) not in groups:
            groups[id(batch)] = group(batch)
        experts, length = groups[id(batch)]
        hit = experts.stop - experts.start
        h = torch.bmm(rows[0][: hit * length].view(hit, length, -1), ups[experts])
        return torch.bmm(h[..., : case.intermediate_size], downs[experts]).flatten(0, 1)

    return call


# ---------------------------------------------------------------- Hugging Face
def _hf_why_not(layer: Layer) -> str | None:
    if not found("transformers"):
        return 'transformers is not installed; run: pip install "moesaic[hf]"'
    return _torch_grouped_mm_why_not(layer)


def _hf_grouped_mm(layer: Layer) -> Call:
    """The experts function that transformers registers as `grouped_mm`, on a module of this layer's weights."""
    moe: Any = importlib.import_module("transformers.integrations.moe")
    case, act = layer.case, ACTIVATIONS[layer.case.activation]
    module = SimpleNamespace(
        num_experts=case.num_experts, has_gate=act.gated, has_bias=case.bias, is_transposed=case.transposed,
        is_concatenated=not layer.interleaved, has_post_expert_norm=False, _is_expert_parallel=False,
        gate_up_proj=layer.w_gate_up, up_proj=layer.w_gate_up, down_proj=layer.w_down, act_fn=F.silu,
        gate_up_proj_bias=layer.b_gate_up, up_proj_bias=layer.b_gate_up, down_proj_bias=layer.b_down,
    )  # fmt: skip
    if not act.gated:
        module.act_fn = lambda h: apply(act, h, False)
    if case.activation == "swiglu" and not layer.interleaved:
        module._apply_gate = lambda h: moe._default_apply_gate(module, h)
    else:
        module._apply_gate = lambda h: apply(act, h, layer.interleaved)
    return lambda batch: moe.grouped_mm_experts_forward(module, batch.x, batch.ids_long, batch.weights_low)


# ---------------------------------------------------------------- GPU libraries
def _gpu_swiglu(package: str, trains: bool) -> Callable[[Layer], str | None]:
    """The usual reasons of a GPU library that has bf16 SwiGLU."""

    def why_not(layer: Layer) -> str | None:
        if layer.device.type != "cuda":
            return "needs a GPU"
        if not found(package):
            return f"{package} is not installed"
        if layer.train and not trains:
            return f"{package} has no backward"
        if not layer.plain_swiglu:
            return "its adapter knows concatenated SwiGLU without biases alone"
        if layer.dtype not in (torch.bfloat16, torch.float16):
            return f"takes bf16 and fp16, got {layer.dtype}"
        return None

    return why_not


def _vllm_why_not(layer: Layer) -> str | None:
    return _gpu_swiglu("vllm_shim" if found("vllm_shim") else "vllm", trains=False)(layer)


def _vllm(layer: Layer) -> Call:
    """vLLM's Triton `fused_experts`; `vllm_shim` stands in where only the wheel's files were unpacked."""
    if found("vllm_shim"):
        experts = importlib.import_module("vllm_shim").fused_experts()
    else:
        experts = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts
    return lambda batch: experts(batch.x, layer.w_gate_up, layer.w_down, batch.weights, batch.ids)


def _triton_kernels(layer: Layer) -> Call:
    """Triton's `triton_kernels`. Its SwiGLU computes silu(gate)·(up + 1), so its output is not compared."""
    ogs: Any = importlib.import_module("triton_kernels.matmul_ogs")
    swiglu = importlib.import_module("triton_kernels.swiglu").swiglu_fn
    routing = importlib.import_module("triton_kernels.routing").routing
    I, K = layer.case.intermediate_size, layer.case.top_k
    pairs = torch.stack((layer.w_gate_up[:, :I], layer.w_gate_up[:, I:]), dim=2)  # it reads g0 u0 g1 u1 ...
    up, down = pairs.flatten(1, 2).mT, layer.w_down.mT
    activation = ogs.FusedActivation(ogs.FnSpecs("swiglu", swiglu, ("alpha", "limit")), (1.0, None), 2)

    def call(batch: Batch) -> Tensor:
        data, gather, scatter = routing(batch.logits.to(batch.x.dtype), K)
        h = ogs.matmul_ogs(batch.x, up, None, data, gather_indx=gather, fused_activation=activation)
        return ogs.matmul_ogs(h, down, None, data, scatter_indx=scatter, gammas=data.gate_scal)

    return call


def _deepgemm_why_not(layer: Layer) -> str | None:
    if reason := _gpu_swiglu("deep_gemm", trains=False)(layer):
        return reason
    if layer.dtype != torch.bfloat16:
        return f"its 16-bit grouped GEMM takes bf16 alone, got {layer.dtype}"
    if torch.cuda.get_device_capability(layer.device)[0] < 9:
        return "deep_gemm needs compute capability 9.0 or newer"
    return None


def _deepgemm(layer: Layer) -> Call:
    """DeepGEMM's grouped bf16 GEMM, twice; it has no layer of its own, so plain torch does the rest.

    Each expert's rows start at a multiple of its tile and rows without an expert are marked -1. The buffer holds the
    most rows that any routing can need, so the host never waits for the counts and a graph can hold the call.
    """
    deep_gemm: Any = importlib.import_module("deep_gemm")
    case, act, tile = layer.case, ACTIVATIONS["swiglu"], deep_gemm.get_mk_alignment_for_contiguous_layout()
    experts = torch.arange(case.num_experts, device=layer.device)

    def product(rows: Tensor, w: Tensor, owner: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], w.shape[1])
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(rows, w, out, owner)
        return out

    def call(batch: Batch) -> Tensor:
        T, K = batch.ids_long.shape
        chosen, order = batch.ids_long.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, experts, right=True)
        begins = torch.searchsorted(chosen, experts)
        lengths = (ends - begins + tile - 1) // tile * tile
        place = torch.arange(T * K, device=layer.device) + (lengths.cumsum(0) - lengths - begins)[chosen]
        size = (T * K + min(T * K, case.num_experts) * (tile - 1)) // tile * tile
        owner = torch.full((size,), -1, dtype=torch.int32, device=layer.device)
        owner[place] = chosen.int()
        rows = batch.x.new_empty(size, batch.x.shape[1])  # nobody reads what padding computes
        rows[place] = batch.x[order // K]
        out = product(apply(act, product(rows, layer.w_gate_up, owner), False), layer.w_down, owner)
        back = torch.empty_like(order).scatter_(0, order, place)
        return (out[back].view(T, K, -1) * batch.weights_low[..., None]).sum(1)

    return call


def _sonic(layer: Layer) -> Call:
    """SonicMoE: its two autograd functions behind its own index build. `limits` says what it may try."""
    functional: Any = importlib.import_module("sonicmoe.functional")
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    limits.sonic()
    case, train = layer.case, layer.train
    E, K = case.num_experts, case.top_k
    up, down = layer.w_gate_up.permute(1, 2, 0), layer.w_down.permute(1, 2, 0)
    # newer releases take one more flag at the end of the second function
    parameters = inspect.signature(functional._DownProjection.forward).parameters.values()
    last = (True,) * (sum(p.default is p.empty for p in parameters) - 15)

    def call(batch: Batch) -> Tensor:
        T = batch.x.shape[0]
        rows, slots, counts, offsets, gather = (
            torch.empty(n, dtype=torch.int32, device=layer.device) for n in (T * K, T * K, E, E + 1, T * K)
        )
        functional.TC_topk_router_metadata_triton(batch.ids, E, counts, offsets, gather, rows, slots)
        tables = (gather, rows, slots, None, False, swiglu, *last)
        a, h = functional._UpProjection.apply(
            batch.x, up, None, offsets, T * K, K, gather, rows, slots, None, False, swiglu, not train, True
        )
        return functional._DownProjection.apply(a, h, down, None, batch.weights, offsets, T, K, *tables)

    return call


def _liger(layer: Layer) -> Call:
    """Liger's autograd function. `limits` says what it may try.

    It reads a count back to the host in every call, so no graph holds it.
    """
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    limits.liger()
    return lambda batch: function.apply(batch.x, layer.w_gate_up, layer.w_down, batch.ids, batch.weights)


DENSE = "dense_bmm"  # with the weighted sum's bytes behind it, the dense bound

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torch_loop", "torch, loop over experts", lambda layer: None, _torch_loop, graph=False),
        Peer("torch_grouped_mm", "torch, grouped_mm", _torch_grouped_mm_why_not, _torch_grouped_mm),
        Peer("hf_grouped_mm", "Hugging Face grouped_mm", _hf_why_not, _hf_grouped_mm),
        Peer("vllm", "vLLM (Triton)", _vllm_why_not, _vllm),
        Peer("triton_kernels", "triton_kernels", _gpu_swiglu("triton_kernels", trains=False), _triton_kernels,
             comparable=False),
        Peer("deepgemm", "DeepGEMM in plain torch", _deepgemm_why_not, _deepgemm),
        Peer("sonic", "SonicMoE", _gpu_swiglu("sonicmoe", trains=True), _sonic, limits=limits.SONIC),
        Peer("liger", "Liger", _gpu_swiglu("liger_kernel", trains=True), _liger, graph=False, limits=limits.LIGER),
        Peer(DENSE, "both products alone, batched", lambda layer: "has no backward" if layer.train else None,
             _dense_bmm, comparable=False, bound=True),
    )
}  # fmt: skip


def peer_named(name: str) -> Peer:
    """A peer of the table, `moesaic`, or `moesaic:<implementation>`."""
    if name == "moesaic" or name.startswith("moesaic:"):
        return moesaic(name.partition(":")[2])
    if name not in PEERS:
        raise ValueError(f"peer: must be one of {', '.join(PEERS)}, moesaic, moesaic:<implementation>; got {name!r}.")
    return PEERS[name]
