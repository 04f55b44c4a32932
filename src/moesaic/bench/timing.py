"""Timing several candidates against each other: rounds over all of them, inputs that rotate, medians.

Interleaving is what makes the comparison fair on a shared or throttling machine: whatever slows one round slows all
candidates in it. On a GPU, calls with few tokens are captured in a CUDA graph (a serving engine replays one), so that
the time is the device's; larger calls are enqueued one by one.

A GPU is timed under two protocols, because one that is held to a power limit ranks kernels differently cold and hot
(H200 capped at 700 W: 1.98 GHz cold, 1.40 to 1.55 GHz under load). *Burst* is a millisecond after idling.
*Sustained* lets the candidate itself settle the clocks before it is timed. Short windows back to back are neither:
there a candidate runs at the clocks that its neighbour left, which put one kernel 24 % ahead where it was 2 %, and
windows of 50 ms behind 50 ms still gave the same kernel times 9 % apart.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

Call = Callable[[int], object]  # runs batch i

GRAPH_TOKENS = 1024  # up to this many tokens a GPU call is timed as a graph replay
IDLE, BURST = 5e-3, 1.2e-3  # seconds: before a burst, of a burst
# Seconds before a sustained window, and of one. When the work changes, the power controller swings for a while: a bmm
# behind another kernel took 1262 µs at first, 1498 after 0.3 s, 1305 from 0.4 s on (H200, 2026-11-23).
SETTLE, SUSTAINED = 0.4, 0.1
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
    clocks: str = "burst",
) -> dict[str, Sample]:
    """Median-ready samples of every call.

    Args:
        calls: `name -> call(i)`, each already warmed up; none is allowed.
        batches: how many batches `i` may name.
        seconds: time to spend on one candidate; rounds stop there, between `min_rounds` and `max_rounds`.
        graphs: the names to capture in a CUDA graph; one that cannot be captured is timed by events instead.
        clocks: on a GPU, the protocol in `PROTOCOLS`; a CPU has none.
    """
    if device.type == "cuda":
        gpu, protocol = Gpu(device), PROTOCOLS[clocks]
        units = {name: _unit(gpu, call, batches, device, name in graphs) for name, call in calls.items()}
        timers = {name: (unit.mode, functools.partial(protocol, gpu, unit)) for name, unit in units.items()}
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


# ---------------------------------------------------------------- protocols of a GPU
class Gpu:
    """What the protocols ask of a device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._scratch = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def idle(self, seconds: float) -> None:
        """Let the device finish, and then do nothing."""
        torch.cuda.synchronize(self._device)
        time.sleep(seconds)

    def flush(self) -> None:
        """Enqueue a write that is larger than the L2."""
        self._scratch.zero_()

    def seconds(self, work: Callable[[], object]) -> float:
        """The device's time for what `work` enqueues, behind all that was enqueued before; waits for it."""
        self._start.record()
        work()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


@dataclass(frozen=True)
class Unit:
    """What a window repeats: `run(i)` enqueues `calls` calls (i picks the batch), which takes about `seconds`."""

    mode: str
    calls: int
    run: Callable[[int], object]
    seconds: float


def burst(gpu: Gpu, unit: Unit, turn: int) -> float:
    """Seconds a call in `BURST` seconds of calls, at least one, by a device that idled for `IDLE` seconds.

    The flush empties the L2 and hides the first launch: the device is busy with it while the host enqueues.
    """
    times = max(1, round(BURST / unit.seconds))
    gpu.idle(IDLE)
    gpu.flush()
    return gpu.seconds(lambda: _repeat(unit, turn, times)) / (times * unit.calls)


def sustained(gpu: Gpu, unit: Unit, turn: int) -> float:
    """Seconds a call in `SUSTAINED` seconds of calls right behind `SETTLE` seconds, in which the clocks settle."""
    times = max(1, math.ceil(SUSTAINED / unit.seconds))
    _repeat(unit, turn, max(1, math.ceil(SETTLE / unit.seconds)))  # nobody waits: the device must not idle
    return gpu.seconds(lambda: _repeat(unit, turn, times)) / (times * unit.calls)


PROTOCOLS: dict[str, Callable[[Any, Unit, int], float]] = {"burst": burst, "sustained": sustained}


def _repeat(unit: Unit, turn: int, times: int) -> None:
    for i in range(turn * times, (turn + 1) * times):
        unit.run(i)


def _unit(gpu: Gpu, call: Call, batches: int, device: torch.device, graph: bool) -> Unit:
    """A replay of all batches where the call is captured, else one call. Batches rotate: weights come from memory."""
    captured = _capture(call, batches, device) if graph else None
    if captured is None:
        unit = Unit("event", 1, lambda i: call(i % batches), 0.0)
    else:
        unit = Unit("graph", batches, lambda i: captured.replay(), 0.0)
    return replace(unit, seconds=gpu.seconds(lambda: _repeat(unit, 0, 3)) / 3)


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


def launches(call: Call, device: torch.device) -> int | None:
    """How many kernels, copies and fills one call makes a GPU run; None on a CPU, or where the profiler sees none.

    The first call runs in the profiler's warm-up: some CUPTI lose what a session launches first (pytorch #192021).
    """
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=1, active=1, repeat=1)) as seen:
        for _ in range(2):
            call(0)
            torch.cuda.synchronize(device)
            seen.step()
    return device_work(seen.events() or ()) or None


def device_work(events: Iterable[Any]) -> int:
    """How many of a profile's events ran on a GPU; spans that the profiler itself draws there are none."""
    return sum(e.device_type == DeviceType.CUDA and not e.is_user_annotation for e in events)


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
