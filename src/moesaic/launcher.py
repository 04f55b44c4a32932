"""How Triton's kernels are compiled together, and how a compiled one is entered without Triton's own call.

What `entry` reads is private to Triton and changes with it: the generated C function (3.6 keeps it in a closure when a
kernel takes tensor maps), the tuple of things that stand before the arguments, and the encoding of tensor maps. It is
read because Triton's call costs 20 µs of host time a launch, more than a decode step can hide (H200, 2026-11-22);
versions that are not known here go through Triton's own call. `tests/kernels/test_launch.py` fails when 3.6 changes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hardware


@functools.cache
def knobs() -> Any:
    """Triton's run-time knobs where `entry` knows how a compiled kernel is entered (3.5 and 3.6), else None."""
    version = hardware.triton.__version__.split(".")[:2]
    return hardware.triton.knobs.runtime if version in (["3", "5"], ["3", "6"]) else None


def watched(hook: Any) -> bool:
    """Does a profiler hang on the launch hook? Triton's own call pays for it even when nobody does."""
    return bool(getattr(hook, "calls", hook))


def entry(compiled: Any) -> tuple[Any, tuple[Any, ...], Callable[[int, Any], list[Any]] | None]:
    """`(call, middle, encode)` such that `call(x, y, z, stream, *middle, *arguments)` launches a compiled kernel.

    On NVIDIA with Triton 3.6 and no scratch memory that is the generated C function itself. It takes a tensor map as
    several arguments, which `encode(n, descriptor)` makes of the kernel's n-th; None where Triton's own call does it.
    """
    run, hooks = compiled.run, (None, None, None)
    if hardware.triton.__version__.startswith("3.6.") and hasattr(run, "launch_pdl"):
        if run.global_scratch_size == run.profile_scratch_size == 0:
            flags = (run.launch_cooperative_grid, run.launch_pdl, None, None)
            call, encode, metas = run.launch, None, getattr(compiled.metadata, "tensordesc_meta", None)
            wrapped = closed_over(call, "launcher") if metas else None
            if wrapped is not None:
                call, driver = wrapped, importlib.import_module("triton.backends.nvidia.driver")
                encode = functools.partial(_encode, driver, metas)
            return call, (compiled.function, *flags, compiled.packed_metadata, *hooks), encode
    return run, (compiled.function, compiled.packed_metadata, *hooks), None


def closed_over(function: Any, name: str) -> Any:
    """What a Python function keeps under a name in its closure, or None."""
    return inspect.getclosurevars(function).nonlocals.get(name) if inspect.isfunction(function) else None


def _encode(driver: Any, metas: Any, n: int, descriptor: Any) -> list[Any]:
    return driver.make_tensordesc_arg(descriptor, metas[n])


# ---------------------------------------------------------------- compiling together
class _State(threading.local):
    """What holds for the launches of a thread."""

    overlap = True  # may a launch begin while the one before it ends, where a GPU can
    pending: Pending | None = None  # what they are collected in


state = _State()


@contextlib.contextmanager
def overlap(allowed: bool) -> Iterator[None]:
    """Allow or forbid programmatic dependent launch for what this thread launches inside the block."""
    before, state.overlap = state.overlap, allowed
    try:
        yield
    finally:
        state.overlap = before


class Request(NamedTuple):
    """One compiled variant of a bound kernel, before there is one."""

    bound: Any
    dtypes: tuple[torch.dtype | None, ...]
    strides: tuple[int, ...]
    counts: tuple[int, ...]


class Pending:
    """What launches ask the compiler for. They are collected and nothing runs: results are memory as it was."""

    def __init__(self):
        self.requests: dict[tuple[Any, ...], Request] = {}

    def add(
        self, bound: Any, pointers: tuple[Tensor | None, ...], strides: tuple[int, ...], counts: tuple[int, ...]
    ) -> None:
        dtypes = tuple(None if p is None else p.dtype for p in pointers)
        self.requests.setdefault((bound, dtypes, strides), Request(bound, dtypes, strides, counts))

    def compile(self, progress: Callable[[], None] = lambda: None) -> None:
        """All at the same time, as far as there are cores."""
        requests = [functools.partial(r.bound.warmup, *r[1:]) for r in self.requests.values()]
        _compile(requests, min(32, os.cpu_count() or 1), progress)


def _compile(requests: list[Callable[[], object]], workers: int, done: Callable[[], None]) -> None:
    """Run calls that each ask Triton for one kernel, with `workers` compiling at once where Triton can.

    Triton 3.5 and newer has a mode in which a missing kernel is compiled by an executor; its Python part holds the
    interpreter's lock, its passes and ptxas do not.
    """
    have = importlib.util.find_spec("triton.runtime._async_compile") is not None
    if not have or len(requests) == 1:
        for request in requests:
            request()
            done()
        return
    mode = importlib.import_module("triton.runtime._async_compile")
    with futures.ThreadPoolExecutor(workers) as pool, mode.AsyncCompileMode(pool) as compiling:
        for request in requests:
            request()
        for _ in futures.as_completed(compiling.raw_futures):
            done()


# Stands in for a Pending while all kernels of a call are there; the first launch that finds none puts one in its place.
WARM = Pending()


@contextlib.contextmanager
def dry() -> Iterator[Pending]:
    """Collect what is launched inside the block instead of launching it."""
    before, pending = state.pending, Pending()
    state.pending = pending
    try:
        yield pending
    finally:
        state.pending = before


def together(call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)`; where kernels of it are missing, they are compiled at the same time before it runs.

    `call` must not read what it launched, nor write to its arguments.
    """
    if state.pending is not None:
        return call(*arguments)
    state.pending = WARM
    try:
        out = call(*arguments)
    finally:
        pending, state.pending = state.pending, None
    if pending is WARM:
        return out
    pending.compile()
    return call(*arguments)
