"""`moesaic bench`: one layer of experts, ours beside everything else that can run here. Studies are its subcommands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..bench import PEERS, Plan, Result, report
from ..bench import run as measure
from ..bench.peers import DENSE
from ..bench.timing import PROTOCOLS
from ..cases import DISTRIBUTIONS
from ..errors import MissingExtra
from .screen import Clock, Device, Json, Screen, UsageMistake, clean, names, pick_device


def bench(
    context: typer.Context,
    shapes: Annotated[
        str, typer.Option(help="Names in moesaic.cases.CASES; NAME-small shrinks one.")
    ] = "olmoe,qwen3-30b-a3b",
    tokens: Annotated[
        str, typer.Option(help="Numbers of tokens; 1..64: powers of two up to 64, and 1.5 times them.")
    ] = "1,8,64,512",
    dtypes: Annotated[str, typer.Option(help="bf16, fp16, fp32, fp64.")] = "bf16",
    peers: Annotated[str, typer.Option(help=f"all, none, or some of {', '.join(PEERS)}.")] = "all",
    ours: Annotated[str, typer.Option(help="moesaic, or moesaic:IMPLEMENTATION to force one.")] = "moesaic",
    train: Annotated[bool, typer.Option("--train", help="Time forward and backward.")] = False,
    distribution: Annotated[
        str, typer.Option(help=f"How tokens spread, some of {', '.join(DISTRIBUTIONS)}.")
    ] = "uniform",
    clocks: Annotated[
        str, typer.Option(help=f"On a GPU: {', '.join(PROTOCOLS)} (behind 0.4 s of its own load), or both.")
    ] = "both",
    seconds: Annotated[float, typer.Option(help="Time to spend on one candidate in one cell.")] = 2.0,
    rounds: Annotated[int, typer.Option(help="Rounds of one cell at least, of each of the clocks.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Write the record here (JSON), kept up to date while it runs.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time against tokens here (PNG).")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to record, where the source is not a git tree.")] = None,
    note: Annotated[str, typer.Option(help="A remark for the record.")] = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time one layer of experts against other implementations, all of them in the same rounds.

    Medians over rotating batches; TFLOP/s and GB/s count the least work the layer needs; roofline is the share of what
    this machine was measured to do in the same run; error is against fp64. Exit code 1 if moesaic itself fails.
    """
    if context.invoked_subcommand is not None:
        _only_the_study(context, context.invoked_subcommand)
        return
    screen, here, clock = Screen(as_json), pick_device(device), Clock()
    plan = Plan(
        names(shapes), _tokens(tokens), names(dtypes), _peers(peers), str(here), train, names(distribution),
        seconds, rounds, names(ours), tuple(PROTOCOLS) if clocks == "both" else names(clocks),
    )  # fmt: skip
    check_before(plan, "bench", plot)
    what = "forward and backward" if train else "forward"
    spread, name = ", ".join(plan.distributions), report.device_name(here)
    screen.title("moesaic bench", f"One layer of experts, {what}, {spread} routing, on {name}.")
    source = context.get_parameter_source("clocks")
    if here.type != "cuda" and source is not None and source.name == "COMMANDLINE":
        screen.print("[yellow]--clocks is for GPUs: a CPU is timed call by call[/yellow]")
    result = _run(screen, plan, out, commit, note)
    kept = report.record(result, commit, note)
    _rest(screen, result, clock.seconds)
    if plot is not None:
        report.plot(result, plot)
        screen.print(f"wrote {plot}")
    if out is not None:
        screen.print(f"wrote {out}")
    screen.emit(kept)
    if result.failed:
        raise typer.Exit(1)


def check_before(plan: Any, who: str, plot: Path | None) -> None:
    """Say now what would fail after minutes: a plan that means nothing, a picture without matplotlib."""
    try:
        plan.check()
    except ValueError as error:
        raise UsageMistake(f"{who}: {error}") from error
    if plot is not None and not report.found("matplotlib"):
        raise MissingExtra("matplotlib", "plot", "--plot")


def _only_the_study(context: typer.Context, study: str) -> None:
    """An option before a study's name would be lost: say so."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageMistake(f"bench: options of a study come after its name, as in: moesaic bench {study} --json")


def _run(screen: Screen, plan: Plan, out: Path | None, commit: str | None, note: str) -> Result:
    """Measure, print each table when its last cell is done, and keep the record up to date."""
    result, shown = Result(plan), 0
    cells = [cell for shape in plan.shapes for dtype in plan.dtypes for cell in plan.cells(shape, dtype)]
    with screen.alone(), screen.progress(len(cells)) as advance:
        for result in measure(plan, lambda what: advance(what, 0)):
            advance("", 1)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(clean(report.record(result, commit, note)), indent=1) + "\n")
            rows = result.measured[shown:]
            if rows and rows[-1].cell == plan.cells(rows[-1].shape, rows[-1].dtype)[-1]:
                shown = len(result.measured)
                screen.print(report.table(rows, f"{rows[0].shape}, {rows[0].dtype}", screen.console.width))
    return result


def _rest(screen: Screen, result: Result, seconds: float) -> None:
    """The rooflines, and everything that was not measured with its reason."""
    for dtype, peak in result.rooflines.items():
        screen.print(
            f"[dim]measured roofline, {dtype}: copy {peak.bandwidth / 1e9:.3g} GB/s, "
            f"product {peak.flops / 1e12:.3g} TFLOP/s[/dim]"
        )
    for line in report.summary(result):
        ratio, paired = line["ratio"], line["paired"]
        where = "" if line["clocks"] == "call" else f", {line['clocks']}"
        where += "" if line["distribution"] == "uniform" else f", {line['distribution']} routing"
        screen.print(Text.assemble(
            f"{line['ours']} against {line['peer']}{where}: ", (f"{ratio['mean']:.2f}x", "bold"),
            f" over {line['cells']} cells, lowest {ratio['lowest']:.2f}x at {ratio['at']}; round by round "
            f"{paired['mean']:.2f}x, lowest {paired['lowest']:.2f}x at {paired['at']}",
        ))  # fmt: skip
    for line in report.sweep(result):
        _print_sweep(screen, line)
    if DENSE not in result.plan.peers and not result.plan.train:
        screen.print(f"[dim]the share of the dense bound is shown where --peers names {DENSE}[/dim]")
    for peer, limits in {row.peer: row.limits for row in result.measured if row.limits}.items():
        screen.print(Text(f"{peer}: {limits}", style="dim"))
    for (peer, reason), cells in result.not_run.items():
        where = "" if len(cells) == len({row.cell for row in result.rows}) else f" ({', '.join(cells)})"
        screen.print(Text(f"not run: {peer}: {reason}{where}", style="dim"))
    for what, reason in result.skipped.items():
        screen.print(Text(f"skipped: {what}: {reason}", style="yellow"))
    for row in result.failed:
        screen.print(Text(f"FAILED: {row.peer} on {row.cell}: {row.why_not}", style="red"))
    screen.print(f"[dim]{seconds:.0f} s[/dim]")


def _print_sweep(screen: Screen, line: dict[str, Any]) -> None:
    """Whether a larger batch is ever faster, and the steepest step."""
    spread = "" if line["distribution"] == "uniform" else f" {line['distribution']}"
    clocks = "" if line["clocks"] == "call" else f", {line['clocks']}"
    top, ends = line["steepest"], f"T={line['tokens'][0]} to {line['tokens'][-1]}"
    cliffs = "; ".join(
        f"cliff: T={c['tokens']} takes {report.figure(c['ms'])} ms, T={c['next']} {report.figure(c['next_ms'])} ms"
        for c in line["cliffs"]
    )
    screen.print(Text(
        f"{line['ours']} on {line['shape']} {line['dtype']}{spread}{clocks}, {ends}: {cliffs or 'no cliff'}; steepest "
        f"from T={top['tokens']} to {top['next']}, where time grows {top['beyond_floor']:.2f}x what the roofline does",
        style="yellow" if cliffs else "dim",
    ))  # fmt: skip


def _tokens(text: str) -> tuple[int, ...]:
    """Whole numbers, each once; `A..B` stands for the powers of two from A to B, and for those half way between two."""
    steps = sorted(n << i for n in (1, 3) for i in range(30))
    out: list[int] = []
    try:
        for part in names(text):
            first, dots, last = part.partition("..")
            out += [n for n in steps if int(first) <= n <= int(last)] if dots else [int(part)]
    except ValueError as error:
        raise UsageMistake(f"--tokens: must be whole numbers or ranges A..B, got {text!r}.") from error
    return tuple(dict.fromkeys(out))


def _peers(text: str) -> tuple[str, ...]:
    if text == "all":
        return tuple(PEERS)
    return () if text == "none" else names(text)
