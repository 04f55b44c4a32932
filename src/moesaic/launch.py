"""Launching a Triton kernel again without asking again what it was compiled for.

`kernel[grid](...)` inspects every argument at every call, which costs more host time than a decode step can hide. The
caller here says by a key what the inspection would find; the second call with the same key goes to the compiled kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import hardware

_compiled: dict[tuple, Any] = {}


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
    if hardware.interpreting():
        kernel[grid](*args)
        return
    address = 0
    for pointer in pointers:
        if pointer is not None:
            address |= pointer.data_ptr()
    if address & 15 or any(n >= 2**31 for n in numbers):
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages)  # compiled for less than we assume
        return
    first = pointers[0]
    assert first is not None
    full = (id(kernel), first.device.index, num_warps, num_stages, key)
    compiled = _compiled.get(full)
    if compiled is None:
        _compiled[full] = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages)
    else:
        compiled[grid](*args)
