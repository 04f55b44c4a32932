"""Every router that `RouterConfig` describes against plain Python: choices, tables, weights, statistics, gradients."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from router_oracle import Answer, Asked
from router_oracle import route as oracle

from moesaic import RouterConfig, hardware, route
from moesaic.nn.config import PRESETS
from moesaic.ops.route.config import DROPS, NORMS, ORDERS, POLICIES, SCORES
from moesaic.testing import assert_close

# numpy's warnings about values in lanes that a mask throws away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
TRITON = hardware.triton_why_not("cpu", hardware.arch_of(torch.device("cpu")))
SEED = 11
STEP = 1e-6


# ---------------------------------------------------------------- drawing a call
@st.composite
def configs(draw, kernel_only: bool = False):
    """`(num_experts, RouterConfig)`, legal by construction."""
    flag, one_of, number = st.booleans(), st.sampled_from, st.integers
    policy = draw(one_of(POLICIES[:3] if kernel_only else POLICIES))
    score, order = draw(one_of(SCORES)), draw(one_of(ORDERS))
    if policy == "sparsemixer":
        score, order = "softmax", "pre"
    E = draw(one_of((1, 3, 5, 6, 7, 9, 10, 11, 12, 13)))
    extra = dict.fromkeys(("zero_experts", "identity_experts", "constant_experts"), 0)
    if draw(number(0, 3)) == 0:
        extra = {name: draw(number(0, 2)) for name in extra}
    columns = E + sum(extra.values())
    groups, kept, group_score = 1, 1, "max"
    if order != "post" and policy in ("topk", "top_p", "entropy") and draw(flag):
        groups = draw(one_of([g for g in range(1, columns + 1) if columns % g == 0]))
        kept = draw(number(1, groups))
        group_score = draw(one_of(("max", "top2_sum"))) if columns // groups > 1 else "max"
    norm = "softmax" if score == "log_sigmoid" and order == "pre_renorm" else draw(one_of(NORMS))
    if policy == "entropy" and columns == 1:
        policy = "topk"
    threshold = {"top_p": draw(st.floats(0.05, 1.0)), "entropy": draw(st.floats(0.2, 0.95)) * math.log(columns)}
    noisy = policy != "sparsemixer" and draw(number(0, 2)) == 0
    capacity = draw(one_of((None, None, 0.3, 0.7, 1.0, 1.6)))
    return E, RouterConfig(
        draw(number(1, max(1, columns // groups * (kept if groups > 1 else 1)))),
        score, order, draw(one_of((0.0, 1e-20, 1e-2))), draw(one_of((1.0, 2.5))), groups, kept, group_score,
        draw(one_of((-math.inf, 0.0))), policy, threshold.get(policy, 0.0),
        draw(number(0, columns)) if policy == "expert_choice" else 0,
        draw(one_of((1.0, 1.0, 0.7))), draw(one_of((0.0, 0.0, 2.0))),
        draw(one_of(("scores", "scores", "logits"))), norm, draw(one_of((1.0, 1.0, 2.0, 3.0))),
        draw(one_of((0.0, 0.0, 0.8))), draw(flag),
        draw(number(0, 2)) if score != "softmax" and order != "post" and draw(flag) else 0,
        **extra,
        noise=draw(one_of(("gaussian", "jitter", "noisy_topk", "gumbel"))) if noisy else "none",
        noise_std=draw(one_of((0.3, 0.05))), temperature=draw(one_of((1.0, 1.7))) if noisy else 1.0,
        noise_in_weights=noisy and draw(flag), straight_through=draw(number(0, 4)) == 0,
        capacity_factor=capacity, eval_capacity_factor=draw(one_of((None, 0.6))), capacity_counts_k=draw(flag),
        min_capacity=draw(one_of((0, 0, 2))), drop_policy=draw(one_of(DROPS)), renorm_after_drop=draw(flag),
    )  # fmt: skip


@dataclass
class Call:
    """A call's arguments as tensors; `asked()` gives them to the oracle."""

    logits: torch.Tensor
    config: RouterConfig
    tensors: dict[str, torch.Tensor]
    training: bool
    sequences: int
    dtype: torch.dtype = torch.float64

    def to(self, dtype: torch.dtype) -> Call:
        """The same call on inputs that are rounded to `dtype` and kept in fp64."""
        tensors = {k: v.to(dtype).double() if v.is_floating_point() else v for k, v in self.tensors.items()}
        return replace(self, logits=self.logits.to(dtype).double(), tensors=tensors, dtype=dtype)

    def run(self, implementation: str):
        """`(routing, leaves by name)`."""
        leaves = {"logits": self.logits, **{k: v for k, v in self.tensors.items() if v.is_floating_point()}}
        leaves = {k: v.to(self.dtype).requires_grad_(k != "bias") for k, v in leaves.items()}
        rest = {k: v for k, v in self.tensors.items() if k not in leaves}
        arguments = {**rest, **leaves}
        routing = route(
            arguments.pop("logits"), self.config, **arguments, training=self.training, generator=SEED,
            sequences=self.sequences, statistics=True, implementation=implementation,
        )  # fmt: skip
        return routing, leaves

    def draws(self):
        """The noise's numbers: the first that the seed gives."""
        columns = self.logits.shape[1] - self.config.shared_logits
        make = torch.rand if self.config.noise in ("jitter", "gumbel") else torch.randn
        like = torch.Generator().manual_seed(SEED)
        return make(self.logits.shape[0], columns, dtype=self.dtype, generator=like).double()

    def asked(self, **changed: torch.Tensor) -> Asked:
        given = {"logits": self.logits, **self.tensors, **changed}
        masks = given.get("expert_mask")
        if masks is not None and masks.dim() == 1:
            given["expert_mask"] = masks.expand(self.logits.shape[0], -1)
        given["draws"] = self.draws()
        return Asked(
            config=self.config, training=self.training, sequences=self.sequences, columns=self.logits.shape[1],
            **{k: v.tolist() for k, v in given.items()},
        )  # fmt: skip


def spread(rows: int, columns: int, r: random.Random) -> torch.Tensor:
    """Numbers well apart in each row, so that no choice hangs on rounding."""
    out, width = [], r.uniform(0.2, 0.9)
    for _ in range(rows):
        order = r.sample(range(columns), columns)
        out.append([width * (n - columns / 2 + r.uniform(-0.3, 0.3)) for n in order])
    return torch.tensor(out, dtype=torch.float64).reshape(rows, columns)


@st.composite
def calls(draw, kernel_only: bool = False):
    E, config = draw(configs(kernel_only))
    r = random.Random(draw(st.integers(0, 2**30)))
    T = draw(st.sampled_from((0, 1, 2, 3, 5, 6)))
    columns, training = E + config.extra_experts, draw(st.booleans()) and config.policy != "sparsemixer"
    logits = spread(T, config.columns(E), r)
    if r.random() < 0.2:
        for t in range(T):
            logits[t, r.randrange(columns)] = -math.inf
    tensors = {}
    if config.policy not in ("sinkhorn", "sparsemixer") and r.random() < 0.5:
        tensors["bias"] = torch.tensor([r.gauss(0, 0.3) for _ in range(columns)], dtype=torch.float64)
    if r.random() < 0.3:
        size = r.choice((1, columns))
        tensors["expert_scale"] = torch.tensor([r.uniform(0.5, 2) for _ in range(size)], dtype=torch.float64)
    if r.random() < 0.3:
        tensors["token_mask"] = torch.tensor([r.random() < 0.7 for _ in range(T)], dtype=torch.bool)
    if r.random() < 0.3:
        rows = [r.sample(range(columns), r.randint(config.top_k, columns)) for _ in range(T)]
        mask = torch.tensor([[e in row for e in range(columns)] for row in rows]).reshape(T, columns).bool()
        tensors["expert_mask"] = mask if T == 0 or r.random() < 0.5 else mask[0]
    if r.random() < 0.25:
        width = min(config.max_choices or columns, columns) if config.policy == "expert_choice" else config.top_k
        rows = [[e if r.random() < 0.8 else -1 for e in r.sample(range(columns), width)] for _ in range(T)]
        tensors["ids"] = torch.tensor(rows, dtype=r.choice((torch.int32, torch.int64))).reshape(T, width)
    if config.noise == "noisy_topk":
        tensors["noise_logits"] = torch.tensor(
            [[r.gauss(-1, 0.5) for _ in range(columns)] for _ in range(T)], dtype=torch.float64
        ).reshape(T, columns)
    sequences = r.choice([s for s in (1, 2, 3) if T % s == 0])
    return Call(logits, config, tensors, training, sequences)


# ---------------------------------------------------------------- comparing
FIELDS = ("weights", "shared", "identity", "constant", "probability_sums", "logsumexp_squares")


def outputs(routing) -> dict[str, torch.Tensor]:
    """The differentiable ones that there are."""
    values = (routing.topk_weights, routing.shared_weights, routing.identity_weight, routing.constant_weights,
              routing.probability_sums, routing.logsumexp_squares)  # fmt: skip
    return {name: v for name, v in zip(FIELDS, values, strict=True) if v is not None}


def cotangent(name: str, shape) -> torch.Tensor:
    n = math.prod(shape)
    return torch.sin(torch.arange(1, n + 1, dtype=torch.float64) * (1 + FIELDS.index(name))).reshape(shape)


def total(answer: Answer, like: dict[str, torch.Tensor]) -> float:
    out = 0.0
    for name, value in like.items():
        want = torch.tensor(getattr(answer, name), dtype=torch.float64).reshape(value.shape)
        out += (want * cotangent(name, value.shape)).sum().item()
    return out


def slope(call: Call, answer: Answer, like: dict, name: str, direction: torch.Tensor) -> float:
    """The oracle's derivative of the outputs' total along a direction of one argument."""
    value = call.logits if name == "logits" else call.tensors[name]
    ends = [replace(call.asked(**{name: value + step * direction}), anchor=answer.soft) for step in (STEP, -STEP)]
    high, low = (total(oracle(asked), like) for asked in ends)
    return (high - low) / (2 * STEP)


def check_values(call: Call, answer: Answer, routing, closer) -> None:
    E = call.config.num_experts(call.logits.shape[1])
    assert routing.topk_ids.tolist() == answer.ids
    for table, want in answer.tables(E).items():
        assert getattr(routing, table).tolist() == want, table
    assert routing.capacity == answer.capacity
    assert routing.choices.tolist() == answer.choices
    for name, got in outputs(routing).items():
        want = torch.tensor(getattr(answer, name), dtype=torch.float64).reshape(got.shape)
        closer(got, want, name)


def check_gradients(call: Call, answer: Answer, routing, leaves, tolerance: float) -> None:
    got = outputs(routing)
    scalar = sum((v.double() * cotangent(n, v.shape)).sum() for n, v in got.items())
    wanted = {k: v for k, v in leaves.items() if v.requires_grad and v.numel()}
    if not wanted or not scalar.requires_grad:
        return
    gradients = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True, materialize_grads=True)
    g = torch.Generator().manual_seed(1)
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
        assert torch.isfinite(gradient).all(), name
        for _ in range(2):
            direction = torch.randn(leaf.shape, dtype=torch.float64, generator=g).masked_fill(leaf == -math.inf, 0.0)
            mine = (gradient.double() * direction).sum().item()
            want = slope(call, answer, got, name, direction)
            scale = (gradient.double() * direction).abs().sum().item() + 1.0
            assert abs(mine - want) <= tolerance * scale, (name, mine, want)


def exact(got, want, name):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=lambda m: f"{name}: {m}")


def rounded(got, want, name):
    if name == "logsumexp_squares":  # near 0 it is the difference of numbers of order one, whose rounding it keeps
        got, want = got.double() + 1, want + 1
    assert_close(got.float(), want, 16, 16, name=name)


def clear(call: Call, answer: Answer, least: float) -> bool:
    iterated = call.config.policy == "sinkhorn" and call.training
    return answer.margin > (1e-3 if iterated else least)


# ---------------------------------------------------------------- the laws
NAMED = ("policy", "score", "order", "norm", "noise", "drop_policy", "group_score")


def combination(config: RouterConfig) -> tuple:
    fields = (getattr(config, name) for name in NAMED)
    return (*fields, config.num_groups > 1, config.shared_logits > 0, config.extra_experts > 0)


def test_every_configuration_matches_plain_python():
    """Combinations that no model has, too: at least four of those drawn are in no preset."""
    seen = set()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(calls())
    def check(call):
        answer = oracle(call.asked())
        assume(clear(call, answer, 1e-5))
        seen.add(combination(call.config))
        for implementation in ("torch", "reference"):
            routing, leaves = call.run(implementation)
            check_values(call, answer, routing, exact)
            check_gradients(call, answer, routing, leaves, 1e-6)

    check()
    assert len(seen - {combination(p.router) for p in PRESETS.values()}) >= 4


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_fp32_matches_plain_python(implementation):
    """The kernels too where they can run; their suite compares them with the reference, configuration by name."""
    if implementation == "triton" and TRITON:
        pytest.skip(TRITON)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(calls(kernel_only=True))
    def check(call):
        call = call.to(torch.float32)
        answer = oracle(call.asked())
        assume(clear(call, answer, 1e-4))
        routing, leaves = call.run(implementation)
        check_values(call, answer, routing, rounded)
        check_gradients(call, answer, routing, leaves, 1e-5)

    check()
