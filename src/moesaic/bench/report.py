"""What a benchmark leaves behind: a JSON record with everything needed to repeat it, a table, and a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingExtra
from ..hardware import arch_of, cpu_name, sm_count
from .harness import Figures, Result, Row
from .libraries import found

CLIFF = 1.1  # a T that takes this many times as long as the next larger one, beyond what noise does
PACKAGES = ("moesaic", "torch", "triton", "transformers", "numpy", "vllm", "sonic-moe", "quack-kernels", "liger-kernel")

# Candidates keep their colour in every plot: ours dark and heavy, peers from one qualitative set.
COLOURS = {
    "moesaic": "#111111", "torch_loop": "#9a9a9a", "torch_grouped_mm": "#e69f00", "hf_grouped_mm": "#0072b2",
    "vllm": "#d55e00", "triton_kernels": "#009e73", "sonic": "#cc79a7", "liger": "#56b4e9",
}  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, read from their metadata (nothing is imported)."""
    out = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "moesaic" not in out:
        from .. import __version__

        out["moesaic"] = __version__
    out["torch"] = torch.__version__  # with the build's tag
    return out


def machine(device: torch.device) -> dict[str, Any]:
    """The machine as a record keeps it."""
    out: dict[str, Any] = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "os": platform.platform(),
    }  # fmt: skip
    if device.type == "cuda":
        out |= {"gpu": torch.cuda.get_device_name(device), "arch": arch_of(device), "sms": sm_count(device.index or 0),
                "cuda": torch.version.cuda, "hip": torch.version.hip}  # fmt: skip
    return out


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU's with the threads that torch uses."""
    here = machine(device)
    return here.get("gpu") or f"{here['cpu']}, {here['threads']} thread{'s' if here['threads'] > 1 else ''}"


def commit() -> str | None:
    """The commit of the source tree that this package runs from, `+` if it was changed; None outside of one."""
    where = str(Path(__file__).parents[1])

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", where, *arguments], capture_output=True, text=True, timeout=20)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    tracked = head and git("ls-files", "--error-unmatch", "__init__.py")
    return head + ("+" if git("status", "--porcelain", "--", where) else "") if head and tracked else None


def provenance(device: torch.device, commit_id: str | None = None, note: str = "") -> dict[str, Any]:
    """When, where and with what a record was made: date, command line, commit, note, machine and versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["moesaic", *sys.argv[1:]]),
        "commit": commit_id or commit(),
        "note": note,
        "machine": machine(device),
        "versions": versions(),
    }


def record(result: Result, commit_id: str | None = None, note: str = "") -> dict[str, Any]:
    """The whole run as plain values: machine, versions, commit, command line, date, rooflines and rows."""
    return {
        "what": "training" if result.plan.train else "inference",
        **provenance(torch.device(result.plan.device), commit_id, note),
        "plan": asdict(result.plan),
        "roofline": {
            dtype: {"GB/s": r.bandwidth / 1e9, "TFLOP/s": r.flops / 1e12} for dtype, r in result.rooflines.items()
        },
        "summary": summary(result),
        "sweep": sweep(result),
        "skipped": result.skipped,
        "not_run": [{"peer": p, "reason": why, "cells": cells} for (p, why), cells in result.not_run.items()],
        "rows": [{k: v for k, v in asdict(row).items() if k != "why_not"} for row in result.measured],
    }


def summary(result: Result) -> list[dict[str, Any]]:
    """Each of ours against each peer over all cells they share: geometric mean and lowest ratio; above 1 is faster.

    A line for each distribution and each protocol, `clocks`. `ratio` compares medians; `paired` is the median over
    rounds of the ratio within a round, which noise touches less.
    """
    cells = {(r.cell, r.peer): r.figures for r in result.measured}
    plan, out = result.plan, []
    for ours, peer, spread, clocks in itertools.product(plan.ours, plan.peers, plan.distributions, plan.protocols):
        ratios, paired = {}, {}
        for (cell, name), figures in cells.items():
            other = cells.get((cell, peer))
            if name == ours and cell.distribution == spread and other is not None:
                own = figures[clocks]
                ratios[str(cell)], paired[str(cell)] = (other[clocks].ms or 0) / (own.ms or 1), own.paired[peer]
        if ratios:
            out.append({"ours": ours, "peer": peer, "distribution": spread, "clocks": clocks, "cells": len(ratios),
                        "ratio": _low_and_mean(ratios), "paired": _low_and_mean(paired)})  # fmt: skip
    return out


def sweep(result: Result) -> list[dict[str, Any]]:
    """How the time of ours grows with T, a line for each layer, distribution and protocol with two T or more.

    `cliffs` holds every T that takes over `CLIFF` times as long as the next larger one: there a larger batch is faster.
    `steepest` is the step to the next larger T whose time grows most in relation to its floor.
    """
    lines: dict[tuple, list[Row]] = {}
    for row in sorted(result.measured, key=lambda row: row.tokens):
        if row.ours:
            lines.setdefault((row.peer, row.cell._replace(tokens=0)), []).append(row)
    out = []
    for ((name, cell), rows), clocks in itertools.product(lines.items(), result.plan.protocols):
        if len(rows) < 2:
            continue
        timed = [(row.tokens, row.figures[clocks].ms or 0, row.figures[clocks].floor_ms or 0) for row in rows]
        steps = [
            {"tokens": a, "next": b, "ms": ms, "next_ms": next_ms, "beyond_floor": next_ms / ms / (next_floor / floor)}
            for (a, ms, floor), (b, next_ms, next_floor) in itertools.pairwise(timed)
        ]
        out.append({
            "ours": name, "shape": cell.shape, "dtype": cell.dtype, "distribution": cell.distribution, "clocks": clocks,
            "tokens": [tokens for tokens, *_ in timed],
            "cliffs": [step for step in steps if step["ms"] > CLIFF * step["next_ms"]],
            "steepest": max(steps, key=lambda step: step["beyond_floor"]),
        })  # fmt: skip
    return out


def _low_and_mean(values: dict[str, float]) -> dict[str, Any]:
    where = min(values, key=lambda cell: values[cell])
    return {"mean": statistics.geometric_mean(values.values()), "lowest": values[where], "at": where}


# ---------------------------------------------------------------- table
Entry = Callable[[Row], str]
_HEADS = {"call": "", "burst": "burst", "sustained": "sust."}


def table(rows: Sequence[Row], title: str, width: int = 120):
    """A rich table of measured rows of one shape and dtype; the fastest candidate of each T is bold.

    A column without a value is left out, and as many of the last ones as the width has no room for.
    """
    from rich.console import Console

    columns = [(head, cell) for head, cell in _columns(rows[0].figures) if any(cell(row) for row in rows)]
    measure = Console(width=1000).measure
    while measure(out := _table(rows, title, columns)).maximum > width and len(columns) > 1:
        columns.pop()
    return out


def _columns(protocols: Iterable[str]) -> list[tuple[str, Entry]]:
    """Heads and cells in the order of their importance; a cell is empty where its row has no value."""

    def timed(head: str, cell: Callable[[Row, Figures], str]) -> list[tuple[str, Entry]]:
        """A column for each protocol."""
        return [(f"{head}\n{_HEADS[p]}".strip(), lambda row, p=p: cell(row, row.figures[p])) for p in protocols]

    return [
        *timed("ms", lambda row, f: figure(f.ms)),
        *timed("vs\nbest", lambda row, f: _ratio(row, f.vs_best_peer)),
        *timed("dense", lambda row, f: "" if f.dense is None else f"{f.dense:.0%}"),
        *timed("vs\nuniform", lambda row, f: "" if f.vs_uniform is None else f"{f.vs_uniform:.2f}x"),
        ("longest", lambda row: "" if row.longest is None or row.cell == row.cell.even else f"{row.longest:.1f}x"),
        ("roofline", lambda row: f"{row.roofline:.0%}"),
        ("error", lambda row: "" if row.error is None else f"{row.error:.1e}"),
        ("padding", lambda row: "" if row.padding is None else f"{row.padding:.0%}"),
        ("launches", lambda row: "" if row.launches is None else str(row.launches)),
        ("quartiles", lambda row: f"{figure(row.ms_low)} to {figure(row.ms_high)}"),
        ("TFLOP/s", lambda row: figure(row.tflops)),
        ("GB/s", lambda row: figure(row.gbs)),
    ]


def _table(rows: Sequence[Row], title: str, columns: Sequence[tuple[str, Entry]]):
    from rich.table import Table

    out = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    spread = ["routing"] if any(row.cell != row.cell.even for row in rows) else []
    for name in ("T", *spread, "candidate", *(head for head, _ in columns)):
        out.add_column(name, justify="left" if name in ("routing", "candidate") else "right", no_wrap=True)
    for here in dict.fromkeys(row.cell for row in rows):
        group = [row for row in rows if row.cell == here]
        fastest = min(row.ms or 0 for row in group)
        for i, row in enumerate(group):
            name = row.peer + (f" ({row.implementation})" if row.implementation and ":" not in row.peer else "")
            cells = (cell(row) or "–" for _, cell in columns)
            style = "bold" if row.ms == fastest else ""
            place = [str(here.tokens), here.distribution][: 1 + len(spread)]
            out.add_row(
                *([""] * len(place) if i else place), name, *cells, end_section=i + 1 == len(group), style=style
            )
    return out


def _ratio(row: Row, value: float | None) -> str:
    """Of ours green where it is at least as fast as every peer within the noise of 3 %, red where it is not."""
    if value is None:
        return ""
    text = f"{value:.2f}x"
    return text if not row.ours else f"[green]{text}[/]" if value >= 0.97 else f"[red]{text}[/]"


def figure(value: float | None) -> str:
    """Three significant figures without an exponent."""
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


# ---------------------------------------------------------------- plot
def plot(result: Result, path: Path) -> None:
    """Time against tokens, one panel for each shape, dtype and distribution, with the measured roofline beneath.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if not found("matplotlib"):
        raise MissingExtra("matplotlib", "plot", "the plot")
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row.cell._replace(tokens=0) for row in result.measured))
    columns = min(len(panels), 3) or 1
    lines = -(-len(panels) // columns) or 1
    sheet = Figure(figsize=(0.8 + 3.9 * columns, 1.1 + 3.3 * lines), layout="constrained", dpi=140)
    axes = list(sheet.subplots(lines, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        title = f"{panel.shape}, {panel.dtype}" + ("" if panel == panel.even else f", {panel.distribution}")
        _panel(axis, [r for r in result.measured if r.cell._replace(tokens=0) == panel], title)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    across = min(len(handles), 2 * columns) or 1
    sheet.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across, frameon=False, fontsize=9)
    what = "forward and backward" if result.plan.train else "forward"
    name = device_name(torch.device(result.plan.device))
    end = "\n" if columns == 1 else " "
    sheet.suptitle(f"One layer of experts, {what}, on {name}:{end}median time (lower is better)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path)


def _panel(axis, rows: list[Row], title: str) -> None:
    for name in dict.fromkeys(r.peer for r in rows):
        points = [(r.tokens, r.ms) for r in rows if r.peer == name]
        ours = name.startswith("moesaic")
        axis.plot(
            *zip(*points, strict=True), marker="o", markersize=4.5 if ours else 3.5, linewidth=2.4 if ours else 1.3,
            color=COLOURS.get(name.partition(":")[0]), label=name, zorder=3 if ours else 2,
            linestyle="--" if ":" in name else "-",
        )  # fmt: skip
    floor = dict(sorted((r.tokens, r.floor_ms or 0.0) for r in rows))
    tokens = list(floor)
    axis.plot(tokens, list(floor.values()), color="#555555", linewidth=1, linestyle=":", label="measured roofline")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
    axis.fill_between(tokens, 0, list(floor.values()), color="#000000", alpha=0.06, linewidth=0)
    axis.set_ylim(bottom=min(floor.values()) / 1.6)
    ticks = tokens[:: -(-len(tokens) // 8)]  # room for eight
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(title, fontsize=10)
    axis.grid(True, alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
