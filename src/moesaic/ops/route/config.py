"""RouterConfig: what a router does with its logits, one field for each difference between routers.

Legend: T tokens, E experts, K choices, G groups of experts; z transformed logits, s scores, c choice values, w weights.
"""

from __future__ import annotations

import functools
import math
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, NamedTuple

from ...errors import check_choice

SCORES = ("softmax", "sigmoid", "sqrt_softplus", "log_sigmoid")
ORDERS = ("pre", "pre_renorm", "post")
POLICIES = ("topk", "top_p", "entropy", "expert_choice", "sinkhorn", "sparsemixer")
RAGGED = ("top_p", "entropy")
NORMS = ("sum", "softmax")
GROUP_SCORES = ("max", "top2_sum")
NOISES = ("none", "gaussian", "jitter", "noisy_topk", "gumbel")
DROPS = ("position", "choice", "probability")


class Core(NamedTuple):
    """The fields that the private operator runs; the others are composed around it."""

    top_k: int
    policy: str
    threshold: float
    score: str
    order: str
    multiplier: float
    soft_cap: float
    bias_on: str
    norm_eps: float
    norm_min: float
    scale: float
    num_groups: int
    topk_groups: int
    group_score: str
    group_mask_value: float


@dataclass(frozen=True, repr=False)
class RouterConfig:
    """What a router does with its logits. Every difference between real models' routers is a field here.

    **Scores.** `z = soft_cap · tanh(multiplier · logits / soft_cap)` (no cap at 0) and `s = score(z)` in fp32: softmax
    over E, or elementwise sigmoid, `sqrt(softplus(z))`, `log(sigmoid(z))`. The choice values are `c = s + bias`, or
    `c = z + bias` with `bias_on="logits"`. The bias takes part in the choice alone (DeepSeek-V3). A token's
    probabilities, for `"top_p"` and the losses, are the softmax of z, or positive s divided by their sum.

    **Groups.** With `num_groups > 1` experts form G equal consecutive groups, scored by their best c (`"max"`) or their
    two best (`"top2_sum"`); all but the `topk_groups` best groups are masked with `group_mask_value`.

    **Choice** (`policy`), ties to the lowest expert, NaN below every number; an expert whose c is -inf is never chosen:

    - `"topk"`: the K largest c.
    - `"top_p"`: of these, in falling order, as many as it takes to hold the share `threshold` of the probability.
    - `"entropy"`: of these 1 where the entropy of softmax(z) over all experts, in nats, is below `threshold`, 2 below
      twice that, else all K.
    - `"expert_choice"`: each expert takes its `ceil(T·K/E · capacity_factor)` best tokens (factor 1 by default); of its
      experts a token keeps at most `max_choices` (E by default), those with the largest c.
    - `"sinkhorn"`: in training the K largest of the doubly normalised `exp(z)`; otherwise `"topk"`. Takes no bias.
    - `"sparsemixer"`: K sampled experts with Heun's third-order gradient (Phi-MoE); `noise_std` is its jitter. In
      evaluation the K largest z. Takes no bias.

    **Weights** (`order`):

    - `"pre"`: `w_k = s[id_k]`.
    - `"pre_renorm"`: with `norm="sum"` `w_k / (max((sum_k |w_k|^norm_p)^(1/norm_p), norm_min) + norm_eps)`, with
      `norm="softmax"` the softmax of the w over k.
    - `"post"`: the choice is made on `z + bias`, then the chosen z are scored (softmax over K).

    Then `w *= scale`, and `w /= K` with `divide_by_k`. `straight_through` puts exactly 1 in the place of each w before
    that, in evaluation too, and gives it the gradient of the w that it replaced.

    **Columns behind the experts'.** Of the logits' columns the last `shared_logits` belong to shared experts, which
    every token meets: their scores take part in the normalisation. Before them come `zero_experts`, `identity_experts`
    and `constant_experts`, which compete in the choice but have no matrices.

    **Training only.** `noise` before the choice: `"gaussian"` (`noise_std`), `"jitter"` (logits times U(1 - std, 1 +
    std)), `"noisy_topk"` (normal times softplus of a second linear map), `"gumbel"`; the noisy logits are divided by
    `temperature`; weights come from the clean ones unless `noise_in_weights` (Gumbel-softmax). `expert_sampling < 1`
    leaves each expert out with one minus that probability, but never leaves a token fewer than K of those it has.

    **Capacity.** With a factor each expert keeps at most `max(ceil(T·K/E · factor), min_capacity)` slots (at most T;
    without K in the product when `capacity_counts_k` is off) and drops the rest: in the order of tokens
    (`"position"`), first choices before second ones (`"choice"`), or by falling weight (`"probability"`). Weights stay
    as they were unless `renorm_after_drop`.

    Sources: softmax `pre_renorm` Mixtral, Qwen3-MoE; `post` GPT-OSS, Granite; sigmoid, bias and groups DeepSeek-V3;
    sqrt-softplus DeepSeek-V4; shared logits Inkling; zero experts LongCat; expert choice arXiv 2202.09368; top-p arXiv
    2403.07652; noisy top-k arXiv 1701.06538; capacity GShard, Switch, Megatron-LM.
    """

    top_k: int
    score: str = "softmax"
    order: str = "pre_renorm"
    norm_eps: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "top2_sum"
    group_mask_value: float = float("-inf")
    # choice
    policy: str = "topk"
    threshold: float = 0.0
    max_choices: int = 0
    # scores and weights
    multiplier: float = 1.0
    soft_cap: float = 0.0
    bias_on: str = "scores"
    norm: str = "sum"
    norm_p: float = 1.0
    norm_min: float = 0.0
    divide_by_k: bool = False
    # columns behind the experts'
    shared_logits: int = 0
    zero_experts: int = 0
    identity_experts: int = 0
    constant_experts: int = 0
    # training only
    noise: str = "none"
    noise_std: float = 1.0
    temperature: float = 1.0
    noise_in_weights: bool = False
    straight_through: bool = False
    expert_sampling: float = 1.0
    # capacity
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    capacity_counts_k: bool = True
    min_capacity: int = 0
    drop_policy: str = "position"
    renorm_after_drop: bool = False

    def __repr__(self) -> str:
        """What differs from the defaults."""
        values = ((f, getattr(self, f.name)) for f in fields(self))
        return (
            f"RouterConfig({', '.join(f'{f.name}={v!r}' for f, v in values if f.default is MISSING or v != f.default)})"
        )

    def __hash__(self) -> int:
        """Made once: plans are looked up by it at every call."""
        made = self.__dict__.get("_hash")
        if made is None:
            made = hash(tuple(getattr(self, f.name) for f in fields(self)))
            object.__setattr__(self, "_hash", made)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash: strings have another in another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    # ------------------------------------------------------------ what follows from the fields
    @property
    def extra_experts(self) -> int:
        """Experts that can be chosen but have no matrices."""
        return self.zero_experts + self.identity_experts + self.constant_experts

    def columns(self, num_experts: int) -> int:
        """Columns of the logits for `num_experts` experts with matrices."""
        return num_experts + self.extra_experts + self.shared_logits

    def num_experts(self, columns: int) -> int:
        """Experts with matrices, given the columns of the logits."""
        return columns - self.extra_experts - self.shared_logits

    @property
    def weights_later(self) -> bool:
        """The kernels leave the normalisation to torch: it is over more than the chosen scores, or a rare one."""
        return self.order == "pre_renorm" and (self.norm == "softmax" or self.norm_p != 1.0 or self.shared_logits > 0)

    @property
    def plain(self) -> bool:
        """The private operator runs all of it in evaluation: nothing is composed around it."""
        kernel = self.policy == "topk" or self.policy in RAGGED
        extras = self.weights_later or self.straight_through or self.shared_logits or self.extra_experts
        capacity = self.capacity_factor is not None or self.eval_capacity_factor is not None
        return kernel and not extras and not capacity

    def core(self) -> Core:
        """What the private operator runs: choice and plain weights."""
        later, ragged = self.weights_later, self.policy in RAGGED
        scale = 1.0 if later or self.straight_through else self.scale / (self.top_k if self.divide_by_k else 1)
        return Core(
            self.top_k, self.policy if ragged else "topk", self.threshold if ragged else 0.0, self.score,
            "pre" if later else self.order, self.multiplier, self.soft_cap, self.bias_on, self.norm_eps, self.norm_min,
            scale, self.num_groups, self.topk_groups, self.group_score, self.group_mask_value,
        )  # fmt: skip

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of_core(core: Core) -> RouterConfig:
        """The configuration whose `core()` that is."""
        return RouterConfig(**core._asdict())

    def capacity(self, num_tokens: int, num_experts: int, training: bool) -> int | None:
        """Slots that each expert keeps, or None without a factor for this mode.

        The evaluation factor is the training one where it is not given.
        """
        factor = self.capacity_factor
        if not training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        if factor is None:
            return None
        slots = num_tokens * (self.top_k if self.capacity_counts_k else 1)
        # 1e-9: a product like 1.1 · 10 must not round up to the next integer
        capacity = math.ceil(slots / num_experts * factor - 1e-9)
        return max(0, min(max(capacity, self.min_capacity), num_tokens))

    # ------------------------------------------------------------ checks
    @functools.lru_cache(maxsize=1024)  # noqa: B019 - configurations are few
    def fits(self, num_experts: int, who: str) -> bool:
        """True, or what `check` raises; looked at once for each number of experts."""
        self.check(num_experts, who)
        return True

    def check(self, num_experts: int, who: str = "route") -> None:
        """Raise `ValueError` unless this configuration fits `num_experts` experts with matrices."""
        for name, choices in (
            ("score", SCORES), ("order", ORDERS), ("policy", POLICIES), ("norm", NORMS), ("noise", NOISES),
            ("bias_on", ("scores", "logits")), ("group_score", GROUP_SCORES), ("drop_policy", DROPS),
        ):  # fmt: skip
            check_choice(who, name, getattr(self, name), choices)
        for name in ("shared_logits", "zero_experts", "identity_experts", "constant_experts", "max_choices",
                     "min_capacity"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{who}: {name} must not be negative, got {getattr(self, name)}; use 0 for none.")
        if num_experts < 1:
            raise ValueError(
                f"{who}: the logits must have more columns than the {self.extra_experts + self.shared_logits} of zero, "
                f"identity, constant and shared experts, got {self.columns(num_experts)}."
            )
        self._check_choice(num_experts + self.extra_experts, who)
        self._check_weights(who)
        self._check_training(who)

    def _check_choice(self, candidates: int, who: str) -> None:
        groups = self.num_groups
        if groups < 1 or candidates % groups:
            raise ValueError(
                f"{who}: num_groups must divide the number of experts E={candidates}, got {groups}; use a divisor."
            )
        if not 1 <= self.topk_groups <= groups:
            raise ValueError(
                f"{who}: topk_groups must be between 1 and num_groups={groups}, got {self.topk_groups}; lower it."
            )
        reach = candidates // groups * (self.topk_groups if groups > 1 else 1)
        if not 1 <= self.top_k <= reach:
            raise ValueError(
                f"{who}: top_k must be between 1 and the {reach} experts that can be chosen, got {self.top_k}; "
                + (
                    f"{self.topk_groups} of num_groups={groups} groups of {candidates // groups} stay: change those."
                    if groups > 1
                    else "lower it."
                )
            )
        if groups > 1 and self.group_score == "top2_sum" and candidates // groups < 2:
            raise ValueError(f"{who}: group_score='top2_sum' needs groups of at least 2 experts, got 1; use 'max'.")
        if groups > 1 and (self.order == "post" or self.policy in ("expert_choice", "sinkhorn", "sparsemixer")):
            raise ValueError(
                f"{who}: order='post' and policy={self.policy!r} have no group form, got num_groups={groups}; use "
                "order='pre' or 'pre_renorm' with policy 'topk', 'top_p' or 'entropy'."
                if self.order != "post"
                else f"{who}: order='post' has no group form; use order='pre' or 'pre_renorm', got num_groups={groups}."
            )
        if self.policy == "top_p" and not 0 < self.threshold <= 1:
            raise ValueError(f"{who}: policy='top_p' needs 0 < threshold <= 1, got {self.threshold}; it is a share.")
        if self.policy == "entropy" and not 0 < self.threshold < math.log(candidates):
            raise ValueError(
                f"{who}: policy='entropy' needs 0 < threshold < ln(E) = {math.log(candidates):.4g}, which no entropy "
                f"exceeds, got {self.threshold}."
            )
        if self.policy == "sparsemixer" and (self.score != "softmax" or self.order != "pre"):
            raise ValueError(
                f"{who}: policy='sparsemixer' makes its own weights and needs score='softmax', order='pre', got "
                f"{self.score!r}, {self.order!r}."
            )
        if self.policy == "sparsemixer" and (self.noise != "none" or self.temperature != 1.0):
            raise ValueError(
                f"{who}: policy='sparsemixer' draws its own noise and needs noise='none', temperature=1.0, got "
                f"{self.noise!r}, {self.temperature}; noise_std is its jitter."
            )
        if math.isnan(self.group_mask_value):
            raise ValueError(f"{who}: group_mask_value must be a number, got nan; -inf takes the other groups out.")

    def _check_weights(self, who: str) -> None:
        if not self.multiplier > 0:
            raise ValueError(f"{who}: multiplier must be positive, got {self.multiplier}; negate the logits instead.")
        if self.soft_cap < 0 or self.norm_p <= 0 or self.norm_eps < 0 or self.norm_min < 0:
            raise ValueError(
                f"{who}: soft_cap, norm_eps and norm_min must not be negative and norm_p must be positive, got "
                f"{self.soft_cap}, {self.norm_eps}, {self.norm_min} and {self.norm_p}."
            )
        if self.shared_logits and (self.score == "softmax" or self.order == "post"):
            raise ValueError(
                f"{who}: shared_logits needs an elementwise score (sigmoid, sqrt_softplus, log_sigmoid) and order "
                f"'pre' or 'pre_renorm', got {self.score!r} and {self.order!r}."
            )
        if self.score == "log_sigmoid" and self.order == "pre_renorm" and self.norm == "sum":
            raise ValueError(f"{who}: score='log_sigmoid' is negative and needs norm='softmax', got norm='sum'.")

    def _check_training(self, who: str) -> None:
        if self.noise_std < 0 or self.temperature <= 0:
            raise ValueError(
                f"{who}: noise_std must not be negative and temperature must be positive, got {self.noise_std} and "
                f"{self.temperature}."
            )
        if not 0 < self.expert_sampling <= 1:
            raise ValueError(f"{who}: expert_sampling must lie in (0, 1], got {self.expert_sampling}; it is a rate.")
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(
                    f"{who}: {name} must be positive and finite, got {factor}; use None to keep every slot."
                )

    def replace(self, **changes) -> RouterConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)
