"""The errors a caller can meet, and the one form in which they are written.

Form: *who: what must hold, with the values; what came; what to do*. `ValueError` is for the caller's input,
`Unsupported` for an implementation that was asked for by name and cannot run, `MissingExtra` for an optional package.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

MANY = 24  # choices that a message lists


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
    """Raise `ValueError` unless `value` is one of `choices`; of many, the message names those that look like it."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 3, 0.5)
    shown = choices if len(choices) <= MANY else near
    listed = ", ".join(map(repr, shown)) or f"{len(choices)} names"
    of = f"one of {listed}" if len(choices) <= MANY or not near else f"a known name, like {listed}"
    meant = f"; did you mean {near[0]!r}?" if near and len(choices) <= MANY else "."
    raise ValueError(f"{who}: {name} must be {of}, got {value!r}{meant}")


def check_tensors(who: str, **tensors: object) -> None:
    """Raise `ValueError` unless each is a tensor."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            what = "stack them with torch.stack" if kind in ("list", "tuple") else "give a tensor"
            raise ValueError(f"{who}: {name} must be a tensor, got {kind}; {what}.")
