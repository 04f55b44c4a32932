"""What a study leaves behind: its table as text, its figures as plain values, and a record that can be repeated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import MissingExtra
from ..libraries import found
from ..report import device_name, machine, provenance


@dataclass
class Study:
    """A finished study; made while torch still has the number of threads that it ran with.

    Attributes:
        name: the command's name.
        plan: the dataclass of everything that was asked for; it has a `device`.
        rows: every figure with its names, as plain values.
        heads, cells: the table for a person, made from `rows`.
        notes: what a reader of the table has to know.
        machine, where: the machine as a record keeps it, and in words.
    """

    name: str
    title: str
    plan: Any
    rows: list[dict[str, Any]]
    heads: tuple[str, ...]
    cells: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    machine: dict[str, Any] = field(init=False)
    where: str = field(init=False)

    def __post_init__(self) -> None:
        device = torch.device(self.plan.device)
        self.machine, self.where = machine(device), device_name(device)

    def record(self, commit_id: str | None = None, note: str = "") -> dict[str, Any]:
        """Everything needed to repeat the study, and what it measured, as plain values."""
        return {
            "what": f"study: {self.name}",
            **provenance(torch.device(self.plan.device), commit_id, note),
            "machine": self.machine,
            "plan": asdict(self.plan),
            "notes": list(self.notes),
            "rows": self.rows,
        }


def sheet(width: float, height: float, study: Study) -> Any:
    """An empty matplotlib figure under the study's title and the machine's name.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if not found("matplotlib"):
        raise MissingExtra("matplotlib", "plot", "the plot")
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    out = Figure(figsize=(width, height), layout="constrained", dpi=110)
    out.suptitle(f"{study.title}, on {study.where}", fontsize=10)
    return out


def save(figure: Any, path: Path) -> None:
    """Write a figure and the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
