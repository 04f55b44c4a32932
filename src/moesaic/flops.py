"""FLOP formulas of the private operators, for `torch.utils.flop_counter.FlopCounterMode`.

The counter sees an operator of ours as one call and knows nothing of the products inside. A formula counts those that
the mathematics needs, two operations for a multiplication and an addition: no padding of tiles, no recomputation, and
every slot, since the shapes do not say which were dropped. Routing, permutation and activations count nothing, as
torch's own pointwise operations do.

The formulas are registered when the counter's module is imported, for importing it here would import triton.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .ops import fused_experts, gate, grouped_matmul  # noqa: F401 - registers the operators that are counted

__all__ = ["FORMULAS", "register"]

_COUNTER = "torch.utils.flop_counter"


# ---------------------------------------------------------------- formulas of an operator's arguments, by name
def _experts(a: Mapping[str, Any]) -> tuple[int, int]:
    """FLOPs of the first and the second product: `2·R·H·N` and `2·R·I·H`, N = 2I with a gate."""
    rows, w_up, w_down = a["row_order"].shape[0], a["w_gate_up"], a["w_down"]
    return 2 * rows * w_up.shape[1] * w_up.shape[2], 2 * rows * w_down.shape[1] * w_down.shape[2]


def _fused_experts_flops(a: Mapping[str, Any]) -> int:
    return sum(_experts(a))


def _fused_experts_backward_flops(a: Mapping[str, Any]) -> int:
    """The gradient of the activations serves x, the first weight and bias, and the routing weights: it counts once."""
    up, down = _experts(a)
    x, w_gate_up, w_down, weights, b_gate_up = a["needs"][:5]
    through = x or w_gate_up or weights or b_gate_up
    return up * (bool(x) + bool(w_gate_up)) + down * (bool(through) + bool(w_down))


def _grouped_matmul_flops(a: Mapping[str, Any]) -> int:
    return 2 * a["rows"].shape[0] * a["w"].shape[1] * a["w"].shape[2]


def _grouped_matmul_backward_flops(a: Mapping[str, Any]) -> int:
    return _grouped_matmul_flops(a) * sum(map(bool, a["needs"][:2]))


def _router_logits_flops(a: Mapping[str, Any]) -> int:
    return 2 * a["x"].shape[0] * a["weight"].numel()


def _router_logits_backward_flops(a: Mapping[str, Any]) -> int:
    return _router_logits_flops(a) * sum(map(bool, a["needs"][:2]))


FORMULAS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "fused_experts": _fused_experts_flops,
    "fused_experts_backward": _fused_experts_backward_flops,
    "grouped_matmul": _grouped_matmul_flops,
    "grouped_matmul_backward": _grouped_matmul_backward_flops,
    "router_logits": _router_logits_flops,
    "router_logits_backward": _router_logits_backward_flops,
}


# ---------------------------------------------------------------- registration
def register() -> None:
    """Give the formulas to the counter, which is imported for that. Harmless to repeat."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        packet = getattr(torch.ops.moesaic, name)
        if packet not in flop_registry:
            register_flop_formula(packet, get_raw=True)(_by_name(packet, formula))


def _by_name(packet: Any, formula: Callable[[Mapping[str, Any]], int]) -> Callable[..., int]:
    """A formula of positional arguments, as the counter calls it: the names are those of the operator's schema."""
    names = [argument.name for argument in packet.default._schema.arguments]

    def counted(*arguments: Any, out_val: Any = None, **keywords: Any) -> int:
        return formula({**dict(zip(names, arguments, strict=False)), **keywords})

    return counted


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the formulas right after the counter's module was imported, and withdraws."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: Any) -> None:
        super().exec_module(module)
        register()


if _COUNTER in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _AfterImport())
