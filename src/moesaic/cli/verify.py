"""`moesaic verify`: is every implementation that runs here right, and would we notice if it were not?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..bench import report
from ..hardware import interpreting
from .checks import INTERPRETER_NOTE, Verdict, all_checks
from .controls import Control, all_controls
from .screen import Clock, Device, Json, Screen, pick_device

SHOWN_FAILURES = 10


def verify(
    full: Annotated[
        bool, typer.Option("--full/--quick", help="All cases, sizes and dtypes; or a minute's worth.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check every implementation that can run here against the fp64 oracle, and that mistakes would be caught.

    Forward and gradients of every operator, over model cases, odd sizes, dtypes, activations and hostile routings. The
    bound of an error scales with the dtype and the length of the sums. Exit code 1 names the worst case.
    """
    screen, here, clock = Screen(as_json), pick_device(device), Clock()
    screen.title(
        "moesaic verify", f"Every implementation that runs on {here}, against a slow and clear oracle in fp64."
    )
    with screen.alone(), screen.progress() as advance:
        verdicts = []
        for verdict in all_checks(here, full):
            verdicts.append(verdict)
            advance(f"{len(verdicts)} checks: {verdict.operator} {verdict.implementation}")
        controls = all_controls(here)
    failures = sorted((v for v in verdicts if not v.ok), key=lambda v: -v.ratio)
    missed = [c for c in controls if not c.ok]
    _show(screen, verdicts, failures, controls, clock.seconds)
    screen.emit({
        "ok": not failures and not missed, "device": str(here), "full": full, "seconds": clock.seconds,
        "versions": report.versions(), "checks": len(verdicts), "distribution": summary(verdicts),
        "worst": asdict(worst(verdicts)), "failures": [asdict(v) for v in failures[:1000]],
        "controls": [asdict(c) for c in controls],
    })  # fmt: skip
    if failures or missed:
        raise typer.Exit(1)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict nearest to its bound, or furthest beyond it."""
    return max(verdicts, key=lambda v: v.ratio)


def summary(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The error distribution of every implementation and dtype."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.implementation, verdict.dtype), []).append(verdict)
    return [
        {"implementation": implementation, "dtype": dtype, "checks": len(group), "failed": sum(not v.ok for v in group),
         "norm": _spread([v.norm for v in group]), "ratio": _spread([v.ratio for v in group])}
        for (implementation, dtype), group in groups.items()
    ]  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median_low(ordered), "p99": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "max": ordered[-1],
    }  # fmt: skip


# ---------------------------------------------------------------- screen
def _show(
    screen: Screen, verdicts: list[Verdict], failures: list[Verdict], controls: list[Control], seconds: float
) -> None:
    screen.print(_distribution(verdicts))
    screen.print("[dim]norm: ||out - oracle|| / ||oracle||.  ratio: error over its bound; above 1 fails.[/dim]")
    if interpreting():
        screen.print(f"[dim]{INTERPRETER_NOTE}[/dim]")
    screen.print()
    screen.print(_controls(controls))
    screen.print()
    for verdict in failures[:SHOWN_FAILURES]:
        screen.print(Text(f"FAIL {verdict}: {verdict.ratio:.3g} times its bound; {verdict.detail}", style="red"))
    if len(failures) > SHOWN_FAILURES:
        screen.print(f"... and {len(failures) - SHOWN_FAILURES} more")
    missed = [c.name for c in controls if not c.ok]
    last = worst(verdicts)
    if failures:
        line = f"FAILED: {len(failures)} of {len(verdicts)} checks; worst: {last} ({last.ratio:.3g} times its bound)"
    elif missed:
        line = f"FAILED: the rule does not tell right from wrong: {', '.join(missed)}"
    else:
        line = (f"ok: {len(verdicts)} checks passed, {len(controls)} planted mistakes caught, {seconds:.0f} s; "
                f"nearest to its bound: {last} ({last.ratio:.2f})")  # fmt: skip
    screen.print(Text(line, style="bold green" if line.startswith("ok") else "bold red"))


def _distribution(verdicts: list[Verdict]) -> Table:
    table = Table(title="Errors", title_justify="left", title_style="bold", header_style="bold")
    for name in ("implementation", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("checks", "norm median", "p99", "max", "ratio median", "p99", "max", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in summary(verdicts):
        norm, ratio, failed = line["norm"], line["ratio"], line["failed"]
        table.add_row(
            line["implementation"], line["dtype"], str(line["checks"]),
            *(f"{norm[k]:.1e}" for k in norm), *(f"{ratio[k]:.2f}" for k in ratio),
            Text(str(failed), style="red" if failed else "green"),
        )  # fmt: skip
    return table


def _controls(controls: list[Control]) -> Table:
    table = Table(title="Negative controls: planted mistakes that must be caught", title_justify="left",
                  title_style="bold", header_style="bold")  # fmt: skip
    table.add_column("mistake", no_wrap=True)
    table.add_column("what is wrong", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for control in controls:
        verdict = f"caught: {control.caught.split(' (')[0]}" if control.caught else "NOT CAUGHT"
        if control.right:
            verdict = f"and without the mistake it fails too: {control.right}"
        table.add_row(control.name, control.mistake, Text(verdict, style="green" if control.ok else "red"))
    return table
