"""Router, Experts, SharedExperts and MoE: the operators as torch modules, with Hugging Face's parameter names.

Legend: T tokens, H hidden, I intermediate, E experts, K choices per token; N = 2I with a gated activation, else I.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import resolve
from ..ops.experts import fused_experts
from ..ops.route import load_balancing_loss, route, z_loss
from ..routing import Routing
from .config import MoEConfig
from .state_dict import load_experts, load_layer


class Router(nn.Module):
    """The gate: `routing = route(W x + b)`, the product and the scores in fp32 whatever the dtypes of x and W.

    Parameters: `weight (E, H)`; `bias (E,)` if `config.router_bias`. Buffer: `e_score_correction_bias (E,)`, fp32 at
    creation, if `config.selection_bias`.
    """

    bias: Tensor | None
    e_score_correction_bias: Tensor | None

    def __init__(self, config: MoEConfig, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        E, H = config.num_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(E, H, device=device, dtype=dtype))
        bias = nn.Parameter(torch.empty(E, device=device, dtype=dtype)) if config.router_bias else None
        self.register_parameter("bias", bias)
        correction = torch.empty(E, device=device, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights (see `MoEConfig.init_std`), biases zero."""
        _normal(self.weight, self.config.hidden_size, self.config)
        for bias in (self.bias, self.e_score_correction_bias):
            if bias is not None:
                bias.zero_()

    def forward(self, x: Tensor) -> Routing:
        """`x (T, H) -> Routing`, whose weights and logits carry the gradient to x, weight and bias."""
        if x.dim() != 2 or x.shape[1] != self.config.hidden_size:
            raise ValueError(
                f"Router: x must have shape (T, H={self.config.hidden_size}), got {tuple(x.shape)}; reshape it."
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        # autocast would compute the logits in half precision; it knows nothing of the meta device
        full = contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with full:
            logits = F.linear(x.to(dtype), self.weight.to(dtype), bias)
        return route(logits, self.config.router, bias=self.e_score_correction_bias)

    def extra_repr(self) -> str:
        c = self.config
        text = f"hidden_size={c.hidden_size}, num_experts={c.num_experts}, {c.router}"
        return text + (", bias=True" if c.router_bias else "") + (", selection_bias=True" if c.selection_bias else "")


class Experts(nn.Module):
    """The routed experts, `fused_experts` over merged weights.

    Parameters: `gate_up_proj (E, N, H)`, named `up_proj` for an activation without gate, and `down_proj (E, H, I)`;
    with `config.transposed` `(E, H, N)` and `(E, I, H)`. With `config.expert_bias` the same names with `_bias` added,
    `(E, N)` and `(E, H)`. `load_state_dict` also reads one tensor an expert (see `moesaic.nn.state_dict`).
    """

    down_proj: Tensor
    down_proj_bias: Tensor | None

    def __init__(self, config: MoEConfig, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        act = resolve(config.activation, "Experts")
        E, H, I = config.num_experts, config.hidden_size, config.intermediate_size
        N = act.width(I)
        self.first = "gate_up_proj" if act.gated else "up_proj"
        for name, rows, columns in ((self.first, N, H), ("down_proj", H, I)):
            shape = (E, columns, rows) if config.transposed else (E, rows, columns)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            bias = torch.empty(E, rows, device=device, dtype=dtype) if config.expert_bias else None
            self.register_parameter(f"{name}_bias", None if bias is None else nn.Parameter(bias))
        self.register_load_state_dict_pre_hook(load_experts)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights (see `MoEConfig.init_std`), biases zero."""
        for name, fan_in in ((self.first, self.config.hidden_size), ("down_proj", self.config.intermediate_size)):
            _normal(getattr(self, name), fan_in, self.config)
            if self.config.expert_bias:
                getattr(self, f"{name}_bias").zero_()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """`x (T, H) -> (T, H)`: every token through its experts, summed with the routing weights."""
        return fused_experts(
            x, getattr(self, self.first), self.down_proj, routing, activation=self.config.activation,
            b_gate_up=getattr(self, f"{self.first}_bias"), b_down=self.down_proj_bias, layout=self.config.layout,
            transposed=self.config.transposed,
        )  # fmt: skip

    def extra_repr(self) -> str:
        c = self.config
        name = resolve(c.activation).name
        text = f"{c.num_experts} x ({c.hidden_size} -> {c.intermediate_size} -> {c.hidden_size}), activation={name!r}"
        stored = [c.layout] * (c.layout != "concatenated") + ["transposed"] * c.transposed + ["bias"] * c.expert_bias
        return ", ".join([text, *stored])


class SharedExperts(nn.Module):
    """The experts that every token meets, one dense MLP: `(..., H) -> down_proj(act(gate_proj x) · up_proj x)`."""

    def __init__(self, config: MoEConfig, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        H, width = config.hidden_size, config.shared_width
        kwargs: dict[str, Any] = dict(bias=False, device=device, dtype=dtype)
        if resolve(config.activation, "SharedExperts").gated:
            self.gate_proj = nn.Linear(H, width, **kwargs)
        self.up_proj = nn.Linear(H, width, **kwargs)
        self.down_proj = nn.Linear(width, H, **kwargs)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights (see `MoEConfig.init_std`)."""
        if resolve(self.config.activation).gated:
            _normal(self.gate_proj.weight, self.config.hidden_size, self.config)
        _normal(self.up_proj.weight, self.config.hidden_size, self.config)
        _normal(self.down_proj.weight, self.config.shared_width, self.config)

    def forward(self, x: Tensor) -> Tensor:
        act, up = resolve(self.config.activation), self.up_proj(x)
        halves = (self.gate_proj(x), up) if act.gated else (up,)
        return self.down_proj(act.forward(*halves, act.alpha, act.limit))


class MoE(nn.Module):
    """A whole Mixture-of-Experts layer: `y = experts(x, gate(x)) [+ [sigmoid(w x)] · shared_experts(x)]`.

    Modules: `gate` (Router), `experts` (Experts), `shared_experts` (SharedExperts) and `shared_expert_gate` where the
    configuration asks for them. The state dict has Hugging Face's merged layout; `load_state_dict` also reads one
    tensor an expert, and the names `router` and `shared_expert` for `gate` and `shared_experts` (see
    `moesaic.nn.state_dict`).

    Attributes:
        losses: auxiliary losses of the last forward by name (`load_balancing_loss`, `z_loss`), each already multiplied
            by its coefficient, so that `loss + sum(layer.losses.values())` is what to minimise. Empty in eval mode
            and for coefficients of 0. Read them before the layer's next call.
        routing: the last forward's choices, `topk_weights` detached and without logits, for diagnosis.

    Works under `torch.compile(fullgraph=True)`, autocast (the router stays in fp32), activation checkpointing, and on
    the meta device (`to_empty`, then `reset_parameters` or `load_state_dict`). Differentiable; deterministic.
    """

    losses: dict[str, Tensor]
    routing: Routing | None

    def __init__(self, config: MoEConfig, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.gate = Router(config, device, dtype)
        self.experts = Experts(config, device, dtype)
        self.shared_experts = SharedExperts(config, device, dtype) if config.num_shared_experts else None
        self.shared_expert_gate = (
            nn.Linear(config.hidden_size, 1, bias=False, device=device, dtype=dtype) if config.shared_gated else None
        )
        self.losses, self.routing = {}, None
        self.register_load_state_dict_pre_hook(load_layer)
        self._reset_shared_gate()

    @torch.no_grad()
    def _reset_shared_gate(self) -> None:
        if self.shared_expert_gate is not None:
            _normal(self.shared_expert_gate.weight, self.config.hidden_size, self.config)

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer of the layer."""
        for module in (self.gate, self.experts, self.shared_experts):
            if module is not None:
                module.reset_parameters()
        self._reset_shared_gate()

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., H) -> (..., H)`; any leading dimensions, also empty ones."""
        if x.shape[-1:] != (self.config.hidden_size,):
            raise ValueError(
                f"MoE: x must have shape (..., H={self.config.hidden_size}), got {tuple(x.shape)}; project it."
            )
        tokens = x.reshape(-1, self.config.hidden_size)
        routing = self.gate(tokens)
        self.losses = self._losses(routing)
        self.routing = dataclasses.replace(routing, topk_weights=routing.topk_weights.detach(), logits=None)
        y = self.experts(tokens, routing)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
            y = y + shared
        return y.view(x.shape)

    def _losses(self, routing: Routing) -> dict[str, Tensor]:
        losses, c = {}, self.config
        if self.training and c.load_balancing_loss_coef:
            losses["load_balancing_loss"] = c.load_balancing_loss_coef * load_balancing_loss(routing, c.router.score)
        if self.training and c.z_loss_coef:
            losses["z_loss"] = c.z_loss_coef * z_loss(routing)
        return losses

    def __getstate__(self) -> dict[str, Any]:
        # what the last forward left is not the layer's state, and tensors of a graph can be neither copied nor pickled
        return {**self.__dict__, "losses": {}, "routing": None}


def _normal(weight: Tensor, fan_in: int, config: MoEConfig) -> None:
    nn.init.normal_(weight, std=config.init_std or fan_in**-0.5)
