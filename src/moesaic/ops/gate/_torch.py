"""`router_logits` in torch: half-precision operands as they are where the product can widen its result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEEDS = ""


def why_not(problem: Any) -> str | None:
    return None


def _half(x: Tensor, weight: Tensor) -> bool:
    """Both in the same half precision, on a device whose product can widen its result."""
    return x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of half-precision operands with an fp32 result."""
    return torch.mm(a, b, out_dtype=torch.float32)


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor], None]:
    if _half(o.x, o.weight):
        return (_product(o.x, o.weight.mT),), None
    wide = torch.promote_types(o.x.dtype, torch.float32)
    return (o.x.to(wide) @ o.weight.to(wide).mT,), None


def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    (x, weight), grad = o, grads.logits
    out: dict[str, Tensor] = {}
    if not _half(x, weight):
        if needs.x:
            out["x"] = (grad @ weight.to(grad.dtype)).to(x.dtype)
        if needs.weight:
            out["weight"] = (grad.mT @ x.to(grad.dtype)).to(weight.dtype)
        return out
    high = grad.to(x.dtype)
    low = (grad - high.to(grad.dtype)).to(x.dtype)
    if needs.x:
        out["x"] = (_product(high, weight) + _product(low, weight)).to(x.dtype)
    if needs.weight:
        out["weight"] = (_product(high.mT, x) + _product(low.mT, x)).to(weight.dtype)
    return out
