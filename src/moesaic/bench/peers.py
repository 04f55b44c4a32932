"""PEERS: what other people run, one adapter each. To add one, write an adapter and put it in the table.

Adapters of GPU libraries are in `libraries`.

An adapter says why it cannot run a layer, without importing the package it stands for, and builds `call(batch) -> y`.
Packages are imported when their adapter is built. Each call gets the router's answer in the form that the peer takes;
everything that the peer must do with it (sorting, index tables) is inside the timed call, ours included.
"""

from __future__ import annotations

import importlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS, apply
from ..hardware import MIN_COMPUTE_CAPABILITY
from ..op import OPS, Explanation, explain
from ..ops.fused_experts import fused_experts
from ..routing import Routing
from . import libraries, limits
from .layer import Batch, Layer
from .libraries import Call, found


@dataclass(frozen=True)
class Peer:
    """One candidate.

    Attributes:
        why_not: `layer -> str | None`, the reason why it cannot run it.
        build: `layer -> call(batch) -> y`.
        graph: its call can be captured in a CUDA graph.
        comparable: whether it computes this layer's function, so that its error means something.
        ours: it is moesaic.
        bound: it skips part of the layer, so ours is not ranked against it.
        limits: what its own tuning was held to; goes with its figures.
    """

    name: str
    title: str
    why_not: Callable[[Layer], str | None]
    build: Callable[[Layer], Call]
    graph: bool = True
    comparable: Callable[[Layer], bool] = lambda layer: True
    ours: bool = False
    bound: bool = False
    limits: str = ""


def foreign_errors() -> tuple[type[BaseException], ...]:
    """What another package's code may raise at import, compilation or call; reported as the reason, never hidden."""
    own = (getattr(sys.modules.get(module), name, None) for module, name in _THEIR_ERRORS)
    return (
        ImportError, OSError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError,
        NameError, ArithmeticError, SyntaxError, subprocess.SubprocessError, *(error for error in own if error),
    )  # fmt: skip


# those that are nothing more than an Exception; all others derive from one above
_THEIR_ERRORS = (
    ("triton.errors", "TritonError"),
    ("triton_kernels.matmul_ogs", "InapplicableConstraint"),
    ("cutlass.base_dsl.common", "DSLBaseError"),
    ("cutlass._mlir.ir", "MLIRError"),
)


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


def explanation(layer: Layer, tokens: int) -> Explanation:
    """Which implementation of ours runs this layer, and why."""
    fields = layer.case.problem(tokens, layer.dtype, layer.device.type, training=layer.train)
    return explain("fused_experts", **fields)


def padding(implementation: str, layer: Layer, batches: list[Batch]) -> float | None:
    """Rows that an implementation of ours computes for nobody over real rows, mean of the batches; None without tiles.

    Of the forward pass, and of its up product where tiles differ.
    """
    extra = getattr(OPS["fused_experts"].implementation(implementation), "padding", None)
    if extra is None:
        return None
    return statistics.mean(extra(explanation(layer, batch.x.shape[0]).problem, layer.loads(batch)) for batch in batches)


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


DENSE = "dense_bmm"  # with the weighted sum's bytes behind it, the dense bound

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torch_loop", "torch, loop over experts", lambda layer: None, _torch_loop, graph=False),
        Peer("torch_grouped_mm", "torch, grouped_mm", _torch_grouped_mm_why_not, _torch_grouped_mm),
        Peer("hf_grouped_mm", "Hugging Face grouped_mm", _hf_why_not, _hf_grouped_mm),
        Peer("vllm", "vLLM (Triton)", libraries.vllm_why_not, libraries.vllm),
        Peer("triton_kernels", "triton_kernels", libraries.gpu_library("triton_kernels", gpt_oss=True),
             libraries.triton_kernels, comparable=lambda layer: layer.gpt_oss),
        Peer("deepgemm", "DeepGEMM in plain torch", libraries.deepgemm_why_not, libraries.deepgemm),
        Peer("sonic", "SonicMoE", libraries.sonic_why_not, libraries.sonic, limits=limits.SONIC),
        Peer("liger", "Liger", libraries.gpu_library("liger_kernel", trains=True), libraries.liger, graph=False,
             limits=limits.LIGER),
        Peer(DENSE, "both products alone, batched", lambda layer: "has no backward" if layer.train else None,
             _dense_bmm, comparable=lambda layer: False, bound=True),
    )
}  # fmt: skip


def peer_named(name: str) -> Peer:
    """A peer of the table, `moesaic`, or `moesaic:<implementation>`."""
    if name == "moesaic" or name.startswith("moesaic:"):
        return moesaic(name.partition(":")[2])
    if name not in PEERS:
        raise ValueError(f"peer: must be one of {', '.join(PEERS)}, moesaic, moesaic:<implementation>; got {name!r}.")
    return PEERS[name]
