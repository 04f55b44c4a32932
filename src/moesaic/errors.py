"""The errors a caller can meet, and the one form in which they are written.

Form: *who: what must hold, with the values; what came; what to do*. `ValueError` is for the caller's input,
`Unsupported` for an implementation that was asked for by name and cannot run, `MissingExtra` for an optional package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Unsupported(RuntimeError):
    """No implementation, or not the one asked for, can run a problem; the message holds every reason."""


class MissingExtra(ImportError):
    """An optional package is absent; the message holds the line that installs it."""

    def __init__(self, package: str, extra: str, what: str):
        super().__init__(f'{what} needs {package}, which is not installed; run: pip install "moesaic[{extra}]"')


def check_shape(who: str, name: str, tensor: torch.Tensor, want: Sequence[int | str], hint: str = "") -> None:
    """Raise `ValueError` unless `tensor` has the shape `want`; a string in `want` names a free dimension."""
    shape = tensor.shape
    if len(shape) == len(want):
        for have, need in zip(shape, want, strict=True):
            if not isinstance(need, str) and have != need:
                break
        else:
            return
    text = ", ".join(str(d) for d in want)
    raise ValueError(f"{who}: {name} must have shape ({text}), got {tuple(shape)}{'; ' + hint if hint else ''}.")


def check_same(who: str, what: str, reference: str, want: object, **got: object) -> None:
    """Raise `ValueError` unless every value of `got` equals `want`; `what` names the quantity (dtype, device)."""
    for name, value in got.items():
        if value != want:
            raise ValueError(
                f"{who}: {name} must have the {what} of {reference} ({want}), got {value}; convert it with .to({want})."
            )


def check_choice(who: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{who}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
