"""Timing several candidates against each other: rounds over all of them, inputs that rotate, medians.

Interleaving is what makes the comparison fair on a shared or throttling machine: whatever slows one round slows all
candidates in it. On a GPU, calls with few tokens are captured in a CUDA graph (a serving engine replays one), so that
the time is the device's; larger calls are timed one at a time behind a cache flush that also hides the launch.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Call = Callable[[int], object]  # runs batch i

GRAPH_TOKENS = 1024  # up to this many tokens a GPU call is timed as a graph replay
_FLUSH_BYTES = 256 << 20  # larger than any L2


@dataclass
class Sample:
    """Seconds per call. `mode` is `call` (CPU), `graph` or `event` (GPU)."""

    mode: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def interleave(
    calls: dict[str, Call],
    batches: int,
    device: torch.device,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    graphs: frozenset[str] = frozenset(),
) -> dict[str, Sample]:
    """Median-ready samples of every call.

    Args:
        calls: `name -> call(i)`, each already warmed up; none is allowed.
        batches: how many batches `i` may name.
        seconds: time to spend on one candidate; rounds stop there, between `min_rounds` and `max_rounds`.
        graphs: the names to capture in a CUDA graph; one that cannot be captured is timed by events instead.
    """
    if device.type == "cuda":
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        timers = {n: _cuda_timer(call, batches, device, flush, n in graphs) for n, call in calls.items()}
    else:
        timers = {name: ("call", _cpu_timer(call, batches)) for name, call in calls.items()}
    samples = {name: Sample(mode) for name, (mode, _) in timers.items()}
    names, start, rounds = list(calls), time.perf_counter(), 0
    if not names:
        return {}
    while rounds < min_rounds or (time.perf_counter() - start < seconds * len(names) and rounds < max_rounds):
        shift = rounds % len(names)
        order = names[shift:] + names[:shift]
        for name in order if rounds // len(names) % 2 else reversed(order):  # every place, and both neighbours
            samples[name].seconds.append(timers[name][1](rounds))
        rounds += 1
    return samples


def _cpu_timer(call: Call, batches: int) -> Callable[[int], float]:
    def timer(turn: int) -> float:
        start = time.perf_counter()
        call(turn % batches)
        return time.perf_counter() - start

    return timer


def _cuda_timer(
    call: Call, batches: int, device: torch.device, flush: torch.Tensor, graph: bool
) -> tuple[str, Callable[[int], float]]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    captured = _capture(call, batches, device) if graph else None
    if captured is not None:

        def replay(turn: int) -> float:
            start.record()
            captured.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / batches

        return "graph", replay

    def timer(turn: int) -> float:
        flush.zero_()
        start.record()
        call(turn % batches)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return "event", timer


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for torch: work this small takes less time than handing half of it to another thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def host_seconds(call: Call, batches: int, device: torch.device, repeats: int = 20) -> float:
    """What a call costs the host on a GPU: the time to enqueue it, while the device is not waited for."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for i in range(repeats):
        call(i % batches)
    spent = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return spent / repeats


def _capture(call: Call, batches: int, device: torch.device) -> torch.cuda.CUDAGraph | None:
    """A graph that runs every batch once, or None where the call does something that a graph cannot hold."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for i in range(batches):
            call(i)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(batches):
                call(i)
    except RuntimeError:  # a synchronisation inside: the caller's sample says "event"
        torch.cuda.synchronize(device)
        return None
    graph.replay()
    torch.cuda.synchronize(device)
    return graph
