"""How many experts should a token meet? One small language model trained with K = 1, 2, 4, 8 side by side.

All models see the same batches in the same order, one step of each in turn, so that whatever slows the machine slows
all of them. Everything but K is the same, with two exceptions that K itself forces: with K = 1 the routing weight is
the probability itself (`order="pre"`), since one weight that is normalised is the constant 1 and trains no router; and
the coefficient of Hugging Face's balance loss, which grows with K, is divided by K.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...diagnose import expert_load, load_statistics
from ..report import figure
from . import tiny_lm
from .study import Study, save, sheet

NAME = "study-k"
USED = 0.5  # an expert counts as used from this share of the even load
POINTS = 6  # evaluations on the way


@dataclass(frozen=True)
class Plan:
    """What to train. `order` is that of the weights for K > 1: `pre_renorm` (the model's own) or `pre`."""

    top_ks: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 150
    batch: int = 8
    length: int = 256
    order: str = "pre_renorm"
    device: str = "cpu"
    seed: int = tiny_lm.SEED

    def check(self) -> None:
        """Raise `ValueError` for a number or a name that means nothing."""
        E, longest = tiny_lm.MODEL["num_experts"], tiny_lm.MODEL["max_position_embeddings"]
        if not self.top_ks or min(self.top_ks) < 1 or max(self.top_ks) > E:
            raise ValueError(f"top_ks: each must lie in 1..E = {E}, got {', '.join(map(str, self.top_ks)) or 'none'}.")
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}.")
        if not 2 <= self.length <= longest:
            raise ValueError(f"length: must lie in 2..{longest}, got {self.length}.")
        if self.order not in ("pre", "pre_renorm"):
            raise ValueError(f"order: must be pre or pre_renorm, got {self.order!r}.")

    def order_of(self, k: int) -> str:
        """The order of the routing weights that K = k trains with."""
        return "pre" if k == 1 else self.order


@dataclass
class _Run:
    """One model under way."""

    k: int
    model: Any
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    seconds: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


def run(plan: Plan, progress: Callable[[str], None] = lambda what: None) -> Study:
    """Train every model and judge each on the held-out files; `progress` is called once a round of steps.

    Raises:
        MissingExtra: transformers is not installed.
    """
    plan.check()
    runs = [_start(plan, k) for k in plan.top_ks]
    text, held_out = tiny_lm.corpus()
    every = max(plan.steps // POINTS, 1)
    for step in range(plan.steps):
        shift = step % len(runs)
        for one in runs[shift:] + runs[:shift]:  # every place in a round equally often
            _step(plan, one, step, text)
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            for one in runs:
                unseen = tiny_lm.evaluate(one.model, held_out, plan.batch, plan.length, plan.device)
                train = sum(one.recent) / len(one.recent)
                one.curve.append({"step": step + 1, "train": train, "validation": unseen})
                one.recent.clear()
        progress(f"step {step + 1} of {plan.steps}")
    rows = [_row(plan, one, held_out) for one in runs]
    return Study(NAME, "K experts a token", plan, rows, *_table(rows), _notes(plan))


def _start(plan: Plan, k: int) -> _Run:
    coefficient = tiny_lm.MODEL["router_aux_loss_coef"] * tiny_lm.MODEL["num_experts_per_tok"] / k
    model = tiny_lm.build(
        seed=plan.seed, num_experts_per_tok=k, norm_topk_prob=plan.order_of(k) == "pre_renorm",
        router_aux_loss_coef=coefficient,
    ).to(plan.device)  # fmt: skip
    return _Run(k, model, tiny_lm.optimizer_of(model), torch.Generator().manual_seed(plan.seed))


def _step(plan: Plan, one: _Run, step: int, text: Tensor) -> None:
    ids = tiny_lm.sample_batch(text, one.generator, plan.batch, plan.length, plan.device)
    rate = tiny_lm.learning_rate(step, plan.steps, min(tiny_lm.WARMUP, max(plan.steps // 5, 1)))
    start = time.perf_counter()
    loss, _ = tiny_lm.train_step(one.model, one.optimizer, ids, rate)  # reads the loss, so a GPU is waited for
    one.seconds.append(time.perf_counter() - start)
    one.recent.append(loss)


@torch.no_grad()
def loads(model: Any, text: Tensor, batch: int, length: int, device: str, batches: int = 8) -> list[Tensor]:
    """`(E,)` load of every layer over the windows that `tiny_lm.evaluate` reads; 1 is an even share."""
    generator = torch.Generator().manual_seed(tiny_lm.SEED + 1)
    model.eval()
    chosen: list[list[Tensor]] = []
    for _ in range(batches):
        ids = tiny_lm.sample_batch(text, generator, batch, length, device)
        logits = model(input_ids=ids, output_router_logits=True).router_logits
        chosen.append([layer.topk(model.config.num_experts_per_tok, -1).indices for layer in logits])
    model.train()
    return [expert_load(torch.cat(layer), model.config.num_experts) for layer in zip(*chosen, strict=True)]


def _row(plan: Plan, one: _Run, held_out: Tensor) -> dict[str, Any]:
    by_layer = loads(one.model, held_out, plan.batch, plan.length, plan.device)
    timed = one.seconds[max(len(one.seconds) // 10, 1) :] or one.seconds  # the first steps also warm up
    tokens, seconds = plan.batch * plan.length, statistics.median(timed)
    busiest = [load_statistics(load).max_violation + 1 for load in by_layer]
    return {
        "top_k": one.k, "order": plan.order_of(one.k), "validation": one.curve[-1]["validation"],
        "train": one.curve[-1]["train"], "tokens_per_second": tokens / seconds, "step_ms": seconds * 1e3,
        "utilisation": statistics.mean(float((load >= USED).double().mean()) for load in by_layer),
        "max_over_mean": statistics.mean(busiest), "worst_max_over_mean": max(busiest),
        "dead": statistics.mean(load_statistics(load).dead for load in by_layer), "curve": one.curve,
        "load": [[round(v, 4) for v in load.tolist()] for load in by_layer],
    }  # fmt: skip


# ---------------------------------------------------------------- what is shown
def _table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    heads = ("K", "weights", "validation\nnats/byte", "training\ntokens/s", "experts\nused", "max/mean\nload",
             "worst layer")  # fmt: skip
    return heads, [
        (str(r["top_k"]), r["order"], f"{r['validation']:.3f}", figure(r["tokens_per_second"]),
         f"{r['utilisation']:.0%}", f"{r['max_over_mean']:.2f}", f"{r['worst_max_over_mean']:.2f}") for r in rows
    ]  # fmt: skip


def _notes(plan: Plan) -> tuple[str, ...]:
    m = tiny_lm.MODEL
    return (
        f"{m['num_hidden_layers']} layers of {m['num_experts']} experts; {plan.steps} steps of {plan.batch} windows of "
        f"{plan.length} bytes, the same for all, one seed.",
        "Validation on files that were held out. Tokens/s from the median step (forward, backward, optimizer), models "
        "taking turns.",
        f"Experts used: share of experts with at least {USED:g} of the even load, on the held-out windows, mean over "
        "layers; so is max/mean.",
        "A larger K also computes more for every token: this compares choices of K, not equal budgets.",
    )


def plot(study: Study, path: Path) -> None:
    """Validation loss on the way, and for each K throughput and the use of experts."""
    picture = sheet(10, 3.4, study)
    curves, speed, use = picture.subplots(1, 3, width_ratios=(1.5, 1, 1))
    names = [f"K = {r['top_k']}" for r in study.rows]
    colours = ("#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")
    colours = [colours[i % len(colours)] for i in range(len(names))]
    for row, name, colour in zip(study.rows, names, colours, strict=True):
        curves.plot([p["step"] for p in row["curve"]], [p["validation"] for p in row["curve"]], color=colour,
                    marker="o", markersize=3, linewidth=1.4, label=name)  # fmt: skip
    curves.set(xlabel="step", ylabel="validation loss (nats per byte)")
    curves.legend(frameon=False, fontsize=8)
    speed.bar(names, [r["tokens_per_second"] for r in study.rows], color=colours, width=0.65)
    speed.set(ylabel="training tokens/s")
    use.bar(names, [100 * r["utilisation"] for r in study.rows], color=colours, width=0.65)
    use.set(ylabel="experts used, %", ylim=(0, 100))
    for axes in (curves, speed, use):
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    save(picture, path)
