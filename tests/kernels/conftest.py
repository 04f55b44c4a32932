"""The kernel suite runs on the GPU if there is one, else in Triton's interpreter (`TRITON_INTERPRET=1`) on the CPU.

The interpreter (3.6 to 3.9) multiplies the raw bits of bf16 operands and truncates where hardware rounds to nearest;
both are mended here, before any kernel is made.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesaic import hardware


def mend_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def widen(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        return handle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def to_bf16(values):
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).astype(np.uint32) >> 16
        return np.where(np.isnan(values), np.uint16(0x7FC0), nearest.astype(np.uint16))

    def narrows(source, target):
        return source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16

    def create_dot(self, a, b, acc, *rest):
        return dot(self, widen(a), widen(b), acc, *rest)

    def cast_impl(self, source, target):
        return handle(to_bf16(source.data), tl.bfloat16) if narrows(source, target) else cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        if narrows(source, target):
            return handle(to_bf16(source.data), tl.bfloat16)
        return convert(self, source, target, rounding)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp


if hardware.interpreting() and hardware.has_triton():
    mend_interpreter()


def pytest_configure(config):
    # numpy's warnings about values in lanes that a mask throws away
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not hardware.interpreting() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def implementation(request, device) -> str:
    arch = hardware.arch_of(torch.device(device))
    if request.param == "triton" and (reason := hardware.triton_why_not(device, arch)):
        pytest.skip(reason)
    return request.param
