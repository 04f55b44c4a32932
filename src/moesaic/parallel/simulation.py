"""A layer of experts played on many GPUs: a discrete-event simulation of the ways tokens can travel.

Every GPU does its tasks in order on three engines (compute, the link inside the node, the link between nodes) and waits
where a transport waits, so that skew and overlap come out of it and are not put in.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import check_choice
from .scale import Load, Machine, experts_time

DESIGNS = ("plain", "flat", "hierarchical", "push", "overlap")


class Simulation:
    """Tasks on engines: each starts when its engine is free, in the order given, and what it waits for is done.

    A task without an engine takes its time without occupying anything: a wait, or the meeting of many.
    """

    def __init__(self) -> None:
        self.engines: list[Any] = []
        self.seconds: list[float] = []
        self.waits: list[list[int]] = []
        self.names: list[str] = []

    def task(self, name: str, engine: Any, seconds: float, after: Sequence[int] = ()) -> int:
        """Add a task; returns its number. Tasks of one engine run in the order in which they were added."""
        self.engines.append(engine)
        self.seconds.append(seconds)
        self.waits.append(list(after))
        self.names.append(name)
        return len(self.seconds) - 1

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of every task."""
        n = len(self.seconds)
        waiting, followers = [len(w) for w in self.waits], [[] for _ in range(n)]
        for i, w in enumerate(self.waits):
            for j in w:
                followers[j].append(i)
        queue: dict[Any, list[int]] = {}
        for i, engine in enumerate(self.engines):
            if engine is not None:
                queue.setdefault(engine, []).append(i)
        turn, busy = dict.fromkeys(queue, 0), set()
        start, end = np.zeros(n), np.full(n, np.inf)
        events: list[tuple[float, int]] = []
        now = 0.0

        def begin(i: int) -> None:
            start[i] = now
            heapq.heappush(events, (now + self.seconds[i], i))

        def serve(engine: Any) -> None:
            line = queue[engine]
            if engine not in busy and turn[engine] < len(line) and not waiting[line[turn[engine]]]:
                busy.add(engine)
                turn[engine] += 1
                begin(line[turn[engine] - 1])

        for i in range(n):
            if self.engines[i] is None and not waiting[i]:
                begin(i)
        for engine in queue:
            serve(engine)
        done = 0
        while events:
            now, i = heapq.heappop(events)
            end[i] = now
            done += 1
            if self.engines[i] is not None:
                busy.discard(self.engines[i])
                serve(self.engines[i])
            for j in followers[i]:
                waiting[j] -= 1
                if not waiting[j]:
                    if self.engines[j] is None:
                        begin(j)
                    else:
                        serve(self.engines[j])
        if done < n:
            raise ValueError(f"Simulation: every task must become possible, got {n - done} that wait for each other.")
        return start, end


class _Layer:
    """One layer on every GPU of a group, as tasks of a simulation; chunks share what a layer's tokens cost."""

    def __init__(self, machine: Machine, load: Load, sends: str):
        self.m, self.load, self.sends = machine, load, sends
        self.sim = Simulation()
        self.N, self.G, self.nodes = load.group, load.local, load.nodes
        to_gpu = load.reach(self.N) if sends == "token" else load.chosen.reshape(self.N, -1).sum(1)
        self.to_gpu = to_gpu * load.tokens * load.row_bytes  # bytes that one GPU sends to each
        self.to_node = load.reach(self.nodes) * load.tokens * load.row_bytes
        self.node_of = np.arange(self.N) // self.G

    def gpus(self) -> range:
        return range(self.N)

    def each(self, name: str, engine: str | None, seconds: Callable[[int], float], after: Sequence[int]) -> list[int]:
        """A task for every GPU, each after its own one of `after`."""
        return [
            self.sim.task(name, None if engine is None else (engine, g), seconds(g), after[g : g + 1])
            for g in self.gpus()
        ]

    def meet(self, tasks: list[int], groups: Sequence[Sequence[int]] | None = None) -> list[int]:
        """Every GPU goes on when all of its group have come."""
        out = [0] * self.N
        for members in groups or [list(self.gpus())]:
            one = self.sim.task("meet", None, 0.0, [tasks[g] for g in members])
            for g in members:
                out[g] = one
        return out

    def inside(self) -> list[list[int]]:
        return [list(range(n * self.G, (n + 1) * self.G)) for n in range(self.nodes)]

    def across(self) -> list[list[int]]:
        return [list(range(g, self.N, self.G)) for g in range(self.G)]

    # bytes that GPU g moves over a link, the larger of what it sends and receives
    def over_link(self, g: int) -> float:
        mine = slice(self.node_of[g] * self.G, self.node_of[g] * self.G + self.G)
        return max(self.to_gpu[mine].sum() - self.to_gpu[g], self.to_gpu[g] * (self.G - 1))

    def over_wire(self, g: int) -> float:
        mine = slice(self.node_of[g] * self.G, self.node_of[g] * self.G + self.G)
        return max(self.to_gpu.sum() - self.to_gpu[mine].sum(), self.to_gpu[g] * (self.N - self.G))

    def node_wire(self, g: int) -> float:
        n = self.node_of[g]
        return max(self.to_node.sum() - self.to_node[n], self.to_node[n] * (self.nodes - 1))

    def node_link(self, g: int) -> float:
        """What the stage inside a node moves for one GPU: the copies for tokens of all nodes."""
        return self.over_link(g) * self.nodes

    def sort(self) -> float:
        """Making the copies, or adding them up: they are written or read once, and the tokens once."""
        total = self.to_gpu.sum() + self.load.tokens * self.load.row_bytes
        return total / self.m.memory

    def flat(self, after: list[int], share: float) -> list[int]:
        """One all-to-all among all."""
        m = self.m
        wire = self.nodes > 1
        link = self.each("link", "link", lambda g: m.link_latency + share * self.over_link(g) / m.link, after)
        if not wire:
            return self.meet(link)
        far = self.each(
            "wire", "wire",
            lambda g: m.wire_latency + (self.N - self.G) * m.message + share * self.over_wire(g) / m.wire, after,
        )  # fmt: skip
        return self.meet([self.sim.task("both", None, 0.0, [a, b]) for a, b in zip(link, far, strict=True)])

    def two(self, after: list[int], share: float, back: bool, push: bool) -> list[int]:
        """Between nodes and inside them; back the other way round. `push`: inside by stores and one barrier."""
        m = self.m
        rate, latency = (m.push_link, m.push_latency) if push else (m.link, m.link_latency)

        def far(after: list[int]) -> list[int]:
            if self.nodes == 1:
                return after
            cost = m.wire_latency + (self.nodes - 1) * m.message
            done = self.each("wire", "wire", lambda g: cost + share * self.node_wire(g) / m.wire, after)
            return self.meet(done, self.across())

        def near(after: list[int]) -> list[int]:
            if self.G == 1:
                return after
            done = self.each("link", "link", lambda g: latency + share * self.node_link(g) / rate, after)
            return self.meet(done, self.inside())

        return far(near(after)) if back else near(far(after))


def _chunks(design: str, chunks: int) -> int:
    return chunks if design == "overlap" else 1


@dataclass(frozen=True)
class Result:
    """What a simulated layer took.

    Attributes:
        seconds: until the last GPU had its tokens' sums.
        parts: seconds that the busiest GPU spent on each kind of work.
        waited: share of the time that the average GPU's compute engine stood still.
        timeline: (name, GPU, engine, start, end) of GPU 0's and the busiest GPU's tasks.
    """

    design: str
    seconds: float
    parts: dict[str, float]
    waited: float
    timeline: list[tuple[str, int, str, float, float]]


def simulate(machine: Machine, load: Load, design: str, *, chunks: int = 4, captured: bool | None = None) -> Result:
    """One forward layer under a design.

    Args:
        machine, load: what things cost, and what there is to do.
        design: `"plain"` (one copy a choice, flat, counts to the host), `"flat"` (one copy a GPU), `"hierarchical"`
            (one copy a node), `"push"` (stores inside a node and no host; between nodes as hierarchical), `"overlap"`
            (hierarchical where there are nodes, in chunks of tokens).
        chunks: of the overlap.
        captured: leave out what the host costs, as a CUDA graph does; by default for push inside one node.
    """
    check_choice("simulate", "design", design, DESIGNS)
    layer = _Layer(machine, load, "slot" if design == "plain" else "token")
    sim, m, n = layer.sim, machine, _chunks(design, chunks)
    if captured is None:
        captured = design == "push" and layer.nodes == 1
    pushed, single = design == "push", load.group == 1
    staged = pushed or design == "hierarchical" or (design == "overlap" and layer.nodes > 1)
    # of a chunk: its share of the rows, and every weight that it touches once more
    own = experts_time(machine, replace(load, tokens=max(load.tokens // n, 1)), load.rows / n)
    sort = 0.0 if pushed else layer.sort() / n
    back = (layer.to_gpu > 0).mean() * layer.N  # sums that come back, at most one a GPU
    add = (
        (min(back, load.case.top_k, layer.N) + 1) * load.tokens * load.row_bytes / m.memory if pushed else layer.sort()
    )
    host = 0.0 if captured else m.host
    ready = layer.each("host", None, lambda g: host, [])
    if not single and not captured:  # counts
        ready = layer.meet(ready)
    going = []
    for _ in range(n):
        sorted_ = layer.each("sort", "compute", lambda g: sort, ready)
        travel = sorted_ if single else (
            layer.two(sorted_, 1 / n, False, pushed) if staged else layer.flat(sorted_, 1 / n)
        )  # fmt: skip
        going.append(travel)
    coming = []
    for travel in going:
        done = layer.each("experts", "compute", lambda g: float(own[g]), travel)
        coming.append(done if single else (layer.two(done, 1 / n, True, pushed) if staged else layer.flat(done, 1 / n)))
    last = [layer.each("add", "compute", lambda g: add / n, back_) for back_ in coming]
    start, end = sim.run()
    seconds = max(float(end[t]) for tasks in last for t in tasks)
    if not captured:
        seconds = max(seconds, m.floor)
    return _result(design, sim, start, end, seconds, layer.N)


def _result(design: str, sim: Simulation, start: np.ndarray, end: np.ndarray, seconds: float, gpus: int) -> Result:
    busy = np.zeros(gpus)
    per: dict[str, np.ndarray] = {}
    for i, engine in enumerate(sim.engines):
        if engine is not None:
            kind, g = engine
            per.setdefault(sim.names[i], np.zeros(gpus))[g] += sim.seconds[i]
            if kind == "compute":
                busy[g] += sim.seconds[i]
    worst = int(busy.argmax())
    timeline = [
        (sim.names[i], e[1], e[0], float(start[i]), float(end[i]))
        for i, e in enumerate(sim.engines) if e is not None and e[1] in (0, worst)
    ]  # fmt: skip
    waited = float(1 - busy.mean() / seconds) if seconds else 0.0
    return Result(design, seconds, {k: float(v.max()) for k, v in per.items()}, waited, timeline)
