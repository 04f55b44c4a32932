"""Hugging Face transformers: importing this module registers `experts_implementation="moesaic"`.

The name is put in two registries, since the experts of an FP8 checkpoint are dispatched through one of their own. An
experts function gets the module, hidden_states `(T, H)`, top_k_index `(T, K)` and top_k_weights `(T, K)`, and returns
`(T, H)`; attributes of the module say how its weights are stored and what its activation is. Attributes that some
releases lack are read with a default. Weights are read at every call and nothing made from them is kept, so adapters,
sharding and training work.

Two paths, chosen by `plan`:
- fused: the activation is an entry of `ACTIVATIONS`, so the whole layer is one `fused_experts`;
- composed: `permute`, `grouped_matmul`, the module's own activation, `grouped_matmul`, its norm, `unpermute`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS, Activation, apply, apply_backward
from ..errors import MissingExtra, Unsupported
from ..hardware import arch_of
from ..op import Explanation, explain
from ..ops.fused_experts import fused_experts
from ..ops.grouped_matmul import grouped_matmul
from ..ops.permute import permute, unpermute
from ..problem import Problem
from ..routing import Routing

try:
    from transformers.activations import ACT2FN
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
except ImportError as error:  # absent, or older than the experts registries
    raise MissingExtra("transformers >= 5.17", "hf", "moesaic.integrations.transformers") from error

__all__ = ["NAME", "Plan", "Report", "experts_forward", "plan", "register", "report"]

NAME = "moesaic"

# Scalar activations by Hugging Face's names, and by the classes behind those names (two names may share one).
_SCALAR_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
_SCALARS: dict[type, str] = {type(ACT2FN[theirs]): ours for theirs, ours in _SCALAR_NAMES.items()}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
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


# ---------------------------------------------------------------- the experts function
def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls for each layer: `y[t] = sum_k top_k_weights[t, k] · expert(top_k_index[t, k])(x[t])`.

    Args:
        experts: the module that owns the weights; only its attributes are read.
        hidden_states: `(T, H)`, converted to the weights' dtype if it differs (norms may leave fp32 under autocast).
        top_k_index: `(T, K)` integers. An id outside `[0, E)` is another rank's expert (transformers writes E): its
            slot is skipped and its routing weight, whatever it is, gets a zero gradient.
        top_k_weights: `(T, K)`, any float dtype.

    Returns:
        `(T, H)` in the dtype of hidden_states.

    Raises:
        ValueError: shapes, dtypes or devices disagree. Unsupported: weights packed in a format that is not read here.

    Differentiable in hidden_states, the weights and biases (not FP8 ones) and top_k_weights. Deterministic.
    """
    chosen, flags = plan(experts), Flags.of(experts)
    w_up, w_down, ids = _weights(experts, flags, top_k_index, hidden_states.dtype)
    b_up, b_down = (getattr(experts, f"{flags.up}_bias"), experts.down_proj_bias) if flags.bias else (None, None)
    routing = Routing.from_topk(top_k_weights, _local(ids, w_down.shape[0]), w_down.shape[0])
    x = hidden_states.to(w_down.dtype)
    if chosen.activation is not None:
        y = fused_experts(
            x, w_up, w_down, routing, activation=chosen.activation, b_gate_up=b_up, b_down=b_down,
            layout="interleaved" if flags.interleaved else "concatenated", transposed=flags.transposed,
        )  # fmt: skip
        return y.to(hidden_states.dtype)
    rows = grouped_matmul(permute(x, routing), w_up, routing, bias=b_up, transposed=flags.transposed)
    rows = experts._apply_gate(rows) if flags.gated else experts.act_fn(rows)
    rows = grouped_matmul(rows, w_down, routing, bias=b_down, transposed=flags.transposed)
    if flags.post_norm:
        rows = experts.post_expert_norm(rows)
    return unpermute(rows, routing).to(hidden_states.dtype)


def register() -> None:
    """Put `"moesaic"` in both registries; done when this module is imported, and harmless to repeat."""
    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, experts_forward)


def _local(ids: Tensor, num_experts: int) -> Tensor:
    """`ids` with those of other ranks made -1. On a GPU the operator does that itself, without these launches."""
    if ids.is_cuda:
        return ids
    return ids.masked_fill(ids >= num_experts, -1).clamp_min_(-1)


# ---------------------------------------------------------------- weights
def _weights(experts: Any, flags: Flags, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Both weights, and the ids that index them. FP8 weights are decoded to `dtype`, at each call.

    When fewer slots than experts are chosen (decode) only the chosen experts are decoded, one copy a slot, and the ids
    count slots: no host synchronisation, and less to read.
    """
    names = (flags.up, "down_proj")
    w_up, w_down = (getattr(experts, name) for name in names)
    if w_down.dtype.itemsize > 1:
        return w_up, w_down, ids
    if not w_down.is_floating_point():
        raise Unsupported(
            f"moesaic: expert weights of {type(experts).__name__} must be float8 or wider floats, got {w_down.dtype} "
            "(packed FP4, or another quantisation); dequantise at load, or choose another experts_implementation."
        )
    scales = [getattr(experts, f"{name}_scale_inv") for name in names]
    E, slots = w_down.shape[0], ids.numel()
    if slots < E:
        here = ids.reshape(-1).clamp(0, E - 1)
        w_up, w_down, *scales = (_pick(t, here) for t in (w_up, w_down, *scales))
        count = torch.arange(slots, device=ids.device).view(ids.shape)
        ids = torch.where((ids >= 0) & (ids < E), count, -1)
    block = getattr(experts, "block_size", None)
    w_up, w_down = (dequantize_blocks(w, s, block, dtype) for w, s in zip((w_up, w_down), scales, strict=True))
    return w_up, w_down, ids


def _pick(t: Tensor, experts: Tensor) -> Tensor:
    """`t[experts]`, by bytes where t is FP8: indexing is not implemented for all of its dtypes."""
    t = t.detach()
    return t.view(torch.uint8)[experts].view(t.dtype) if t.dtype.itemsize == 1 else t[experts]


def dequantize_blocks(w: Tensor, scale: Tensor, block_size, dtype: torch.dtype) -> Tensor:
    """`w (E, N, K)` in FP8 times its block's scale: `out[e, n, k] = w[e, n, k] · scale[e, n // bn, k // bk]`.

    Args:
        scale: `(E, N/bn, K/bk)` rounded up; fp32, or powers of two in `float8_e8m0fnu`.
        block_size: `(bn, bk)`, or None for one scale a matrix. A grid that it does not explain (two scales for the two
            halves of a gate/up matrix) divides the matrix evenly.
        dtype: of the result; the product is taken in fp32 and rounded once.
    """
    wide, scale = w.detach().to(torch.float32), scale.detach().to(torch.float32)
    sizes = block_size or (w.shape[1], w.shape[2])
    bn, bk = (
        size if -(-length // size) == grid else -(-length // grid)
        for length, size, grid in zip(w.shape[1:], sizes, scale.shape[1:], strict=True)
    )
    rows = scale.repeat_interleave(bn, dim=1)[:, : w.shape[1]]
    if w.shape[2] % bk:
        return wide.mul_(rows.repeat_interleave(bk, dim=2)[:, :, : w.shape[2]]).to(dtype)
    wide.unflatten(2, (-1, bk)).mul_(rows[..., None])  # broadcast, since a second weight-sized tensor is dear
    return wide.to(dtype)


# ---------------------------------------------------------------- which path
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
    constants = tuple(own.get(name) if isinstance(own.get(name), (int, float)) else None for name in _CONSTANTS)
    flags, act = tuple(Flags.of(experts)), type(getattr(experts, "act_fn", None))
    name, alpha, limit, why = _plan(gate, act, flags, constants)
    if not name:
        return Plan(None, why)
    entry = ACTIVATIONS[name]
    return Plan(entry if (entry.alpha, entry.limit) == (alpha, limit) else entry.with_constants(alpha, limit), why)


@torch.compiler.assume_constant_result  # a function of classes and numbers, all of which the tracer guards
def _plan(gate: Callable | None, act: type, flags: tuple, constants: tuple) -> tuple[str, float, float, str]:
    """`plan` in plain values, since a tracer cannot take a `Flags` or an `Activation` for a constant."""
    chosen = _recognise(gate, act, Flags(*flags), constants)
    if chosen.activation is None:
        return "", 0.0, 0.0, chosen.why
    return chosen.activation.name, chosen.activation.alpha, chosen.activation.limit, chosen.why


@functools.cache
def _recognise(gate: Callable | None, act: type, flags: Flags, constants: tuple) -> Plan:
    """The entry of an activation: looked up for transformers' own gate, found by `_match` for any other."""
    scalar = _SCALARS.get(act, "")
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
    alphas = [constants[n] for n in ("alpha", "swiglu_alpha") if constants[n] is not None]
    limits = [constants[n] for n in ("limit", "swiglu_limit") if constants[n] is not None]
    candidates = [ACTIVATIONS[name] for name in _GATED.values()]
    candidates += [ACTIVATIONS["swiglu_clamped"].with_constants(limit=c) for c in limits]
    candidates += [ACTIVATIONS["swiglu_oai"].with_constants(a, c) for a in alphas for c in limits]
    h = _probe().requires_grad_()
    try:
        want = gate(stand_in, h)
        d = torch.linspace(0.5, 1.5, want.numel(), dtype=want.dtype).view(want.shape)
        (dh,) = torch.autograd.grad(want, h, d)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return Plan(None, f"{gate.__qualname__} needs more than the module's constants ({error})")
    h = h.detach()
    for entry in candidates:
        # a gate that works in fp32 has exponentials that are off by 1e-5 in the tails, or underflow
        pairs = (want, apply(entry, h, interleaved)), (dh, apply_backward(entry, h, d, interleaved))
        if all(a.shape == b.shape and torch.allclose(a, b.to(a.dtype), rtol=1e-4, atol=1e-30) for a, b in pairs):
            return Plan(entry, f"{gate.__qualname__} computes the same")
    return Plan(None, f"{gate.__qualname__} is not in ACTIVATIONS")


def _probe() -> Tensor:
    """Pre-activations `(128, 8)` from 0.01 to 10⁴ in size: any clamp below 10⁴ and any coupling of columns shows."""
    values = 1.01 * torch.logspace(-2, 4, 48, dtype=torch.float64)
    pick = torch.randint(0, 96, (128, 8), generator=torch.Generator().manual_seed(0))
    return torch.cat((values, -values))[pick]


# ---------------------------------------------------------------- report
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
    return Report(tuple(
        _line(name, module, tokens, training)
        for name, module in model.named_modules()
        if _dispatched(module) or (type(module).__name__.endswith("Experts") and _has_weights(module))
    ))  # fmt: skip


def _dispatched(module: nn.Module) -> bool:
    """Whether the module was made by `use_experts_implementation`, which leaves its flags on it."""
    return {"config", "has_bias", "is_transposed"} <= vars(module).keys() and hasattr(module, "down_proj")


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _line(name: str, experts: Any, tokens: int, training: bool) -> Line:
    kind = type(experts).__name__
    if not _dispatched(experts):
        return Line(name, kind, "not ours", "this class does not go through transformers' experts registry")
    current = getattr(experts.config, "_experts_implementation", None)
    if current != NAME:
        return Line(name, kind, "not ours", f"runs {current!r}; call model.set_experts_implementation({NAME!r})")
    chosen, flags, w_down, top_k = plan(experts), Flags.of(experts), experts.down_proj, _top_k(experts.config)
    E, H, I = w_down.shape if not flags.transposed else (w_down.shape[0], w_down.shape[2], w_down.shape[1])
    byte = w_down.dtype.itemsize == 1
    common: dict[str, Any] = dict(
        device=w_down.device.type, arch=arch_of(w_down.device), num_experts=E, hidden_size=H, bias=flags.bias,
        dtype=_stated_dtype(experts) if byte else w_down.dtype, transposed=flags.transposed,
    )  # fmt: skip
    if chosen.activation:
        activation = _describe(chosen.activation)
        problem = Problem(
            "fused_experts", num_tokens=tokens, top_k=top_k, intermediate_size=I, activation=chosen.activation.name,
            interleaved=flags.interleaved, training=training, **common,
        )  # fmt: skip
    else:
        activation = type(experts)._apply_gate.__qualname__ if flags.gated else type(experts.act_fn).__name__
        width = 2 * I if flags.gated else I
        problem = Problem("grouped_matmul", num_tokens=tokens * top_k, intermediate_size=width, **common)
    words = dict(interleaved=flags.interleaved, transposed=flags.transposed, bias=flags.bias, fp8=byte)
    layout = ", ".join(word for word, true in words.items() if true) or "default"
    shape = f"{E} x {H} x {I}"
    return Line(name, kind, chosen.path, chosen.why, activation, layout, shape, explain(problem.op, problem))


def _stated_dtype(experts: Any) -> torch.dtype:
    dtype = getattr(experts.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _top_k(config: Any) -> int:
    """Experts a token, under the names that configurations use."""
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 1


def _describe(activation: Activation) -> str:
    """The entry's name, with its constants where they are not the entry's own."""
    own, text = ACTIVATIONS[activation.name], []
    for name in ("alpha", "limit"):
        if (value := getattr(activation, name)) != getattr(own, name):
            text.append(f"{name}={value:g}")
    return f"{activation.name}({', '.join(text)})" if text else activation.name


register()
