"""ACTIVATIONS: every activation an expert can have. To add one, add an entry here; nothing else changes.

An entry holds the torch forward and derivative, and the same pair as Triton device functions, which the grouped GEMM
takes as a compile-time argument and runs on its fp32 accumulator. Legend: `g` gate, `u` up, `d` the incoming gradient.
Gated entries compute act(gate)·up from 2I columns; plain ones compute act(up) from I columns.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import check_choice

tl: Any = None  # triton.language, put here by `Activation.device` before a device function is compiled


@dataclass(frozen=True)
class Activation:
    """One activation. `alpha` and `limit` are its constants; entries that have none ignore them.

    Attributes:
        forward: gated `(g, u, alpha, limit) -> a`, plain `(u, alpha, limit) -> a`, in any float dtype.
        backward: gated `(g, u, d, alpha, limit) -> (dg, du)`, plain `(u, d, alpha, limit) -> du`.
        device_forward, device_backward: the same as Triton source, read through `device`.
    """

    name: str
    gated: bool
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor] | Tensor]
    device_forward: Callable
    device_backward: Callable
    alpha: float = 1.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        if not self.limit > 0 or not math.isfinite(self.alpha):
            raise ValueError(
                f"Activation: limit must be positive and alpha finite, got limit={self.limit}, alpha={self.alpha}; "
                "leave out what the activation has no use for."
            )

    def with_constants(self, alpha: float | None = None, limit: float | None = None) -> Activation:
        """The same activation with other constants, e.g. `ACTIVATIONS["swiglu_clamped"].with_constants(limit=7.0)`."""
        return replace(self, alpha=self.alpha if alpha is None else alpha, limit=self.limit if limit is None else limit)

    def width(self, intermediate_size: int) -> int:
        """Columns of the first expert matrix: 2I when gated, I otherwise."""
        return 2 * intermediate_size if self.gated else intermediate_size

    @property
    def device(self) -> tuple[Callable, Callable]:
        """The device functions `(forward, backward)`, compiled by Triton when first asked for."""
        return _device(self.device_forward), _device(self.device_backward)


@functools.cache
def _device(function: Callable) -> Callable:
    global tl
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    return triton.jit(function)


def resolve(activation: str | Activation, who: str = "activation") -> Activation:
    """The table's entry for a name, or an entry with constants of the caller's own.

    Raises:
        ValueError: there is no entry of that name, or it computes something else: operators carry names.
    """
    if not isinstance(activation, Activation):
        check_choice(who, "activation", activation, tuple(ACTIVATIONS))
        return ACTIVATIONS[activation]
    entry = ACTIVATIONS.get(activation.name)
    if entry is not activation and (entry is None or not _alike(entry, activation)):
        raise ValueError(
            f"{who}: activation must be an entry of ACTIVATIONS, with other constants at most, got one named "
            f"{activation.name!r} of your own; add it under a new name: ACTIVATIONS[name] = Activation(name, ...)."
        )
    return activation


def _alike(entry: Activation, other: Activation) -> bool:
    """The same but for the constants."""
    names = ("gated", "forward", "backward", "device_forward", "device_backward")
    return all(getattr(entry, name) is getattr(other, name) for name in names)


def split_gate_up(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up as views of `h (..., 2I)`: `[g0..gI | u0..uI]`, or `g0 u0 g1 u1 ...` when interleaved."""
    if interleaved:
        return h[..., 0::2], h[..., 1::2]
    half = h.shape[-1] // 2
    return h[..., :half], h[..., half:]


def apply(activation: Activation, h: Tensor, interleaved: bool) -> Tensor:
    """The activation on pre-activations `h (R, 2I)` or `(R, I)`, computed in h's dtype."""
    if not activation.gated:
        return activation.forward(h, activation.alpha, activation.limit)
    g, u = split_gate_up(h, interleaved)
    return activation.forward(g, u, activation.alpha, activation.limit)


def apply_backward(activation: Activation, h: Tensor, d: Tensor, interleaved: bool) -> Tensor:
    """The gradient with respect to `h` of `apply`, given the gradient `d (R, I)`."""
    if not activation.gated:
        return cast(Tensor, activation.backward(h, d, activation.alpha, activation.limit))
    g, u = split_gate_up(h, interleaved)
    out = torch.empty_like(h)
    dg, du = split_gate_up(out, interleaved)
    values = activation.backward(g, u, d, activation.alpha, activation.limit)
    dg.copy_(values[0])
    du.copy_(values[1])
    return out


# ---------------------------------------------------------------- scalar functions, torch: f(x), vjp(x, d) = d·f'(x)
def _silu_vjp(x: Tensor, d: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(d, x)


def _gelu_vjp(x: Tensor, d: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(d, x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_vjp(x: Tensor, d: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(d, x, approximate="tanh")


def _relu_vjp(x: Tensor, d: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(d, x, 0)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _relu2_vjp(x: Tensor, d: Tensor) -> Tensor:
    return 2 * d * F.relu(x)


# ---------------------------------------------------------------- scalar functions, device (compiled by triton.jit)
def _silu_dev(x, ALPHA, LIMIT):
    return x * tl.sigmoid(x)


def _silu_dev_bwd(x, d, ALPHA, LIMIT):
    s = tl.sigmoid(x)
    return d * s * (1 + x * (1 - s))


def _gelu_erf_dev(x, ALPHA, LIMIT):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


def _gelu_erf_dev_bwd(x, d, ALPHA, LIMIT):
    return d * (0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)


def _gelu_tanh_dev(x, ALPHA, LIMIT):
    # 0.5·(1 + tanh z) = sigmoid(2z)
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def _gelu_tanh_dev_bwd(x, d, ALPHA, LIMIT):
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return d * (s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x))


def _relu_dev(x, ALPHA, LIMIT):
    return tl.where(x > 0, x, tl.where(x != x, x, 0.0))


def _relu_dev_bwd(x, d, ALPHA, LIMIT):
    return tl.where(x > 0, d, 0.0)


def _relu2_dev(x, ALPHA, LIMIT):
    r = tl.where(x > 0, x, tl.where(x != x, x, 0.0))
    return r * r


def _relu2_dev_bwd(x, d, ALPHA, LIMIT):
    return tl.where(x > 0, 2 * x * d, 0.0)


# ---------------------------------------------------------------- gated, device
def _swiglu_dev(g, u, ALPHA, LIMIT):
    return g * tl.sigmoid(g) * u


def _swiglu_dev_bwd(g, u, d, ALPHA, LIMIT):
    s = tl.sigmoid(g)
    return d * u * s * (1 + g * (1 - s)), d * g * s


def _geglu_dev(g, u, ALPHA, LIMIT):
    return 0.5 * g * (1 + tl.erf(g * 0.7071067811865476)) * u


def _geglu_dev_bwd(g, u, d, ALPHA, LIMIT):
    c = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
    return d * u * (c + g * tl.exp(-0.5 * g * g) * 0.3989422804014327), d * g * c


def _geglu_tanh_dev(g, u, ALPHA, LIMIT):
    return g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * u


def _geglu_tanh_dev_bwd(g, u, d, ALPHA, LIMIT):
    s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    return d * u * (s + g * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * g * g)), d * g * s


def _reglu_dev(g, u, ALPHA, LIMIT):
    return tl.where(g > 0, g, tl.where(g != g, g, 0.0)) * u


def _reglu_dev_bwd(g, u, d, ALPHA, LIMIT):
    return tl.where(g > 0, d * u, 0.0), tl.where(g > 0, d * g, 0.0)


def _swiglu_oai_dev(g, u, ALPHA, LIMIT):
    g = tl.where(g > LIMIT, LIMIT, g)
    u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
    return g * tl.sigmoid(ALPHA * g) * (u + 1)


def _swiglu_oai_dev_bwd(g, u, d, ALPHA, LIMIT):
    gc = tl.where(g > LIMIT, LIMIT, g)
    uc = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
    s = tl.sigmoid(ALPHA * gc)
    dg = tl.where(g > LIMIT, 0.0, d * (uc + 1) * s * (1 + ALPHA * gc * (1 - s)))
    du = tl.where((u > LIMIT) | (u < -LIMIT), 0.0, d * gc * s)
    return dg, du


def _swiglu_clamped_dev(g, u, ALPHA, LIMIT):
    g = tl.where(g > LIMIT, LIMIT, g)
    u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
    return g * tl.sigmoid(g) * u


def _swiglu_clamped_dev_bwd(g, u, d, ALPHA, LIMIT):
    gc = tl.where(g > LIMIT, LIMIT, g)
    uc = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
    s = tl.sigmoid(gc)
    dg = tl.where(g > LIMIT, 0.0, d * uc * s * (1 + gc * (1 - s)))
    du = tl.where((u > LIMIT) | (u < -LIMIT), 0.0, d * gc * s)
    return dg, du


def _swiglu_step_dev(g, u, ALPHA, LIMIT):
    a = g * tl.sigmoid(g)
    a = tl.where(a > LIMIT, LIMIT, a)
    return a * tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))


def _swiglu_step_dev_bwd(g, u, d, ALPHA, LIMIT):
    s = tl.sigmoid(g)
    a = g * s
    uc = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
    dg = tl.where(a > LIMIT, 0.0, d * uc * s * (1 + g * (1 - s)))
    return dg, tl.where((u > LIMIT) | (u < -LIMIT), 0.0, d * tl.where(a > LIMIT, LIMIT, a))


def _swiglu_softcapped_dev(g, u, ALPHA, LIMIT):
    # tanh by its series near zero, where 2·sigmoid(2x) - 1 would cancel
    x, y = g / ALPHA, u / LIMIT
    x2, y2 = x * x, y * y
    near_x = x * (1 - x2 * (1.0 / 3 - x2 * (2.0 / 15 - x2 * (17.0 / 315 - x2 * (62.0 / 2835)))))
    near_y = y * (1 - y2 * (1.0 / 3 - y2 * (2.0 / 15 - y2 * (17.0 / 315 - y2 * (62.0 / 2835)))))
    x = tl.where(tl.abs(x) < 0.3, near_x, 2 * tl.sigmoid(2 * x) - 1)
    y = tl.where(tl.abs(y) < 0.3, near_y, 2 * tl.sigmoid(2 * y) - 1)
    return ALPHA * x * tl.sigmoid(g) * (LIMIT * y)


def _swiglu_softcapped_dev_bwd(g, u, d, ALPHA, LIMIT):
    x, y, s = g / ALPHA, u / LIMIT, tl.sigmoid(g)
    x2, y2 = x * x, y * y
    near_x = x * (1 - x2 * (1.0 / 3 - x2 * (2.0 / 15 - x2 * (17.0 / 315 - x2 * (62.0 / 2835)))))
    near_y = y * (1 - y2 * (1.0 / 3 - y2 * (2.0 / 15 - y2 * (17.0 / 315 - y2 * (62.0 / 2835)))))
    x = tl.where(tl.abs(x) < 0.3, near_x, 2 * tl.sigmoid(2 * x) - 1)
    y = tl.where(tl.abs(y) < 0.3, near_y, 2 * tl.sigmoid(2 * y) - 1)
    dg = d * (LIMIT * y) * s * (1 - x * x + ALPHA * x * (1 - s))
    return dg, d * (ALPHA * x) * s * (1 - y * y)


def _reglu2_dev(g, u, ALPHA, LIMIT):
    r = tl.where(g > 0, g, tl.where(g != g, g, 0.0))
    return r * r * u


def _reglu2_dev_bwd(g, u, d, ALPHA, LIMIT):
    return tl.where(g > 0, 2 * g * d * u, 0.0), tl.where(g > 0, d * g * g, 0.0)


# ---------------------------------------------------------------- gated, torch
def _swiglu_oai(g: Tensor, u: Tensor, alpha: float, limit: float) -> Tensor:
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return g * torch.sigmoid(alpha * g) * (u + 1)


def _swiglu_oai_d(g: Tensor, u: Tensor, d: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    gc, uc = g.clamp(max=limit), u.clamp(-limit, limit)
    s = torch.sigmoid(alpha * gc)
    dg = d * (uc + 1) * s * (1 + alpha * gc * (1 - s))
    return dg.masked_fill(g > limit, 0), (d * gc * s).masked_fill(u.abs() > limit, 0)


def _swiglu_clamped(g: Tensor, u: Tensor, alpha: float, limit: float) -> Tensor:
    return F.silu(g.clamp(max=limit)) * u.clamp(-limit, limit)


def _swiglu_clamped_d(g: Tensor, u: Tensor, d: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    gc, uc = g.clamp(max=limit), u.clamp(-limit, limit)
    return _silu_vjp(gc, d * uc).masked_fill(g > limit, 0), (d * F.silu(gc)).masked_fill(u.abs() > limit, 0)


def _swiglu_step(g: Tensor, u: Tensor, alpha: float, limit: float) -> Tensor:
    return F.silu(g).clamp(max=limit) * u.clamp(-limit, limit)


def _swiglu_step_d(g: Tensor, u: Tensor, d: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    a, uc = F.silu(g), u.clamp(-limit, limit)
    du = (d * a.clamp(max=limit)).masked_fill(u.abs() > limit, 0)
    return _silu_vjp(g, d * uc).masked_fill(a > limit, 0), du


def _swiglu_softcapped(g: Tensor, u: Tensor, alpha: float, limit: float) -> Tensor:
    return alpha * torch.tanh(g / alpha) * torch.sigmoid(g) * (limit * torch.tanh(u / limit))


def _swiglu_softcapped_d(g: Tensor, u: Tensor, d: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    x, y, s = torch.tanh(g / alpha), torch.tanh(u / limit), torch.sigmoid(g)
    dg = d * (limit * y) * s * (1 - x * x + alpha * x * (1 - s))
    return dg, d * (alpha * x) * s * (1 - y * y)


def _plain(name: str, f: Callable, vjp: Callable, dev: Callable, dev_bwd: Callable) -> Activation:
    return Activation(name, False, lambda u, a, c: f(u), lambda u, d, a, c: vjp(u, d), dev, dev_bwd)


def _glu(name: str, f: Callable, vjp: Callable, dev: Callable, dev_bwd: Callable) -> Activation:
    return Activation(
        name, True, lambda g, u, a, c: f(g) * u, lambda g, u, d, a, c: (vjp(g, d * u), d * f(g)), dev, dev_bwd
    )


ACTIVATIONS: dict[str, Activation] = {
    entry.name: entry
    for entry in (
        _plain("silu", F.silu, _silu_vjp, _silu_dev, _silu_dev_bwd),
        _plain("gelu", F.gelu, _gelu_vjp, _gelu_erf_dev, _gelu_erf_dev_bwd),
        _plain("gelu_tanh", _gelu_tanh, _gelu_tanh_vjp, _gelu_tanh_dev, _gelu_tanh_dev_bwd),
        _plain("relu", F.relu, _relu_vjp, _relu_dev, _relu_dev_bwd),
        _plain("relu2", _relu2, _relu2_vjp, _relu2_dev, _relu2_dev_bwd),
        _glu("swiglu", F.silu, _silu_vjp, _swiglu_dev, _swiglu_dev_bwd),
        _glu("geglu", F.gelu, _gelu_vjp, _geglu_dev, _geglu_dev_bwd),
        _glu("geglu_tanh", _gelu_tanh, _gelu_tanh_vjp, _geglu_tanh_dev, _geglu_tanh_dev_bwd),
        _glu("reglu", F.relu, _relu_vjp, _reglu_dev, _reglu_dev_bwd),
        _glu("reglu2", _relu2, _relu2_vjp, _reglu2_dev, _reglu2_dev_bwd),
        # gpt-oss: the linear half is shifted by one, both halves are clamped
        Activation("swiglu_oai", True, _swiglu_oai, _swiglu_oai_d, _swiglu_oai_dev, _swiglu_oai_dev_bwd, 1.702, 7.0),
        # DeepSeek-V4, GLM5-next: SwiGLU of clamped halves
        Activation(
            "swiglu_clamped",
            True,
            _swiglu_clamped,
            _swiglu_clamped_d,
            _swiglu_clamped_dev,
            _swiglu_clamped_dev_bwd,
            1.0,
            10.0,
        ),
        # Step-3.7's last layers: clamped behind the silu
        Activation("swiglu_step", True, _swiglu_step, _swiglu_step_d, _swiglu_step_dev, _swiglu_step_dev_bwd, 1.0, 7.0),
        # Inkling2: `alpha` and `limit` bound gate and up softly; the sigmoid sees the gate as it is
        Activation(
            "swiglu_softcapped",
            True,
            _swiglu_softcapped,
            _swiglu_softcapped_d,
            _swiglu_softcapped_dev,
            _swiglu_softcapped_dev_bwd,
            4.0,
            25.0,
        ),
    )
}
