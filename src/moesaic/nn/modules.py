"""Router, Experts, SharedExperts and MoE: the operators as torch modules, with Hugging Face's parameter names.

Legend: T tokens, H hidden, I intermediate, E experts, K choices per token; N = 2I with a gated activation, else I.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import resolve
from ..ops.fused_experts import fused_experts
from ..ops.gate import gate, router_logits
from ..ops.route.policies import generator_of
from ..routing import Routing
from .config import MoEConfig
from .losses import LOSSES, once_recorded
from .passing import RouterOutput, Sealed, detached, output_of, routing_of
from .state_dict import load_experts, load_layer, load_router


class Router(nn.Module):
    """The gate: `route(W x + b)`, the product and the scores in fp32 whatever the dtypes of x and W.

    Parameters: `weight (C, H)`, C the columns of the logits, E unless the configuration has experts without matrices or
    weighed shared ones; `bias (C,)` if `config.router_bias`; `scale (H,)` if `config.router_norm_eps` is given;
    `per_expert_scale (E,)` or `global_scale (1,)`, as `config.learned_scale` says; `noise_weight (E, H)` for
    `noise="noisy_topk"`. Buffers: `e_score_correction_bias (E,)`, fp32 at creation, if `config.selection_bias`;
    `tid2eid (V, K)` if `config.hash_vocab_size` is V. Here E counts the experts without matrices too.

    In training mode noise, expert sampling and the training capacity are on.
    """

    bias: Tensor | None
    scale: Tensor | None
    per_expert_scale: Tensor | None
    global_scale: Tensor | None
    noise_weight: Tensor | None
    e_score_correction_bias: Tensor | None
    tid2eid: Tensor | None

    def __init__(self, config: MoEConfig, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        H, E, C = config.hidden_size, config.num_candidates, config.router_columns
        self.weight = nn.Parameter(torch.empty(C, H, device=device, dtype=dtype))
        for name, wanted, shape in (
            ("bias", config.router_bias, (C,)),
            ("scale", config.router_norm_eps is not None, (H,)),
            ("per_expert_scale", config.learned_scale == "per_expert", (E,)),
            ("global_scale", config.learned_scale == "global", (1,)),
            ("noise_weight", config.router.noise == "noisy_topk", (E, H)),
        ):
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, parameter)
        correction = torch.empty(E, device=device, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        table = (config.hash_vocab_size, config.router.top_k)
        table = torch.empty(table, device=device, dtype=torch.long) if config.hash_vocab_size else None
        self.register_buffer("tid2eid", table)
        self.register_load_state_dict_pre_hook(load_router)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights (see `MoEConfig.init_std`), biases and noise zero, scales one, tokens dealt out in turn."""
        _normal(self.weight, self.config.hidden_size, self.config)
        for zero in (self.bias, self.e_score_correction_bias, self.noise_weight):
            if zero is not None:
                zero.zero_()
        for one in (self.scale, self.per_expert_scale, self.global_scale):
            if one is not None:
                one.fill_(1.0)
        if self.tid2eid is not None:
            slots = torch.arange(self.tid2eid.numel(), device=self.tid2eid.device)
            self.tid2eid.copy_((slots % self.config.num_candidates).view_as(self.tid2eid))

    def forward(
        self, x: Tensor, *, ids: Tensor | None = None, input_ids: Tensor | None = None,
        token_mask: Tensor | None = None, expert_mask: Tensor | None = None, sequences: int = 1,
        generator: torch.Generator | int | None = None,
    ) -> RouterOutput:  # fmt: skip
        """`x (T, H) -> RouterOutput`, whose weights and logits carry the gradient to x and every parameter.

        It has a `Routing`'s fields as a named tuple, for hooks to see; `routing_of(output)` is the Routing.

        Args:
            x: `(T, H)`.
            ids: `(..., K)`, a choice made elsewhere, `routing.topk_ids` of an earlier forward among them; weights come
                from this router's scores.
            input_ids: `(...)` token ids, which choose the experts if `config.hash_vocab_size`.
            token_mask: `(...)` bool; False routes a token nowhere.
            expert_mask: `(E,)` or `(..., E)` bool; False takes an expert out.
            sequences: the tokens are that many sequences of equal length, for `sequence_balance_loss`.
            generator: for the noise, see `moesaic.route`.

        The leading dimensions `...` hold T tokens in all.
        """
        c = self.config
        if x.dim() != 2 or x.shape[1] != c.hidden_size:
            raise ValueError(f"Router: x must have shape (T, H={c.hidden_size}), got {tuple(x.shape)}; reshape it.")
        if self.tid2eid is not None and ids is None:
            if input_ids is None:
                raise ValueError("Router: input_ids must be given where token ids choose the experts, got None.")
            ids = self.tid2eid[input_ids.reshape(-1)]
        generator = generator_of(generator, x.device)
        # autocast would compute the logits in half precision; it knows nothing of the meta device
        with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            if token_mask is not None and (self.scale is not None or self.noise_weight is not None):
                x = x.masked_fill(~token_mask.reshape(-1, 1), 0.0)  # see `gate`
            if self.scale is not None or (self.training and c.input_jitter):
                x = self._input(x, generator)
            noise = None
            if self.training and self.noise_weight is not None:
                noise = router_logits(x, self.noise_weight)
            # one sequence goes unsaid: it is what the short path of few tokens takes
            scale = self.per_expert_scale if self.global_scale is None else self.global_scale
            options: dict[str, Any] = {} if sequences == 1 else dict(sequences=sequences)
            return output_of(gate(
                x, self.weight, c.router, logit_bias=self.bias, bias=self.e_score_correction_bias,
                expert_scale=scale, ids=_rows(ids), expert_mask=_rows(expert_mask),
                token_mask=None if token_mask is None else token_mask.reshape(-1), noise_logits=noise,
                training=self.training, generator=generator,
                # also where no gradient flows: in the first forward of reentrant checkpointing
                statistics=True if self.training and (c.has_losses or c.selection_bias) else None, **options,
            ))  # fmt: skip

    def _input(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the product reads: x with jitter, normed, in fp32."""
        c, x = self.config, x if x.dtype == torch.float64 else x.float()
        if self.training and c.input_jitter:
            u = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = x * (1 + c.input_jitter * (2 * u - 1))
        if self.scale is not None:
            x = F.rms_norm(x, (c.hidden_size,), eps=c.router_norm_eps) * self.scale.to(x.dtype) * c.hidden_size**-0.5
        return x

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
        self.localize: Callable[[Tensor], Tensor] | None = None  # set where the experts are spread over ranks
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights (see `MoEConfig.init_std`), biases zero."""
        for name, fan_in in ((self.first, self.config.hidden_size), ("down_proj", self.config.intermediate_size)):
            _normal(getattr(self, name), fan_in, self.config)
            if self.config.expert_bias:
                getattr(self, f"{name}_bias").zero_()

    def forward(
        self, x: Tensor, routing: Routing | RouterOutput | Sealed, residual: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """`x (T, H) -> (T, H)`: every token through its experts, summed with the routing weights, onto `residual`."""
        names = (self.first, "down_proj", f"{self.first}_bias", "down_proj_bias")
        up, down, b_up, b_down = (self._here(getattr(self, name)) for name in names)
        return fused_experts(
            x, up, down, routing_of(routing), activation=self.config.activation, b_gate_up=b_up, b_down=b_down,
            layout=self.config.layout,
            transposed=self.config.transposed, residual=residual,
            weights_on="input" if self.config.weight_on_input else "output",
        )  # fmt: skip

    def _here(self, parameter: Any) -> Any:
        """The part of a parameter that the operators read."""
        return parameter if self.localize is None or parameter is None else self.localize(parameter)

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
        if resolve(config.shared_act, "SharedExperts").gated:
            self.gate_proj = nn.Linear(H, width, **kwargs)
        self.up_proj = nn.Linear(H, width, **kwargs)
        self.down_proj = nn.Linear(width, H, **kwargs)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights (see `MoEConfig.init_std`)."""
        if resolve(self.config.shared_act).gated:
            _normal(self.gate_proj.weight, self.config.hidden_size, self.config)
        _normal(self.up_proj.weight, self.config.hidden_size, self.config)
        _normal(self.down_proj.weight, self.config.shared_width, self.config)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """`weights (..., n)`: one for each of the n equal shared experts, which together are the width."""
        act, up = resolve(self.config.shared_act), self.up_proj(x)
        halves = (self.gate_proj(x), up) if act.gated else (up,)
        hidden = act.forward(*halves, act.alpha, act.limit)
        if weights is not None:
            hidden = (hidden.unflatten(-1, (weights.shape[-1], -1)) * weights[..., None].to(hidden.dtype)).flatten(-2)
        return self.down_proj(hidden)


class MoE(nn.Module):
    """A whole Mixture-of-Experts layer: `y = experts(x, gate(x)) [+ [sigmoid(w x)] · shared_experts(x)]`.

    Modules: `gate` (Router), `experts` (Experts), `shared_experts` (SharedExperts) and `shared_expert_gate` where the
    configuration asks for them; parameter `constants (n, H)`, what constant experts give. For a router that no
    configuration describes assign to `gate` a module of your own, `(x (T, H), **keywords of forward) -> Routing`, or a
    `RouterOutput`, whose tensors hooks see. The state dict has Hugging Face's merged layout; `load_state_dict` also
    reads one tensor an expert, and the names that other models have for these modules (see `moesaic.nn.state_dict`).

    Args:
        config: the layer, or a preset's name (`"qwen3-moe"`). A layer's `config` may be replaced by one with which all
            parameters keep their shapes.
        device, dtype: of its parameters.
        overrides: fields of the configuration that differ.
        parallel: spread the experts over ranks: a `DeviceMesh` with a dimension `ep`, or a `moesaic.parallel.Parallel`.
            Expert parameters become DTensors, `Shard(0)` on `ep`; tokens travel to them, and the shared experts compute
            meanwhile. `load_balancing_loss` and `z_loss` are then the whole batch's (their mean over ranks is); a
            capacity and the other losses are each rank's own.

    Attributes:
        losses: auxiliary losses of the last forward by name (`load_balancing_loss`, `sequence_balance_loss`,
            `importance_loss`, `load_loss`, `z_loss`), each already multiplied by its coefficient, so that
            `loss + sum(layer.losses.values())` is what to minimise (or use `attach_losses`). Empty in eval mode and
            for coefficients of 0. Read them before the layer's next call.
        routing: the last forward's choices without logits and gradient, for diagnosis and to replay
            (`ids=routing.topk_ids`). A capacity's dropped slots are -1 in `topk_ids`, and missing in
            `tokens_per_expert`; `choices`, where the statistics were kept, counts them too.

    Works under `torch.compile(fullgraph=True)`, autocast (the router stays in fp32), activation checkpointing, and on
    the meta device (`to_empty`, then `reset_parameters` or `load_state_dict`). Differentiable; deterministic but for
    the noise that the router's configuration asks for in training.
    """

    losses: dict[str, Tensor]
    routing: Routing | None
    constants: Tensor | None

    def __init__(
        self, config: MoEConfig | str, device: Any = None, dtype: torch.dtype | None = None, *, parallel: Any = None,
        **overrides: Any,
    ):  # fmt: skip
        super().__init__()
        config = self._config = MoEConfig.of(config, **overrides)
        H, constants = config.hidden_size, config.router.constant_experts
        self.gate = Router(config, device, dtype)
        self.experts = Experts(config, device, dtype)
        self.shared_experts = SharedExperts(config, device, dtype) if config.num_shared_experts else None
        self.shared_expert_gate = (
            nn.Linear(H, 1, bias=False, device=device, dtype=dtype) if config.shared_gated else None
        )
        given = nn.Parameter(torch.empty(constants, H, device=device, dtype=dtype)) if constants else None
        self.register_parameter("constants", given)
        self.losses, self.routing = {}, None
        self.register_load_state_dict_pre_hook(load_layer)
        self._reset_own()
        self.parallel: Any = None
        if parallel is not None:
            from ..parallel.layers import attach  # torch.distributed is there only for those who ask

            self.parallel = attach(self, parallel)

    @property
    def config(self) -> MoEConfig:
        return self._config

    @config.setter
    def config(self, config: MoEConfig) -> None:
        own = "" if isinstance(self.gate, Router) else "gate."  # a gate of the caller's own has parameters of its own
        with torch.device("meta"):
            shapes = [{n: t.shape for n, t in m.state_dict().items() if not (own and n.startswith(own))}
                      for m in (self, MoE(config))]  # fmt: skip
        have, wanted = shapes
        for name in sorted(have | wanted):
            if have.get(name) != wanted.get(name):
                raise ValueError(
                    f"MoE: a new config must keep every parameter, got one in which {name} is "
                    f"{_shape(wanted.get(name))}, not {_shape(have.get(name))}; build another layer."
                )
        self._config = config
        for module in (self.gate, self.experts, self.shared_experts):
            if isinstance(module, (Router, Experts, SharedExperts)):
                module.config = config

    @torch.no_grad()
    def _reset_own(self) -> None:
        H = self.config.hidden_size
        if self.shared_expert_gate is not None:
            _normal(self.shared_expert_gate.weight, H, self.config)
        if self.constants is not None:
            _normal(self.constants, H, self.config)

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer of the layer."""
        for module in (self.gate, self.experts, self.shared_experts):
            if module is not None:
                module.reset_parameters()
        self._reset_own()

    def forward(self, x: Tensor, **choice: Any) -> Tensor:
        """`x (..., H) -> (..., H)`; any leading dimensions, also empty ones.

        Args:
            x: `(..., H)`.
            choice: keywords of `Router.forward`: `ids`, `input_ids`, `token_mask`, `expert_mask`, `sequences`,
                `generator`. Masks and ids have the leading dimensions of x. A masked token meets the shared experts
                alone. With a `sequence_balance_loss_coef` all leading dimensions but the last count sequences.
        """
        if x.shape[-1:] != (self.config.hidden_size,):
            raise ValueError(
                f"MoE: x must have shape (..., H={self.config.hidden_size}), got {tuple(x.shape)}; project it."
            )
        tokens = x.reshape(-1, self.config.hidden_size)
        if self.training and self.config.sequence_balance_loss_coef:
            choice.setdefault("sequences", max(1, math.prod(x.shape[:-2])))
        routing = routing_of(self.gate(tokens, **choice))
        self.losses = self._losses(routing)
        self.routing = detached(routing)
        return self._routed(tokens, routing).view(x.shape)

    def _shared(self, tokens: Tensor, routing: Routing) -> Tensor | None:
        """What the shared experts give, weighed."""
        if self.shared_experts is None:
            return None
        shared = self.shared_experts(tokens, routing.shared_weights)
        if self.shared_expert_gate is not None:
            shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
        return shared

    def _routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """What the chosen experts give, with matrices and without, and the shared ones' part."""
        c = self.config
        # a factor of the routed sum alone must not meet the shared part; nor has it come while tokens travel
        apart = c.routed_scale != 1.0 or self.parallel is not None
        if self.parallel is None:
            shared = self._shared(tokens, routing)
            y = self.experts(tokens, Sealed(routing), None if apart else shared)
        else:
            y, shared = self.parallel(self.experts, tokens, routing, lambda: self._shared(tokens, routing))
        if routing.identity_weight is not None:
            y = y + routing.identity_weight[:, None].to(y.dtype) * tokens.to(y.dtype)
        if routing.constant_weights is not None:
            assert self.constants is not None
            y = y + routing.constant_weights.to(y.dtype) @ self.constants.to(y.dtype)
        if c.routed_scale != 1.0:
            y = y * c.routed_scale
        return y if shared is None or not apart else y + shared

    def _losses(self, routing: Routing) -> dict[str, Tensor]:
        if not self.training:
            return {}
        coefficients = {name: getattr(self.config, f"{name}_coef") for name in LOSSES}
        if self.parallel is not None:
            return {n: c * self.parallel.loss(n, LOSSES[n], routing) for n, c in coefficients.items() if c}
        return once_recorded({name: c * LOSSES[name](routing) for name, c in coefficients.items() if c}, self.gate)

    def __getstate__(self) -> dict[str, Any]:
        # what the last forward left is not the layer's state, and tensors of a graph can be neither copied nor pickled
        return {**self.__dict__, "losses": {}, "routing": None}


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))


def _normal(weight: Tensor, fan_in: int, config: MoEConfig) -> None:
    nn.init.normal_(weight, std=config.init_std or fan_in**-0.5)


def _rows(t: Tensor | None) -> Tensor | None:
    """`(..., n) -> (T, n)`."""
    return t if t is None or t.dim() < 3 else t.reshape(-1, t.shape[-1])
