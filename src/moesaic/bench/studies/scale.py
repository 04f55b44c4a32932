"""Expert parallelism on paper: one layer simulated on many GPUs, under every way its tokens can travel.

Nothing is measured; `moesaic.parallel.scale` has the machine's figures and says where they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cases import CASES
from ...errors import check_choice
from ...parallel.scale import MACHINES, Load, experts_time
from ...parallel.simulation import DESIGNS, simulate
from .study import Study, save, sheet

NAME = "scale"


@dataclass(frozen=True)
class Plan:
    """Models by name, numbers of GPUs, tokens of a GPU, exponents of popularity; chunks of the overlap."""

    models: tuple[str, ...] = ("mixtral-8x7b", "deepseek-v3", "kimi-k2")
    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    tokens: tuple[int, ...] = (64, 4096)
    zipf: tuple[float, ...] = (0.0, 0.5)
    chunks: int = 4
    machine: str = "H100"
    seed: int = 0
    device: str = "cpu"

    def check(self) -> None:
        """Raise `ValueError` for what cannot be simulated."""
        for model in self.models:
            check_choice("scale", "models", model, tuple(CASES))
        check_choice("scale", "machine", self.machine, tuple(MACHINES))
        if self.chunks < 1:
            raise ValueError(f"scale: chunks must be at least 1, got {self.chunks}.")
        for gpus in self.gpus:
            for tokens in self.tokens:
                Load(CASES[self.models[0]], gpus, tokens, MACHINES[self.machine].node)

    @property
    def cells(self) -> int:
        return len(self.models) * len(self.gpus) * len(self.tokens) * len(self.zipf)


def run(plan: Plan, advance: Callable[..., None]) -> Study:
    """Every cell under every design; few tokens are decoding, captured in a graph, many are a training step's."""
    machine, rows, cells = MACHINES[plan.machine], [], []
    for model in plan.models:
        for tokens in plan.tokens:
            for zipf in plan.zipf:
                for gpus in plan.gpus:
                    load = Load(CASES[model], gpus, tokens, machine.node, zipf, plan.seed)
                    captured = True if tokens <= 256 else None
                    made = {d: simulate(machine, load, d, chunks=plan.chunks, captured=captured) for d in DESIGNS}
                    alone = float(experts_time(machine, load).max())
                    best = min(made, key=lambda d: made[d].seconds)
                    rows.append(
                        dict(model=model, tokens=tokens, zipf=zipf, gpus=gpus, group=load.group, nodes=load.nodes,
                             experts_us=alone * 1e6, best=best,
                             **{f"{d}_us": r.seconds * 1e6 for d, r in made.items()},
                             **{f"{d}_waits": r.waited for d, r in made.items()})
                    )  # fmt: skip
                    cells.append((
                        model, str(tokens), f"{zipf:g}", str(gpus), str(load.group), f"{alone * 1e6:.0f}",
                        *(f"{made[d].seconds * 1e6:.0f}" for d in DESIGNS), best,
                    ))  # fmt: skip
                    advance(f"{model}, {gpus} GPUs")
    return Study(
        NAME, f"One layer on many {plan.machine}s, simulated: microseconds", plan, rows,
        ("model", "T a GPU", "Zipf", "GPUs", "EP group", "experts", *DESIGNS, "best"), cells,
        (
            "Simulated, not measured: moesaic.parallel.scale has the figures. Forward pass, half precision.",
            "Up to 256 tokens a GPU a captured graph; beyond, a design that reads counts pays for the host's wait.",
        ),
    )  # fmt: skip


def plot(study: Study, path: Path) -> None:
    """One panel for each model and number of tokens, even load: time over the experts alone against GPUs."""
    plan = study.plan
    figure = sheet(4 * len(plan.models), 3.2 * len(plan.tokens), study)
    figure.suptitle(study.title, fontsize=10)  # no machine of its own: nothing was run here
    grid: Any = figure.subplots(len(plan.tokens), len(plan.models), squeeze=False)
    for i, tokens in enumerate(plan.tokens):
        for j, model in enumerate(plan.models):
            axes = grid[i][j]
            mine = [r for r in study.rows if (r["model"], r["tokens"], r["zipf"]) == (model, tokens, plan.zipf[0])]
            for design in DESIGNS:
                axes.plot([r["gpus"] for r in mine], [r[f"{design}_us"] for r in mine], marker="o", markersize=3,
                          label=design)  # fmt: skip
            axes.plot([r["gpus"] for r in mine], [r["experts_us"] for r in mine], "k--", label="experts alone")
            axes.set(xscale="log", yscale="log", title=f"{model}, {tokens} tokens a GPU", xlabel="GPUs", ylabel="µs")
            axes.grid(alpha=0.3, which="both")
    grid[0][0].legend(fontsize=7)
    save(figure, path)
