"""Expert load: how many tokens each expert gets, relative to an even share.

Legend: `load[e]` = rows of expert e over the ideal T·K/E, so 1 is even, 0 a dead expert, E/K the most there can be.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MissingExtra


def expert_load(topk_ids: Tensor, num_experts: int) -> Tensor:
    """`(E,)` fp64: rows of each expert over the ideal; ids outside `[0, E)` are dropped slots and do not count.

    Args:
        topk_ids: `(T, K)` integers, on any device.
    """
    ids = topk_ids.reshape(-1)
    counts = torch.bincount(ids[(ids >= 0) & (ids < num_experts)].long(), minlength=num_experts).double().cpu()
    return counts * num_experts / counts.sum().clamp_min(1)


@dataclass(frozen=True)
class LoadStatistics:
    """One layer's balance, under the names that training frameworks log.

    Attributes:
        max_violation: `(max - mean) / mean`, MaxVio; 0 is even.
        cv: standard deviation over mean.
        dead: share of experts without a token.
        diversity: exp(entropy) / E, 1 when even.
    """

    max_violation: float
    cv: float
    dead: float
    diversity: float


def load_statistics(load: Tensor) -> LoadStatistics:
    """The statistics of one layer's `expert_load`."""
    share = load / load.sum().clamp_min(1e-300)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return LoadStatistics(
        float(load.max() - 1), float(load.std(correction=0)), float((load == 0).double().mean()),
        float(entropy.exp() / load.numel()),
    )  # fmt: skip


def heatmap(loads: Sequence[Tensor], path: Path, title: str, names: Sequence[str] | None = None) -> None:
    """A picture of layer × expert, load over ideal; white is even, red above, blue below.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "plot", "the heatmap")
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    table = torch.stack(list(loads))
    layers, experts = table.shape
    top = max(2.0, float(table.max()))
    sheet = Figure(
        figsize=(max(5.0, 2.2 + 0.46 * experts), max(2.4, 1.5 + 0.42 * layers)), layout="constrained", dpi=140
    )
    axis = sheet.subplots()
    picture = axis.imshow(table.numpy(), cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, top), aspect="auto")
    if experts <= 32:
        for i in range(layers):
            for e in range(experts):
                value = float(table[i, e])
                strong = abs(value - 1) / (top - 1 if value > 1 else 1) > 0.65
                axis.text(
                    e, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if strong else "black"
                )
    axis.set_yticks(range(layers), list(names) if names else [f"layer {i}" for i in range(layers)], fontsize=8)
    step = 1 if experts <= 32 else experts // 16
    axis.set_xticks(range(0, experts, step), [str(e) for e in range(0, experts, step)], fontsize=8)
    axis.set(xlabel="expert")
    axis.set_title(title, fontsize=10)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    sheet.colorbar(picture, ax=axis, label="tokens / even share", pad=0.015)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path)
