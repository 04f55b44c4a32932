"""The adapters of GPU libraries: why one cannot run a layer, and its call. `peers` holds the table.

A library is imported when its adapter is built. It gets weights as it wants them, converted once, outside the timing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, apply
from . import limits
from .layer import Batch, Layer

Call = Callable[[Batch], Tensor]

ONE_FORM = "its adapter knows concatenated SwiGLU without biases alone"
TWO_FORMS = "its adapter knows concatenated SwiGLU without biases, and gpt-oss's clipped one with them"


def found(module: str) -> bool:
    """Whether a top-level module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def gpu_library(package: str, trains: bool = False, gpt_oss: bool = False) -> Callable[[Layer], str | None]:
    """The usual reasons of a library for bf16 and fp16 SwiGLU on a GPU; `gpt_oss`: its adapter knows that form too."""

    def why_not(layer: Layer) -> str | None:
        if layer.device.type != "cuda":
            return "needs a GPU"
        if not found(package):
            return f"{package} is not installed"
        if layer.train and not trains:
            return f"{package} has no backward"
        if not (layer.plain_swiglu or (gpt_oss and layer.gpt_oss)):
            return TWO_FORMS if gpt_oss else ONE_FORM
        if layer.dtype not in (torch.bfloat16, torch.float16):
            return f"takes bf16 and fp16, got {layer.dtype}"
        return None

    return why_not


# ---------------------------------------------------------------- vLLM
def vllm_why_not(layer: Layer) -> str | None:
    return gpu_library("vllm_shim" if found("vllm_shim") else "vllm", gpt_oss=True)(layer)


def vllm(layer: Layer) -> Call:
    """vLLM's Triton `fused_experts`; `vllm_shim` stands in where only the wheel's files were unpacked.

    Its `SWIGLUOAI` has gpt-oss's constants built in and reads gate and up interleaved, as they are stored.
    """
    package = "vllm.model_executor.layers.fused_moe"
    if found("vllm_shim"):
        experts = importlib.import_module("vllm_shim").fused_experts()
    else:
        experts = importlib.import_module(f"{package}.fused_moe").fused_experts
    up, down = layer.output_major()
    if layer.plain_swiglu:
        return lambda batch: experts(batch.x, up, down, batch.weights, batch.ids)
    activation = importlib.import_module(f"{package}.activation").MoEActivation.SWIGLUOAI
    biases = importlib.import_module(f"{package}.config").biased_moe_quant_config(layer.b_gate_up, layer.b_down)
    return lambda batch: experts(
        batch.x, up, down, batch.weights, batch.ids, activation=activation, quant_config=biases
    )


# ---------------------------------------------------------------- triton_kernels
def triton_kernels(layer: Layer) -> Call:
    """Triton's `triton_kernels`: its `routing` gets the router's choice, and takes the softmax over it itself.

    Its SwiGLU computes gate·sigmoid(alpha·gate)·(up + 1), clipped where there is a limit: gpt-oss's. Of a plain SwiGLU
    it therefore has the time but not the output.
    """
    ogs: Any = importlib.import_module("triton_kernels.matmul_ogs")
    swiglu = importlib.import_module("triton_kernels.swiglu").swiglu_fn
    routing = importlib.import_module("triton_kernels.routing").routing
    act, K = ACTIVATIONS[layer.case.activation], layer.case.top_k
    up, down = layer.output_major()
    if not layer.interleaved:  # it reads g0 u0 g1 u1 ...
        up = torch.stack(up.chunk(2, 1), 2).flatten(1, 2)
    b_up, b_down = (None if b is None else b.float() for b in (layer.b_gate_up, layer.b_down))  # split-K wants fp32
    constants = act.alpha, act.limit if math.isfinite(act.limit) else None
    activation = ogs.FusedActivation(ogs.FnSpecs("swiglu", swiglu, ("alpha", "limit")), constants, 2)

    def call(batch: Batch) -> Tensor:
        data, gather, scatter = routing(batch.logits, K, expt_indx=batch.ids)
        h = ogs.matmul_ogs(batch.x, up.mT, b_up, data, gather_indx=gather, fused_activation=activation)
        return ogs.matmul_ogs(h, down.mT, b_down, data, scatter_indx=scatter, gammas=data.gate_scal)

    return call


# ---------------------------------------------------------------- DeepGEMM
def deepgemm_why_not(layer: Layer) -> str | None:
    if reason := gpu_library("deep_gemm")(layer):
        return reason
    if layer.dtype != torch.bfloat16:
        return f"its 16-bit grouped GEMM takes bf16 alone, got {layer.dtype}"
    if torch.cuda.get_device_capability(layer.device)[0] < 9:
        return "deep_gemm needs compute capability 9.0 or newer"
    return None


def deepgemm(layer: Layer) -> Call:
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


# ---------------------------------------------------------------- SonicMoE, Liger
def sonic_why_not(layer: Layer) -> str | None:
    reason = gpu_library("sonicmoe", trains=True)(layer)
    return "sonicmoe has no clipped SwiGLU" if reason == ONE_FORM and layer.gpt_oss else reason


def sonic(layer: Layer) -> Call:
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


def liger(layer: Layer) -> Call:
    """Liger's autograd function. `limits` says what it may try.

    It reads a count back to the host in every call, so no graph holds it.
    """
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    limits.liger()
    return lambda batch: function.apply(batch.x, layer.w_gate_up, layer.w_down, batch.ids, batch.weights)
