"""The oracle for `router_logits`: one product in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEEDS = ""


def why_not(problem: Any) -> str | None:
    return None


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor], None]:
    return ((o.x.double() @ o.weight.double().mT).to(torch.promote_types(o.x.dtype, torch.float32)),), None


def backward(grads: Any, o: Any, saved: Any, problem: Any, needs: Any) -> dict[str, Tensor]:
    (x, weight), grad, out = o, grads.logits.double(), {}
    if needs.x:
        out["x"] = (grad @ weight.double()).to(x.dtype)
    if needs.weight:
        out["weight"] = (grad.mT @ x.double()).to(weight.dtype)
    return out
