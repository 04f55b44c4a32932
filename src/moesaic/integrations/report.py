"""The report on a Hugging Face model: what runs each module of experts, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..formats import FORMATS, format_of, why_not_readable
from ..hardware import gpu_of
from ..op import Explanation, explain
from . import undecorated
from .recognise import Flags, act_name, describe, plan

__all__ = ["NAME", "Line", "Report", "report"]

NAME = "moesaic"


@dataclass(frozen=True)
class Line:
    """One module of experts: what runs it and why. `choice` is None where moesaic does not run it."""

    name: str
    kind: str
    path: str
    why: str
    activation: str = ""
    layout: str = ""
    shape: str = ""
    choice: Explanation | None = None

    def cells(self) -> tuple[str, ...]:
        implementation = (self.choice.chosen or "none") if self.choice else ""
        return self.kind, self.shape, self.path, self.activation, self.layout, implementation


@dataclass(frozen=True)
class Report:
    """Every module of experts in a model, in order. Prints as a table; modules that agree in everything share a row."""

    lines: tuple[Line, ...]

    def __str__(self) -> str:
        if not self.lines:
            return "no experts found: no module of this model goes through transformers' experts registry"
        groups: dict[tuple, list[Line]] = {}
        for line in self.lines:
            groups.setdefault((*line.cells(), line.why), []).append(line)
        head = ("modules", "class", "E x H x I", "path", "activation", "layout", "implementation")
        rows = [head] + [(_names(group), *group[0].cells()) for group in groups.values()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for group in groups.values():
            line = group[0]
            text.append(f"\n{_names(group)}: {line.path}: {line.why}")
            if line.choice:
                text.append(str(line.choice))
        return "\n".join(text)


def _names(group: list[Line]) -> str:
    return group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


def report(model: nn.Module, tokens: int = 512, training: bool = False) -> Report:
    """Say for each module of experts in `model` which path and implementation would run it, and why.

    Args:
        model: any transformers model; no weight is read, so one on the meta device will do.
        tokens: T of the call to explain.
        training: whether gradients are wanted.
    """
    lines, inside = [], ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue  # the parts of a module that has a line
        patched = undecorated.entry_of(module)
        if patched or _dispatched(module) or (type(module).__name__.endswith("Experts") and _has_weights(module)):
            lines.append(_line(name, module, tokens, training))
            inside = (*inside, f"{name}.") if patched else inside
    return Report(tuple(lines))


def _dispatched(module: nn.Module) -> bool:
    """Whether the module was made by `use_experts_implementation`, which leaves its flags on it."""
    return {"config", "has_bias", "is_transposed"} <= vars(module).keys() and hasattr(module, "down_proj")


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _line(name: str, experts: Any, tokens: int, training: bool) -> Line:
    kind = type(experts).__name__
    patched = undecorated.entry_of(experts)
    if not patched and not _dispatched(experts):
        why = "this class does not go through transformers' experts registry"
        if kind in {entry.name for entry in undecorated.UNDECORATED}:
            why += ", and was not patched: build it with from_pretrained or from_config, after importing this module"
        return Line(name, kind, "not ours", why)
    if patched and not patched.run:
        return Line(name, kind, "not ours", patched.why)
    current = getattr(experts.config, "_experts_implementation", None)
    if current != NAME:
        return Line(name, kind, "not ours", f"runs {current!r}; call model.set_experts_implementation({NAME!r})")
    if patched and not _dispatched(experts):
        return Line(name, kind, "patched", patched.why)
    refused = [(n, why_not_readable(w)) for n, w in experts.named_parameters(recurse=False) if n.endswith("_proj")]
    if reasons := [f"{n} is {why}" for n, why in refused if why]:
        return Line(name, kind, "refused", "; ".join(reasons))
    chosen, flags, w_down, top_k = plan(experts), Flags.of(experts), experts.down_proj, _top_k(experts.config)
    E, H, I = w_down.shape if not flags.transposed else (w_down.shape[0], w_down.shape[2], w_down.shape[1])
    byte = format_of(w_down) is not FORMATS["plain"]
    common: dict[str, Any] = dict(
        device=w_down.device.type, gpu=gpu_of(w_down.device), num_experts=E, hidden_size=H, bias=flags.bias,
        dtype=_stated_dtype(experts) if byte else w_down.dtype, transposed=flags.transposed,
    )  # fmt: skip
    if chosen.activation:
        activation = describe(chosen.activation)
        choice = explain(
            "fused_experts", num_tokens=tokens, top_k=top_k, intermediate_size=I, activation=chosen.activation.name,
            interleaved=flags.interleaved, training=training, **common,
        )  # fmt: skip
    else:
        activation = type(experts)._apply_gate.__qualname__ if flags.gated else act_name(experts)
        width = 2 * I if flags.gated else I
        choice = explain("grouped_matmul", num_rows=tokens * top_k, intermediate_size=width, **common)
    words = dict(interleaved=flags.interleaved, transposed=flags.transposed, bias=flags.bias, fp8=byte)
    layout = ", ".join(word for word, true in words.items() if true) or "default"
    shape = f"{E} x {H} x {I}"
    return Line(name, kind, chosen.path, chosen.why, activation, layout, shape, choice)


def _stated_dtype(experts: Any) -> torch.dtype:
    dtype = getattr(experts.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _top_k(config: Any) -> int:
    """Experts a token, under the names that configurations use."""
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 1
