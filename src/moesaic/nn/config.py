"""MoEConfig: the frozen description of one Mixture-of-Experts layer, and PRESETS, those of published models."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

from ..activations import Activation, resolve
from ..errors import check_choice
from ..ops.fused_experts import LAYOUTS
from ..ops.route import RouterConfig
from .presets import ROWS

LEARNED_SCALES = ("none", "per_expert", "global")
COEFFICIENTS = ("load_balancing_loss_coef", "sequence_balance_loss_coef", "importance_loss_coef", "load_loss_coef",
                "z_loss_coef")  # fmt: skip

# Our sizes, and the names that transformers' configurations have for them, the more telling first.
THEIRS = dict(
    hidden_size=("hidden_size", "n_embd", "d_model"),
    intermediate_size=(
        "moe_intermediate_size",
        "expert_intermediate_size",
        "expert_ffn_hidden_size",
        "ffn_hidden_size",
        "intermediate_size",
    ),
    num_experts=("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    top_k=("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k"),
    num_groups=("n_group",),
    topk_groups=("topk_group",),
    scale=("routed_scaling_factor", "route_scale"),
    num_shared_experts=("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    shared_intermediate_size=("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
)


@dataclass(frozen=True)
class MoEConfig:
    """One layer: its sizes, its router, how its expert weights are stored, its shared experts, its losses.

    Attributes:
        hidden_size, intermediate_size, num_experts: H, I (after the gate) and E, experts with matrices.
        router: what the router does with its logits; holds `top_k`, the capacity, noise, and the experts without
            matrices: identity experts give the token back, constant ones a learned vector, zero ones nothing. Its
            `shared_logits` weigh the shared experts, one each.
        activation: a name in `moesaic.ACTIVATIONS`, or an entry with other constants.
        layout: gate and up as `"concatenated"` halves or `"interleaved"` columns of the first expert matrix.
        transposed: both expert matrices are stored input-major, `(E, H, 2I)` and `(E, I, H)`.
        expert_bias: the experts' two products have biases.
        router_bias: the router's product has a bias, which takes part in choice and weight (gpt-oss).
        selection_bias: the router has the buffer `e_score_correction_bias`, which takes part in the choice alone
            (DeepSeek-V3).
        router_norm_eps: the router reads `scale · H^-1/2 · x / sqrt(mean(x²) + eps)` with a learned `scale (H,)`
            (Gemma 4); None for x itself.
        learned_scale: factor of the router's weights that is learned: `"per_expert"` (Gemma 4), `"global"`, one for
            all, shared experts too (Inkling), or `"none"`.
        hash_vocab_size: a buffer `tid2eid (hash_vocab_size, K)` chooses the experts of each token id (DeepSeek-V4's
            first layers); 0 for a choice by scores.
        input_jitter: in training the router reads x times U(1 - jitter, 1 + jitter), elementwise (Switch).
        weight_on_input: weights multiply the experts' input, not their output (Llama 4).
        routed_scale: factor of what the experts with and without matrices give together, shared ones excepted
            (MiniMax-M3); a scale of the router's weights is `router.scale`.
        num_shared_experts: experts that every token goes through, fused into one dense MLP; 0 for none.
        shared_intermediate_size: width of that MLP; by default `num_shared_experts · intermediate_size`.
        shared_gated: scale the shared output by `sigmoid(w · x)`, one number a token (Qwen2-MoE).
        shared_activation: that of the shared experts; by default `activation`.
        load_balancing_loss_coef: factor of Switch's balance loss; 0 leaves it out. Hugging Face's form of that loss is
            K times ours, so its `router_aux_loss_coef` is this number divided by K.
        sequence_balance_loss_coef: factor of DeepSeek-V3's balance loss within each sequence; 0 leaves it out.
        importance_loss_coef, load_loss_coef: factors of Shazeer's losses; that of the load needs
            `noise="noisy_topk"`, whose second map it trains. 0 leaves them out.
        z_loss_coef: factor of the router's z-loss; 0 leaves it out.
        init_std: standard deviation of the initial weights; None takes 1/sqrt(fan in), which keeps the scale of
            activations at any width (and is about the usual 0.02 at H = 2048).
    """

    hidden_size: int = 0
    intermediate_size: int = 0
    num_experts: int = 0
    router: RouterConfig = None  # type: ignore[assignment]  # given, or refused in our words
    activation: str | Activation = "swiglu"
    layout: str = "concatenated"
    transposed: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    router_norm_eps: float | None = None
    learned_scale: str = "none"
    hash_vocab_size: int = 0
    input_jitter: float = 0.0
    weight_on_input: bool = False
    routed_scale: float = 1.0
    num_shared_experts: int = 0
    shared_intermediate_size: int | None = None
    shared_gated: bool = False
    shared_activation: str | Activation | None = None
    load_balancing_loss_coef: float = 0.0
    sequence_balance_loss_coef: float = 0.0
    importance_loss_coef: float = 0.0
    load_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    init_std: float | None = None

    def __post_init__(self) -> None:
        who = "MoEConfig"
        for name in ("hidden_size", "intermediate_size", "num_experts"):
            _check_at_least(who, name, getattr(self, name), 1)
        if not isinstance(self.router, RouterConfig):
            raise ValueError(
                f"{who}: router must be a RouterConfig, got {self.router!r}; write RouterConfig(top_k=...)."
            )
        resolve(self.activation, who)
        check_choice(who, "layout", self.layout, LAYOUTS)
        check_choice(who, "learned_scale", self.learned_scale, LEARNED_SCALES)
        self.router.check(self.num_experts, who)
        _check_at_least(who, "hash_vocab_size", self.hash_vocab_size, 0)
        _check_at_least(who, "num_shared_experts", self.num_shared_experts, 0)
        self._check_shared(who)
        for name in (*COEFFICIENTS, "input_jitter"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{who}: {name} must be at least 0, got {getattr(self, name)}; use 0 to leave it out.")
        if self.load_loss_coef and self.router.noise != "noisy_topk":
            raise ValueError(
                f"{who}: load_loss_coef needs noise='noisy_topk', got {self.router.noise!r}; set it, or use "
                "load_balancing_loss_coef."
            )
        if self.router.noise == "noisy_topk" and not (self.load_loss_coef or self.router.noise_in_weights):
            raise ValueError(
                f"{who}: noise='noisy_topk' learns its size from load_loss or from noisy weights, got neither; set "
                "load_loss_coef, or noise_in_weights=True."
            )
        if self.router_norm_eps is not None and not self.router_norm_eps >= 0:
            raise ValueError(
                f"{who}: router_norm_eps must be at least 0, got {self.router_norm_eps}; use None for no norm."
            )
        if self.init_std is not None and not self.init_std > 0:
            raise ValueError(f"{who}: init_std must be positive, got {self.init_std}; use None for 1/sqrt(fan in).")

    def _check_shared(self, who: str) -> None:
        own = (self.shared_intermediate_size, self.shared_activation)
        if not self.num_shared_experts and (self.shared_gated or any(value is not None for value in own)):
            raise ValueError(
                f"{who}: shared_gated, shared_intermediate_size and shared_activation need shared experts, got "
                "num_shared_experts=0; set it to 1 or more."
            )
        if self.shared_intermediate_size is not None:
            _check_at_least(who, "shared_intermediate_size", self.shared_intermediate_size, 1)
        if self.shared_activation is not None:
            resolve(self.shared_activation, who)
        weighed, n = self.router.shared_logits, self.num_shared_experts
        if weighed and (weighed != n or self.shared_width % n):
            raise ValueError(
                f"{who}: the router's shared_logits weigh equal shared experts one by one, got {weighed} of them, "
                f"num_shared_experts={n} and a shared width of {self.shared_width}; make the numbers agree."
            )

    @classmethod
    def of(cls, config: MoEConfig | str, **overrides: Any) -> MoEConfig:
        """A configuration, or the preset of that name, with some fields changed."""
        if isinstance(config, str):
            return cls.preset(config, **overrides)
        if not isinstance(config, MoEConfig):
            raise ValueError(f"MoE: config must be a MoEConfig or a preset's name, got {config!r}; see nn.PRESETS.")
        return config.replace(**overrides) if overrides else config

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MoEConfig:
        """The layer of a published model, e.g. `MoEConfig.preset("deepseek-v3", num_experts=32)`.

        Args:
            name: a key of `PRESETS`, the model's type in transformers (`deepseek_v3` is as good as `deepseek-v3`).
                `moesaic.nn.presets` says what some models do around their layer.
            overrides: fields of `MoEConfig` or of `RouterConfig` (`top_k=4`), as in `replace`.
        """
        key = name.replace("_", "-")
        check_choice("MoEConfig.preset", "name", key, tuple(PRESETS))
        return PRESETS[key].replace(**overrides)

    @classmethod
    def from_hf(cls, config: Any, **overrides: Any) -> MoEConfig:
        """The layer of a model of transformers, from its configuration: the preset of its type in the model's sizes.

        Args:
            config: what `AutoConfig.from_pretrained(...)` gives; of a model with several parts the text's is read.
            overrides: fields that differ, as in `replace`.

        Raises:
            ValueError: no preset is of this model's type.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        kinds = [str(getattr(c, "model_type", "")).replace("_", "-") for c in (text, config)]
        kind = next((k for name in kinds for k in (name, name.removesuffix("-text")) if k in PRESETS), kinds[0])
        base, found = cls.preset(kind), {}
        for ours, theirs in THEIRS.items():
            values = (getattr(text, name, None) for name in theirs)
            # several of them: of the text's experts first, then of another part's
            value = next((v for v in (v[0] if isinstance(v, list) and v else v for v in values)
                          if isinstance(v, (int, float))), None)  # fmt: skip
            if value is not None and (value or ours not in ("num_groups", "topk_groups")):
                found[ours] = value
        if "scale" in found and base.routed_scale != 1.0:
            found["routed_scale"] = found.pop("scale")
        normed = getattr(text, "norm_topk_prob", None)
        if normed is not None and base.router.order != "post":
            found["order"] = "pre_renorm" if normed else "pre"
        if not base.num_shared_experts:
            found = {name: value for name, value in found.items() if "shared" not in name}
        return base.replace(**found | overrides)

    def replace(self, **overrides: Any) -> MoEConfig:
        """A copy with some fields changed; a field of `RouterConfig` goes to the router."""
        own = {f.name for f in fields(self)}
        router = {f.name for f in fields(RouterConfig)}
        if unknown := sorted(set(overrides) - own - router):
            check_choice("MoEConfig", "an override", unknown[0], sorted(own | router))
        inner = {k: v for k, v in overrides.items() if k in router}
        outer = {k: v for k, v in overrides.items() if k in own}
        if inner:
            outer["router"] = replace(outer.get("router", self.router), **inner)
        return replace(self, **outer)

    @property
    def shared_width(self) -> int:
        """Intermediate width of the shared experts' MLP; 0 when there are none."""
        if not self.num_shared_experts:
            return 0
        return self.shared_intermediate_size or self.num_shared_experts * self.intermediate_size

    @property
    def shared_act(self) -> str | Activation:
        """The shared experts' activation."""
        return self.activation if self.shared_activation is None else self.shared_activation

    @property
    def router_columns(self) -> int:
        """Logits of a token: experts with and without matrices, then shared ones."""
        return self.router.columns(self.num_experts)

    @property
    def num_candidates(self) -> int:
        """Experts that can be chosen, with and without matrices."""
        return self.num_experts + self.router.extra_experts

    @property
    def has_losses(self) -> bool:
        """The layer has auxiliary losses in training."""
        return any(getattr(self, name) for name in COEFFICIENTS)

    @property
    def num_parameters(self) -> int:
        """Parameters of the layer (buffers excluded)."""
        return self._parameters(self.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: the router, its `top_k` experts and the shared ones."""
        return self._parameters(self.router.top_k)

    def _parameters(self, experts: int) -> int:
        H, I, r = self.hidden_size, self.intermediate_size, self.router
        N = resolve(self.activation).width(I)
        expert = N * H + H * I + (N + H if self.expert_bias else 0)
        shared = (resolve(self.shared_act).width(self.shared_width) + self.shared_width) * H
        shared += H if self.shared_gated else 0
        router = self.router_columns * (H + self.router_bias) + (0 if self.router_norm_eps is None else H)
        router += self.num_candidates * H if r.noise == "noisy_topk" else 0
        router += {"none": 0, "per_expert": self.num_candidates, "global": 1}[self.learned_scale]
        return experts * expert + shared + router + r.constant_experts * H


def _check_at_least(who: str, name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{who}: {name} must be an integer of at least {least}, got {value!r}.")


PRESETS: dict[str, MoEConfig] = {name: MoEConfig(**row) for name, row in ROWS.items()}


_init = MoEConfig.__init__


@functools.wraps(_init)
def _checked_init(self: MoEConfig, *arguments: Any, **named: Any) -> None:
    own = [f.name for f in fields(MoEConfig)]
    for name in named:
        if name not in own and name in {f.name for f in fields(RouterConfig)}:
            raise ValueError(
                f"MoEConfig: {name} is the router's, got it beside; write router=RouterConfig({name}=...)."
            )
        check_choice("MoEConfig", "a field", name, own)
    _init(self, *arguments, **named)


MoEConfig.__init__ = _checked_init
