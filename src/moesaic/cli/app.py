"""The verbs put together, and what becomes of an error: one line on stderr and its exit code."""

from __future__ import annotations

import sys

import typer

from ..errors import MissingExtra, Unsupported
from .demo import demo
from .env import env
from .scale import bench  # with its subcommands
from .screen import UsageMistake
from .verify import verify

app = typer.Typer(
    name="moesaic", help="Mixture-of-Experts operators for PyTorch: see them run, check them, time them.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    epilog="Exit codes: 0 ok, 1 a check failed, 2 wrong usage or a missing extra.",
)  # fmt: skip
app.command()(demo)
app.add_typer(bench, name="bench")
app.command()(verify)
app.command()(env)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_version
    ),
) -> None:
    pass


def run() -> None:
    """Run the command; a caller's mistake or an absent package ends it with code 2 and one line."""
    try:
        app(prog_name="moesaic")
    except (MissingExtra, Unsupported, UsageMistake) as error:
        print(f"moesaic: {error}", file=sys.stderr)
        sys.exit(2)
