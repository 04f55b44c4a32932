"""What this machine can do, measured in the same run (copy bandwidth, product rate), and what a layer must do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..activations import ACTIVATIONS
from ..cases import Case


@dataclass(frozen=True)
class Roofline:
    """Measured peaks: `bandwidth` of a copy in bytes/s, read plus written; `flops` of a square product in 1/s."""

    bandwidth: float
    flops: float

    def seconds(self, work: Work) -> float:
        """The least time that the work can take here."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float


def work(case: Case, dtype: torch.dtype, tokens: int, experts_hit: float, train: bool) -> Work:
    """The least work of a layer: every chosen expert's weights read once, tokens read and outputs written once.

    Backward doubles the operations, reads the weights and the tokens again, and writes a gradient for every expert.
    """
    matrices = ACTIVATIONS[case.activation].width(1) + 1
    expert = matrices * case.hidden_size * case.intermediate_size * dtype.itemsize
    io = 2 * tokens * case.hidden_size * dtype.itemsize
    if not train:
        return Work(case.flops(tokens), experts_hit * expert + io)
    return Work(3 * case.flops(tokens), (2 * experts_hit + case.num_experts) * expert + 3 * io)


def combine_bytes(case: Case, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the weighted sum behind the products: each token's K rows read, its output written."""
    return (case.top_k + 1) * tokens * case.hidden_size * dtype.itemsize


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Roofline:
    """Time a copy far larger than the caches, and a square product, each for `seconds`.

    The best of several counts, since others may be running.
    """
    size, n = (1 << 30, 8192) if device.type == "cuda" else (1 << 28, 2048)
    return Roofline(2 * size / _copy(size, device, seconds), 2 * n**3 / _product(n, dtype, device, seconds))


def _copy(size: int, device: torch.device, seconds: float) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best(lambda: target.copy_(source), device, seconds)


def _product(n: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _best(lambda: torch.mm(a, b, out=out), device, seconds)


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Least time of a call, over at least five and at most `seconds`."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
