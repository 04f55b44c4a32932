"""What calls into the native kernels share: the numbers of dtypes and activations, pointers, and the call itself."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cpu_build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `enum dtype`
_NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu", "geglu_tanh", "reglu", "reglu2",
          "swiglu_oai", "swiglu_clamped", "swiglu_step", "swiglu_softcapped")  # fmt: skip
ACTIVATIONS = {name: i for i, name in enumerate(_NAMES)}  # `enum act`


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def call(entry: str, given: bytes) -> None:
    """Run a kernel on its packed arguments.

    Raises:
        MemoryError: its workspace cannot be had.
    """
    if getattr(_cpu_build.load().library, entry)(given):
        raise MemoryError("fused_experts: there is no memory for the workspace of its rows; split the tokens.")
