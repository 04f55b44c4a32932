"""Mends Triton's CPU interpreter, so that bf16 is right where kernels run in it (`TRITON_INTERPRET=1`).

The interpreter (3.6 to 3.9) multiplies the raw bits of bf16 operands and truncates where hardware rounds to nearest: a
layer is wrong by ten orders of magnitude. `hardware` calls `mend` when it imports Triton to interpret.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np


@functools.cache
def mend() -> None:
    """Replace the interpreter's product and its narrowing of fp32; once a process, before any kernel is made."""
    tl: Any = importlib.import_module("triton.language")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")

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
