"""Every preset against its model in transformers: the router's choice, weights and gradients; many layers whole."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic import Routing, route
from moesaic.nn import PRESETS, Experts, MoE, MoEConfig, Router, SharedExperts

transformers = pytest.importorskip("transformers")

H, T = 64, 64
Chosen = tuple[Tensor, Tensor]  # ids (T, K), weights (T, K)


# ---------------------------------------------------------------- how to ask their routers
def plain(gate: nn.Module, x: Tensor, given: dict[str, Tensor]) -> Chosen:
    _, weights, ids, *rest = gate(x, *given.values())
    if rest:
        given["shared weights"] = rest[0]
    return ids, weights


def in_sequences(gate: nn.Module, x: Tensor, given: dict[str, Tensor]) -> Chosen:
    return plain(gate, x[None], given)


def dense(gate: nn.Module, x: Tensor, given: dict[str, Tensor]) -> Chosen:
    """Llama 4: the scores of all experts, 0 for those not chosen."""
    scores, logits = gate(x)
    ids = logits.topk(gate.top_k, -1).indices
    assert torch.equal(scores != 0, torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True))
    return ids, scores.gather(1, ids)


def sorted_rows(gate: nn.Module, x: Tensor, given: dict[str, Tensor]) -> Chosen:
    """JetMoE: slots and weights of the rows, sorted by expert."""
    slots, _, weights, counts, _ = gate(x)
    experts = torch.arange(gate.num_experts).repeat_interleave(torch.tensor(counts))
    place = slots.argsort()
    return experts[place].view(-1, gate.top_k), weights[place].view(-1, gate.top_k)


def in_the_block(block: nn.Module, x: Tensor, given: dict[str, Tensor]) -> Chosen:
    """DBRX: the router gives logits, the block chooses."""
    weights, ids = block.route_tokens_to_experts(block.router(x))
    return ids, weights


def one_hot(gate: nn.Module, x: Tensor, given: dict[str, Tensor]) -> Chosen:
    """Switch: a one-hot row, or zeros for a dropped token."""
    mask, weights, _ = gate(x[None])
    kept = mask[0].sum(-1, keepdim=True) > 0
    return mask[0].argmax(-1, keepdim=True).masked_fill(~kept, -1), weights[0] * kept


def dense_and_dropped(gate: nn.Module, x: Tensor, given: dict[str, Tensor]) -> Chosen:
    """NLLB: the weights of all experts, 0 for those not chosen or dropped."""
    _, weights, logits = gate(x)
    ids = logits.topk(2, -1).indices
    dropped = weights.gather(1, ids) == 0
    return ids.masked_fill(dropped, -1), weights.gather(1, ids)


# ---------------------------------------------------------------- the table
@dataclass(frozen=True)
class Model:
    """A router in transformers: its class, what differs from its configuration's defaults, and how to call it."""

    preset: str
    folder: str
    gate: str
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    ask: Callable[[nn.Module, Tensor, dict[str, Tensor]], Chosen] = plain
    config: str | None = None  # the class of the configuration, if not that of the model's text
    bias: bool = False  # the block holds the selection bias and hands it over
    train: bool = False

    def __str__(self) -> str:
        extra = "-".join(str(v) for v in self.theirs.values()) if self.ours else ""
        return "-".join(filter(None, (self.preset, self.folder, extra)))


def biased(preset: str, folder: str, gate: str, **theirs: Any) -> Model:
    return Model(preset, folder, gate, theirs, bias=True)


def m(preset: str, folder: str, gate: str, **theirs: Any) -> Model:
    return Model(preset, folder, gate, theirs)


_NLLB: dict[str, Any] = dict(ask=dense_and_dropped, config="NllbMoeConfig")
_GROUPS: tuple[dict, dict] = (dict(n_group=8, topk_group=2), dict(num_groups=8, topk_groups=2))
MODELS = [
    m("mixtral", "mixtral", "MixtralTopKRouter"),
    m("minimax", "minimax", "MiniMaxTopKRouter", num_local_experts=32),
    m("qwen2-moe", "qwen2_moe", "Qwen2MoeTopKRouter"),
    m("qwen3-moe", "qwen3_moe", "Qwen3MoeTopKRouter", norm_topk_prob=True),
    m("qwen3-next", "qwen3_next", "Qwen3NextTopKRouter"),
    m("qwen3-5-moe", "qwen3_5_moe", "Qwen3_5MoeTopKRouter"),
    m("qwen4-exp", "qwen4_exp", "Qwen4ExpTextTopKRouter"),
    m("mellum", "mellum", "MellumTopKRouter"),
    m("olmoe", "olmoe", "OlmoeTopKRouter"),
    m("flex-olmo", "flex_olmo", "FlexOlmoTopKRouter"),
    m("jamba", "jamba", "JambaTopKRouter"),
    m("hunyuan-v1-moe", "hunyuan_v1_moe", "HunYuanMoEV1Gate", num_experts=64, moe_topk=8),
    m("gemma4", "gemma4", "Gemma4TextRouter", num_experts=128, top_k_experts=8),
    m("diffusion-gemma", "diffusion_gemma", "DiffusionGemmaTextRouter", num_experts=128, top_k_experts=8),
    m("phimoe", "phimoe", "PhimoeTopKRouter"),
    m("deepseek-v2", "deepseek_v2", "DeepseekV2TopkRouter", n_routed_experts=160, num_experts_per_tok=6, n_group=8,
      topk_group=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    m("mistral4", "mistral4", "Mistral4TopkRouter"),
    m("mistral-large4", "mistral_large4", "MistralLarge4TextTopkRouter"),
    m("ernie4-5-moe", "ernie4_5_moe", "Ernie4_5_MoeTopKRouter"),
    m("ernie4-5-vl-moe", "ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeTopKRouter"),
    m("longcat-flash", "longcat_flash", "LongcatFlashTopkRouter"),
    m("gpt-oss", "gpt_oss", "GptOssTopKRouter"),
    m("openai-privacy-filter", "openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter"),
    m("granitemoe", "granitemoe", "GraniteMoeTopKRouter", num_local_experts=40, num_experts_per_tok=8),
    m("aria", "aria", "AriaTextTopKRouter", moe_num_experts=64, moe_topk=6),
    m("cohere2-moe", "cohere2_moe", "Cohere2MoeTopKRouter"),
    m("flint", "flint", "FlintTopKRouter"),
    m("deepseek-v3", "deepseek_v3", "DeepseekV3TopkRouter"),
    m("deepseek-v32", "deepseek_v32", "DeepseekV32TopkRouter"),
    m("kimi-k2", "deepseek_v3", "DeepseekV3TopkRouter", n_routed_experts=384, n_group=1, topk_group=1,
      routed_scaling_factor=2.827),
    m("kimi-linear", "kimi_linear", "KimiLinearTopkRouter"),
    m("dots1", "dots1", "Dots1TopkRouter", n_routed_experts=128, num_experts_per_tok=6, norm_topk_prob=True,
      routed_scaling_factor=2.5),
    m("dots3-note", "dots3_note", "Dots3NoteTextTopkRouter"),
    m("bailing-hybrid", "bailing_hybrid", "BailingHybridTopkRouter"),
    m("axk1", "axk1", "AXK1TopkRouter"),
    m("axk2", "axk2", "AXK2TopkRouter"),
    m("glm4-moe", "glm4_moe", "Glm4MoeTopkRouter"),
    m("glm4-moe-lite", "glm4_moe_lite", "Glm4MoeLiteTopkRouter"),
    m("glm-moe-dsa", "glm_moe_dsa", "GlmMoeDsaTopkRouter"),
    m("glm5-next", "glm5_next", "Glm5NextTextTopkRouter"),
    biased("hy-v3", "hy_v3", "HYV3TopKRouter"),
    m("hy-v4", "hy_v4", "HYV4TopkRouter"),
    m("nemotron-h", "nemotron_h", "NemotronHTopkRouter", n_routed_experts=512, num_experts_per_tok=22,
      routed_scaling_factor=5.0),
    m("mimo-v2-flash", "mimo_v2_flash", "MiMoV2FlashTopkRouter"),
    m("solar-open", "solar_open", "SolarOpenTopkRouter"),
    m("exaone-moe", "exaone_moe", "ExaoneMoeTopkRouter"),
    m("inkling2", "inkling2", "Inkling2TopKRouter"),
    m("muse-spark", "muse_spark", "MuseSparkTopkRouter"),
    biased("lfm2-moe", "lfm2_moe", "Lfm2MoeTopKRouter"),
    biased("minimax-m2", "minimax_m2", "MiniMaxM2TopKRouter"),
    m("beam", "beam", "BeamTopKRouter"),
    m("minimax-m3-vl", "minimax_m3_vl", "MiniMaxM3VLTopKRouter"),
    m("step3p7", "step3p7", "Step3p7TopKRouter"),
    m("laguna", "laguna", "LagunaTopKRouter"),
    m("kolibri1", "kolibri1", "Kolibri1TopKRouter"),
    m("deepseek-v4", "deepseek_v4", "DeepseekV4TopKRouter"),
    Model("inkling", "inkling", "InklingTopkRouter", config="InklingTextConfig"),
    Model("deepseek-v4-hash", "deepseek_v4", "DeepseekV4HashRouter", dict(vocab_size=99), dict(hash_vocab_size=99)),
    Model("afmoe", "afmoe", "AfmoeTokenChoiceRouter", ask=in_sequences, bias=True),
    Model("llama4", "llama4", "Llama4Router", ask=dense),
    Model("jetmoe", "jetmoe", "JetMoeTopKGating", ask=sorted_rows),
    Model("dbrx", "dbrx", "DbrxFFN", dict(moe_num_experts=16, moe_top_k=4), ask=in_the_block, config="DbrxFFNConfig"),
    Model("switch-transformers", "switch_transformers", "SwitchTransformersTop1Router", ask=one_hot),
    Model("nllb-moe", "nllb_moe", "NllbMoeTop2Router", **_NLLB),
    # the same routers with other options
    Model("deepseek-v2", "deepseek_v2", "DeepseekV2TopkRouter", dict(num_experts_per_tok=6),
          dict(num_experts=64, num_groups=1, topk_groups=1, scale=1.0)),
    Model("llama4", "llama4", "Llama4Router", dict(num_experts_per_tok=3), dict(top_k=3), ask=dense),
    Model("mistral4", "mistral4", "Mistral4TopkRouter", *_GROUPS),
    Model("axk2", "axk2", "AXK2TopkRouter", *_GROUPS),
    Model("cohere2-moe", "cohere2_moe", "Cohere2MoeTopKRouter", dict(expert_selection_fn="sigmoid"),
          dict(score="sigmoid", order="pre_renorm", bias_on="logits")),
    Model("laguna", "laguna", "LagunaTopKRouter", dict(moe_router_logit_softcapping=2.0), dict(soft_cap=2.0)),
    Model("kolibri1", "kolibri1", "Kolibri1TopKRouter", dict(norm_topk_prob=True), dict(order="pre_renorm")),
    Model("dbrx", "dbrx", "DbrxFFN", dict(moe_num_experts=16, moe_top_k=4, moe_normalize_expert_weights=2.0),
          dict(norm_p=2.0), in_the_block, "DbrxFFNConfig"),
    Model("switch-transformers", "switch_transformers", "SwitchTransformersTop1Router", dict(expert_capacity=7),
          dict(min_capacity=7), one_hot),
    Model("nllb-moe", "nllb_moe", "NllbMoeTop2Router", dict(num_experts=8, expert_capacity=9),
          dict(num_experts=8, min_capacity=9), train=True, **_NLLB),
    # the same routers in other models
    m("granitemoe", "granitemoehybrid", "GraniteMoeHybridTopKRouter", num_local_experts=40, num_experts_per_tok=8),
    m("granitemoe", "granitemoeshared", "GraniteMoeSharedTopKRouter", num_local_experts=40, num_experts_per_tok=8),
    m("granitemoe", "granitemoe_swa", "GraniteMoeSWATopKRouter", num_local_experts=40, num_experts_per_tok=8),
    m("glm4-moe", "glm4v_moe", "Glm4vMoeTextTopkRouter"),
    m("qwen3-moe", "qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter", num_experts=128, num_experts_per_tok=8),
]  # fmt: skip


def config_of(model: Model) -> Any:
    """Their configuration with its own numbers of experts, choices and groups, and H = 64."""
    if model.config:
        module = importlib.import_module(f"transformers.models.{model.folder}.configuration_{model.folder}")
        config = getattr(module, model.config)()
    else:
        config = transformers.AutoConfig.for_model(model.folder).get_text_config()
    for name, value in model.theirs.items():
        setattr(config, name, value)
    return config


def gate_of(model: Model) -> nn.Module:
    """Their router with random weights and biases."""
    config = config_of(model)
    config.hidden_size = H
    cls = getattr(importlib.import_module(f"transformers.models.{model.folder}.modeling_{model.folder}"), model.gate)
    if model.ask is sorted_rows:
        gate = cls(H, config.num_local_experts, config.num_experts_per_tok)
    elif model.ask is in_the_block:
        config.ffn_hidden_size = 8
        gate = cls(type("Config", (), dict(ffn_config=config)))
    else:
        gate = cls(config)
    torch.manual_seed(0)
    for name, t in (*gate.named_parameters(), *gate.named_buffers()):
        with torch.no_grad():
            if "bias" in name:
                t.normal_(0, 0.02 if PRESETS[model.preset].router.score == "softmax" else 0.2)
            elif "scale" in name:
                t.uniform_(0.5, 1.5)
            elif t.dtype == torch.long:
                t.copy_(torch.rand(t.shape[0], config.n_routed_experts).argsort(-1)[:, : t.shape[1]])
            else:
                t.normal_(0, 0.3)
    return gate.train(model.train)


def router_of(model: Model, gate: nn.Module, given: dict[str, Tensor]) -> Router:
    """Ours, with their state."""
    router = Router(MoEConfig.preset(model.preset, hidden_size=H, **model.ours)).train(model.train)
    state = {k.removeprefix("router."): v for k, v in gate.state_dict().items() if not k.startswith("experts.")}
    if model.bias:
        state["e_score_correction_bias"] = given["bias"]
    router.load_state_dict(state)
    return router


def by_expert(ids: Tensor, *others: Tensor) -> list[Tensor]:
    order = ids.argsort(-1)
    return [t.gather(1, order) for t in (ids, *others)]


def total(ids: Tensor, weights: Tensor, cotangent: Tensor) -> Tensor:
    """The weights' product with each expert's number, whatever the order of the choices."""
    return (weights * cotangent.gather(1, ids.long().clamp_min(0)).masked_fill(ids < 0, 0.0)).sum()


def gradients(value: Tensor, x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Of x and of the parameters by the last part of their names, which is the same in both."""
    x.grad = None
    module.zero_grad()
    value.backward()
    assert x.grad is not None
    return {"x": x.grad, **{n.rsplit(".", 1)[-1]: p.grad for n, p in module.named_parameters() if p.grad is not None}}


def check_same(routing: Routing, config: MoEConfig, ids: Tensor, weights: Tensor, ordered: bool) -> None:
    without = ids >= config.num_experts  # the model's identity experts
    if routing.identity_weight is not None:
        assert without.any()
        torch.testing.assert_close(routing.identity_weight, (weights * without).sum(-1), rtol=0, atol=1e-6)
    ids, weights = ids.masked_fill(without, -1), weights.masked_fill(without, 0.0)
    assert routing.topk_weights is not None
    (mine, my_weights), (want, want_weights) = (
        by_expert(routing.topk_ids, routing.topk_weights),
        by_expert(ids, weights),
    )
    assert torch.equal(mine.long(), want)
    largest = max(1.0, float(want_weights.abs().max()))  # of those whose weights are scaled beyond 1
    torch.testing.assert_close(my_weights.sum(-1), want_weights.sum(-1), rtol=0, atol=2e-6 * largest)
    live = want >= 0
    torch.testing.assert_close(my_weights[live], want_weights[live], rtol=0, atol=1e-6 * largest)
    if ordered:
        assert torch.equal(routing.topk_ids.long(), ids)


def compare(model: Model, gate: nn.Module, x: Tensor) -> None:
    """Choice, weights and the gradients of x and of every parameter."""
    given: dict[str, Tensor] = {}
    if model.bias:
        given["bias"] = 0.2 * torch.randn(MoEConfig.preset(model.preset).num_experts)
    if "hash" in model.preset:
        given["input_ids"] = torch.randint(99, (T,))
    router = router_of(model, gate, given)
    c = router.config
    x = x.clone().requires_grad_()
    cotangent, shared_cotangent = torch.randn(T, c.num_candidates), torch.randn(T, c.num_shared_experts)
    cotangent[:, c.num_experts :] = cotangent[:, -1:]  # those without matrices count as one

    ids, weights = model.ask(gate, x, given)
    value = total(ids, weights, cotangent)
    if "shared weights" in given:
        value = value + (given["shared weights"] * shared_cotangent).sum()
    want = gradients(value, x, gate)

    routing = router(x, input_ids=given.get("input_ids"))
    source = inspect.getsource(type(gate))
    check_same(routing, c, ids, weights.detach(), ordered="sorted=False" not in source and "topk" in source)
    value = total(routing.topk_ids, routing.topk_weights, cotangent)
    if routing.identity_weight is not None:
        value = value + (routing.identity_weight * cotangent[:, -1]).sum()
    if "shared weights" in given:
        torch.testing.assert_close(routing.shared_weights, given["shared weights"], rtol=1e-6, atol=1e-6)
        value = value + (routing.shared_weights * shared_cotangent).sum()
    grads = gradients(value, x, router)
    assert grads.keys() == want.keys()
    for name, grad in grads.items():
        assert (grad - want[name]).abs().max() <= 1e-5 * want[name].abs().max(), name


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_router(model):
    gate = gate_of(model)
    compare(model, gate, torch.randn(T, H))


def has_constants(model: Model) -> bool:
    router = PRESETS[model.preset].router
    # A.X-K2's masked groups, all of choice value 0, would tie
    return bool(router.norm_eps or router.norm_min) and not (model.preset == "axk2" and model.ours)


SMALL = [model for model in MODELS if has_constants(model)]


@pytest.mark.parametrize("model", SMALL, ids=str)
def test_router_of_small_scores(model):
    """Where the constants count: scores down to 1e-21 beside that of the norm, choice values below that of the mask."""
    gate, router = gate_of(model), PRESETS[model.preset].router
    x = torch.randn(T, H)
    with torch.no_grad():
        if router.score == "softmax":  # the bias chooses unlikely experts
            x = 12 * x
            for name, t in (*gate.named_parameters(), *gate.named_buffers()):
                if "bias" in name:
                    t.mul_(100)
        else:  # logits that share a summand, far below 0 for most tokens, and no expert that a bias lifts above 0
            for name, t in (*gate.named_parameters(), *gate.named_buffers()):
                if "bias" in name:
                    t.copy_(-t.abs())
            weight = next(p for n, p in gate.named_parameters() if n.endswith("weight"))
            weight[:, 0] = 1.0
            x[:, 0] = torch.tensor([0.0, -14.0, -32.0, -46.0]).repeat(T // 4) / router.multiplier
    compare(model, gate, x)


def test_zaya_from_its_logits():
    """Its router makes the logits; ours chooses from them, the last column for the expert that skips."""
    model = m("zaya", "zaya", "ZayaRouter")
    config, preset = config_of(model), MoEConfig.preset("zaya")
    config.hidden_size = H
    cls = importlib.import_module("transformers.models.zaya.modeling_zaya").ZayaRouter
    torch.manual_seed(0)
    gate = cls(config, layer_idx=1)
    with torch.no_grad():
        for p in gate.parameters():
            p.normal_(0, 0.5) if p.dim() > 1 else p.uniform_(0.5, 1.5)
        gate.balancing_biases.normal_(0, 0.02)
        gate.balancing_biases[-1] = 0.9  # so that some tokens skip
    x, state = torch.randn(1, T, H, requires_grad=True), torch.randn(1, T, config.router_hidden_size)
    logits, weights, ids, _ = gate(x, state)
    cotangent = torch.randn(T, 16)
    want = torch.autograd.grad(total(ids, weights, cotangent), x, retain_graph=True)[0]

    routing = route(logits, preset.router, bias=gate.balancing_biases)
    skipped = routing.topk_ids < 0
    assert 0 < skipped.sum() < T
    assert torch.equal(routing.topk_ids.clamp_min(0).long(), ids)
    assert not weights[skipped].any()
    torch.testing.assert_close(routing.topk_weights, weights, rtol=0, atol=1e-6)
    grad = torch.autograd.grad(total(routing.topk_ids, routing.topk_weights, cotangent), x)[0]
    assert (grad - want).abs().max() <= 1e-5 * want.abs().max()


# ---------------------------------------------------------------- whole layers
LAYERS = {
    "mixtral": "MixtralSparseMoeBlock", "qwen3-next": "Qwen3NextSparseMoeBlock", "jamba": "JambaSparseMoeBlock",
    "deepseek-v2": "DeepseekV2Moe", "deepseek-v4": "DeepseekV4SparseMoeBlock",
    "deepseek-v4-hash": "DeepseekV4SparseMoeBlock", "beam": "BeamMoE", "hy-v3": "HYV3MoE", "hy-v4": "HYV4MoE",
    "glm5-next": "Glm5NextTextMoE", "minimax-m2": "MiniMaxM2SparseMoeBlock", "phimoe": "PhimoeSparseMoeBlock",
    "minimax-m3-vl": "MiniMaxM3VLSparseMoeBlock", "llama4": "Llama4TextMoe", "granitemoe": "GraniteMoeMoE",
    "aria": "AriaTextMoELayer", "hunyuan-v1-moe": "HunYuanMoEV1Moe", "ernie4-5-moe": "Ernie4_5_MoeSparseMoeBlock",
    "longcat-flash": "LongcatFlashMoE", "step3p7": "Step3p7SparseMoeBlock",
    "mistral4": "Mistral4MoE", "inkling": "InklingMoE", "laguna": "LagunaSparseMoeBlock",
    "cohere2-moe": "Cohere2MoeSparseMoeBlock", "kolibri1": "Kolibri1SparseMoeBlock", "flint": "FlintSparseMoeBlock",
    "lfm2-moe": "Lfm2MoeSparseMoeBlock", "afmoe": "AfmoeSparseMoeBlock",
    "openai-privacy-filter": "OpenAIPrivacyFilterMLP",
}  # fmt: skip
SIZES = {  # what their configurations call the sizes that are not K
    32: ("hidden_size",),
    24: ("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"),
    16: ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    40: ("shared_expert_intermediate_size", "share_expert_dim", "moe_shared_expert_intermediate_size",
         "shared_intermediate_size"),
    8: ("zero_expert_num",),
    1: ("n_group", "topk_group"),
}  # fmt: skip


def block_of(name: str) -> tuple[nn.Module, MoE]:
    """Their block, small and with random weights, and our layer with the same."""
    model = next(model for model in MODELS if model.preset == name)
    config = config_of(model)
    config._experts_implementation = "eager"
    for size, names in SIZES.items():
        for key in names:
            if getattr(config, key, None) is not None:
                setattr(config, key, size)
    if name.startswith("deepseek-v4"):
        config.mlp_layer_types = ["hash_moe" if "hash" in name else "moe"]
        config.vocab_size = 99
    for key in ("moe_routed_scaling_factor", "moe_router_scaling_factor"):
        if hasattr(config, key):
            setattr(config, key, PRESETS[name].routed_scale)
    module = importlib.import_module(f"transformers.models.{model.folder}.modeling_{model.folder}")
    cls = getattr(module, LAYERS[name])
    block = cls(config, layer_idx=0) if "layer_idx" in inspect.signature(cls.__init__).parameters else cls(config)
    torch.manual_seed(0)
    for key, t in (*block.named_parameters(), *block.named_buffers()):
        with torch.no_grad():
            if t.is_floating_point():
                t.normal_(0, 0.02 if key.endswith("bias") else 0.2)
            else:
                t.copy_(torch.rand(len(t), 16).argsort(-1)[:, : t.shape[1]])
    overrides: dict[str, Any] = dict(hidden_size=32, intermediate_size=24, num_experts=16, **model.ours)
    overrides["top_k"] = next(m.top_k for m in block.modules() if hasattr(m, "top_k"))
    if PRESETS[name].num_shared_experts and any(getattr(config, key, None) for key in SIZES[40]):
        overrides["shared_intermediate_size"] = 40
    if PRESETS[name].router.num_groups > 1:
        overrides.update(num_groups=1, topk_groups=1)
    if name == "longcat-flash":
        overrides["identity_experts"] = 8
    layer = MoE(MoEConfig.preset(name, **overrides))
    layer.load_state_dict(dict(converted(name, block.state_dict())))
    return block.eval(), layer.eval()


def converted(name: str, state: dict[str, Tensor]):
    """Three layouts that are those of no other model."""
    for key, t in state.items():
        if name == "longcat-flash" and key == "experts.gate_up_proj":
            yield key, t[:16]  # it has unused matrices for its identity experts
        elif name == "minimax-m3-vl" and key == "shared_experts.gate_up_proj.weight":
            yield from zip(
                ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"), t.chunk(2), strict=True
            )
        elif name == "inkling" and key.startswith("shared_experts."):
            yield f"{key}.weight", torch.cat(list(t), 1) if "down" in key else t.flatten(0, 1)
        else:
            yield key, t


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    """What their block gives, and the gradient of x, with its state dict loaded as it is."""
    block, layer = block_of(name)
    extra = {"input_ids": torch.randint(99, (2, 13))} if "hash" in name else {}
    x = (6 * torch.randn(2, 13, 32)).requires_grad_()  # into the clamps
    direction = torch.randn(2, 13, 32)
    want = block(x.clone(), **extra)
    want = (want[0] if isinstance(want, tuple) else want).view(2, 13, 32)
    (dx_want,) = torch.autograd.grad((want * direction).sum(), x)
    y = layer(x, **extra)
    (dx,) = torch.autograd.grad((y * direction).sum(), x)
    assert (y - want).abs().max() <= 5e-6 * want.abs().max()
    assert (dx - dx_want).abs().max() <= 5e-6 * dx_want.abs().max()


def test_two_pools():
    """ERNIE 4.5 VL: a layer for text and one for vision, each blind for the other's tokens."""
    module = importlib.import_module("transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe")
    config = config_of(m("ernie4-5-vl-moe", "ernie4_5_vl_moe", ""))
    config.hidden_size, config.moe_intermediate_size, config.moe_num_experts = 32, [24, 8], 16
    config._experts_implementation = "eager"
    block = module.Ernie4_5_VLMoeMoeBlock(config)
    torch.manual_seed(0)
    for key, t in (*block.named_parameters(), *block.named_buffers()):
        with torch.no_grad():
            t.normal_(0, 0.02 if key.endswith("bias") else 0.2)
    sizes: dict[str, Any] = dict(hidden_size=32, num_experts=16)
    text = MoE(MoEConfig.preset("ernie4-5-vl-moe", intermediate_size=24, **sizes))
    vision = MoE(MoEConfig.preset("ernie4-5-vl-moe", intermediate_size=8, num_shared_experts=0, **sizes))
    shared = {f"shared_experts.{k}": v for k, v in block.shared_experts.state_dict().items()}
    text.load_state_dict({**block.text_moe.state_dict(), **shared})
    vision.load_state_dict(block.vision_moe.state_dict())
    x, seen = torch.randn(2, 13, 32), torch.rand(2, 13) < 0.4
    y = text(x, token_mask=~seen) + vision(x, token_mask=seen)
    want, _ = block(x, seen.int())
    assert (y - want).abs().max() <= 2e-6 * want.abs().max()


def test_latent_experts():
    """Nemotron-H with latent projections: its parts put together."""
    model = next(model for model in MODELS if model.preset == "nemotron-h")
    config = config_of(model)
    config.hidden_size, config.moe_intermediate_size, config.moe_shared_expert_intermediate_size = 32, 24, 40
    config.n_routed_experts, config.num_experts_per_tok, config.moe_latent_size = 16, 4, 20
    config._experts_implementation = "eager"
    module = importlib.import_module("transformers.models.nemotron_h.modeling_nemotron_h")
    block = module.NemotronHMoE(config)
    torch.manual_seed(0)
    for t in (*block.parameters(), *block.buffers()):
        nn.init.normal_(t, 0, 0.2)
    ours = MoEConfig.preset("nemotron-h", hidden_size=32, intermediate_size=24, num_experts=16, top_k=4,
                            shared_intermediate_size=40)  # fmt: skip
    gate, experts, shared = Router(ours), Experts(ours.replace(hidden_size=20)), SharedExperts(ours)
    gate.load_state_dict(block.gate.state_dict())
    experts.load_state_dict(block.experts.state_dict())
    shared.load_state_dict(block.shared_experts.state_dict())
    x = torch.randn(13, 32)
    y = block.fc2_latent_proj(experts(block.fc1_latent_proj(x), gate(x))) + shared(x)
    want = block(x[None])[0]
    assert (y - want).abs().max() <= 2e-6 * want.abs().max()


def test_gemma4_reads_two_inputs():
    """The router sees the residual, the experts a norm of it."""
    module = importlib.import_module("transformers.models.gemma4.modeling_gemma4")
    config = transformers.AutoConfig.for_model("gemma4").get_text_config()
    config.hidden_size, config.moe_intermediate_size, config.num_experts, config.top_k_experts = 32, 24, 16, 4
    config._experts_implementation = "eager"
    router, experts = module.Gemma4TextRouter(config), module.Gemma4TextExperts(config)
    torch.manual_seed(0)
    for t in (*router.parameters(), *experts.parameters()):
        nn.init.normal_(t, 0.0, 0.5)
    layer = MoE(MoEConfig.preset("gemma4", hidden_size=32, intermediate_size=24, num_experts=16, top_k=4))
    state = {f"router.{k}": v for k, v in router.state_dict().items()}
    layer.load_state_dict({**state, **{f"experts.{k}": v for k, v in experts.state_dict().items()}})
    residual, normed = torch.randn(13, 32), torch.randn(13, 32)
    _, weights, ids = router(residual)
    want = experts(normed, ids, weights)
    y = layer.experts(normed, layer.gate(residual))
    assert (y - want).abs().max() <= 2e-6 * want.abs().max()


# ---------------------------------------------------------------- the table of presets itself
def test_every_preset_is_compared():
    assert {model.preset for model in MODELS} | {"zaya"} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_builds(name):
    config = MoEConfig.preset(name)
    config.router.check(config.num_experts)
    layer = MoE(config, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == config.num_parameters
    assert MoEConfig.preset(name.replace("-", "_")) == config


# published checkpoints that differ in H or I from their class's defaults
PUBLISHED = {
    "minimax", "olmoe", "hunyuan-v1-moe", "deepseek-v2", "ernie4-5-vl-moe", "granitemoe", "aria", "kimi-k2", "dots1",
    "nemotron-h", "gemma4", "diffusion-gemma", "dbrx", "switch-transformers", "nllb-moe", "inkling", "deepseek-v4-hash",
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_numbers_are_those_of_transformers(name):
    """Sizes, where the class's defaults are the published ones, and the factor of the balance loss."""
    preset = MoEConfig.preset(name)
    model = next((model for model in MODELS if model.preset == name), m("zaya", "zaya", ""))
    config = config_of(model)
    if name not in PUBLISHED:
        names = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
        width = next(value for n in names if (value := getattr(config, n, None)) is not None)
        assert (preset.hidden_size, preset.intermediate_size) == (config.hidden_size, width)
    coefficient = getattr(config, "router_aux_loss_coef", None) or 0.0
    if name != "olmoe":  # its paper's
        assert preset.load_balancing_loss_coef == pytest.approx(coefficient * preset.router.top_k)
