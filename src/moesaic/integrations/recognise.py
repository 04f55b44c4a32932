"""Which entry of ACTIVATIONS a module of Hugging Face experts computes, if any: the choice between the two paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS, Activation, apply, apply_backward

__all__ = ["SCALAR_NAMES", "Flags", "Plan", "act_name", "describe", "plan", "scalar_gate", "scalar_of"]

# Scalar activations by Hugging Face's names.
SCALAR_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
# Those that a model may have as a function (LFM2-MoE has F.silu).
_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu", "relu2": "reglu2"}
# Every constant that a gate in transformers reads. A gate that reads anything else runs on the composed path.
_CONSTANTS = ("alpha", "limit", "swiglu_alpha", "swiglu_limit", "gate_softcap", "up_softcap")


class Flags(NamedTuple):
    """How a module's weights are stored and used, from the attributes that transformers' decorator leaves on it."""

    gated: bool
    interleaved: bool
    transposed: bool
    bias: bool
    post_norm: bool

    @classmethod
    def of(cls, experts: Any) -> Flags:
        return cls(
            getattr(experts, "has_gate", True), not getattr(experts, "is_concatenated", True),
            getattr(experts, "is_transposed", False), getattr(experts, "has_bias", False),
            getattr(experts, "has_post_expert_norm", False),
        )  # fmt: skip

    @property
    def up(self) -> str:
        """The name of the first matrix."""
        return "gate_up_proj" if self.gated else "up_proj"


@dataclass(frozen=True)
class Plan:
    """How a module's experts run: fused with `activation`, or composed where that is None; `why` in words."""

    activation: Activation | None
    why: str

    @property
    def path(self) -> str:
        return "composed" if self.activation is None else "fused"


def plan(experts: Any) -> Plan:
    """Choose the path of a module from its class, flags and constants. It reads no tensor and works while tracing."""
    own = vars(experts)
    gate = None if "_apply_gate" in own else type(experts)._apply_gate
    constants = tuple(_number(own.get(name)) for name in _CONSTANTS)
    flags, act = tuple(Flags.of(experts)), _act(experts)
    name, alpha, limit, why = _plan(gate, act, flags, constants)
    if not name:
        return Plan(None, why)
    entry = ACTIVATIONS[name]
    return Plan(entry if (entry.alpha, entry.limit) == (alpha, limit) else entry.with_constants(alpha, limit), why)


def _number(value: Any) -> Any:
    """`value` where it is a number, else None.

    A tracer may hold a float attribute as a symbol (`dynamic=True`, or another value seen before). What goes through a
    set is hashed, and for that the tracer makes it a constant and guards it.
    """
    return next(iter({value})) if isinstance(value, (int, float)) else None


def _act(experts: Any) -> Any:
    """What tells a scalar activation: a plain function itself, the class of anything else."""
    act = getattr(experts, "act_fn", None)
    return act if isinstance(act, (FunctionType, BuiltinFunctionType)) else type(act)


def act_name(experts: Any) -> str:
    """The name of a module's scalar activation, for messages."""
    return _act(experts).__name__


@functools.cache
def _scalar_classes() -> dict[type, str]:
    """The classes behind Hugging Face's names (two names may share one)."""
    from transformers.activations import ACT2FN

    return {type(ACT2FN[theirs]): ours for theirs, ours in SCALAR_NAMES.items()}


def scalar_of(act: Any) -> str:
    """Our name of a scalar activation, given a function or the class of a module; empty where there is none."""
    return _scalar_classes().get(act, "") if isinstance(act, type) else _FUNCTIONS.get(act, "")


def scalar_gate(act: Any) -> str:
    """The entry that computes `act(gate)·up`, by name; empty where there is none. It works while tracing."""
    return _scalar_gate(act if isinstance(act, (FunctionType, BuiltinFunctionType)) else type(act))


@torch.compiler.assume_constant_result
def _scalar_gate(act: Any) -> str:
    return _GATED.get(scalar_of(act), "")


@torch.compiler.assume_constant_result  # a function of classes and numbers, all of which the tracer guards
def _plan(gate: Callable | None, act: Any, flags: tuple, constants: tuple) -> tuple[str, float, float, str]:
    """`plan` in plain values, since a tracer cannot take a `Flags` or an `Activation` for a constant."""
    chosen = _recognise(gate, act, Flags(*flags), constants)
    if chosen.activation is None:
        return "", 0.0, 0.0, chosen.why
    return chosen.activation.name, chosen.activation.alpha, chosen.activation.limit, chosen.why


@functools.cache
def _recognise(gate: Callable | None, act: Any, flags: Flags, constants: tuple) -> Plan:
    """The entry of an activation: looked up for transformers' own gate, found by `_match` for any other."""
    from transformers.integrations.moe import _default_apply_gate

    scalar = scalar_of(act)
    if flags.post_norm:
        return Plan(None, "its experts end in a norm of their own")
    if not flags.gated:
        return _listed(scalar, f"{act.__name__} without gate")
    if gate is None:
        return Plan(None, "its gate was replaced on the instance")
    if gate is _default_apply_gate and not flags.interleaved:
        return _listed(_GATED.get(scalar, ""), f"a gate of {act.__name__}")
    # a thread of its own has none of the caller's modes: no_grad, autocast, a default device, an export
    with ThreadPoolExecutor(1) as fresh:
        named = dict(zip(_CONSTANTS, constants, strict=True))
        return fresh.submit(_match, gate, scalar, flags.interleaved, named).result()


def _listed(name: str, what: str) -> Plan:
    entry = ACTIVATIONS.get(name)
    return Plan(entry, what if entry else f"{what} is not in ACTIVATIONS")


def _match(gate: Callable, scalar: str, interleaved: bool, constants: dict) -> Plan:
    """Find the entry that computes the same as a class's own `_apply_gate`, by running both.

    The gate runs on a stand-in that has the module's constants and nothing else. A gate that reads more than those (a
    parameter, an unknown constant) fails there, so agreement proves that class and constants determine it.
    """
    stand_in = SimpleNamespace(**constants)
    if scalar:
        entry = ACTIVATIONS[scalar]
        stand_in.act_fn = lambda x: entry.forward(x, entry.alpha, entry.limit)
    h = _probe().requires_grad_()
    try:
        want = gate(stand_in, h)
        d = torch.linspace(0.5, 1.5, want.numel(), dtype=want.dtype).view(want.shape)
        (dh,) = torch.autograd.grad(want, h, d)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return Plan(None, f"{gate.__qualname__} needs more than the module's constants ({error})")
    h = h.detach()
    for entry in _candidates(constants):
        # a gate that works in fp32 has exponentials that are off by 1e-5 in the tails, or underflow
        pairs = (want, apply(entry, h, interleaved)), (dh, apply_backward(entry, h, d, interleaved))
        if all(a.shape == b.shape and torch.allclose(a, b.to(a.dtype), rtol=1e-4, atol=1e-30) for a, b in pairs):
            return Plan(entry, f"{gate.__qualname__} computes the same")
    return Plan(None, f"{gate.__qualname__} is not in ACTIVATIONS")


def _candidates(constants: dict) -> list[Activation]:
    """Every gated entry, those that have constants with the module's."""
    alphas = [constants[n] for n in ("alpha", "swiglu_alpha", "gate_softcap") if constants[n] is not None]
    limits = [c for n in ("limit", "swiglu_limit", "up_softcap") if (c := constants[n]) is not None and c > 0]
    gated = [entry for entry in ACTIVATIONS.values() if entry.gated]
    found = [entry for entry in gated if entry.name in _GATED.values()]
    for entry in gated:
        if entry.name not in _GATED.values():
            found += [entry.with_constants(limit=c) for c in limits]
            found += [entry.with_constants(a, c) for a in alphas for c in limits]
    return found


def _probe() -> Tensor:
    """Pre-activations `(128, 8)` from 0.01 to 10⁴ in size: any clamp below 10⁴ and any coupling of columns shows."""
    values = 1.01 * torch.logspace(-2, 4, 48, dtype=torch.float64)
    pick = torch.randint(0, 96, (128, 8), generator=torch.Generator().manual_seed(0))
    return torch.cat((values, -values))[pick]


def describe(activation: Activation) -> str:
    """The entry's name, with its constants where they are not the entry's own."""
    own, text = ACTIVATIONS[activation.name], []
    for name in ("alpha", "limit"):
        if (value := getattr(activation, name)) != getattr(own, name):
            text.append(f"{name}={value:g}")
    return f"{activation.name}({', '.join(text)})" if text else activation.name
