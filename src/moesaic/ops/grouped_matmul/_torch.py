"""`grouped_matmul` as a loop of `torch.mm` over experts: any device and dtype that torch multiplies.

It reads the group sizes on the host, so on a GPU it waits for the device: the portable path, not the fast one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import hardware


def why_not(problem) -> str | None:
    return None


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
    if flags & native or (dtype == torch.bfloat16 and "avx512_bf16" in flags and hardware.cpu_vendor() != "GenuineIntel"):
        return float("inf")
    return 96


def matrices(w: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    """The experts' matrices as `(K, N)` views, right operands of a product."""
    return (w if transposed else w.mT).unbind(0)


class Workspace:
    """Scratch for widened experts, grown on demand and shared by the products of one call."""

    def __init__(self, rows: Tensor):
        self.limit = upcast_rows(rows.dtype, rows.device)
        self._flat: Tensor | None = None

    def widen(self, w: Tensor) -> Tensor:
        """`w` in fp32, in its own memory order, so that the copy streams."""
        if self._flat is None or self._flat.numel() < w.numel():
            self._flat = torch.empty(w.numel(), dtype=torch.float32, device=w.device)
        if w.stride(0) == 1:
            return self._flat[: w.numel()].view(w.shape[1], w.shape[0]).copy_(w.mT).mT
        return self._flat[: w.numel()].view(w.shape).copy_(w)

    def mm(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """`out = a @ b (+ bias)`, rounded once, widened where that is faster."""
        if a.shape[0] >= self.limit:
            wide = torch.mm(a.float(), self.widen(b))
            out.copy_(wide if bias is None else wide.add_(bias))
        elif bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)


def _groups(expert_offsets: Tensor) -> list[tuple[int, int, int]]:
    """`(expert, first row, end)` of every expert that has rows."""
    ends = expert_offsets.tolist()
    return [(e, s, t) for e, (s, t) in enumerate(zip(ends, ends[1:], strict=False)) if t > s]



def grouped_matmul(rows: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None, problem) -> Tensor:
    out = rows.new_empty(rows.shape[0], problem.intermediate_size)
    work, ws, end = Workspace(rows), matrices(w, problem.transposed), 0
    for e, s, end in _groups(expert_offsets):
        work.mm(rows[s:end], ws[e], out[s:end], None if bias is None else bias[e])
    out[end:] = 0
    return out


def grouped_matmul_backward(
    grad: Tensor, rows: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None, problem, needs: Sequence[bool]
):
    groups, empty = _groups(expert_offsets), rows.new_empty(0)
    drows, dw, dbias = empty, empty.clone(), empty.clone()
    work, ws = Workspace(rows), matrices(w, not problem.transposed)
    if needs[0]:
        drows = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
        for e, s, t in groups:
            work.mm(grad[s:t], ws[e], drows[s:t])
    if needs[1]:
        dw = torch.zeros(w.shape, dtype=w.dtype, device=w.device)
        for e, s, t in groups:
            wgrad(grad[s:t], rows[s:t], dw[e], problem.transposed)
    if needs[2]:
        dbias = torch.zeros(w.shape[0], grad.shape[1], dtype=rows.dtype, device=rows.device)
        for e, s, t in groups:
            dbias[e] = grad[s:t].sum(0)
    return drows, dw, dbias


def wgrad(grad: Tensor, rows: Tensor, out: Tensor, transposed: bool) -> None:
    """One expert's weight gradient `grad.T @ rows`, in the weight's own layout."""
    left, right = (rows, grad) if transposed else (grad, rows)
    torch.mm(left.mT, right, out=out)
