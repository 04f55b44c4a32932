"""Launch: a Triton kernel with everything fixed but its pointers and a few numbers.

`kernel[grid](...)` inspects every argument at every call, which costs more host time than a decode step can hide. A
`Launch` is made once for a problem (its makers are cached) and from its second call on goes to the compiled kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import hardware

_INTERPRETING = hardware.interpreting()  # as it was when the kernels were made


@functools.cache
def _direct() -> Any:
    """Triton's knobs where `compiled.run` takes its arguments as `_launch` gives them (3.5 and 3.6), else None."""
    version = hardware.triton.__version__.split(".")[:2]
    return hardware.triton.knobs.runtime if version in (["3", "5"], ["3", "6"]) else None


def _watched(knobs: Any) -> bool:
    """Does a profiler hang on the launch hooks? Triton's own call pays for them even when nobody does."""
    hook = knobs.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


class Launch:
    """`kernel[grid](*pointers, *numbers, *constants)`.

    Args:
        constants: the compile-time arguments, which come last in the kernel's signature.

    A launch is called with pointers (tensors of one device, or None) and numbers. From call to call, the pointers'
    dtypes, which of them are None, and the numbers that the kernel specialises on must not change; numbers that do
    change must be in its `do_not_specialize` and below 2^31.
    """

    __slots__ = ("_compiled", "constants", "grid", "kernel", "options")

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], constants: tuple, num_warps: int = 4, num_stages: int = 3
    ):
        self.kernel, self.grid, self.constants = kernel, grid, constants
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self._compiled: dict[int, Any] = {}

    def __call__(self, pointers: tuple[Tensor | None, ...], numbers: tuple[int, ...] = ()) -> None:
        arguments = (*pointers, *numbers, *self.constants)
        if _INTERPRETING:
            self.kernel[self.grid](*arguments)
            return
        address = 0
        for pointer in pointers:
            if pointer is not None:
                address |= pointer.data_ptr()
        device = pointers[0].get_device()  # type: ignore[union-attr]
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self._launch(device, address, arguments)
        else:
            self._launch(device, address, arguments)

    def _launch(self, device: int, address: int, arguments: tuple) -> None:
        compiled = self._compiled.get(device)
        if address & 15:  # a compiled kernel assumes addresses on 16 bytes
            self.kernel[self.grid](*arguments, **self.options)
        elif compiled is None:
            self._compiled[device] = self.kernel[self.grid](*arguments, **self.options)
        elif (knobs := _direct()) is None or _watched(knobs):
            compiled[self.grid](*arguments)
        else:
            x, y, z = self.grid
            stream = torch._C._cuda_getCurrentRawStream(device)
            compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
