"""Where a verb writes: tables and panels for a person, or one JSON value for a program, never both.

On a terminal there is colour and progress; in a pipe there is plain text without control codes; with `--json` stdout
holds the JSON and nothing else, whatever imported packages print.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PIPE_WIDTH = 130  # a pipe has no width of its own; wide enough for every table


class UsageMistake(ValueError):
    """The caller asked for something that is not there: exit code 2."""


Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout and nothing else.")]
Device = Annotated[str, typer.Option(help="cpu, cuda (or cuda:N), or auto: a GPU if there is one.", metavar="DEVICE")]


def pick_device(name: str) -> torch.device:
    """The device that `--device` means; a `UsageMistake` if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageMistake(f"--device: must be cpu, cuda, cuda:N or auto, got {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageMistake(f"--device: must be cpu, cuda, cuda:N or auto, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageMistake(
            f"--device: {name} is not here; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs."
        )
    return device


def names(text: str) -> tuple[str, ...]:
    """The parts of a list that is written with commas, each once; a `UsageMistake` if there is none."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UsageMistake(f"a list needs at least one name, got {text!r}.")
    return parts


def numbers(text: str, option: str) -> tuple[int, ...]:
    """`names` that are whole numbers."""
    try:
        return tuple(dict.fromkeys(int(part) for part in names(text)))
    except ValueError as error:
        raise UsageMistake(f"{option}: must be whole numbers, got {text!r}.") from error


class Screen:
    """One verb's output."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self._stdout = sys.stdout
        tty = sys.stdout.isatty() and not as_json
        self.tty = tty
        self.console = Console(
            file=sys.stdout, quiet=as_json, highlight=False, emoji=False, soft_wrap=False,
            force_terminal=None if tty else False, width=None if tty else PIPE_WIDTH,
            color_system="auto" if tty else None,
        )  # fmt: skip

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """With `--json`, send what anything else prints to stderr."""
        if not self.as_json:
            yield
            return
        with contextlib.redirect_stdout(sys.stderr):
            yield

    def print(self, *what: RenderableType, **options: Any) -> None:
        self.console.print(*what, **options)

    def title(self, text: str, subtitle: str = "") -> None:
        """A panel at the head of the output."""
        body = f"[bold]{text}[/bold]" + (f"\n[dim]{subtitle}[/dim]" if subtitle else "")
        self.print(Panel(body, border_style="cyan", expand=True, padding=(0, 2)))

    def step(self, number: int, text: str, note: str = "") -> None:
        """The head of a section, and a sentence that says what it shows."""
        self.print()
        self.console.rule(f"[bold]{number}  {text}[/bold]", align="left", style="cyan")
        if note:
            self.print(f"[dim]{note}[/dim]")

    @contextlib.contextmanager
    def progress(self, total: int | None = None, aside: bool = False) -> Iterator[Any]:
        """Yields `advance(what)`: a bar on a terminal, nothing in a pipe.

        Args:
            aside: draw it on stderr, where it can run beside `--json` and a piped stdout; print nothing meanwhile.
        """
        if not (sys.stderr.isatty() if aside else self.tty):
            yield lambda what, done=1: None
            return
        console = Console(stderr=True) if aside else self.console
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task("", total=total)

            def advance(what: str, done: float = 1) -> None:
                bars.update(task, description=what, advance=done)

            yield advance

    def emit(self, value: Any) -> None:
        """With `--json`, write the value; otherwise nothing."""
        if self.as_json:
            json.dump(clean(value), self._stdout, allow_nan=False, indent=1)
            self._stdout.write("\n")


def clean(value: Any) -> Any:
    """Plain JSON values: tuples become lists, numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
