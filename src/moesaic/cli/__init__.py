"""The `moesaic` command: one file a verb. Exit codes: 0 ok, 1 a check failed, 2 wrong usage or a missing extra."""

from __future__ import annotations

import importlib.util
import sys

from ..errors import MissingExtra

__all__ = ["main"]


def main() -> None:
    """Run the command with the arguments of the process; never returns."""
    for package in ("typer", "rich"):
        if importlib.util.find_spec(package) is None:
            print(f"moesaic: {MissingExtra(package, 'cli', 'the moesaic command')}", file=sys.stderr)
            sys.exit(2)
    from .app import run

    run()
