"""How to keep experts evenly used: a router and its experts trained on a toy task, once for every way.

Tokens come in clusters of very uneven size around a mean that they share, as hidden states do, and each cluster has its
own target map. Each way also runs without the task, the router trained on the balance term alone: what it drives at
shows there.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...diagnose import load_statistics
from ...nn import BiasBalancer
from ...ops.fused_experts import fused_experts
from ...ops.route import (
    cross_entropy_balance_loss,
    load_balancing_loss,
    route,
    uniform_cross_entropy_loss,
    z_loss,
)
from ...routing import Routing
from ..timing import one_thread
from .study import Study, save, sheet

NAME = "balance"
LEARNING_RATE = 3e-3
NOISE = 0.5  # standard deviation of a token around its cluster's centre


@dataclass(frozen=True)
class Plan:
    """What to train, and how hard to balance. `bias_rate` is the step of the selection bias."""

    steps: int = 300
    tokens: int = 2048
    num_experts: int = 8
    top_k: int = 2
    hidden_size: int = 32
    clusters: int = 64
    coefficient: float = 0.3
    z_coefficient: float = 0.003
    bias_rate: float = 0.001
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Raise `ValueError` for a number that means nothing."""
        for name in ("steps", "tokens", "num_experts", "hidden_size", "clusters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: must lie in 1..E = {self.num_experts}, got {self.top_k}.")
        for name in ("coefficient", "z_coefficient", "bias_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}.")


# ---------------------------------------------------------------- the ways
@dataclass(frozen=True)
class Way:
    """One way to balance: its weighted loss, or None, and whether `BiasBalancer` moves a selection bias."""

    loss: Callable[[Routing, Plan], Tensor] | None = None
    bias: bool = False


WAYS = {
    "no loss": Way(),
    "switch": Way(lambda r, p: p.coefficient * load_balancing_loss(r)),
    "switch + z-loss": Way(lambda r, p: p.coefficient * load_balancing_loss(r) + p.z_coefficient * z_loss(r)),
    "uniform CE": Way(lambda r, p: p.coefficient * uniform_cross_entropy_loss(r)),
    "literal CE": Way(lambda r, p: p.coefficient * cross_entropy_balance_loss(r)),
    "bias update": Way(bias=True),
}


# ---------------------------------------------------------------- the task
class _Task:
    """Clustered tokens and their targets; the same stream for every way."""

    def __init__(self, plan: Plan):
        H, C = plan.hidden_size, plan.clusters
        self.plan, self.generator = plan, torch.Generator().manual_seed(plan.seed)
        self.centres = self._normal(C, H) + self._normal(H)
        self.maps = (self._normal(1, H, H) + self._normal(C, H, H)) / (2 * H) ** 0.5  # half shared, half their own
        self.frequency = 1 / torch.arange(1, C + 1).float()  # Zipf
        self.weights = [
            (self._normal(*shape) / H**0.5).to(plan.device).requires_grad_()
            for shape in ((plan.num_experts, H), (plan.num_experts, 2 * H, H), (plan.num_experts, H, H))
        ]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        """`(x (T, H), target (T, H))`."""
        T, H = self.plan.tokens, self.plan.hidden_size
        cluster = torch.multinomial(self.frequency, T, True, generator=self.generator)
        x = self.centres[cluster] + NOISE * self._normal(T, H)
        target = torch.bmm(self.maps[cluster], x[:, :, None])[:, :, 0]
        return x.to(self.plan.device), target.to(self.plan.device)


def _train(plan: Plan, way: Way, with_task: bool) -> dict[str, Any]:
    """One way from fresh weights: what its load and its error did."""
    task = _Task(plan)
    w_router, w_gate_up, w_down = task.weights
    optimizer = torch.optim.Adam(task.weights if with_task else [w_router], lr=LEARNING_RATE)
    bias = torch.zeros(plan.num_experts, device=plan.device) if way.bias else None
    balancer = BiasBalancer(rate=plan.bias_rate)
    counts, errors = [], []
    routing = None
    for _ in range(plan.steps):
        x, target = task.batch()
        routing = route(x @ w_router.T, top_k=plan.top_k, order="pre", bias=bias)
        terms = [way.loss(routing, plan)] if way.loss else []
        if with_task:
            error = (fused_experts(x, w_gate_up, w_down, routing) - target).square().mean()
            errors.append(error.detach() / target.square().mean())
            terms.append(error)
        counts.append(routing.tokens_per_expert.double())
        if terms:
            optimizer.zero_grad()
            torch.stack(terms).sum().backward()
            optimizer.step()
        if bias is not None:
            balancer.observe(bias, routing)
            balancer.step()
    assert routing is not None and routing.logits is not None
    return _facts(torch.stack(counts).cpu(), [float(e) for e in errors], routing.logits.detach())


def _facts(counts: Tensor, errors: list[float], logits: Tensor) -> dict[str, Any]:
    """Figures of a run; final ones are means over the last tenth of the steps."""
    loads = counts / counts.mean(1, keepdim=True)
    curve, last = [round(v, 4) for v in loads.amax(1).tolist()], max(len(loads) // 10, 1)
    ends = [load_statistics(load) for load in loads[-last:]]
    return {
        "first_max_over_mean": curve[0], "max_over_mean": statistics.mean(curve[-last:]),
        "max_minus_min": float((loads[-last:].amax(1) - loads[-last:].amin(1)).mean()),
        "cv": statistics.mean(s.cv for s in ends), "diversity": statistics.mean(s.diversity for s in ends),
        "unused": float((loads[-last:].mean(0) < 0.01).double().mean()),
        "task_error": statistics.mean(errors[-last:]) if errors else None,
        "logsumexp": float(torch.logsumexp(logits, -1).square().mean().sqrt()), "curve": curve,
    }  # fmt: skip


def run(plan: Plan, progress: Callable[[str], None] = lambda what: None) -> Study:
    """Train every way with the task and on its balance term alone; `progress` is called after each."""
    plan.check()
    rows = []
    with one_thread():  # products this small cost more to share out than to do
        for name, way in WAYS.items():
            row: dict[str, Any] = {"way": name, **_train(plan, way, with_task=True)}
            progress(name)
            alone = _train(plan, way, with_task=False)
            progress(f"{name}, alone")
            rows.append(row | {"alone_max_over_mean": alone["max_over_mean"], "alone_unused": alone["unused"],
                               "alone_curve": alone["curve"]})  # fmt: skip
        return Study(NAME, "Balance of the experts' load", plan, rows, *_table(rows), _notes(plan))


# ---------------------------------------------------------------- what is shown
def _table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    heads = ("way", "max/mean\nfirst", "max/mean\nfinal", "(max-min)\n/mean", "CV", "unused", "task\nerror",
             "logsumexp\nrms", "max/mean\nalone")  # fmt: skip
    return heads, [
        (r["way"], f"{r['first_max_over_mean']:.2f}", f"{r['max_over_mean']:.2f}", f"{r['max_minus_min']:.2f}",
         f"{r['cv']:.2f}", f"{r['unused']:.0%}", f"{r['task_error']:.3f}", f"{r['logsumexp']:.2f}",
         f"{r['alone_max_over_mean']:.2f}") for r in rows
    ]  # fmt: skip


def _notes(plan: Plan) -> tuple[str, ...]:
    return (
        f"E = {plan.num_experts}, K = {plan.top_k}, T = {plan.tokens}, {plan.steps} steps. max/mean is 1 when even, "
        f"E/K = {plan.num_experts / plan.top_k:g} when K experts take everything; (max-min)/mean is 0 when even.",
        "Final figures are means over the last tenth of the steps. Unused: experts with under 1% of the even load. "
        "Task error: squared error over that of answering 0.",
        f"Coefficient of every balance loss {plan.coefficient:g}, of the z-loss {plan.z_coefficient:g}; bias rate "
        f"{plan.bias_rate:g}.",
        "Alone: the router trained on the balance term without the task, for as many steps.",
    )


COLOURS = {
    "no loss": "#9a9a9a", "switch": "#0072b2", "switch + z-loss": "#56b4e9", "uniform CE": "#009e73",
    "literal CE": "#d55e00", "bias update": "#111111",
}  # fmt: skip


def plot(study: Study, path: Path) -> None:
    """Max over mean load against steps: with the task, and on the balance term alone."""
    picture = sheet(10, 3.8, study)
    panels = picture.subplots(1, 2, sharey=True)
    for axes, curve, title in zip(panels, ("curve", "alone_curve"), ("with the task", "balance term alone"),
                                  strict=True):  # fmt: skip
        for row in study.rows:
            axes.plot(_smooth(row[curve]), color=COLOURS[row["way"]], linewidth=1.4, label=row["way"])
        axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="step")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="max/mean load (1 is even)")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False,
                   fontsize=9)  # fmt: skip
    save(picture, path)


def _smooth(values: list[float], width: int = 9) -> list[float]:
    """Running means, so that six lines can be told apart."""
    return [statistics.fmean(values[max(i - width + 1, 0) : i + 1]) for i in range(len(values))]
