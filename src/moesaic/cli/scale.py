"""`moesaic bench scale`: one layer on 8 to 4096 GPUs, simulated. A subcommand of `bench` like the studies."""

from __future__ import annotations

from typing import Annotated

import typer

from ..bench.studies import scale as scale_study
from .screen import Json, UsageMistake, names, numbers
from .studies import Commit, Note, Out, Picture, _conduct, bench

__all__ = ["bench", "scale"]


@bench.command()
def scale(
    models: Annotated[str, typer.Option(help="Names in moesaic.cases.CASES.")] = "mixtral-8x7b,deepseek-v3,kimi-k2",
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, whole nodes of 8.")] = "8,32,64,256,1024,4096",
    tokens: Annotated[str, typer.Option(help="Tokens of a GPU.")] = "64,4096",
    zipf: Annotated[str, typer.Option(help="Exponents of the experts' popularity; 0 is even.")] = "0,0.5",
    chunks: Annotated[int, typer.Option(help="Chunks of the overlapped design.")] = 4,
    seed: Annotated[int, typer.Option(help="Which experts are popular, and the draw of tokens.")] = 0,
    out: Out = None,
    plot: Picture = None,
    commit: Commit = None,
    note: Note = "",
    as_json: Json = False,
) -> None:
    """One layer on many GPUs under every way its tokens can travel, simulated with constants from two of them."""
    try:
        exponents = tuple(float(z) for z in names(zipf))
    except ValueError as error:
        raise UsageMistake(f"--zipf: must be numbers, got {zipf!r}.") from error
    plan = scale_study.Plan(
        names(models), numbers(gpus, "--gpus"), numbers(tokens, "--tokens"), exponents, chunks, seed=seed
    )
    _conduct(scale_study, plan, plan.cells, out, plot, commit, note, as_json)
