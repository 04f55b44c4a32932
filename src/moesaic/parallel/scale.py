"""What a layer of experts costs on many GPUs: the machine and the load. `simulation` plays it.

Legend: N GPUs in nodes of G; T tokens a GPU, H hidden, I intermediate, E experts, K choices; L = E / N experts a GPU. A
*copy* is a token's row on its way to one GPU. Times are seconds.

The load says how many copies go where and how many rows each GPU computes: expected values of a draw of K of E experts
without replacement, plus the spread of a finite number of tokens. The machine says what a byte, a message, a product
and a wait cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..cases import Case


# ---------------------------------------------------------------- the machine
@dataclass(frozen=True)
class Machine:
    """What things cost. Rates are bytes or operations a second and GPU, times seconds.

    Attributes:
        name: of the machine.
        node: G, GPUs of a node.
        link, link_latency: rate inside a node, and what a collective costs there before its first byte.
        push_link, push_latency: the same for stores into a peer's memory and their barrier.
        wire, wire_latency, message: rate between nodes, what a collective costs there, and what each message adds.
        memory: rate at which weights and rows are read.
        peak, width0: half-precision operations; a product of experts I wide reaches `peak · I / (I + width0)`.
        launch: what the experts cost before their first byte.
        host: what an eager layer with a wait of the host costs (counts to the host and the queue that ran dry).
        floor: the least that such a layer takes, however few its tokens.
    """

    name: str
    node: int
    link: float
    link_latency: float
    push_link: float
    push_latency: float
    wire: float
    wire_latency: float
    message: float
    memory: float
    peak: float
    width0: float
    launch: float
    host: float
    floor: float


# From two H100s of one host (docs/scale.md): links and barrier measured, memory, products, launch and host fitted to
# layers. The wire between nodes is an assumption: 400 Gb/s a GPU.
H100 = Machine(
    "H100", node=8, link=280e9, link_latency=38e-6, push_link=360e9, push_latency=5.5e-6, wire=45e9, wire_latency=45e-6,
    message=1.0e-6, memory=2.9e12, peak=780e12, width0=300, launch=20e-6, host=230e-6, floor=870e-6,
)  # fmt: skip
MACHINES = {m.name: m for m in (H100,)}


# ---------------------------------------------------------------- the load
@dataclass(frozen=True)
class Load:
    """Who sends what to whom: everything that depends on shapes and routing alone.

    Attributes:
        case: the layer.
        gpus, node: N and G.
        tokens: T of each GPU.
        zipf: exponent of the experts' popularity; 0 is even, 1 the usual hard case.
        seed: which experts are popular, and the draw of a finite number of tokens.
        bytes_per: of an element that travels.
    """

    case: Case
    gpus: int
    tokens: int
    node: int = 8
    zipf: float = 0.0
    seed: int = 0
    bytes_per: int = 2

    def __post_init__(self) -> None:
        who = "Load"
        if self.gpus < 1 or self.tokens < 0 or self.node < 1 or (self.gpus > self.node and self.gpus % self.node):
            raise ValueError(
                f"{who}: gpus must be at least 1 and whole nodes, and tokens at least 0, got gpus={self.gpus}, "
                f"node={self.node}, tokens={self.tokens}."
            )

    @property
    def group(self) -> int:
        """GPUs that share one copy of the experts: all, or as many as there are experts."""
        size = min(self.gpus, self.case.num_experts)
        while self.case.num_experts % size or self.gpus % size:
            size -= 1
        return size

    @property
    def local(self) -> int:
        """G as the group sees it: GPUs of the group in one node."""
        size = min(self.node, self.group)
        while self.group % size:
            size -= 1
        return size

    @property
    def nodes(self) -> int:
        return self.group // self.local

    @cached_property
    def chosen(self) -> np.ndarray:
        """`(E,)`: the probability that a token chooses an expert; sums to K."""
        E, K = self.case.num_experts, self.case.top_k
        p = np.arange(1, E + 1) ** -self.zipf
        p = np.random.default_rng(self.seed).permutation(p / p.sum())
        if K == E:
            return np.ones(E)
        low, high = 0.0, 1e6
        for _ in range(200):  # inclusion 1 - exp(-s·p), with s such that K are included
            s = (low + high) / 2
            low, high = (s, high) if (1 - np.exp(-s * p)).sum() < K else (low, s)
        return 1 - np.exp(-low * p)

    def reach(self, parts: int) -> np.ndarray:
        """`(parts,)`: the probability that a token has an expert in each of so many equal parts of them."""
        E, K = self.case.num_experts, self.case.top_k
        if self.zipf == 0:  # 1 - C(E - m, K) / C(E, K)
            rest = E - E // parts
            missed = np.prod([(rest - k) / (E - k) for k in range(K)]) if rest >= K else 0.0
            return np.full(parts, 1 - missed)
        hit = np.zeros((len(self._drawn), parts), dtype=bool)
        np.put_along_axis(hit, self._drawn // (E // parts), True, axis=1)
        return hit.mean(0)

    @cached_property
    def _drawn(self) -> np.ndarray:
        """`(8192, K)`: the experts of some tokens, drawn by their popularity without replacement (Gumbel top-k)."""
        E, K = self.case.num_experts, self.case.top_k
        rng = np.random.default_rng(self.seed)
        popularity = rng.permutation(-self.zipf * np.log(np.arange(1, E + 1)))  # the permutation of `chosen`
        scores = popularity + rng.gumbel(size=(8192, E))
        return np.argpartition(-scores, K - 1, axis=1)[:, :K]

    @cached_property
    def rows(self) -> np.ndarray:
        """`(group,)` rows, one a choice, of each GPU of the slowest group; a finite number of tokens spreads."""
        mean = self.chosen.reshape(self.group, -1).sum(1) * self.tokens * self.group
        if self.group == 1:
            return mean
        noise = np.random.default_rng(self.seed + 1).standard_normal((self.gpus // self.group, self.group))
        drawn = np.maximum(mean + noise * np.sqrt(mean), 0.0)
        return drawn[drawn.max(1).argmax()]  # of all groups the one that is waited for

    @cached_property
    def touched(self) -> np.ndarray:
        """`(group,)` experts of each GPU that somebody chose, whose weights must be read."""
        some = 1 - (1 - self.chosen) ** (self.tokens * self.group)
        return some.reshape(self.group, -1).sum(1)

    @property
    def row_bytes(self) -> int:
        return self.case.hidden_size * self.bytes_per


def experts_time(machine: Machine, load: Load, rows: np.ndarray | None = None) -> np.ndarray:
    """`(group,)` seconds of the experts' products: weights that must be read against operations that must be done.

    The two overlap badly where they are alike, so that their squares are added.
    """
    case, rows = load.case, load.rows if rows is None else rows
    matrices = (3 if case.gated else 2) * case.hidden_size * case.intermediate_size
    read = load.touched * matrices * 2 / machine.memory
    rate = machine.peak * case.intermediate_size / (case.intermediate_size + machine.width0)
    return machine.launch + np.hypot(read, rows * 2 * matrices / rate)


# ---------------------------------------------------------------- machines as they are
def calibrate(group: Any = None, device: str = "cpu", name: str = "here", node: int | None = None) -> Machine:
    """What this machine costs, measured in the running process group: collectives of three sizes, experts of two.

    Every rank must call. Takes a second or two. Rates between nodes are taken to be those inside one.
    """
    import statistics
    import time

    import torch
    import torch.distributed as dist

    from ..ops.fused_experts import fused_experts
    from ..routing import Routing
    from .collectives import Flight, group_of

    pg = group_of(group, "calibrate")
    W = pg.size()

    def timed(call: Callable[[], Any], rounds: int = 5) -> float:
        took = []
        for _ in range(rounds + 1):
            dist.barrier(pg)
            begin = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - begin)
        worst = torch.tensor(statistics.median(took[1:]), device=device, dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX, pg)
        return worst.item()

    def exchange(rows: int) -> float:
        x = torch.zeros(rows * W, 256, device=device)
        return timed(lambda: Flight(x, [rows] * W, [rows] * W, pg, "same", "calibrate").wait())

    few, many = exchange(1), exchange(2048)
    link = 2047 * 1024 * max(W - 1, 1) / max(many - few, 1e-9)
    H, I, E = 256, 256, 8
    up, down = torch.randn(E, 2 * I, H, device=device), torch.randn(E, H, I, device=device)

    def experts(T: int) -> float:
        ids = torch.arange(T, device=device, dtype=torch.int32).remainder(E)[:, None]
        routing = Routing.from_topk(torch.ones(T, 1, device=device), ids, E)
        x = torch.randn(T, H, device=device)
        return timed(lambda: fused_experts(x, up, down, routing))

    small, large = experts(8), experts(2048)
    rate = 2040 * 6 * H * I / max(large - small, 1e-9)
    moved = torch.zeros(1 << 22, device=device)
    memory = 2 * moved.nbytes / max(timed(moved.clone), 1e-9)
    return replace(
        H100, name=name, node=node or W, link=link, link_latency=few, push_link=link, push_latency=few, wire=link,
        wire_latency=few, message=few / W, memory=memory, peak=rate, width0=0.0, launch=small, host=few, floor=0.0,
    )  # fmt: skip
