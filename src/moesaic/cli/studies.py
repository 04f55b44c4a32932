"""`moesaic bench topk`, `balance` and `study-k`: the studies of `moesaic.bench.studies`, as subcommands of `bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..bench.studies import Study
from ..bench.studies import balance as balance_study
from ..bench.studies import study_k as k_study
from ..bench.studies import topk as topk_study
from .bench import bench as layer
from .bench import check_before
from .screen import Clock, Device, Json, Screen, clean, numbers, pick_device

Out = Annotated[Path | None, typer.Option(help="Write the record here (JSON).")]
Picture = Annotated[Path | None, typer.Option(help="Draw it here (PNG).")]
Commit = Annotated[str | None, typer.Option(help="Commit to record, where the source is not a git tree.")]
Note = Annotated[str, typer.Option(help="A remark for the record.")]

bench = typer.Typer(invoke_without_command=True, no_args_is_help=False, subcommand_metavar="[STUDY [OPTIONS]]")
bench.callback()(layer)


@bench.command()
def topk(
    candidates: Annotated[str, typer.Option(help="Numbers of candidates, N.")] = "8,16,64,128,256,512,1024,2048,4096",
    top_k: Annotated[int, typer.Option(help="How many to select, K.")] = 8,
    rows: Annotated[int, typer.Option(help="Rows of a call, T.")] = 256,
    seconds: Annotated[float, typer.Option(help="Time to spend on one algorithm and N.")] = 0.3,
    out: Out = None,
    plot: Picture = None,
    commit: Commit = None,
    note: Note = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Ways to select the K largest of N: sort, heap, quickselect, blocks, torch.topk and moesaic's router.

    All have to agree with a stable sort before they are timed; figures are median microseconds a row.
    """
    where = str(pick_device(device))
    plan = topk_study.Plan(numbers(candidates, "--candidates"), top_k, rows, seconds, where)
    _conduct(topk_study, plan, len(plan.candidates), out, plot, commit, note, as_json)


@bench.command()
def balance(
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 300,
    tokens: Annotated[int, typer.Option(help="Tokens of a step, T.")] = 2048,
    experts: Annotated[int, typer.Option(help="Experts, E.")] = 8,
    top_k: Annotated[int, typer.Option(help="Choices of a token, K.")] = 2,
    coefficient: Annotated[float, typer.Option(help="Of every balance loss.")] = 0.3,
    z_coefficient: Annotated[float, typer.Option(help="Of the z-loss.")] = 0.003,
    bias_rate: Annotated[float, typer.Option(help="Step of the selection bias.")] = 0.001,
    seed: Annotated[int, typer.Option(help="Of weights, task and tokens.")] = 0,
    out: Out = None,
    plot: Picture = None,
    commit: Commit = None,
    note: Note = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Ways to keep experts evenly used, on a toy task: losses, a selection bias, and a loss that does the opposite."""
    plan = balance_study.Plan(
        steps, tokens, experts, top_k, coefficient=coefficient, z_coefficient=z_coefficient, bias_rate=bias_rate,
        device=str(pick_device(device)), seed=seed,
    )  # fmt: skip
    _conduct(balance_study, plan, 2 * len(balance_study.WAYS), out, plot, commit, note, as_json)


@bench.command("study-k")
def study_k(
    top_ks: Annotated[str, typer.Option(help="Values of K to train with.")] = "1,2,4,8",
    steps: Annotated[int, typer.Option(help="Steps of each model.")] = 150,
    batch: Annotated[int, typer.Option(help="Windows of a batch.")] = 8,
    length: Annotated[int, typer.Option(help="Bytes of a window.")] = 256,
    order: Annotated[str, typer.Option(help="Routing weights for K > 1: pre_renorm or pre; K = 1 is pre.")] = (
        "pre_renorm"
    ),
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    out: Out = None,
    plot: Picture = None,
    commit: Commit = None,
    note: Note = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How many experts a token should meet: a tiny language model trained with each K (needs the hf extra)."""
    plan = k_study.Plan(numbers(top_ks, "--top-ks"), steps, batch, length, order, str(pick_device(device)), seed)
    _conduct(k_study, plan, steps, out, plot, commit, note, as_json)


def _conduct(
    study: Any, plan: Any, total: int, out: Path | None, plot: Path | None, commit: str | None, note: str, as_json: bool
) -> None:
    """Run a study's module on a plan and write what was asked for; `total` calls of progress are expected."""
    screen, clock = Screen(as_json), Clock()
    check_before(plan, f"bench {study.NAME}", plot)
    with screen.alone(), screen.progress(total, aside=True) as advance:
        result: Study = _run(study.run, plan, advance)
    kept = result.record(commit, note)
    _show(screen, result, clock.seconds)
    if plot is not None:
        study.plot(result, plot)
        screen.print(f"wrote {plot}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(clean(kept), indent=1) + "\n")
        screen.print(f"wrote {out}")
    screen.emit(kept)


def _run(run: Callable[..., Study], plan: Any, advance: Callable[..., None]) -> Study:
    advance("starting", 0)
    return run(plan, advance)


def _show(screen: Screen, result: Study, seconds: float) -> None:
    table = Table(title=result.title, title_justify="left", title_style="bold", header_style="bold")
    for i, head in enumerate(result.heads):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    for cells in result.cells:
        table.add_row(*cells)
    screen.print(table)
    for note in result.notes:
        screen.print(Text(note, style="dim"))
    screen.print(f"[dim]{seconds:.0f} s[/dim]")
