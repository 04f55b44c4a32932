"""The benchmark: shapes × dtypes × tokens × candidates, every candidate of a cell timed in the same rounds."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..cases import DISTRIBUTIONS
from ..testing import error_report
from . import roofline
from .layer import DTYPES, Batch, Layer, case_named, memory_why_not
from .peers import DENSE, PEERS, Peer, explanation, foreign_errors, padding, peer_named
from .timing import GRAPH_TOKENS, PROTOCOLS, Sample, host_seconds, interleave, launches


class Cell(NamedTuple):
    """What all candidates are timed on in the same rounds."""

    shape: str
    dtype: str
    tokens: int
    distribution: str = "uniform"

    @property
    def even(self) -> Cell:
        """The same with uniform routing."""
        return self._replace(distribution="uniform")

    def __str__(self) -> str:
        skew = "" if self == self.even else f" {self.distribution}"
        return f"{self.shape} {self.dtype} T={self.tokens}{skew}"


@dataclass(frozen=True)
class Plan:
    """What to measure. Every list keeps its order, but uniform routing comes first: the others are held against it.

    `seconds` is for one candidate in one cell, shared by the protocols in `clocks`; `min_rounds` is for each of them.
    `clocks` means nothing on a CPU.
    """

    shapes: tuple[str, ...]
    tokens: tuple[int, ...] = (1, 64, 512)
    dtypes: tuple[str, ...] = ("bf16",)
    peers: tuple[str, ...] = tuple(PEERS)
    device: str = "cpu"
    train: bool = False
    distributions: tuple[str, ...] = ("uniform",)
    seconds: float = 2.0
    min_rounds: int = 5
    ours: tuple[str, ...] = ("moesaic",)
    clocks: tuple[str, ...] = tuple(PROTOCOLS)
    seed: int = 0

    @property
    def protocols(self) -> tuple[str, ...]:
        """How every candidate is timed, in this order: on a GPU those of `PROTOCOLS` that `clocks` names."""
        if torch.device(self.device).type != "cuda":
            return ("call",)
        return tuple(name for name in PROTOCOLS if name in self.clocks)

    def cells(self, shape: str, dtype: str) -> list[Cell]:
        """Those of one layer, in order."""
        spreads = sorted(self.distributions, key=lambda name: name != "uniform")
        return [Cell(shape, dtype, tokens, spread) for tokens in self.tokens for spread in spreads]

    def check(self) -> None:
        """Raise `ValueError` for a name or a number that means nothing."""
        for name in self.shapes:
            case_named(name)
        for name in (*self.peers, *self.ours):
            peer_named(name)
        if unknown := [d for d in self.dtypes if d not in DTYPES]:
            raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, got {unknown[0]!r}.")
        if not self.distributions or (unknown := [d for d in self.distributions if d not in DISTRIBUTIONS]):
            names, got = ", ".join(DISTRIBUTIONS), unknown[0] if self.distributions else "none"
            raise ValueError(f"distribution: each must be one of {names}, got {got!r}.")
        if not self.clocks or (unknown := [c for c in self.clocks if c not in PROTOCOLS]):
            names, got = ", ".join(PROTOCOLS), unknown[0] if self.clocks else "none"
            raise ValueError(f"clocks: must be some of {names}, got {got!r}.")
        if min(self.tokens, default=0) < 1:
            raise ValueError(f"tokens: each must be at least 1, got {', '.join(map(str, self.tokens)) or 'none'}.")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One candidate in one cell under one protocol. None where it did not run, or has no such figure.

    Attributes:
        clocks: the protocol, `burst` or `sustained`; `call` on a CPU.
        mode: `call`, `graph` or `event`, how it was timed.
        ms, ms_low, ms_high: median and quartiles.
        tflops, gbs: the layer's least operations and least bytes, over the median.
        floor_ms, roofline: the least time by the measured roofline, and its share of the median.
        dense_ms, dense: the dense bound, and its share of the median: both products as cuBLAS runs them on even groups,
            under the same protocol in the same rounds, and the weighted sum's bytes at the bandwidth of a copy.
        vs_uniform: with skewed routing, this candidate's time over its own with uniform routing in the same run.
        vs_best_peer: the best peer's time over this one's; above 1 is faster than every peer. Bounds are no peers.
        paired: of ours against each peer, the median over rounds of the ratio within a round.
    """

    clocks: str = ""
    mode: str = ""
    rounds: int = 0
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    floor_ms: float | None = None
    roofline: float | None = None
    dense_ms: float | None = None
    dense: float | None = None
    vs_uniform: float | None = None
    vs_best_peer: float | None = None
    paired: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row(Figures):
    """One candidate in one cell. `why_not` holds the reason where it did not run.

    Its own figures are those of the first protocol, `clocks`.

    Attributes:
        sustained: the figures of the second protocol, where two were asked for.
        longest: rows of the expert that has most over the mean of all experts, mean of the batches.
        error: relative norm error of the output against fp64.
        padding: of ours, rows that tiles compute for nobody over real rows, in the forward pass.
        launches: on a GPU, how many kernels, copies and fills one call makes it run.
        host_us: on a GPU, the time that the host needs to enqueue a call.
        limits: what the candidate's own tuning was held to.
    """

    shape: str
    dtype: str
    tokens: int
    distribution: str = "uniform"
    peer: str
    ours: bool
    why_not: str | None = None
    sustained: Figures | None = None
    longest: float | None = None
    error: float | None = None
    padding: float | None = None
    launches: int | None = None
    host_us: float | None = None
    implementation: str = ""
    limits: str = ""

    @property
    def cell(self) -> Cell:
        return Cell(self.shape, self.dtype, self.tokens, self.distribution)

    @property
    def figures(self) -> dict[str, Figures]:
        """By protocol; empty where it did not run."""
        both = (self, self.sustained)
        return {f.clocks: f for f in both if f is not None and f.ms is not None}


@dataclass
class Result:
    """All rows, and the rooflines they are held against, by dtype."""

    plan: Plan
    rows: list[Row] = field(default_factory=list)
    rooflines: dict[str, roofline.Roofline] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.why_not is None]

    @property
    def failed(self) -> list[Row]:
        """Rows of ours that did not run."""
        return [row for row in self.rows if row.ours and row.why_not]

    @property
    def not_run(self) -> dict[tuple[str, str], list[str]]:
        """`(candidate, reason) -> cells` in which it did not run."""
        out: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.why_not:
                out.setdefault((row.peer, row.why_not), []).append(str(row.cell))
        return out


def run(plan: Plan, progress: Callable[[str], None] = lambda what: None) -> Iterator[Result]:
    """Measure the plan; yields the growing result after each cell, so that a long run can be kept as it goes."""
    plan.check()
    device, result = torch.device(plan.device), Result(plan)
    for dtype in plan.dtypes:
        progress(f"{dtype}: this machine's roofline")
        result.rooflines[dtype] = roofline.measure(device, DTYPES[dtype], min(1.0, plan.seconds))
    for shape in plan.shapes:
        case = case_named(shape)
        for dtype in plan.dtypes:
            reason = memory_why_not(case, DTYPES[dtype], device, plan.train)
            if reason:
                result.skipped[f"{shape} {dtype}"] = reason
                continue
            progress(f"{shape} {dtype}: weights")
            layer = Layer.make(case, DTYPES[dtype], device, plan.train, plan.seed)
            for cell in plan.cells(shape, dtype):
                progress(str(cell))
                even = [row for row in result.measured if row.cell == cell.even]
                result.rows += _cell(plan, result.rooflines[dtype], layer, cell, even)
                yield result
            del layer
            _release(device)
    if not result.rows:
        yield result


def _cell(plan: Plan, peak: roofline.Roofline, layer: Layer, cell: Cell, even: list[Row]) -> list[Row]:
    """Every candidate on one cell; `even` holds the rows with uniform routing, once they are measured."""
    batches = layer.batches(cell.tokens, cell.distribution, plan.seed)
    exact = layer.oracle(batches[0])
    candidates = [peer_named(name) for name in (*plan.ours, *plan.peers)]
    calls, errors, reasons = {}, {}, {}
    for peer in candidates:
        made = _prepare(peer, layer, batches, exact)
        if isinstance(made, str):
            reasons[peer.name] = made
        else:
            calls[peer.name], errors[peer.name] = made
    graphs = frozenset(p.name for p in candidates if p.graph and cell.tokens <= GRAPH_TOKENS and not plan.train)
    seconds = plan.seconds / len(plan.protocols)
    # all bursts come first: a sustained window would leave its clocks to the burst behind it
    figures = [
        _figures(plan, peak, layer, batches, even, clocks, interleave(
            calls, len(batches), layer.device, seconds, plan.min_rounds, graphs=graphs, clocks=clocks,
        ))
        for clocks in plan.protocols
    ]  # fmt: skip
    longest = statistics.mean(max(n) * len(n) / sum(n) for n in map(layer.loads, batches))
    rows = []
    for peer in candidates:
        what = {**cell._asdict(), "peer": peer.name, "ours": peer.ours, "longest": longest}
        if peer.name in reasons:
            rows.append(Row(**what, why_not=reasons[peer.name]))
            continue
        first, *second = (by_name[peer.name] for by_name in figures)
        call, ours = calls[peer.name], _implementation(peer, layer, cell.tokens)
        rows.append(Row(
            **what, **vars(first), sustained=second[0] if second else None, error=errors[peer.name],
            padding=padding(ours, layer, batches) if ours else None, host_us=_host_us(call, batches, layer.device),
            launches=launches(call, layer.device), implementation=ours, limits=peer.limits,
        ))  # fmt: skip
    return rows


def _figures(
    plan: Plan, peak: roofline.Roofline, layer: Layer, batches: list[Batch], even: list[Row], clocks: str,
    samples: dict[str, Sample],
) -> dict[str, Figures]:  # fmt: skip
    """What one protocol's samples say of every candidate that ran."""
    case, tokens = layer.case, batches[0].x.shape[0]
    hit = statistics.mean(len(batch.ids.unique()) for batch in batches)
    work = roofline.work(case, layer.dtype, tokens, hit, plan.train)
    floor, best, bound = peak.seconds(work), None, None
    if rivals := [s.median for name, s in samples.items() if name in plan.peers and not peer_named(name).bound]:
        best = min(rivals)
    if DENSE in samples:
        bound = samples[DENSE].median + roofline.combine_bytes(case, layer.dtype, tokens) / peak.bandwidth
    uniform = {row.peer: row.figures[clocks].ms or 0 for row in even}
    out = {}
    for name, sample in samples.items():
        peer, median, (low, high) = peer_named(name), sample.median, sample.quartiles
        out[name] = Figures(
            clocks=clocks, mode=sample.mode, rounds=len(sample.seconds), ms=median * 1e3, ms_low=low * 1e3,
            ms_high=high * 1e3, tflops=work.flops / median / 1e12, gbs=work.bytes / median / 1e9, floor_ms=floor * 1e3,
            roofline=floor / median, dense_ms=None if bound is None else bound * 1e3,
            dense=None if bound is None or peer.bound else bound / median,
            vs_uniform=median * 1e3 / uniform[name] if name in uniform else None,
            vs_best_peer=None if best is None else best / median,
            paired={p: _paired(samples[p], sample) for p in plan.peers if peer.ours and p in samples},
        )  # fmt: skip
    return out


def _paired(other: Sample, own: Sample) -> float:
    return statistics.median(a / b for a, b in zip(other.seconds, own.seconds, strict=True))


def _host_us(call: Callable[[int], object], batches: list[Batch], device: torch.device) -> float | None:
    return host_seconds(call, len(batches), device) * 1e6 if device.type == "cuda" else None


def _implementation(peer: Peer, layer: Layer, tokens: int) -> str:
    if not peer.ours:
        return ""
    return peer.name.partition(":")[2] or explanation(layer, tokens).chosen or ""


def _prepare(peer: Peer, layer: Layer, batches: list[Batch], exact: tuple[torch.Tensor, torch.Tensor]):
    """The candidate built and run once on every batch: `(call(i), error on batch 0)`, or the reason why it cannot."""
    if reason := peer.why_not(layer):
        return reason
    try:
        forward, error = peer.build(layer), None
        call = _trainer(forward, layer, batches) if layer.train else _inference(forward, batches)
        with torch.no_grad():
            y = forward(batches[0]).detach()
        if peer.comparable(layer):
            error = error_report(y[exact[0]], exact[1]).norm
        for i in range(len(batches)):
            call(i)
        _synchronize(layer.device)
    except foreign_errors() as caught:
        text = str(caught).strip() or "no message"
        reason = f"{type(caught).__name__}: {text.splitlines()[0][:200]}"
        try:
            _synchronize(layer.device)
        except RuntimeError as broken:
            raise RuntimeError(
                f"bench: {peer.name} left the device in an error that no later call survives ({reason}); "
                f"run again without it."
            ) from broken
        return reason
    return call, error


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _inference(forward, batches: list[Batch]):
    def call(i: int):
        with torch.no_grad():
            return forward(batches[i])

    return call


def _trainer(forward, layer: Layer, batches: list[Batch]):
    """Forward and backward: gradients of x, the routing weights and the expert weights."""
    parameters = [w for w in (layer.w_gate_up, layer.w_down, layer.b_gate_up, layer.b_down) if w is not None]

    def call(i: int):
        batch = batches[i]
        y = forward(batch)
        wanted = (batch.x, batch.weights, batch.weights_low, *parameters)
        return torch.autograd.grad(y, wanted, batch.grad, allow_unused=True)  # a peer takes one form of the weights

    return call


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
