"""What a newcomer gets wrong in the first minutes: said in one form, with the nearest name; what should just work."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

import moesaic
from moesaic import ACTIVATIONS, RouterConfig, fused_experts, route
from moesaic.nn import MoE, MoEConfig

SMALL = dict(hidden_size=32, intermediate_size=16, num_experts=8)
LOGITS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def layer_of(**fields):
    return MoE("qwen3-moe", **SMALL, top_k=2, **fields)


X, UP, DOWN, OWN = torch.ones(3, 8), torch.ones(4, 8, 8), torch.ones(4, 8, 4), ACTIVATIONS["swiglu"]
MISTAKES = {
    "config by position": (lambda: route(LOGITS, 2), r"config must be a RouterConfig, got 2; write .*top_k"),
    "no top_k": (lambda: route(LOGITS), "top_k must be given"),
    "logits in a list": (lambda: route([1.0, 2.0], top_k=1), "router_logits must be a tensor, got list"),
    "router's field": (lambda: MoEConfig(top_k=2), r"router=RouterConfig\(top_k=\.\.\.\)"),
    "no sizes": (lambda: MoEConfig(), "hidden_size must be an integer of at least 1, got 0"),
    "preset's typo": (lambda: MoE("qwen3-mo"), "like 'qwen3-moe'.*got 'qwen3-mo'"),
    "no preset": (lambda: MoE(3), "config must be a MoEConfig or a preset's name, got 3"),
    "field's typo": (lambda: MoEConfig.preset("mixtral", top_j=3), "like 'top_k'.*got 'top_j'"),
    "groups of a shrunk preset": (
        lambda: MoEConfig.preset("deepseek-v3", num_experts=8, num_groups=4, topk_groups=2),
        "top_k must be between 1 and the 4 experts.*2 of num_groups=4 groups of 2 stay",
    ),
    "weights in a list": (
        lambda: fused_experts(X, [UP[0]], DOWN, route(LOGITS, top_k=2)),
        "w_gate_up must be a tensor, got list; stack them",
    ),
    "routing": (lambda: fused_experts(X, UP, DOWN, LOGITS), "routing must be a Routing, got Tensor"),
    "negative limit": (lambda: OWN.with_constants(limit=-1), "limit must be positive"),
    "NaN": (lambda: OWN.with_constants(alpha=float("nan")), "alpha finite"),
    "noise that learns nothing": (
        lambda: MoEConfig.preset("mixtral", noise="noisy_topk"),
        "set load_loss_coef, or noise_in_weights=True",
    ),
    "an activation's typo": (
        lambda: fused_experts(X, UP, DOWN, route(LOGITS, top_k=2), activation="swigl"),
        "did you mean 'swiglu'",
    ),
    "another function under a known name": (
        lambda: fused_experts(X, UP, DOWN, route(LOGITS, top_k=2), activation=replace(OWN, forward=lambda *a: a[0])),
        "activation must be an entry of ACTIVATIONS.*'swiglu' of your own",
    ),
    "a new name that is not in the table": (
        lambda: layer_of(activation=replace(OWN, name="mine")),
        "activation must be an entry of ACTIVATIONS.*'mine' of your own",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_said(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_entry_of_your_own_works_everywhere():
    name = "swiglu_halved"
    mine = replace(OWN, name=name, forward=lambda g, u, a, b: OWN.forward(g, u, a, b) / 2,
                   backward=lambda g, u, d, a, b: OWN.backward(g, u, d / 2, a, b))  # fmt: skip
    ACTIVATIONS[name] = mine
    try:
        routing = route(LOGITS, top_k=2)
        for implementation in ("torch", "reference"):
            y = fused_experts(X, UP, DOWN, routing, activation=name, implementation=implementation)
            torch.testing.assert_close(y, fused_experts(X, UP, DOWN, routing) / 2)
    finally:
        del ACTIVATIONS[name]


def test_a_preset_by_name_is_a_layer():
    torch.manual_seed(0)
    layer = layer_of(activation="geglu")
    assert layer.config == MoEConfig.preset("qwen3-moe", **SMALL, top_k=2, activation="geglu")
    assert layer(torch.randn(5, 32)).shape == (5, 32)


def test_a_changed_config_takes_effect_or_is_refused():
    torch.manual_seed(0)
    layer, x = layer_of(), torch.randn(5, 32)
    layer.config = layer.config.replace(top_k=4, scale=2.0)
    assert layer.gate.config is layer.experts.config is layer.config
    other = MoE(layer.config)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x)) and layer.routing.topk_ids.shape == (5, 4)
    before = layer.config
    with pytest.raises(ValueError, match=r"experts.down_proj is \(4, 32, 16\), not \(8, 32, 16\)"):
        layer.config = before.replace(num_experts=4)
    with pytest.raises(ValueError, match=r"e_score_correction_bias is \(8,\), not absent"):
        layer.config = before.replace(selection_bias=True)
    assert layer.config is before
    copy = pickle.loads(pickle.dumps(layer))
    assert copy.config == before and torch.equal(copy(x), layer(x))


def test_configurations_print_what_differs():
    assert repr(RouterConfig(2, "sigmoid", scale=2.5)) == "RouterConfig(top_k=2, score='sigmoid', scale=2.5)"
    assert eval(repr(RouterConfig(2, num_groups=4))) == RouterConfig(2, num_groups=4)
    again = pickle.loads(pickle.dumps(RouterConfig(2)))
    assert again == RouterConfig(2) and hash(again) == hash(RouterConfig(2))


def test_the_dtype_under_autocast_is_autocasts():
    layer = MoE("longcat-flash", **SMALL, top_k=3, identity_experts=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(6, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2_moe", "qwen3_next", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "afmoe"]
)
def test_a_layer_from_a_models_configuration(kind):
    transformers = pytest.importorskip("transformers")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    theirs = transformers.CONFIG_MAPPING[kind](hidden_size=64, num_experts_per_tok=3)
    ours = MoEConfig.from_hf(theirs, num_experts=8, num_groups=1, topk_groups=1)
    preset = MoEConfig.preset(kind)
    assert (ours.hidden_size, ours.num_experts, ours.router.top_k) == (64, 8, 3)
    assert (ours.router.score, ours.router.order, ours.router.scale) == (
        preset.router.score, preset.router.order, preset.router.scale
    )  # fmt: skip
    assert ours.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert MoE(ours)(torch.randn(2, 64)).shape == (2, 64)


def test_a_model_without_a_preset_is_said():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"MoEConfig\.preset: name must be a known name.*got 'llama'"):
        MoEConfig.from_hf(transformers.LlamaConfig())


def test_noise_in_the_weights_trains_its_map():
    torch.manual_seed(0)
    layer = layer_of(noise="noisy_topk", noise_in_weights=True).train()
    layer(torch.randn(6, 32)).square().sum().backward()
    assert layer.gate.noise_weight.grad.abs().sum() > 0


def test_unsupported_says_the_reason_first():
    with pytest.raises(moesaic.Unsupported, match=r"^route: implementation 'triton' cannot run: needs a GPU"):
        route(LOGITS, top_k=2, implementation="triton")
