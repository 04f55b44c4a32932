"""Kernel: a Triton kernel whose launches cost little and whose compiled variants are told apart by what they hang on.

`kernel[grid](...)` inspects every argument at every call, which costs more host time than a decode step can hide. A
kernel is *bound* once to its compile-time arguments. The bound kernel keeps one entry for each set of things that a
compiled variant depends on: device, dtypes, which pointers are None, strides. The grid and the counts come with the
call, so that no entry hangs on how many tokens there are.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hardware, launcher
from .hardware import tl, triton
from .launcher import WARM, Pending, state

_INTERPRETING = hardware.interpreting()  # as it was when the kernels were made
_current_device = torch._C._cuda_getDevice if hasattr(torch._C, "_cuda_getDevice") else lambda: -1
Pointer = Tensor | None
Grid = tuple[int, int, int]


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


def aligned(t: Tensor) -> Tensor:
    """A copy of t with its strides, which begins at whole 16 bytes."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


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


class Kernel:
    """A Triton kernel, read from its signature: pointers, strides, counts, constants, in this order.

    Constants are annotated `constexpr`; counts stand in `do_not_specialize` (they vary from call to call, and lie
    below 2^31); the compiler may look at strides. A last constant `OVERLAP` says that the kernel begins with `follow`.
    """

    def __init__(self, function: Any):
        self.function = function
        parameters = inspect.signature(function.fn).parameters.values()
        constant = [p.name for p in parameters if "constexpr" in str(p.annotation)]
        self.name: str = function.fn.__name__
        self.arguments = [p.name for p in parameters if p.name not in constant]
        self.overlaps = constant[-1:] == ["OVERLAP"]
        self.constants = constant[: len(constant) - self.overlaps]
        # annotated ints of an interpreted kernel say nothing; a compiled one knows what it does not look at
        self.counts = [p.name for p in getattr(function, "params", ()) if p.do_not_specialize]
        self._bound: dict[Hashable, Bound] = {}
        if self.counts and self.arguments[-len(self.counts) :] != self.counts:
            raise TypeError(f"{self.name}: counts must follow the strides, got {self.arguments}.")

    def bind(
        self, *, num_warps: int = 4, num_stages: int = 3, maps: dict[str, TensorMap] | None = None, **constants: Any
    ) -> Bound:
        """The kernel with its constants by name, and the pointers that it takes as tensor maps."""
        if sorted(constants) != sorted(self.constants):
            odd = sorted(set(constants) ^ set(self.constants))
            raise TypeError(f"{self.name}: bind must name every constant once, got {', '.join(odd)} too few or many.")
        values = tuple(constants[name] for name in self.constants)
        key = (values, num_warps, num_stages, tuple((maps or {}).items()))
        if key not in self._bound:
            self._bound[key] = Bound(self, values, dict(num_warps=num_warps, num_stages=num_stages), maps or {})
        return self._bound[key]


class Bound:
    """A kernel with constants: `bound(grid, pointers, strides, counts)` launches it.

    `pointers` are tensors of one device, or None; the first is a tensor.
    """

    __slots__ = ("_entries", "_maps", "constants", "kernel", "options")

    def __init__(self, kernel: Kernel, constants: tuple[Any, ...], options: dict[str, Any], maps: dict[str, TensorMap]):
        self.kernel, self.constants, self.options = kernel, constants, options
        self._entries: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        # (number, place, map, its arguments by address) of each, the last first: one becomes several arguments
        placed = sorted((kernel.arguments.index(name), tensor_map) for name, tensor_map in maps.items())
        self._maps = [(n, place, tensor_map, {}) for n, (place, tensor_map) in enumerate(placed)][::-1]

    def __call__(
        self, grid: Grid, pointers: tuple[Pointer, ...], strides: tuple[int, ...] = (), counts: tuple[int, ...] = ()
    ) -> None:
        pending = state.pending
        if pending is not None and pending is not WARM:
            pending.add(self, pointers, strides, counts)
            return
        if _INTERPRETING:
            given = self._for_triton(pointers)
            self.kernel.function[grid](*given, *strides, *counts, *self.constants, *[False] * self.kernel.overlaps)
            return
        device = pointers[0].get_device()  # pyright: ignore[reportOptionalMemberAccess]
        if device != _current_device():
            with torch.cuda.device(device):
                self(grid, pointers, strides, counts)
            return
        # plain addresses spare the C side a method call and a driver's question each
        arguments: list[Any] = []
        dtypes: list[torch.dtype | None] = []
        bits = 0
        for p in pointers:
            if p is None:
                arguments.append(0)
                dtypes.append(None)
            else:
                address = p.data_ptr()
                bits |= address
                arguments.append(address)
                dtypes.append(p.dtype)
        if bits & 15:  # compiled kernels load 16 bytes at a time; what is written is ours and begins where it should
            self(
                grid, tuple(p if p is None or not p.data_ptr() & 15 else aligned(p) for p in pointers), strides, counts
            )
            return
        key = (device, state.overlap, strides, *dtypes)
        entry = self._entries.get(key)
        if entry is None:
            if pending is not None:
                state.pending = Pending()
                state.pending.add(self, pointers, strides, counts)
                return
            constants, options = self._finished(device)
            given = self._for_triton(pointers)
            compiled = self.kernel.function[grid](*given, *strides, *counts, *constants, **options)
            self._entries[key] = (compiled, launcher.knobs(), *launcher.entry(compiled), constants)
            return
        compiled, knobs, call, middle, encode, constants = entry
        hook = None if knobs is None else knobs.launch_enter_hook  # a profiler's
        if knobs is None or (hook is not None and launcher.watched(hook)) or (self._maps and encode is None):
            compiled[grid](*self._for_triton(pointers), *strides, *counts, *constants)
            return
        for n, place, tensor_map, made in self._maps:
            address = arguments[place]
            encoded = made.get(address)  # asked once: another thread may clear in between
            if encoded is None:
                if len(made) >= 1024:  # those of the last calls are kept
                    made.clear()
                encoded = made[address] = encode(n, tensor_map.descriptor(pointers[place]))  # pyright: ignore[reportArgumentType]
            arguments[place : place + 1] = encoded
        stream = torch._C._cuda_getCurrentRawStream(device)
        call(*grid, stream, *middle, *arguments, *strides, *counts, *constants)

    def _finished(self, device: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Constants and options as they are on a device."""
        if not self.kernel.overlaps:
            return self.constants, self.options
        early = state.overlap and can_overlap(hardware.arch_of(torch.device("cuda", device)))
        return (*self.constants, early), self.options | (dict(launch_pdl=True) if early else {})

    def _for_triton(self, pointers: tuple[Pointer, ...]) -> list[Any]:
        given: list[Any] = list(pointers)
        for _, place, tensor_map, _ in self._maps:
            given[place] = tensor_map.descriptor(given[place])
        return given

    def warmup(self, dtypes: tuple[torch.dtype | None, ...], strides: tuple[int, ...], counts: tuple[int, ...]) -> None:
        """Have Triton compile what a launch on the current device with such pointers will run; nothing is launched."""
        given: list[Any] = list(dtypes)
        for _, place, tensor_map, _ in self._maps:
            given[place] = tensor_map.descriptor(torch.empty(0, dtype=dtypes[place]))
        constants, options = self._finished(torch.cuda.current_device())
        self.kernel.function.warmup(*given, *strides, *counts, *constants, grid=(1, 1, 1), **options)
