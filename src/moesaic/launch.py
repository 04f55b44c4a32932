"""Launch: a Triton kernel with everything fixed but its pointers and a few numbers.

`kernel[grid](...)` inspects every argument at every call, which costs more host time than a decode step can hide. A
`Launch` is made once for a problem (its makers are cached) and from its second call on goes to the compiled kernel.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hardware
from .hardware import tl, triton

_INTERPRETING = hardware.interpreting()  # as it was when the kernels were made
OVERLAP = True  # may a launch begin while the one before it ends, where a GPU can


def can_overlap(arch: str) -> bool:
    return arch.startswith("sm_") and int(arch[3:]) >= 90


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """The first that a kernel does: wait for the launch before it to end, and let the one behind it come.

    What comes early (programmatic dependent launch) takes the processors that its forerunner leaves, and waits here.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def pow2(n: int) -> int:
    """The smallest power of two that is not below n; 1 for n = 0."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def unit_rows(x: Tensor) -> Tensor:
    """x with unit stride along its last dimension, copied only if it has not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


class TensorMap(NamedTuple):
    """How a kernel sees a pointer's memory: an array of `shape` and `strides`, in elements; one access moves a `box`.

    Gluon's kernels know a map's layout in shared memory, Triton's choose it.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    gluon: bool = False

    def descriptor(self, t: Tensor) -> Any:
        """What Triton takes, and encodes anew at every call."""
        parts = list(map(list, self[:3]))
        if not self.gluon:
            return importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor(t, *parts)
        made = importlib.import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
        dtype = hardware.gl.bfloat16 if t.dtype == torch.bfloat16 else hardware.gl.float16
        return made(t, *parts, hardware.gl.NVMMASharedLayout.get_default_for(parts[2], dtype))


@functools.cache
def _knobs() -> Any:
    """Triton's knobs where `_entry` knows how a compiled kernel is entered (3.5 and 3.6), else None."""
    version = hardware.triton.__version__.split(".")[:2]
    return hardware.triton.knobs.runtime if version in (["3", "5"], ["3", "6"]) else None


def _watched(knobs: Any) -> bool:
    """Does a profiler hang on the launch hooks? Triton's own call pays for them even when nobody does."""
    hook = knobs.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def _entry(compiled: Any) -> tuple[Any, tuple, Callable | None]:
    """`(call, middle, encode)` such that `call(x, y, z, stream, *middle, *arguments)` launches a compiled kernel.

    On NVIDIA with Triton 3.6 and no scratch memory that is the generated C function itself. It takes a tensor map as
    several arguments, which `encode(n, descriptor)` makes of the kernel's n-th; None where Triton's own call does it.
    """
    run, hooks = compiled.run, (None, None, None)
    if hardware.triton.__version__.startswith("3.6.") and hasattr(run, "launch_pdl"):
        if run.global_scratch_size == run.profile_scratch_size == 0:
            flags = (run.launch_cooperative_grid, run.launch_pdl, None, None)
            call, encode, metas = run.launch, None, getattr(compiled.metadata, "tensordesc_meta", None)
            wrapped = inspect.getclosurevars(call).nonlocals.get("launcher") if inspect.isfunction(call) else None
            if metas and wrapped is not None:
                call, driver = wrapped, importlib.import_module("triton.backends.nvidia.driver")
                encode = functools.partial(_encode, driver, metas)
            return call, (compiled.function, *flags, compiled.packed_metadata, *hooks), encode
    return run, (compiled.function, compiled.packed_metadata, *hooks), None


def _encode(driver: Any, metas: Any, n: int, descriptor: Any) -> list:
    return driver.make_tensordesc_arg(descriptor, metas[n])


class Launch:
    """`kernel[grid](*pointers, *numbers, *constants)`.

    Args:
        constants: the compile-time arguments, which come last in the kernel's signature.
        overlaps: does the kernel take OVERLAP behind them, and `follow` the launch before it?
        maps: which pointers the kernel takes as tensor maps, by their places.
        options: the compiler's and the launcher's, beside warps and stages.

    A launch is called with pointers (tensors of one device, or None; a tensor first) and numbers. From call to call,
    the pointers' dtypes, which of them are None, and the numbers that the kernel specialises on must not change;
    numbers that do change must be in its `do_not_specialize` and below 2^31.
    """

    __slots__ = ("_entries", "_maps", "constants", "grid", "kernel", "options", "overlaps")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        constants: tuple,
        num_warps: int = 4,
        num_stages: int = 3,
        maps: dict[int, TensorMap] | None = None,
        overlaps: bool = False,
        **options: Any,
    ):
        self.kernel, self.grid, self.constants, self.overlaps = kernel, grid, constants, overlaps
        self.options = {"num_warps": num_warps, "num_stages": num_stages, **options}
        self._entries: dict[tuple[int, bool], tuple[Any, ...]] = {}
        # (number, place, map, its arguments by address) of each, the last first: one becomes several arguments
        numbered = enumerate(sorted((maps or {}).items()))
        self._maps = [(n, place, tensor_map, {}) for n, (place, tensor_map) in numbered][::-1]

    def __call__(self, pointers: tuple[Any, ...], numbers: tuple[int, ...] = ()) -> None:
        if _INTERPRETING:
            self.kernel[self.grid](*self._for_triton(pointers), *numbers, *self.constants, *[False] * self.overlaps)
            return
        device = pointers[0].get_device()
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self(pointers, numbers)
            return
        # plain addresses spare the C side a method call and a driver's question each
        arguments, bits = [], 0
        for pointer in pointers:
            address = 0 if pointer is None else pointer.data_ptr()
            bits |= address
            arguments.append(address)
        aligned = not bits & 15  # which a compiled kernel relies on
        entry = self._entries.get((device, OVERLAP))
        if entry is None or not aligned:
            constants, options = self.constants, self.options
            if self.overlaps:
                overlap = OVERLAP and can_overlap(hardware.arch_of(torch.device("cuda", device)))
                constants, options = (*constants, overlap), options | (dict(launch_pdl=True) if overlap else {})
            compiled = self.kernel[self.grid](*self._for_triton(pointers), *numbers, *constants, **options)
            if aligned:
                self._entries[device, OVERLAP] = (compiled, _knobs(), *_entry(compiled), constants)
            return
        compiled, knobs, call, middle, encode, constants = entry
        if knobs is None or _watched(knobs) or (self._maps and encode is None):
            compiled[self.grid](*self._for_triton(pointers), *numbers, *constants)
            return
        for n, place, tensor_map, made in self._maps:
            address = arguments[place]
            encoded = made.get(address)  # asked once: another thread may clear in between
            if encoded is None:
                if len(made) >= 1024:  # those of the last calls are kept
                    made.clear()
                encoded = made[address] = encode(n, tensor_map.descriptor(pointers[place]))
            arguments[place : place + 1] = encoded
        stream = torch._C._cuda_getCurrentRawStream(device)
        call(*self.grid, stream, *middle, *arguments, *numbers, *constants)

    def _for_triton(self, pointers: tuple[Any, ...]) -> list:
        given = list(pointers)
        for _, place, tensor_map, _ in self._maps:
            given[place] = tensor_map.descriptor(given[place])
        return given
