"""Mend Triton's CPU interpreter, which is wrong for bf16 in silence (3.6 to 3.9); imported by conftest for its effect.

`tl.dot` multiplies the 16-bit patterns of bf16 as integers, and fp32 is cut to bf16 instead of rounded to nearest even.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot, _cast, _fp_to_fp = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp


def _widened(handle: TensorHandle) -> TensorHandle:
    """bf16 as the same fp32 values; anything else as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle: TensorHandle) -> TensorHandle:
    """fp32 to bf16, to nearest even: add just under half of the last kept place, more by one if that place is odd."""
    values = np.ascontiguousarray(handle.data, np.float32)
    bits = values.view(np.uint32)
    kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), kept), tl.bfloat16)


def _narrows(source: TensorHandle, to) -> bool:
    return source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16


def _create_dot(self, a, b, *rest):
    return _dot(self, _widened(a), _widened(b), *rest)


def _cast_impl(self, source, to):
    return _rounded(source) if _narrows(source, to) else _cast(self, source, to)


def _create_fp_to_fp(self, source, to, rounding):
    return _rounded(source) if _narrows(source, to) else _fp_to_fp(self, source, to, rounding)


np.seterr(all="ignore")  # a GPU has no floating-point warnings
InterpreterBuilder.create_dot = _create_dot
InterpreterBuilder.cast_impl = _cast_impl
InterpreterBuilder.create_fp_to_fp = _create_fp_to_fp
