"""How to select the K largest of N scores: four algorithms, torch's, and moesaic's router, timed on the same rows.

All answer as a stable sort would: largest first, ties to the lowest index. Two of them walk one row at a time in
interpreted Python, which says nothing of how they would run compiled; their figures are there for how they grow with N.

Legend: T rows, N candidates in a row, K selected.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import Unsupported
from ...ops.route import route
from ..report import figure
from ..timing import GRAPH_TOKENS, Sample, interleave, one_thread
from .study import Study, save, sheet

NAME = "topk"
BLOCK = 256  # candidates that block selection reads at a time
BATCHES = 3  # inputs in rotation, so that no branch learns one
OURS, TORCH = "moesaic.route", "torch.topk"


# ---------------------------------------------------------------- the algorithms
def sort_topk(scores: Tensor, k: int) -> Tensor:
    """Sort everything, keep the front: O(N log N)."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


def heap_topk(row: Sequence[float], k: int) -> list[int]:
    """Keep the best K so far in a heap whose root is the worst of them: O(N log K)."""
    heap = [(value, -i) for i, value in enumerate(row[:k])]
    heapq.heapify(heap)
    for i in range(k, len(row)):
        if row[i] > heap[0][0]:  # a later equal one does not displace an earlier one
            heapq.heapreplace(heap, (row[i], -i))
    return [-i for _, i in sorted(heap, reverse=True)]


def quickselect_topk(row: Sequence[float], k: int) -> list[int]:
    """Narrow down to the K-th largest by splitting at a pivot, three ways: O(N) on average."""
    pool, left = row, k
    while True:
        pivot = sorted((pool[0], pool[len(pool) // 2], pool[-1]))[1]
        above = [value for value in pool if value > pivot]
        if left <= len(above):
            pool = above
            continue
        left -= len(above) + pool.count(pivot)
        if left <= 0:
            break
        pool = [value for value in pool if value < pivot]
    best = [i for i, value in enumerate(row) if value > pivot]
    best.sort(key=lambda i: row[i], reverse=True)  # stable: equal ones keep their order
    return best + [i for i, value in enumerate(row) if value == pivot][: k - len(best)]


def introselect_topk(scores: np.ndarray, k: int) -> np.ndarray:
    """Quickselect as numpy compiles it (introselect, O(N) always) for the K-th largest, then a sort of the K."""
    T, N = scores.shape
    threshold = np.partition(scores, N - k, axis=1)[:, N - k, None]
    above, equal = scores > threshold, scores == threshold
    wanted = k - above.sum(1, keepdims=True)
    ids = np.nonzero(above | (equal & (equal.cumsum(1) <= wanted)))[1].reshape(T, k)
    order = np.argsort(-np.take_along_axis(scores, ids, 1), axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1)


def block_topk(scores: Tensor, k: int) -> Tensor:
    """Read blocks of 256 and keep a running top-k: O(N log(256 + K)), and memory for one block beside the result.

    The last block is as short as it is: nothing past N is read. The running list begins empty and not with sentinels,
    so that a candidate of -inf can be selected when there is nothing better.
    """
    ids = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    best, best_ids = scores[:, :0], ids[:, :0]
    for block, block_ids in zip(scores.split(BLOCK, 1), ids.split(BLOCK, 1), strict=True):
        both, both_ids = torch.cat((best, block), 1), torch.cat((best_ids, block_ids), 1)
        best, order = torch.sort(both, dim=-1, descending=True, stable=True)  # earlier ones stand first: they win ties
        best, best_ids = best[:, :k], both_ids.gather(1, order[:, :k])
    return best_ids


@dataclass(frozen=True)
class Algorithm:
    """A way to select: its growth, and what it runs on, `torch`, `numpy` or `python` (one row at a time)."""

    choose: Callable[[Any, int], Any]
    complexity: str
    form: str

    def prepare(self, scores: Tensor) -> Any:
        """`(T, N)` scores in this algorithm's form; not timed."""
        if self.form == "torch":
            return scores
        return scores.cpu().numpy() if self.form == "numpy" else scores.tolist()

    def run(self, prepared: Any, k: int) -> Any:
        """The ids of every row."""
        return [self.choose(row, k) for row in prepared] if self.form == "python" else self.choose(prepared, k)


ALGORITHMS = {
    "sort": Algorithm(sort_topk, "O(N log N)", "torch"),
    "heap": Algorithm(heap_topk, "O(N log K)", "python"),
    "quickselect": Algorithm(quickselect_topk, "O(N) mean", "python"),
    "introselect": Algorithm(introselect_topk, "O(N)", "numpy"),
    "block": Algorithm(block_topk, "O(N log(B+K))", "torch"),
}


def select(name: str, scores: Tensor, k: int) -> Tensor:
    """Select with one of `ALGORITHMS`: `scores (T, N) -> ids (T, K)` int64, largest first, ties to the lowest index.

    Raises:
        ValueError: `scores` is not `(T, N)` or holds NaN, or k is not in 1..N.
    """
    if scores.dim() != 2:
        raise ValueError(f"select: scores must have shape (T, N), got {tuple(scores.shape)}; reshape it.")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(
            f"select: k must lie in 1..N = {scores.shape[1]}, got {k}; there are not more candidates to select."
        )
    if bool(scores.isnan().any()):
        raise ValueError("select: scores must not be NaN, which no order holds; mask them with -inf.")
    algorithm = ALGORITHMS[name]
    ids = algorithm.run(algorithm.prepare(scores), k)
    return torch.as_tensor(ids, dtype=torch.long, device=scores.device).reshape(scores.shape[0], k)


# ---------------------------------------------------------------- the study
@dataclass(frozen=True)
class Plan:
    """What to time. K is cut to N where there are fewer candidates."""

    candidates: tuple[int, ...] = (8, 16, 64, 128, 256, 512, 1024, 2048, 4096)
    top_k: int = 8
    rows: int = 256
    seconds: float = 0.3
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Raise `ValueError` for a number that means nothing."""
        for name, low in (("candidates", min(self.candidates, default=0)), ("top_k", self.top_k), ("rows", self.rows)):
            if low < 1:
                raise ValueError(f"{name}: must be at least 1, got {low}.")


def run(plan: Plan, progress: Callable[[str], None] = lambda what: None) -> Study:
    """Check every algorithm against the stable sort and time it, for every N; on the CPU all have one core."""
    plan.check()
    rows = []
    with one_thread():
        for N in plan.candidates:
            progress(f"N = {N}")
            rows += _measure(plan, N)
        return Study(NAME, f"Top-{plan.top_k} of N", plan, rows, *_table(plan, rows), _notes(plan, rows))


def _measure(plan: Plan, N: int) -> list[dict[str, Any]]:
    k, device = min(plan.top_k, N), torch.device(plan.device)
    generator = torch.Generator().manual_seed(plan.seed + N)
    batches = [torch.randn(plan.rows, N, generator=generator) for _ in range(BATCHES)]
    with torch.inference_mode():
        here = [scores.to(device) for scores in batches]
        _check_own(batches, k)
        _check_value(TORCH, torch.topk(here[0], k).indices, here[0], sort_topk(here[0], k))
        calls: dict[str, Callable[[int], object]] = {TORCH: lambda i: torch.topk(here[i], k)}
        host: dict[str, Callable[[int], object]] = {}
        for name, algorithm in ALGORITHMS.items():
            place = calls if algorithm.form == "torch" else host
            place[name] = _caller(algorithm, here if algorithm.form == "torch" else batches, k)
        reason = _router_why_not(here[0], k)
        if reason is None:
            calls[OURS] = lambda i: _router(here[i], k)
        samples = _time(plan, calls, host, device)
    rows = []
    for name in (*ALGORITHMS, TORCH, OURS):
        own = ALGORITHMS.get(name)
        row: dict[str, Any] = {
            "candidates": N, "top_k": k, "algorithm": name, "complexity": own.complexity if own else None,
            "form": own.form if own else "torch", "why_not": reason if name == OURS else None,
        }  # fmt: skip
        if sample := samples.get(name):
            low, high = sample.quartiles
            each = 1e6 / plan.rows
            row |= {"us_per_row": sample.median * each, "us_per_row_low": low * each, "us_per_row_high": high * each,
                    "rounds": len(sample.seconds), "mode": sample.mode}  # fmt: skip
        rows.append(row)
    return rows


def _time(plan: Plan, calls: dict, host: dict, device: torch.device) -> dict[str, Sample]:
    """Samples of all calls; on a GPU those that run on the host have rounds of their own."""
    for call in (*calls.values(), *host.values()):
        call(0)
    if device.type == "cpu":
        return interleave({**calls, **host}, BATCHES, device, plan.seconds)
    graphs = frozenset(calls) if plan.rows <= GRAPH_TOKENS else frozenset()
    return {
        **interleave(calls, BATCHES, device, plan.seconds, graphs=graphs),
        **interleave(host, BATCHES, torch.device("cpu"), plan.seconds),
    }


def _caller(algorithm: Algorithm, batches: Iterable[Tensor], k: int) -> Callable[[int], object]:
    prepared = [algorithm.prepare(scores) for scores in batches]
    return lambda i: algorithm.run(prepared[i], k)


def _router(scores: Tensor, k: int):
    force = "triton" if scores.device.type == "cuda" else None
    return route(scores, top_k=k, score="sigmoid", order="pre", implementation=force)


def _router_why_not(scores: Tensor, k: int) -> str | None:
    """Check the router's answer; the reason where it cannot run."""
    try:
        ids = _router(scores, k).topk_ids.long()
    except Unsupported as error:
        return str(error)
    _check_value(OURS, ids, torch.sigmoid(scores), sort_topk(scores, k))
    return None


def _check_own(batches: Sequence[Tensor], k: int) -> None:
    """Every algorithm against the stable sort, on the timed scores and on rounded ones, which are full of ties."""
    for scores in (batches[0], batches[0].round()):
        want = sort_topk(scores, k)
        for name in ALGORITHMS:
            if not torch.equal(select(name, scores, k), want):
                raise AssertionError(f"{name} disagrees with the stable sort at N = {scores.shape[1]}, K = {k}.")


def _check_value(name: str, ids: Tensor, values: Tensor, want: Tensor) -> None:
    """Only the values: torch.topk breaks ties as it likes, and a sigmoid makes ties of scores that were none."""
    if not torch.equal(values.gather(1, ids), values.gather(1, want)):
        raise AssertionError(f"{name} disagrees with the stable sort at N = {values.shape[1]}, K = {ids.shape[1]}.")


# ---------------------------------------------------------------- what is shown
def _table(plan: Plan, rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = (*ALGORITHMS, TORCH, OURS)
    heads = tuple(f"{name}\n{ALGORITHMS[name].complexity if name in ALGORITHMS else ''}".strip() for name in names)
    found = {(row["candidates"], row["algorithm"]): row.get("us_per_row") for row in rows}
    return ("N", *heads), [(str(N), *(figure(found[N, name]) for name in names)) for N in plan.candidates]


def _notes(plan: Plan, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    notes = [
        f"Median microseconds a row, {plan.rows} rows a call; on the CPU, one core. B = {BLOCK}, K = min({plan.top_k}, "
        "N). All selections were compared with the stable sort first.",
        "heap and quickselect are interpreted Python, a row at a time; introselect is quickselect as numpy compiles "
        "it; the rest is torch. Compare growth with N across these, time only within one kind.",
        f"{OURS} does more than select: scores, weights and the index tables that the experts read.",
    ]
    reasons = dict.fromkeys(row["why_not"] for row in rows if row["why_not"])
    return (*notes, *(f"not run: {OURS}: {reason}" for reason in reasons))


COLOURS = {
    "sort": "#e69f00", "heap": "#9a9a9a", "quickselect": "#56b4e9", "introselect": "#0072b2", "block": "#009e73",
    TORCH: "#d55e00", OURS: "#111111",
}  # fmt: skip


def plot(study: Study, path: Path) -> None:
    """Time a row against N, both logarithmic; interpreted ones dashed."""
    figure = sheet(7, 4.2, study)
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        rows = [r for r in study.rows if r["algorithm"] == name and "us_per_row" in r]
        style = "--" if name in ALGORITHMS and ALGORITHMS[name].form == "python" else "-"
        axes.plot(
            [r["candidates"] for r in rows], [r["us_per_row"] for r in rows], style, color=colour, marker="o",
            markersize=3.5, linewidth=2.2 if name == OURS else 1.3,
            label=name + (" (Python)" if style == "--" else ""),
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="candidates N", ylabel="µs a row (median)")
    axes.set_xticks(study.plan.candidates, [str(n) for n in study.plan.candidates])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)
