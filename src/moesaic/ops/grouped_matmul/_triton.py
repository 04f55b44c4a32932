"""`grouped_matmul` in Triton: the kernels of `gpu/`, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...launch import unit_rows
from . import gpu
from .gpu.schedule import TileTable
from .gpu.spec import Epilogue, Gemm, GemmSpec
from .gpu.wgrad import bias_grad, wgrad

NEEDS = "triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(problem: Any) -> str | None:
    if problem.dtype not in DTYPES:
        return f"needs bf16, fp16 or fp32, got {str(problem.dtype).removeprefix('torch.')}"
    return gpu.forced_why_not(problem.kernel, _contiguous(problem)) if problem.kernel else None


def details(problem: Any) -> list[str]:
    """What `explain` shows: the kernel and its tiles, and why not the others."""
    return gpu.explained("product", _contiguous(problem).of(problem.num_rows), False, problem.kernel)


def _contiguous(problem: Any) -> GemmSpec:
    """The forward product of rows and weights that lie in memory without gaps."""
    N, K = problem.intermediate_size, problem.hidden_size
    along_n, along_k = (1, N) if problem.transposed else (K, 1)
    strides = (K, N * K, along_n, along_k)
    return _spec(problem, problem.num_experts, N, K, strides, Epilogue(bias=problem.bias))


def _spec(
    problem: Any, experts: int, N: int, K: int, strides: tuple[int, int, int, int], epilogue: Epilogue
) -> GemmSpec:
    return GemmSpec(
        problem.gpu, problem.dtype, experts, N, K, strides, epilogue=epilogue, zero_tail=True,
        tf32=problem.allow_tf32, batch_invariant=problem.batch_invariant,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _choices(problem: Any, experts: int, N: int, K: int, strides: tuple[int, int, int, int], bias: bool) -> gpu.Choices:
    return gpu.choices(_spec(problem, experts, N, K, strides, Epilogue(bias=bias)), kernel=problem.kernel)


def _product(x: Tensor, w: Tensor, offsets: Tensor, problem: Any, bias: Tensor | None = None) -> Tensor:
    """`w` is a view `(E, N, K)`."""
    E, N, K = w.shape
    if x.shape[0] == 0:
        return x.new_empty(0, N)
    choices = _choices(problem, E, N, K, (x.stride(0), *w.stride()), bias is not None)
    gemm: Gemm = choices.gemm(x.shape[0])
    return gemm(x, w, TileTable(offsets, x.shape[0]), bias=None if bias is None else bias.contiguous())


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor], None]:
    w = o.w.mT if problem.transposed else o.w
    return (_product(unit_rows(o.rows), w, o.expert_offsets, problem, o.bias),), None


def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    grad, rows, out = unit_rows(grads.out), unit_rows(o.rows), {}
    if needs.rows:
        w = o.w if problem.transposed else o.w.mT
        out["rows"] = _product(grad, w, o.expert_offsets, problem)
    if needs.w:
        out["w"] = wgrad(
            grad, rows, o.expert_offsets, o.w, problem.transposed, problem.gpu.arch, problem.allow_tf32
        )  # fmt: skip
    if needs.bias:
        out["bias"] = bias_grad(grad, o.expert_offsets, o.bias)
    return out
