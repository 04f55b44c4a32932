"""`grouped_matmul` as a loop of `torch.mm` over experts: any device and dtype that torch multiplies.

It reads the group sizes on the host, so on a GPU it waits for the device: the portable path, not the fast one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import hardware


def why_not(problem: Any) -> str | None:
    return "the order of its sums depends on the batch" if problem.batch_invariant else None


def upcast_rows(dtype: torch.dtype, device: torch.device) -> float:
    """Rows from which copying a half-precision matrix to fp32 and using sgemm beats the half-precision product.

    A fact of the CPU, not a choice: bf16 products run at half the fp32 rate on Xeons with AVX512-BF16 and no AMX
    (Emerald Rapids, 2 cores, 2026-11-22: crossover at 64 to 96 rows) and at three times it on EPYC Zen 4
    (2 cores, 2026-11-22: 407 against 123 GFLOP/s), where widening never pays.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return float("inf")
    flags = hardware.cpu_flags()
    native = {"amx_bf16"} if dtype == torch.bfloat16 else {"amx_fp16", "avx512_fp16"}
    if flags & native or (
        dtype == torch.bfloat16 and "avx512_bf16" in flags and hardware.cpu_vendor() != "GenuineIntel"
    ):
        return float("inf")
    return 96


FEW = 16  # experts; at 8 of 64 the Python loop is the faster one, at 46 torch's (EPYC Zen 4, 2026-11-22)


def _native(a: Tensor, w: Tensor) -> bool:
    """Can `torch.nn.functional.grouped_mm` multiply these? It wants rows on 16-byte boundaries (a GPU also the first
    ones, which a view may miss), and no fp64."""
    if not hasattr(torch.nn.functional, "grouped_mm") or a.dtype == torch.float64:
        return False
    size, (we, wk, wn) = a.element_size(), w.stride()
    if a.stride(1) != 1 or min(wk, wn) != 1 or (a.is_cuda and (a.data_ptr() | w.data_ptr()) % 16):
        return False
    return not (a.stride(0) * size % 16 or we * size % 16 or max(wk, wn) * size % 16)


class Products:
    """The products of one call: rows of each expert times its matrix, `(n, K) @ (K, N)`.

    With few rows an expert, Python's own time between products counts, the more so since every product streams a
    matrix through the cache and takes Python's working set with it: then torch's loop in C++ runs them, where it is
    legal. That one visits experts without rows too, so a handful of experts is left to Python.
    """

    def __init__(self, rows: Tensor):
        self.limit = upcast_rows(rows.dtype, rows.device)
        self._flat: Tensor | None = None

    def __call__(
        self,
        a: Tensor,
        w: Tensor,
        experts: Sequence[int],
        sizes: Sequence[int],
        bias: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`out[group] = a[group] @ w[expert] (+ bias[expert])`, rounded once; `w (E, K, N)` may have any strides."""
        if out is None:
            if bias is None and len(sizes) > FEW and max(sizes) < self.limit and _native(a, w):
                first, rows = experts[0], [0] * (experts[-1] + 1 - experts[0])
                for e, n in zip(experts, sizes, strict=True):
                    rows[e - first] = n
                ends = torch.tensor(list(itertools.accumulate(rows)), dtype=torch.int32, device=a.device)
                return torch.nn.functional.grouped_mm(a, w[first : experts[-1] + 1], offs=ends)
            out = a.new_empty(a.shape[0], w.shape[2])
        for e, n, part, into in zip(experts, sizes, a.split(sizes), out.split(sizes), strict=True):
            if n >= self.limit:
                wide = torch.mm(part.float(), self._widen(w[e]))
                into.copy_(wide if bias is None else wide.add_(bias[e]))
            elif bias is None:
                torch.mm(part, w[e], out=into)
            else:
                torch.addmm(bias[e], part, w[e], out=into)
        return out

    def _widen(self, w: Tensor) -> Tensor:
        """`w` in fp32, copied in its own memory order so that the copy streams, into scratch for the next one too."""
        if self._flat is None or self._flat.numel() < w.numel():
            self._flat = torch.empty(w.numel(), dtype=torch.float32, device=w.device)
        scratch = self._flat[: w.numel()]
        if w.stride(0) == 1:
            return scratch.view(w.shape[1], w.shape[0]).copy_(w.mT).mT
        return scratch.view(w.shape).copy_(w)


def wgrad(
    grad: Tensor, rows: Tensor, out: Tensor, experts: Sequence[int], sizes: Sequence[int], transposed: bool
) -> None:
    """`out[expert] = grad[group].T @ rows[group]`, in the weight's own layout; experts not named are left alone."""
    left, right = (rows, grad) if transposed else (grad, rows)
    for e, a, b in zip(experts, left.split(sizes), right.split(sizes), strict=True):
        torch.mm(a.mT, b, out=out[e])


def bias_grad(grad: Tensor, out: Tensor, experts: Sequence[int], sizes: Sequence[int]) -> None:
    """`out[expert] = sum of grad over its rows`; experts not named are left alone."""
    for e, part in zip(experts, grad.split(sizes), strict=True):
        out[e] = part.sum(0)


def zero_gradients(operands: Any, needs: Any) -> dict[str, Tensor]:
    """Zeros for the gradients that are needed: dropped rows and experts without rows keep them.

    Zeroing what products will write is not waste: it brings the pages in, which is slower inside a product (OLMoE in
    fp32, 8 tokens, EPYC Zen 4, 2026-11-22: 0.72 s forward and backward, 1.18 s from empty memory).
    """
    wanted = ((name, t) for name, t, need in zip(operands._fields, operands, needs, strict=True) if need)
    return {name: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for name, t in wanted if t is not None}


def live_experts(expert_offsets: Tensor) -> tuple[list[int], list[int]]:
    """The experts that have rows, and how many each."""
    ends = expert_offsets.tolist()
    pairs = [(e, t - s) for e, (s, t) in enumerate(itertools.pairwise(ends)) if t > s]
    return [e for e, _ in pairs], [n for _, n in pairs]


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor], None]:
    experts, sizes = live_experts(o.expert_offsets)
    live = sum(sizes)
    out = o.rows.new_empty(o.rows.shape[0], problem.intermediate_size)
    Products(o.rows)(o.rows[:live], o.w if problem.transposed else o.w.mT, experts, sizes, o.bias, out[:live])
    out[live:] = 0
    return (out,), None


def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    experts, sizes = live_experts(o.expert_offsets)
    live = sum(sizes)
    grad, made = grads.out, zero_gradients(o, needs)
    if needs.rows:
        weights = o.w.mT if problem.transposed else o.w
        Products(o.rows)(grad[:live], weights, experts, sizes, out=made["rows"][:live])
    if needs.w:
        wgrad(grad[:live], o.rows[:live], made["w"], experts, sizes, problem.transposed)
    if needs.bias:
        bias_grad(grad[:live], made["bias"], experts, sizes)
    return made
