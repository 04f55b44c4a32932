"""MoEConfig: the frozen description of one Mixture-of-Experts layer, and PRESETS, those of published models.

To add a model, add an entry to PRESETS; its sizes come from the shared table in `moesaic.cases`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..activations import Activation, resolve
from ..cases import CASES
from ..errors import check_choice
from ..ops.experts import LAYOUTS
from ..ops.route import RouterConfig


@dataclass(frozen=True)
class MoEConfig:
    """One layer: its sizes, its router, how its expert weights are stored, its shared experts, its losses.

    Attributes:
        hidden_size, intermediate_size, num_experts: H, I (after the gate) and E.
        router: what the router does with its logits; holds `top_k`.
        activation: a name in `moesaic.ACTIVATIONS`, or an entry with other constants.
        layout: gate and up as `"concatenated"` halves or `"interleaved"` columns of the first expert matrix.
        transposed: both expert matrices are stored input-major, `(E, H, 2I)` and `(E, I, H)`.
        expert_bias: the experts' two products have biases.
        router_bias: the router's product has a bias, which takes part in choice and weight (gpt-oss).
        selection_bias: the router has the buffer `e_score_correction_bias`, which takes part in the choice alone
            (DeepSeek-V3).
        num_shared_experts: experts that every token goes through, fused into one dense MLP; 0 for none.
        shared_intermediate_size: width of that MLP; by default `num_shared_experts · intermediate_size`.
        shared_gated: scale the shared output by `sigmoid(w · x)`, one number a token (Qwen2-MoE).
        load_balancing_loss_coef: factor of Switch's balance loss; 0 leaves it out. Hugging Face's form of that loss is
            K times ours, so its `router_aux_loss_coef` is this number divided by K.
        z_loss_coef: factor of the router's z-loss; 0 leaves it out.
        init_std: standard deviation of the initial weights; None takes 1/sqrt(fan in), which keeps the scale of
            activations at any width (and is about the usual 0.02 at H = 2048).
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    router: RouterConfig
    activation: str | Activation = "swiglu"
    layout: str = "concatenated"
    transposed: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    num_shared_experts: int = 0
    shared_intermediate_size: int | None = None
    shared_gated: bool = False
    load_balancing_loss_coef: float = 0.0
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
        self.router.check(self.num_experts, who)
        _check_at_least(who, "num_shared_experts", self.num_shared_experts, 0)
        if self.shared_intermediate_size is not None:
            _check_at_least(who, "shared_intermediate_size", self.shared_intermediate_size, 1)
        if not self.num_shared_experts and (self.shared_gated or self.shared_intermediate_size is not None):
            raise ValueError(
                f"{who}: shared_gated and shared_intermediate_size need shared experts, got num_shared_experts=0; set "
                "it to 1 or more."
            )
        for name in ("load_balancing_loss_coef", "z_loss_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{who}: {name} must be at least 0, got {getattr(self, name)}; use 0 to leave it out.")
        if self.init_std is not None and not self.init_std > 0:
            raise ValueError(f"{who}: init_std must be positive, got {self.init_std}; use None for 1/sqrt(fan in).")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MoEConfig:
        """The layer of a published model, e.g. `MoEConfig.preset("deepseek-v3", num_experts=32)`.

        Args:
            name: a key of `PRESETS`.
            overrides: fields of `MoEConfig` or of `RouterConfig` (`top_k=4`), as in `replace`.
        """
        check_choice("MoEConfig.preset", "name", name, tuple(PRESETS))
        return PRESETS[name].replace(**overrides)

    def replace(self, **overrides: Any) -> MoEConfig:
        """A copy with some fields changed; a field of `RouterConfig` goes to the router."""
        own = {f.name for f in fields(self)}
        router = {f.name for f in fields(RouterConfig)}
        if unknown := sorted(set(overrides) - own - router):
            raise ValueError(
                f"MoEConfig: overrides must be fields of MoEConfig or RouterConfig, got {', '.join(unknown)}; "
                f"choose from {', '.join(sorted(own | router))}."
            )
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
    def num_parameters(self) -> int:
        """Parameters of the layer (buffers excluded)."""
        return self._parameters(self.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: the router, its `top_k` experts and the shared ones."""
        return self._parameters(self.router.top_k)

    def _parameters(self, experts: int) -> int:
        H, I, E = self.hidden_size, self.intermediate_size, self.num_experts
        act = resolve(self.activation)
        N = act.width(I)
        expert = N * H + H * I + (N + H if self.expert_bias else 0)
        shared = (act.width(self.shared_width) + self.shared_width) * H + (H if self.shared_gated else 0)
        return experts * expert + shared + E * H + (E if self.router_bias else 0)


def _check_at_least(who: str, name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{who}: {name} must be an integer of at least {least}, got {value!r}.")


def _model(case_name: str, *, router: Mapping[str, Any] | None = None, **others: Any) -> MoEConfig:
    case = CASES[case_name]
    return MoEConfig(
        hidden_size=case.hidden_size, intermediate_size=case.intermediate_size, num_experts=case.num_experts,
        router=RouterConfig(top_k=case.top_k, **(router or {})), activation=case.activation, layout=case.layout,
        transposed=case.transposed, expert_bias=case.bias, **others,
    )  # fmt: skip


# Loss factors: Hugging Face's `router_aux_loss_coef` of the model's configuration class times K (see MoEConfig), except
# OLMoE's, which are its paper's (arXiv 2409.02060, whose balance loss has our form). DeepSeek-V3 balances by its bias.
PRESETS: dict[str, MoEConfig] = {
    "mixtral": _model("mixtral-8x7b", load_balancing_loss_coef=0.002),
    "deepseek-v3": _model(
        "deepseek-v3",
        router=dict(score="sigmoid", norm_eps=1e-20, scale=2.5, num_groups=8, topk_groups=4, group_score="top2_sum"),
        selection_bias=True, num_shared_experts=1,
    ),
    "qwen2-moe": _model(
        "qwen2-moe-a2.7b", router=dict(order="pre"), num_shared_experts=4, shared_gated=True,
        load_balancing_loss_coef=0.004,
    ),
    "qwen3-moe": _model("qwen3-30b-a3b", load_balancing_loss_coef=0.008),
    "olmoe": _model("olmoe", router=dict(order="pre"), load_balancing_loss_coef=0.01, z_loss_coef=0.001),
    "gpt-oss": _model("gpt-oss-120b", router=dict(order="post"), router_bias=True, load_balancing_loss_coef=0.004),
}  # fmt: skip
