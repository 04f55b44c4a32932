"""Launching a Triton kernel again without asking again what it was compiled for.

`kernel[grid](...)` inspects every argument at every call, which costs more host time than a decode step can hide. The
caller here says by a key what the inspection would find; the second call with the same key goes to the compiled kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import hardware

_compiled: dict[tuple, Any] = {}
_INTERPRETING = hardware.interpreting()  # as it was when the kernels were made
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (lambda device: None)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    pointers: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    constants: tuple,
    key: tuple,
    num_warps: int = 4,
    num_stages: int = 3,
) -> None:
    """Run `kernel[grid](*pointers, *numbers, *constants)`.

    Args:
        pointers: tensors, all on one device, or None for a pointer that the constants make unused.
        numbers: run-time integers; those that `key` does not hold must be in the kernel's `do_not_specialize`.
        constants: the compile-time arguments.
        key: hashable, and equal only for calls that Triton would compile alike: the dtypes, which pointers are None,
            the numbers that are specialised, and the constants (by name where they are functions).
    """
    args = (*pointers, *numbers, *constants)
    if _INTERPRETING:
        kernel[grid](*args)
        return
    address = 0
    for pointer in pointers:
        if pointer is not None:
            address |= pointer.data_ptr()
    if address & 15 or max(numbers) >= 2**31:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages)  # compiled for less than we assume
        return
    device = pointers[0].get_device()  # type: ignore[union-attr]
    full = (id(kernel), device, num_warps, num_stages, key)
    compiled = _compiled.get(full)
    if compiled is None:
        _compiled[full] = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages)
    else:
        compiled[grid](*args, stream=_raw_stream(device))
