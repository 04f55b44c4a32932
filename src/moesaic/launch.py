"""Launch: a Triton kernel with everything fixed but its pointers and a few numbers.

`kernel[grid](...)` inspects every argument at every call, which costs more host time than a decode step can hide. A
`Launch` is made once for a problem (its makers are cached) and from its second call on goes to the compiled kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import hardware

_INTERPRETING = hardware.interpreting()  # as it was when the kernels were made


@functools.cache
def _direct() -> bool:
    """Triton 3.6 for CUDA has the C launcher that `_prepare` calls; others go through `compiled[grid]`."""
    return hardware.triton.__version__.startswith("3.6.") and torch.version.hip is None


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
        ready = self._compiled.get(device)
        if address & 15:  # a compiled kernel assumes addresses on 16 bytes
            self.kernel[self.grid](*arguments, **self.options)
        elif ready is None:
            self._compiled[device] = self._prepare(self.kernel[self.grid](*arguments, **self.options))
        else:
            ready(torch._C._cuda_getCurrentRawStream(device), arguments)

    def _prepare(self, compiled: Any) -> Callable[[int, tuple], None]:
        """`(stream, arguments) -> None`: the compiled kernel, with all that will not change looked up."""
        general, launcher = compiled[self.grid], compiled.run
        scratch = getattr(launcher, "global_scratch_size", 1) or getattr(launcher, "profile_scratch_size", 1)
        if not _direct() or scratch:
            return lambda stream, arguments: general(*arguments, stream=stream)
        c_launch, grid, knobs = launcher.launch, self.grid, hardware.triton.knobs.runtime
        fixed = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
                 compiled.packed_metadata, None, None, None)  # fmt: skip

        def run(stream: int, arguments: tuple) -> None:
            if knobs.launch_enter_hook is not None:  # a profiler wants to be told
                general(*arguments, stream=stream)
            else:
                c_launch(*grid, stream, *fixed, *arguments)

        return run
