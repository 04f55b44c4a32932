"""moesaic.nn: presets, modules against Hugging Face's, state dict layouts, and what torch does to a module."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic import RouterConfig, route
from moesaic.nn import PRESETS, Experts, MoE, MoEConfig, Router, routing_of, split_experts
from moesaic.nn import modules as nn_modules
from moesaic.testing import STAGES, assert_close, bounds, error_report

SMALL = dict(hidden_size=64, intermediate_size=48, num_experts=16)
MAIN = ("mixtral", "deepseek-v3", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss")
# one more for each part that a layer can have
PARTS = (*MAIN, "longcat-flash", "inkling", "gemma4", "llama4", "minimax-m3-vl", "deepseek-v4")


def small(name: str, **overrides) -> MoE:
    torch.manual_seed(0)
    layer = MoE(MoEConfig.preset(name, **{**SMALL, **overrides}))
    with torch.no_grad():  # biases start at zero: make them matter
        for key, t in (*layer.named_parameters(), *layer.named_buffers()):
            if "bias" in key:
                t.normal_(0, 0.1)
    return layer


def x_of(layer: MoE, *leading: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*leading, layer.config.hidden_size, dtype=dtype, requires_grad=True)


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out - ref).abs().max() / ref.abs().max()).item()


def run(layer: nn.Module, x: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output and the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    (y * direction).sum().backward()
    return y.detach(), {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


# ---------------------------------------------------------------- configuration
def test_presets_are_the_published_models():
    want = {  # H, I, E, K, shared width; billions of parameters in all of the model's layers of this kind
        "mixtral": (4096, 14336, 8, 2, 0),
        "deepseek-v3": (7168, 2048, 256, 8, 2048),
        "qwen2-moe": (2048, 1408, 60, 4, 5632),
        "qwen3-moe": (2048, 768, 128, 8, 0),
        "olmoe": (2048, 1024, 64, 8, 0),
        "gpt-oss": (2880, 2880, 128, 4, 0),
    }
    assert want.keys() <= PRESETS.keys()
    for name, sizes in want.items():
        c = MoEConfig.preset(name)
        assert (c.hidden_size, c.intermediate_size, c.num_experts, c.router.top_k, c.shared_width) == sizes, name
    # 32 layers of Mixtral's experts and routers are 45.1 of its 46.7 billion parameters, 11.3 of its 12.9 active ones
    c = MoEConfig.preset("mixtral")
    assert (round(32 * c.num_parameters / 1e9, 1), round(32 * c.num_active_parameters / 1e9, 1)) == (45.1, 11.3)


def test_presets_agree_with_transformers():
    """Wherever the configuration class's default is the published model's number."""
    auto = pytest.importorskip("transformers").AutoConfig
    mixtral, deepseek, qwen, oss = (auto.for_model(n) for n in ("mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss"))
    c = MoEConfig.preset("mixtral")
    assert (c.hidden_size, c.intermediate_size, c.num_experts, c.router.top_k) == (
        mixtral.hidden_size, mixtral.intermediate_size, mixtral.num_local_experts, mixtral.num_experts_per_tok,
    )  # fmt: skip
    c = MoEConfig.preset("deepseek-v3")
    assert (c.hidden_size, c.intermediate_size, c.num_experts, c.router.top_k, c.num_shared_experts) == (
        deepseek.hidden_size, deepseek.moe_intermediate_size, deepseek.n_routed_experts, deepseek.num_experts_per_tok,
        deepseek.n_shared_experts,
    )  # fmt: skip
    assert (c.router.num_groups, c.router.topk_groups, c.router.scale) == (
        deepseek.n_group, deepseek.topk_group, deepseek.routed_scaling_factor,
    )  # fmt: skip
    c = MoEConfig.preset("qwen3-moe")
    assert (c.hidden_size, c.intermediate_size, c.router.top_k) == (
        qwen.hidden_size, qwen.moe_intermediate_size, qwen.num_experts_per_tok,
    )  # fmt: skip
    assert c.load_balancing_loss_coef == pytest.approx(qwen.router_aux_loss_coef * c.router.top_k)
    c = MoEConfig.preset("gpt-oss")
    assert (c.hidden_size, c.intermediate_size, c.num_experts, c.router.top_k) == (
        oss.hidden_size, oss.intermediate_size, oss.num_local_experts, oss.num_experts_per_tok,
    )  # fmt: skip


def test_overrides_reach_the_router():
    c = MoEConfig.preset("deepseek-v3", num_experts=32, top_k=2, scale=1.0)
    assert (c.num_experts, c.router.top_k, c.router.scale, c.router.score) == (32, 2, 1.0, "sigmoid")
    assert MoEConfig.preset("mixtral", router=RouterConfig(top_k=1), order="pre").router == RouterConfig(1, order="pre")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (dict(hidden_size=0), "hidden_size"),
        (dict(intermediate_size=2.5), "intermediate_size"),
        (dict(num_experts=1), "top_k"),
        (dict(top_k=9), "top_k"),
        (dict(activation="swish"), "activation"),
        (dict(layout="gate_first"), "layout"),
        (dict(router=3), "router"),
        (dict(hidden=64), "hidden"),
        (dict(num_shared_experts=-1), "num_shared_experts"),
        (dict(shared_gated=True), "num_shared_experts=0"),
        (dict(shared_intermediate_size=0, num_shared_experts=1), "shared_intermediate_size"),
        (dict(z_loss_coef=-1.0), "z_loss_coef"),
        (dict(init_std=0.0), "init_std"),
        (dict(input_jitter=-0.1), "input_jitter"),
        (dict(sequence_balance_loss_coef=-1.0), "sequence_balance_loss_coef"),
        (dict(load_loss_coef=0.1), "noisy_topk"),
        (dict(learned_scale="each"), "learned_scale"),
        (dict(hash_vocab_size=-1), "hash_vocab_size"),
        (dict(router_norm_eps=-1.0), "router_norm_eps"),
        (dict(shared_activation="relu"), "num_shared_experts=0"),
        (dict(shared_activation="swish", num_shared_experts=1), "activation"),
        (dict(shared_logits=2, score="sigmoid"), "num_shared_experts=0"),
        (dict(shared_logits=2, score="sigmoid", num_shared_experts=2, shared_intermediate_size=33), "width of 33"),
    ],
)
def test_bad_configuration_is_named(overrides, named):
    with pytest.raises(ValueError, match=named):
        MoEConfig.preset("mixtral", **overrides)


def test_bad_preset_is_named():
    with pytest.raises(ValueError, match=r"known name, like .*llama4.*got .llama."):
        MoEConfig.preset("llama")


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize("name", PARTS)
def test_layer_equals_reference(name):
    """The fp32 layer, shared experts and all, against the fp64 layer over the references: output and gradients."""
    layer = small(name)
    oracle = copy.deepcopy(layer).double()
    x = torch.randn(3, 5, 64)
    direction = torch.randn(3, 5, 64)
    y, grads = run(layer, x, direction)
    with moesaic.use("reference"):
        y_ref, grads_ref = run(oracle, x.double(), direction.double())
    assert_close(y, y_ref, 64, STAGES["fused_experts"])
    for key, grad in grads.items():
        # the router's gradient is the rest of a cancellation where an expert was not chosen: judge it by its norm
        stages = 2 * STAGES["fused_experts_backward"]
        if key.startswith("gate."):
            assert error_report(grad, grads_ref[key]).norm <= bounds(grad.dtype, 2 * 64, stages)[0], key
        else:
            assert_close(grad, grads_ref[key], 2 * 64, stages, name=key)


def test_leading_dimensions_and_no_tokens():
    layer = small("mixtral")
    x = x_of(layer, 2, 3, 4)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(layer(x.reshape(24, 64)).view_as(y), y, rtol=0, atol=0)
    torch.testing.assert_close(layer(x[1, 2, 3]), y[1, 2, 3])
    empty = x_of(layer, 2, 0)
    out = layer(empty)
    assert out.shape == (2, 0, 64)
    (out.sum() + sum(layer.losses.values())).backward()
    assert layer.experts.down_proj.grad.abs().sum().item() == 0


def test_bad_input_is_named():
    layer = small("mixtral")
    with pytest.raises(ValueError, match=r"MoE: x must have shape \(\.\.\., H=64\), got \(2, 63\)"):
        layer(torch.randn(2, 63))
    with pytest.raises(ValueError, match=r"Router: x must have shape \(T, H=64\)"):
        layer.gate(torch.randn(2, 3, 64))
    with pytest.raises(ValueError, match=r"w_gate_up.*dtype|dtype.*w_gate_up|w_gate_up must have the dtype"):
        layer(torch.randn(2, 64, dtype=torch.bfloat16))


def test_initial_scale():
    """1/sqrt(fan in) by default, so that unit tokens give unit logits; `init_std` sets it outright; biases are zero."""
    config = MoEConfig.preset("gpt-oss", hidden_size=256, intermediate_size=128, num_experts=32)
    layer = MoE(config)
    assert layer.gate.weight.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert layer.experts.gate_up_proj.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert layer.experts.down_proj.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert all(p.abs().sum().item() == 0 for n, p in layer.named_parameters() if n.endswith("bias"))
    layer = MoE(replace(config, init_std=0.02))
    assert layer.experts.down_proj.std().item() == pytest.approx(0.02, rel=0.02)


# ---------------------------------------------------------------- parts of a layer, each against a loop by hand
def layer_of(seed: int = 0, **fields) -> MoE:
    """A small layer of a hand-made configuration; fields of `RouterConfig` too."""
    torch.manual_seed(seed)
    return MoE(MoEConfig(16, 12, 6, RouterConfig(top_k=2)).replace(**fields))


def expert(layer: MoE, e: int, v: torch.Tensor) -> torch.Tensor:
    gate, up = (layer.experts.gate_up_proj[e] @ v).chunk(2)
    return layer.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)


def close(y: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)


def test_experts_without_matrices():
    """Zero, identity and constant experts compete with the others and give nothing, the token, a learned vector."""
    layer = layer_of(zero_experts=2, identity_experts=3, constant_experts=2, top_k=4, routed_scale=1.5)
    x = torch.randn(40, 16, requires_grad=True)
    logits = x @ layer.gate.weight.T
    weights, ids = logits.softmax(-1).topk(4)
    weights = weights / weights.sum(-1, keepdim=True)
    rows = []
    for t in range(40):
        row = torch.zeros(16)
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            kind = [expert(layer, e, x[t]) if e < 6 else 0 * x[t] if e < 8 else x[t] if e < 11 else
                    layer.constants[e - 11]][0]  # fmt: skip
            row = row + 1.5 * w * kind
        rows.append(row)
    want, y = torch.stack(rows), layer(x)
    close(y, want)
    assert set(ids.flatten().tolist()) == set(range(13))
    direction = torch.randn(40, 16)
    parameters = [x, *layer.parameters()]
    grads = torch.autograd.grad((y * direction).sum(), parameters)
    for grad, ref in zip(grads, torch.autograd.grad((want * direction).sum(), parameters), strict=True):
        close(grad, ref)


def test_shared_experts_weighed_by_the_router():
    layer = layer_of(score="sigmoid", shared_logits=3, num_shared_experts=3, learned_scale="global", scale=2.0)
    with torch.no_grad():
        layer.gate.global_scale.fill_(1.7)
    x = torch.randn(10, 16)
    scores = (x @ layer.gate.weight.T).sigmoid()
    chosen, ids = scores[:, :6].topk(2)
    every = torch.cat((chosen, scores[:, 6:]), -1)
    every = 3.4 * every / every.sum(-1, keepdim=True)
    s = layer.shared_experts
    for t, y in enumerate(layer(x)):
        want = sum(every[t, k] * expert(layer, ids[t, k], x[t]) for k in range(2))
        for n in range(3):
            part = slice(12 * n, 12 * n + 12)
            hidden = torch.nn.functional.silu(s.gate_proj.weight[part] @ x[t]) * (s.up_proj.weight[part] @ x[t])
            want = want + every[t, 2 + n] * (s.down_proj.weight[:, part] @ hidden)
        close(y, want)


@pytest.mark.parametrize("top_k", [1, 3])
def test_weights_on_the_input(top_k):
    layer = layer_of(top_k=top_k, order="post", score="sigmoid", weight_on_input=True)
    x = torch.randn(10, 16)
    best, ids = (x @ layer.gate.weight.T).topk(top_k)
    y = layer(x, token_mask=torch.arange(10) != 4)
    assert not y[4].any()
    for t in (t for t in range(10) if t != 4):
        close(y[t], sum(expert(layer, ids[t, k], best[t, k].sigmoid() * x[t]) for k in range(top_k)))


# fields, and whether the shared output goes in as a residual: not where something is applied to the routed sum alone
SHARED = {
    "plain": (dict(), True),
    "gated": (dict(shared_gated=True), True),
    "weighed": (dict(score="sigmoid", shared_logits=2, num_shared_experts=2), True),
    "beside experts without matrices": (dict(zero_experts=1, identity_experts=2, constant_experts=2, top_k=4), True),
    "input, one choice": (dict(weight_on_input=True, top_k=1, order="post", score="sigmoid"), True),
    "input, three choices": (dict(weight_on_input=True, top_k=3, order="post", score="sigmoid"), True),
    "routed scale": (dict(routed_scale=2.5), False),
    "routed scale beside experts without matrices": (dict(routed_scale=2.5, identity_experts=3, top_k=4), False),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_output_is_the_residual_of_the_routed_ones(name, monkeypatch):
    fields, inside = SHARED[name]
    layer = layer_of(**{"num_shared_experts": 1, **fields}).double()
    x, direction = torch.randn(3, 7, 16).double(), torch.randn(3, 7, 16).double()
    routed = copy.deepcopy(layer)
    routed.shared_experts = None  # the same routing and the same routed sum, and nothing added

    def by_hand(x):
        y, tokens = routed(x), x.reshape(-1, 16)
        shared = layer.shared_experts(tokens, layer.gate(tokens).shared_weights)
        if layer.shared_expert_gate is not None:
            shared = torch.sigmoid(layer.shared_expert_gate(tokens)) * shared
        return y + shared.view(x.shape)

    given, operator = [], nn_modules.fused_experts

    def recorded(*args, residual=None, **options):
        given.append(residual)
        return operator(*args, residual=residual, **options)

    monkeypatch.setattr(nn_modules, "fused_experts", recorded)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    y, want = layer(leaf), by_hand(other)
    assert [r is not None for r in given] == [inside, False]
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-13)
    assert layer.shared_experts(x).abs().max() > 0.1  # it matters
    parameters = list(layer.shared_experts.parameters())
    got = torch.autograd.grad((y * direction).sum(), [leaf, *parameters])
    for a, b in zip(got, torch.autograd.grad((want * direction).sum(), [other, *parameters]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_shared_activation():
    layer = layer_of(num_shared_experts=1, activation="swiglu_clamped", shared_activation="relu2")
    assert not hasattr(layer.shared_experts, "gate_proj")
    x = torch.randn(5, 16)
    hidden = (x @ layer.shared_experts.up_proj.weight.T).relu().square()
    close(layer(x) - layer.experts(x, layer.gate(x)), hidden @ layer.shared_experts.down_proj.weight.T)
    assert sum(p.numel() for p in layer.parameters()) == layer.config.num_parameters


def test_norm_and_scales_of_the_router():
    layer = layer_of(router_norm_eps=1e-3, learned_scale="per_expert")
    with torch.no_grad():
        layer.gate.scale.uniform_(0.5, 1.5)
        layer.gate.per_expert_scale.uniform_(0.5, 1.5)
    x = torch.randn(10, 16)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.gate.scale / 4
    weights, ids = (normed @ layer.gate.weight.T).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True) * layer.gate.per_expert_scale[ids]
    routing = layer.gate(x)
    assert torch.equal(routing.topk_ids.long(), ids)
    close(routing.topk_weights, weights)


# ---------------------------------------------------------------- choices from elsewhere
def test_token_ids_choose():
    layer = layer_of(hash_vocab_size=50, score="sqrt_softplus")
    table = layer.gate.tid2eid
    assert bool((table[:, 0] != table[:, 1]).all()) and table.flatten().bincount(minlength=6).min() >= 16
    x, tokens = torch.randn(2, 7, 16), torch.randint(50, (2, 7))
    layer(x, input_ids=tokens)
    assert torch.equal(layer.routing.topk_ids.long().view(2, 7, 2), table[tokens])
    with pytest.raises(ValueError, match="Router: input_ids must be given"):
        layer(x)
    assert "gate.tid2eid" in layer.state_dict()


def test_replay():
    """The same ids at another time: the same output where the weights are the same, and gradients flow."""
    layer = layer_of(noise="gaussian", noise_std=3.0)
    x = torch.randn(2, 9, 16)
    y = layer(x)
    ids = layer.routing.topk_ids
    assert torch.equal(layer(x, ids=ids.view(2, 9, 2)), y)
    layer(x)
    assert not torch.equal(layer.routing.topk_ids, ids)
    layer(x, ids=ids).sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0


def test_masks_have_the_leading_dimensions():
    layer = layer_of(num_shared_experts=1)
    x, mask = torch.randn(2, 9, 16), torch.rand(2, 9) < 0.5
    y = layer(x, token_mask=mask)
    close(y[mask], layer(x[mask]))
    close(y[~mask], layer.shared_experts(x[~mask]))
    experts = torch.rand(2, 9, 6) < 0.8
    experts[..., :2] = True
    layer(x, expert_mask=experts)
    assert bool(experts.view(18, 6).gather(1, layer.routing.topk_ids.long()).all())
    layer(x, expert_mask=torch.tensor([True, False, True, False, False, False]))
    assert layer.routing.tokens_per_expert.tolist() == [18, 0, 18, 0, 0, 0]


def test_a_router_of_ones_own():
    class Recurrent(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.inner = config, nn.Linear(16, 6)

        def forward(self, x, *, state, **_):
            return route(torch.tanh(self.inner(x)) + state, self.config.router)

    layer = layer_of(load_balancing_loss_coef=0.1)
    layer.gate = Recurrent(layer.config)
    x, state = torch.randn(4, 16), torch.randn(4, 6)
    y = layer(x, state=state)
    close(y, layer.experts(x, layer.gate(x, state=state)))
    assert layer.losses.keys() == {"load_balancing_loss"}


# ---------------------------------------------------------------- training and evaluation
def test_capacity_by_mode():
    """The factor in force is that of the mode; what it drops shows in the routing."""
    layer = layer_of(top_k=1, capacity_factor=1.0, eval_capacity_factor=1.2)
    x = torch.randn(60, 16)
    kept = {}
    for training in (True, False):
        layer.train(training)
        layer(x)
        kept[training] = layer.routing
        assert int(layer.routing.tokens_per_expert.max()) == layer.routing.capacity == (10 if training else 12)
        dropped = layer.routing.topk_ids < 0
        assert int(dropped.sum()) == 60 - int(layer.routing.tokens_per_expert.sum())
    assert kept[True].tokens_per_expert.sum() < kept[False].tokens_per_expert.sum()
    assert (layer.train()(x)[kept[True].topk_ids[:, 0] < 0] == 0).all()


def test_losses_count_what_was_dropped_also_without_gradient():
    """Reentrant checkpointing makes its first forward without gradient; the losses of both are the same."""
    layer = layer_of(load_balancing_loss_coef=1.0, capacity_factor=0.5)
    x = torch.randn(30, 16)
    layer(x)
    loss = layer.losses["load_balancing_loss"]
    with torch.no_grad():
        layer(x)
    torch.testing.assert_close(layer.losses["load_balancing_loss"], loss.detach())
    assert layer.routing.choices.sum() == 60 > layer.routing.tokens_per_expert.sum()
    assert layer.routing.probability_sums.grad_fn is None


def test_sequence_balance_loss():
    layer = layer_of(sequence_balance_loss_coef=0.5, load_balancing_loss_coef=0.25)
    x = torch.randn(3, 8, 16)
    layer(x)
    routing = layer.gate(x.view(24, 16), sequences=3)
    torch.testing.assert_close(layer.losses["sequence_balance_loss"], 0.5 * moesaic.sequence_balance_loss(routing))
    torch.testing.assert_close(layer.losses["load_balancing_loss"], 0.25 * moesaic.load_balancing_loss(routing))
    layer(x.view(24, 16), sequences=3)
    torch.testing.assert_close(layer.losses["sequence_balance_loss"], 0.5 * moesaic.sequence_balance_loss(routing))
    layer(x[:0])
    assert layer.losses["sequence_balance_loss"] == 0


def test_noise_is_learned():
    """Noisy top-k: the second map gets gradient through the load loss, and through weights if noise is in them."""
    x = torch.randn(30, 16)
    for fields in (dict(load_loss_coef=0.1, importance_loss_coef=0.2), dict(noise_in_weights=True)):
        layer = layer_of(noise="noisy_topk", **fields)
        assert not layer.gate.noise_weight.any()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        (layer(x).square().mean() + sum(layer.losses.values())).backward()
        optimizer.step()
        assert layer.gate.noise_weight.any()
        layer.eval()
        assert torch.equal(layer(x), layer(x))
    layer = layer_of(noise="noisy_topk", load_loss_coef=0.1, importance_loss_coef=0.2)
    layer(x, generator=5)
    routing = routing_of(layer.gate(x, generator=5))
    torch.testing.assert_close(layer.losses["load_loss"], 0.1 * moesaic.load_loss(routing))
    torch.testing.assert_close(layer.losses["importance_loss"], 0.2 * moesaic.importance_loss(routing))


def test_jitter_is_of_training():
    layer = layer_of(input_jitter=0.3)
    x = torch.randn(30, 16)
    plain = x @ layer.gate.weight.T
    first, again = layer.gate(x, generator=5).logits, layer.gate(x, generator=5).logits
    assert torch.equal(first, again) and not torch.equal(first, layer.gate(x, generator=6).logits)
    assert 0 < (first - plain).abs().max() <= 0.3 * (x.abs() @ layer.gate.weight.abs().T).max()
    close(layer.eval().gate(x).logits, plain)


NOISY = {
    "gaussian": dict(noise="gaussian", noise_in_weights=True),
    "noisy_topk": dict(noise="noisy_topk", noise_in_weights=True, load_balancing_loss_coef=0.1),
    "jitter": dict(noise="jitter", noise_std=0.4, expert_sampling=0.7, input_jitter=0.2),
    "sparsemixer": dict(policy="sparsemixer", order="pre", noise_std=0.2),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seeded", [False, True], ids=["torch's generator", "an int"])
@pytest.mark.parametrize("name", NOISY)
def test_checkpointing_with_noise(name, seeded, reentrant):
    layer = layer_of(**NOISY[name])
    x, direction = torch.randn(24, 16), torch.randn(24, 16)

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        layer.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()

        def forward(leaf):
            return layer(leaf, generator=3 if seeded else None)

        y = checkpoint(forward, leaf, use_reentrant=reentrant) if checkpointed else forward(leaf)
        (y * direction).sum().backward()
        return {"x": leaf.grad, **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for key, grad in plain.items():
        assert torch.equal(grad, checkpointed[key]), key


COMPILED = {
    "capacity": dict(capacity_factor=0.8, drop_policy="probability", renorm_after_drop=True, z_loss_coef=0.1),
    "first choices first": dict(capacity_factor=0.8, drop_policy="choice", sequence_balance_loss_coef=0.1),
    "without matrices": dict(zero_experts=1, identity_experts=1, constant_experts=1, top_k=3),
    "shared": dict(score="sigmoid", shared_logits=2, num_shared_experts=2, learned_scale="global"),
    "on the input": dict(order="post", score="sigmoid", weight_on_input=True, routed_scale=2.0),
    "normed": dict(router_norm_eps=1e-6, learned_scale="per_expert"),
    "table": dict(hash_vocab_size=30),
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_parts(name, masked):
    layer = layer_of(**COMPILED[name])
    x, direction = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    given: dict[str, torch.Tensor] = {"token_mask": torch.rand(2, 9) < 0.6} if masked else {}
    if layer.config.hash_vocab_size:
        given["input_ids"] = torch.randint(30, (2, 9))
    torch._dynamo.reset()
    results = []
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        y = module(leaf, **given)
        ((y * direction).sum() + sum(layer.losses.values())).backward()
        losses = torch.tensor([v.item() for v in layer.losses.values()])
        results.append((y.detach(), losses, leaf.grad, *(p.grad for p in layer.parameters())))
    for compiled, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-6, atol=2e-6)


# ---------------------------------------------------------------- losses
def test_losses_are_weighted_and_only_in_training():
    layer = small("olmoe", load_balancing_loss_coef=0.5, z_loss_coef=0.25)
    x = x_of(layer, 7)
    layer(x)
    routing = layer.gate(x)
    expected = {
        "load_balancing_loss": 0.5 * moesaic.load_balancing_loss(routing),
        "z_loss": 0.25 * moesaic.z_loss(routing),
    }
    assert layer.losses.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(layer.losses[name], loss)
    sum(layer.losses.values()).backward()
    assert float(layer.gate.weight.grad.abs().sum()) > 0
    layer.eval()
    layer(x)
    assert layer.losses == {}
    assert small("deepseek-v3").losses == {}


def test_routing_is_kept_without_a_graph():
    layer = small("qwen3-moe")
    layer(x_of(layer, 6))
    kept = layer.routing
    assert kept.topk_ids.shape == (6, 8) and kept.logits is None and kept.topk_weights.grad_fn is None


def test_training_lowers_the_loss_and_balances():
    """Tokens that share a strong mean send a fresh router to few experts; the balance loss spreads them."""

    def train(coefficient: float) -> tuple[float, float, float]:
        torch.manual_seed(0)
        layer = MoE(
            MoEConfig(
                hidden_size=16, intermediate_size=16, num_experts=8, router=RouterConfig(top_k=2),
                load_balancing_loss_coef=coefficient,
            )
        )  # fmt: skip
        x = torch.randn(256, 16) + 2 * torch.randn(16)
        target = torch.sin(x @ torch.randn(16, 16) / 4)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        history = []
        for _ in range(60):
            loss = (layer(x) - target).square().mean()
            history.append(loss.item())
            optimizer.zero_grad()
            (loss + sum(layer.losses.values())).backward()
            optimizer.step()
        load = layer.routing.tokens_per_expert.float()
        return history[0], history[-1], float(load.max() / load.mean())

    first, last, imbalance = train(0.1)
    assert last < 0.5 * first
    assert imbalance < 1.5 < train(0.0)[2]


# ---------------------------------------------------------------- state dict
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("names", ["llama", "mixtral"])
def test_per_expert_round_trip(name, names):
    layer, other = small(name), MoE(MoEConfig.preset(name, **SMALL))
    saved = split_experts(layer.state_dict(), layer.config, names=names)
    assert "experts.gate_up_proj" not in saved and len(saved) > 3 * SMALL["num_experts"]
    keys = set(saved)
    other.load_state_dict(saved)
    assert set(saved) == keys, "the caller's dict must not change"
    for key, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_merged_round_trip_in_a_model():
    model = nn.ModuleDict({"layers": nn.ModuleList([small("deepseek-v3"), small("gpt-oss")])})
    other = copy.deepcopy(model)
    for p in other.parameters():
        nn.init.zeros_(p)
    split = model.state_dict()
    for i, layer in enumerate(model["layers"]):
        split = split_experts(split, layer.config, prefix=f"layers.{i}.experts.")
    other.load_state_dict(split)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_layout_of_gate_and_up():
    """Gate and up stand where the layout says: set one expert's tensors by hand, in each of the four layouts."""
    gate, up, down = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 3)
    for layout in ("concatenated", "interleaved"):
        for transposed in (False, True):
            config = MoEConfig(4, 3, 1, RouterConfig(top_k=1), layout=layout, transposed=transposed)
            experts = Experts(config)
            experts.load_state_dict({"0.gate_proj.weight": gate, "0.up_proj.weight": up, "0.down_proj.weight": down})
            first = experts.gate_up_proj[0].T if transposed else experts.gate_up_proj[0]
            rows = (first[:3], first[3:]) if layout == "concatenated" else (first[0::2], first[1::2])
            assert torch.equal(rows[0], gate) and torch.equal(rows[1], up)
            assert torch.equal(experts.down_proj[0].T if transposed else experts.down_proj[0], down)


def test_activation_without_gate():
    config = MoEConfig(8, 6, 4, RouterConfig(top_k=2), activation="relu2", num_shared_experts=1)
    layer = MoE(config)
    assert sorted(layer.state_dict()) == [
        "experts.down_proj", "experts.up_proj", "gate.weight", "shared_experts.down_proj.weight",
        "shared_experts.up_proj.weight",
    ]  # fmt: skip
    other = MoE(config)
    other.load_state_dict(split_experts(layer.state_dict(), config))
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), other(x))


def faulty(saved: dict, fault: str) -> dict:
    first = saved["experts.0.gate_proj.weight"]
    if fault == "an expert is missing":
        return {k: v for k, v in saved.items() if not k.startswith("experts.5.")}
    if fault == "one tensor is missing":
        return {k: v for k, v in saved.items() if k != "experts.5.up_proj.weight"}
    if fault == "too many experts":
        return {**saved, "experts.16.gate_proj.weight": first}
    if fault == "both layouts":
        return {**saved, "experts.gate_up_proj": torch.zeros(16, 96, 64)}
    if fault == "both names":
        return {**saved, "experts.5.w1.weight": first}
    if fault == "wrong shape":
        return {**saved, "experts.5.gate_proj.weight": first.T}
    if fault == "router's shape":
        return {**saved, "gate.weight": saved["gate.weight"][:8]}
    if fault == "router twice":
        return {**saved, "router.weight": saved["gate.weight"]}
    return {**saved, "experts.5.gate_proj.bias": torch.zeros(48)}


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("an expert is missing", r"missing for experts \[5\]"),
        ("one tensor is missing", r"missing for experts \[5\], first the up weight"),
        ("too many experts", r"16 experts.*gate weight of expert 16"),
        ("both layouts", r"experts.gate_up_proj beside experts\.0"),
        ("both names", r"expert 5 must have one gate weight"),
        ("wrong shape", r"gate weight of expert 5 must have shape \(48, 64\), got \(64, 48\)"),
        ("router's shape", r"gate.weight must have shape \(16, 64\), got \(8, 64\)"),
        ("router twice", r"router.weight beside gate.weight"),
        ("bias without place", r"gate bias of expert 5"),
    ],
)
def test_a_faulty_checkpoint_is_named_and_writes_nothing(fault, named):
    layer = small("qwen3-moe")
    before = copy.deepcopy(layer.state_dict())
    saved = {k: v + 1 for k, v in split_experts(before, layer.config).items()}
    with pytest.raises(ValueError, match=named):
        layer.load_state_dict(faulty(saved, fault))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_names_of_other_models():
    """What others call the router's tensors, by itself and in a layer; ERNIE's bias has a dimension more."""
    router = Router(MoEConfig.preset("deepseek-v3", **SMALL))
    weight, bias = torch.randn(16, 64), torch.randn(16)
    for name in ("wg.weight", "layer.weight", "classifier.weight", "proj.weight", "gate.weight"):
        router.load_state_dict({name: weight, "moe_statics.e_score_correction_bias": bias[None]})
        assert torch.equal(router.weight, weight) and torch.equal(router.e_score_correction_bias, bias)
    layer = small("deepseek-v3")
    saved = layer.state_dict()
    theirs = {k.replace("gate.weight", "router.gate.weight").replace("shared_experts", "shared_mlp"): v + 1
              for k, v in saved.items()}  # fmt: skip
    theirs["expert_bias"] = theirs.pop("gate.e_score_correction_bias")
    other = MoE(layer.config)
    other.load_state_dict(theirs)
    for key, value in saved.items():
        assert torch.equal(other.state_dict()[key], value + 1), key
    with pytest.raises(ValueError, match=r"expert_bias beside gate\.e_score_correction_bias"):
        other.load_state_dict({**theirs, "gate.e_score_correction_bias": bias})


def test_strict_false_skips_names_but_not_halves():
    layer = small("qwen3-moe")
    saved = split_experts(layer.state_dict(), layer.config)
    with pytest.raises(RuntimeError, match=r"Missing key.*gate\.weight"):
        layer.load_state_dict({k: v for k, v in saved.items() if k != "gate.weight"})
    result = layer.load_state_dict({k: v for k, v in saved.items() if k.startswith("experts")}, strict=False)
    assert result.missing_keys == ["gate.weight"]
    with pytest.raises(ValueError, match="missing for experts"):
        layer.load_state_dict(faulty(saved, "an expert is missing"), strict=False)
    with pytest.raises(ValueError, match="prefix"):
        split_experts(layer.state_dict(), layer.config, prefix="mlp.experts.")


# ---------------------------------------------------------------- Hugging Face
BLOCKS = {  # preset: model type, its configuration, the module, our overrides
    "mixtral": ("mixtral", dict(intermediate_size=48, num_local_experts=16), "MixtralSparseMoeBlock", {}),
    "deepseek-v3": (
        "deepseek_v3",
        dict(moe_intermediate_size=48, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2),
        "DeepseekV3MoE", dict(num_groups=4, topk_groups=2, top_k=4),
    ),
    "qwen2-moe": (
        "qwen2_moe", dict(moe_intermediate_size=48, num_experts=16, shared_expert_intermediate_size=80),
        "Qwen2MoeSparseMoeBlock", dict(shared_intermediate_size=80),
    ),
    "qwen3-moe": (
        "qwen3_moe", dict(moe_intermediate_size=48, num_experts=16, norm_topk_prob=True), "Qwen3MoeSparseMoeBlock", {},
    ),
    "olmoe": ("olmoe", dict(intermediate_size=48, num_experts=16), "OlmoeSparseMoeBlock", {}),
    "gpt-oss": ("gpt_oss", dict(intermediate_size=48, num_local_experts=16), "GptOssMLP", {}),
}  # fmt: skip


def hf_block(name: str) -> tuple[nn.Module, MoE]:
    """A transformers block with random weights, and our layer with the same."""
    transformers = pytest.importorskip("transformers")
    model_type, fields, block_class, overrides = BLOCKS[name]
    config = transformers.AutoConfig.for_model(model_type, hidden_size=64, **fields)
    config._experts_implementation = "eager"
    module = __import__(f"transformers.models.{model_type}.modeling_{model_type}", fromlist=[block_class])
    torch.manual_seed(0)
    block = getattr(module, block_class)(config)
    with torch.no_grad():
        for t in (*block.parameters(), *block.buffers()):
            t.normal_(0, 0.2)
    layer = MoE(MoEConfig.preset(name, **{**SMALL, **overrides}))
    layer.load_state_dict(block.state_dict())
    return block, layer


@pytest.mark.parametrize("name", BLOCKS)
def test_hugging_face_block(name):
    """Its weights load as they are and give its output and gradients."""
    block, layer = hf_block(name)
    x, direction = torch.randn(2, 13, 64), torch.randn(2, 13, 64)
    (y, grads), (y_ref, grads_ref) = run(layer, x, direction), run(block, x, direction)
    assert relative(y, y_ref) <= 2e-6
    renamed = {
        k.replace("router.", "gate.").replace("shared_expert.", "shared_experts."): g for k, g in grads_ref.items()
    }
    assert grads.keys() == renamed.keys()
    for key, grad in grads.items():
        assert relative(grad, renamed[key]) <= 2e-6, key


@pytest.mark.parametrize(
    ("model_type", "preset", "fields", "where"),
    [
        ("mixtral", "mixtral", dict(intermediate_size=48, num_local_experts=8), "block_sparse_moe"),
        ("qwen3_moe", "qwen3-moe", dict(moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2, head_dim=16,
                                        norm_topk_prob=True), "mlp"),
    ],
)  # fmt: skip
def test_saved_checkpoint(tmp_path, model_type, preset, fields, where):
    """A layer reads its part of a checkpoint as transformers writes it: one tensor an expert, the model's names."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **fields,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model.save_pretrained(tmp_path)
    prefix = f"model.layers.0.{where}."
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    layer = MoE(MoEConfig.preset(preset, **{**SMALL, "num_experts": 8}, top_k=2))
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
    x = torch.randn(1, 9, 64)
    assert relative(layer(x), model.model.layers[0].mlp(x)) <= 2e-6
    if where == "block_sparse_moe":
        again = split_experts(layer.state_dict(), layer.config, names="mixtral")
        assert {prefix + k for k in again} == {k for k in saved if k.startswith(prefix)}


# ---------------------------------------------------------------- torch
@pytest.mark.parametrize("name", ["deepseek-v3", "qwen2-moe", "olmoe", "gpt-oss"])
def test_compile_fullgraph(name):
    layer = small(name)
    x, direction = torch.randn(2, 9, 64), torch.randn(2, 9, 64)
    y, grads = run(layer, x, direction)
    losses = {k: v.item() for k, v in layer.losses.items()}
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y_compiled, grads_compiled = run(compiled, x, direction)
    assert relative(y_compiled, y) <= 2e-6
    for key, grad in grads.items():
        assert relative(grads_compiled[key if key == "x" else f"_orig_mod.{key}"], grad) <= 2e-6, key
    assert {k: v.item() for k, v in layer.losses.items()} == pytest.approx(losses)


def test_autocast_keeps_the_router_in_fp32():
    layer = small("qwen3-moe", num_shared_experts=1)
    x = x_of(layer, 33)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    routing = layer.gate(x.detach())
    assert y.dtype == torch.bfloat16
    assert torch.equal(layer.routing.topk_ids, routing.topk_ids)
    assert torch.equal(layer.routing.topk_weights, routing.topk_weights)
    (y.float().sum() + sum(layer.losses.values())).backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_low_precision_layer():
    layer = MoE(MoEConfig.preset("deepseek-v3", **SMALL), dtype=torch.bfloat16)
    assert layer.gate.weight.dtype == torch.bfloat16 and layer.gate.e_score_correction_bias.dtype == torch.float32
    x = x_of(layer, 4, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.routing.topk_weights.dtype == torch.float32
    oracle = copy.deepcopy(layer).double()
    oracle_routing = oracle.gate(x.detach().double())
    assert torch.equal(oracle_routing.topk_ids, layer.routing.topk_ids)
    assert_close(y, oracle(x.detach().double()), 64, STAGES["fused_experts"] + 4)  # shared experts: 4 more roundings


def test_activation_checkpointing():
    layer = small("olmoe", load_balancing_loss_coef=0.1)
    x, direction = torch.randn(12, 64), torch.randn(12, 64)

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        layer.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=False) if checkpointed else layer(leaf)
        ((y * direction).sum() + sum(layer.losses.values())).backward()
        return {"x": leaf.grad, **{n: p.grad for n, p in layer.named_parameters()}}

    plain, checkpointed = gradients(False), gradients(True)
    for key, grad in plain.items():
        assert torch.equal(grad, checkpointed[key]), key


def test_meta_device():
    layer = small("gpt-oss")
    with torch.device("meta"):
        empty = MoE(layer.config)
    assert all(p.is_meta for p in empty.parameters())
    x = torch.randn(3, 64)
    empty.load_state_dict(split_experts(layer.state_dict(), layer.config), assign=True)
    assert torch.equal(empty(x), layer(x))
    fresh = MoE(layer.config, device="meta").to_empty(device="cpu")
    fresh.reset_parameters()
    assert torch.isfinite(fresh(x)).all()
    assert MoE(layer.config, device="meta")(torch.randn(3, 64, device="meta")).shape == (3, 64)


def test_meta_device_of_every_part():
    config = layer_of(
        identity_experts=1, constant_experts=2, noise="noisy_topk", load_loss_coef=0.1,
        router_norm_eps=1e-6, learned_scale="per_expert",
        selection_bias=True, router_bias=True, hash_vocab_size=9, num_shared_experts=1, shared_gated=True,
    ).config  # fmt: skip
    layer = MoE(config, device="meta")
    x = torch.randn(3, 16, device="meta")
    assert layer(x, input_ids=torch.zeros(3, dtype=torch.long, device="meta")).shape == (3, 16)
    assert sum(p.numel() for p in layer.parameters()) == config.num_parameters
    layer = layer.to_empty(device="cpu")
    for t in (*layer.parameters(), *layer.buffers()):
        t.data.fill_(77)
    layer.reset_parameters()
    assert all(bool((t != 77).all()) for t in (*layer.parameters(), *layer.buffers()))
    for kept in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(kept.state_dict(), layer.state_dict())


def test_copy_and_pickle_after_a_forward():
    """What a forward leaves on the layer holds a graph, which can be neither copied nor pickled: it stays behind."""
    layer = small("olmoe", num_shared_experts=1)
    x = torch.randn(3, 64)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.losses == {} and other.routing is None
        assert torch.equal(other(x), y)
    assert layer.losses


def test_shows_its_configuration():
    text = repr(small("gpt-oss"))
    assert "16 x (64 -> 48 -> 64), activation='swiglu_oai', interleaved, transposed, bias" in text
    assert "top_k=4" in repr(Router(small("gpt-oss").config))
