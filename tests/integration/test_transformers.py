"""`experts_implementation="moesaic"` against transformers' own eager experts, on real architectures built small.

The bar for fp32 is `max|d| / max|ref| <= 2e-6` for the logits and for every gradient. Elsewhere the oracle is a loop over
experts in fp64. Routing is chaotic at ties (one ulp may flip a choice), so lower precisions are judged layer by layer,
where both sides are given the same choices.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.17")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations import finegrained_fp8, moe  # noqa: E402

import moesaic  # noqa: E402
import moesaic.integrations.transformers as integration  # noqa: E402
from moesaic.testing import STAGES, assert_close  # noqa: E402

BAR = 2e-6
BASE = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts_per_tok=2,
)  # fmt: skip
QWEN = dict(num_experts=8, moe_intermediate_size=32, intermediate_size=48)
LOCAL = dict(num_local_experts=8, intermediate_size=32)
ROUTED = dict(n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=32, intermediate_size=64,
              first_k_dense_replace=1, n_group=1, topk_group=1)  # fmt: skip
MODELS = {
    "mixtral": dict(LOCAL, intermediate_size=48),
    "qwen2_moe": dict(QWEN, shared_expert_intermediate_size=32),
    "qwen3_moe": dict(QWEN, head_dim=16, norm_topk_prob=True),
    "deepseek_v3": dict(ROUTED, n_group=2, num_experts_per_tok=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                        qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4),
    "gpt_oss": dict(LOCAL, head_dim=16, sliding_window=32, layer_types=["sliding_attention", "full_attention"]),
    "olmoe": dict(num_experts=8, intermediate_size=32, num_experts_per_tok=4),
    "glm4_moe": dict(ROUTED, head_dim=16),
    "granitemoe": LOCAL,
    "phimoe": LOCAL,
    "ernie4_5_moe": dict(intermediate_size=64, moe_intermediate_size=32, moe_num_experts=8, moe_k=2,
                         moe_num_shared_experts=1, moe_layer_start_index=0, moe_layer_end_index=1),
    "dots1": ROUTED,
    "minimax_m2": dict(LOCAL, head_dim=16),
}  # fmt: skip
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(4))


def build(name: str, implementation: str) -> nn.Module:
    """A model with fixed weights; those of experts and routers are enlarged, for as initialised they hardly matter."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(name, **{**BASE, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation).float()
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if "experts" in parameter or "router" in parameter or "gate.weight" in parameter:
                value.normal_(0, 0.2)
    return model


def train_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits and every gradient of one step, auxiliary loss included where the model has one."""
    model.train().zero_grad(set_to_none=True)
    # 5.17's granitemoe cannot compute its own auxiliary loss
    aux = hasattr(model.config, "router_aux_loss_coef") and model.config.model_type != "granitemoe"
    torch.manual_seed(7)  # phimoe samples its routing in training
    out = model(input_ids=IDS, labels=IDS, **({"output_router_logits": True} if aux else {}))
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@functools.cache
def eager_step(name: str) -> dict[str, torch.Tensor]:
    return train_step(build(name, "eager"))


def experts_of(model: nn.Module) -> nn.Module:
    """The last module of experts."""
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")][-1]


def distances(got: dict, want: dict) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {k: ((got[k] - want[k]).abs().max() / want[k].abs().max().clamp_min(1e-30)).item() for k in want}


def assert_within(got: dict, want: dict, bar: float = BAR) -> None:
    far = {k: v for k, v in distances(got, want).items() if not v <= bar}
    assert not far, f"further than {bar} from the reference: {far}"


# ---------------------------------------------------------------- real architectures against eager
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_eager(name):
    model = build(name, "moesaic")
    assert integration.plan(experts_of(model)).path == "fused"
    assert_within(train_step(model), eager_step(name))


def test_the_bar_sees_a_wrong_expert():
    """The comparison must fail when it should: one scaled element of one expert."""
    model = build("mixtral", "moesaic")
    with torch.no_grad():
        experts_of(model).down_proj[0, 0, 0] *= 1.01
    assert max(distances(train_step(model), eager_step("mixtral")).values()) > 2 * BAR


@pytest.mark.parametrize("name", MODELS)
def test_generate_equals_eager(name):
    tokens = [
        build(name, implementation).eval().generate(IDS[:, :8], max_new_tokens=8, do_sample=False)
        for implementation in ("eager", "moesaic")
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", MODELS)
def test_compiles_fullgraph(name):
    torch._dynamo.reset()
    integration._recognise.cache_clear()  # the activation must be recognised while tracing, too
    model = build(name, "moesaic").eval()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=IDS).logits
        want = model(input_ids=IDS).logits
    assert_within({"logits": got}, {"logits": want})


def test_compiled_training_step():
    torch._dynamo.reset()
    model = build("gpt_oss", "moesaic")
    want = train_step(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert_within(train_step(model), want)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model = build("qwen3_moe", "moesaic").eval()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(input_ids=IDS).logits
        assert_within({"logits": got}, {"logits": model(input_ids=IDS).logits}, 2 * BAR)  # inductor reorders the norms


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss"))
def test_layers_share_a_compiled_graph(name):
    """Nothing that is traced may depend on which layer it is, or compiling layer by layer compiles every layer anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.randn(6, 64)
    for layer in build(name, "moesaic").eval().model.layers:
        torch.compile(type(layer.mlp).forward, fullgraph=True, backend="aot_eager")(layer.mlp, x[None])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("strict", (False, True))
def test_exports(strict):
    integration._recognise.cache_clear()
    experts = experts_of(build("gpt_oss", "moesaic")).eval()
    with torch.no_grad():
        program = torch.export.export(experts, (torch.randn(5, 64), *choices(5)), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "moesaic.fused_experts.default" in targets


def test_gradient_checkpointing():
    model = build("qwen3_moe", "moesaic")
    model.gradient_checkpointing_enable()
    assert_within(train_step(model), eager_step("qwen3_moe"))


def test_autocast():
    """fp32 weights, bf16 products: the same distance from fp32 as eager's, and gradients in fp32."""
    exact = eager_step("mixtral")
    steps = {}
    for implementation in ("eager", "moesaic"):
        with torch.autocast("cpu", torch.bfloat16):
            steps[implementation] = train_step(build("mixtral", implementation))
    assert steps["moesaic"]["model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.float32
    ours, theirs = (distances({k: v.float() for k, v in s.items()}, exact)["logits"] for s in (steps["moesaic"], steps["eager"]))
    assert 1e-4 < ours < 1.5 * theirs


def test_parametrised_weights():
    """What adapters and sharding do: the weight is computed anew at each access, with a gradient to its parts."""

    class LowRank(nn.Module):
        def __init__(self, weight):
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.a = nn.Parameter(torch.randn(*weight.shape[:2], 2, generator=g) * 0.1)
            self.b = nn.Parameter(torch.randn(weight.shape[0], 2, weight.shape[2], generator=g) * 0.1)

        def forward(self, weight):
            return weight + self.a @ self.b

    steps = []
    for implementation in ("eager", "moesaic"):
        model = build("qwen3_moe", implementation)
        for name in ("gate_up_proj", "down_proj"):
            nn.utils.parametrize.register_parametrization(
                experts_of(model), name, LowRank(getattr(experts_of(model), name))
            )
        steps.append(train_step(model))
    assert_within(steps[1], steps[0])


def test_selected_by_every_route(tmp_path):
    model = build("qwen3_moe", "moesaic").eval()
    model.save_pretrained(tmp_path)
    assert "moesaic" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moesaic")
    switched = AutoModelForCausalLM.from_pretrained(tmp_path)
    switched.set_experts_implementation("moesaic")
    for other in (loaded, switched):
        assert other.config._experts_implementation == "moesaic"
        assert torch.equal(other.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_missing_transformers_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.activations", None)
    spec = importlib.util.spec_from_file_location("moesaic.integrations.copy", integration.__file__)
    with pytest.raises(moesaic.MissingExtra, match=r"pip install \"moesaic\[hf\]\""):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ---------------------------------------------------------------- one module of experts against an fp64 loop
def choices(tokens: int, experts: int = 8, top_k: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=g).topk(top_k).indices, torch.rand(tokens, top_k, generator=g) + 0.1


def oracle(experts: nn.Module, x, ids, weights) -> torch.Tensor:
    """A loop over experts in fp64 with the module's own activation; slots of other ranks are left out."""
    wide = copy.deepcopy(experts).double()
    w_up, E = getattr(wide, "gate_up_proj", None), wide.down_proj.shape[0]
    w_up, act = (wide.up_proj, wide.act_fn) if w_up is None else (w_up, wide._apply_gate)
    y = torch.zeros_like(x, dtype=torch.float64)
    for e in range(E):
        t, k = torch.where(ids == e)
        up, down = (w[e] if wide.is_transposed else w[e].T for w in (w_up, wide.down_proj))
        h = x.double()[t] @ up + (wide.gate_up_proj_bias[e] if wide.has_bias else 0)
        out = act(h) @ down + (wide.down_proj_bias[e] if wide.has_bias else 0)
        out = wide.post_expert_norm(out) if getattr(wide, "has_post_expert_norm", False) else out
        y = y.index_add(0, t, out * weights.double()[t, k, None])
    return y


def check_against_oracle(experts: nn.Module, ids, weights, dtype=torch.float32) -> None:
    """Output and the gradients of tokens, routing weights and parameters."""
    experts = experts.to(dtype)
    x = torch.randn(ids.shape[0], 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    results = []
    for call in (lambda *a: integration.experts_forward(experts, *a), lambda *a: oracle(experts, *a)):
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = call(inputs[0], ids, inputs[1])
        y.backward(grad.to(y.dtype))
        results.append((y, *(t.grad for t in inputs)))
    (y, dx, dw), (y64, dx64, dw64) = results
    assert y.dtype == dtype
    assert_close(y, y64, 64, STAGES["fused_experts"])
    assert_close(dx, dx64, 64, STAGES["fused_experts_backward"])
    assert_close(dw, dw64, 64, STAGES["fused_experts_backward"], dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_layer_with_frozen_routing(name):
    ids, weights = choices(40)
    check_against_oracle(experts_of(build(name, "moesaic")), ids, weights, torch.bfloat16)


@pytest.mark.parametrize("weights_dtype", (torch.float32, torch.bfloat16))
def test_routing_weights_of_either_dtype(weights_dtype):
    ids, weights = choices(9)
    check_against_oracle(experts_of(build("mixtral", "moesaic")), ids, weights.to(weights_dtype).float())
    experts, x = experts_of(build("mixtral", "moesaic")).bfloat16(), torch.randn(9, 64).bfloat16()
    assert experts(x, ids, weights.to(weights_dtype)).dtype == torch.bfloat16


class Softcapped(nn.Module):
    """Experts with a gate that no entry computes."""

    def __init__(self, config):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.num_experts = 8
        self.gate_up_proj = nn.Parameter(torch.randn(8, 64, 64, generator=g) * 0.15)
        self.down_proj = nn.Parameter(torch.randn(8, 64, 32, generator=g) * 0.15)
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError("dispatched")

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * torch.tanh(up)


class Ungated(Softcapped):
    def __init__(self, config, act="relu2"):
        super().__init__(config)
        del self.gate_up_proj
        self.up_proj = nn.Parameter(torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(2)) * 0.15)
        self.act_fn = ACT2FN[act]


def custom(cls: type, gate=None, *args, **flags) -> nn.Module:
    """A fresh decorated class with another gate, as a model's code would have it."""
    body = {} if gate is None else {"_apply_gate": gate}
    made = moe.use_experts_implementation(type(f"{cls.__name__}Experts", (cls,), body), **flags)
    return made(SimpleNamespace(_experts_implementation="moesaic", num_experts_per_tok=2), *args)


def post_normed() -> nn.Module:
    experts = custom(Softcapped, moe._default_apply_gate)
    experts.has_post_expert_norm = True  # not a flag of the decorator in 5.17
    experts.post_expert_norm = nn.RMSNorm(64, eps=1e-6)
    return experts


COMPOSED = {
    "unknown gate": lambda: custom(Softcapped),
    "norm after each expert": post_normed,
    "no gate, unknown activation": lambda: custom(Ungated, None, "mish", has_gate=False),
}


@pytest.mark.parametrize("kind", COMPOSED)
def test_composed_path(kind):
    experts = COMPOSED[kind]()
    assert integration.plan(experts).path == "composed"
    check_against_oracle(experts, *choices(40))


def test_experts_without_gate_are_fused():
    experts = custom(Ungated, None, has_gate=False)
    assert integration.plan(experts).activation is moesaic.ACTIVATIONS["relu2"]
    check_against_oracle(experts, *choices(40))


@pytest.mark.parametrize("make", (lambda: experts_of(build("mixtral", "moesaic")), *COMPOSED.values(),
                                  lambda: experts_of(build("gpt_oss", "moesaic"))))  # fmt: skip
def test_ids_of_other_ranks_are_skipped(make):
    """An id of E or beyond, or below 0, is another rank's: whatever its weight, no output and a zero gradient."""
    experts, (ids, weights) = make(), choices(12)
    ids[0, 1], ids[1], ids[2, 0], ids[3, 1] = 8, 8, 11, -5
    check_against_oracle(experts, ids, weights)
    elsewhere = (ids < 0) | (ids >= 8)
    weights.requires_grad_()
    y = integration.experts_forward(experts, torch.randn(12, 64), ids, weights)
    y.sum().backward()
    assert not y[1].any() and not weights.grad[elsewhere].any()
    assert all(torch.isfinite(p.grad).all() for p in experts.parameters())


@pytest.mark.parametrize("tokens", (0, 1))
def test_few_tokens(tokens):
    check_against_oracle(experts_of(build("gpt_oss", "moesaic")), *choices(tokens))


# ---------------------------------------------------------------- FP8
def quantize(w: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-block FP8 of `w (E, N, K)`, ragged blocks at the ends, by a loop."""
    grid = [-(-length // size) for length, size in zip(w.shape[1:], block, strict=True)]
    out, scale = torch.empty_like(w, dtype=torch.float8_e4m3fn), torch.empty(w.shape[0], *grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            here = (slice(None), slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[:, i, j] = w[here].abs().amax((1, 2)) / 448
            out[here] = (w[here] / scale[:, i, j, None, None]).to(torch.float8_e4m3fn)
    return out, scale


def fp8_model(block: tuple[int, int], scale_dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A qwen3_moe whose experts alone are FP8, made by transformers' own module swap, and the same model decoded."""
    decoded, model = build("qwen3_moe", "eager"), build("qwen3_moe", "eager")
    config = transformers.FineGrainedFP8Config(weight_block_size=block)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    finegrained_fp8.replace_with_fp8_linear(model, modules_to_not_convert=linear, quantization_config=config)
    for plain, byte in zip(decoded.model.layers, model.model.layers, strict=True):
        assert isinstance(byte.mlp.experts, finegrained_fp8.FP8Experts)
        byte.mlp.experts.to_empty(device="cpu")
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(plain.mlp.experts, name)
            q, scale = quantize(weight.detach(), block)
            scale = scale.log2().round().exp2() if scale_dtype == torch.float8_e8m0fnu else scale
            setattr(byte.mlp.experts, name, nn.Parameter(q, requires_grad=False))
            setattr(byte.mlp.experts, f"{name}_scale_inv", nn.Parameter(scale.to(scale_dtype), requires_grad=False))
            for e, i, j in torch.cartesian_prod(*map(torch.arange, scale.shape)).tolist():
                here = (e, slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                weight.data[here] = q[here].float() * scale[e, i, j]
    model.set_experts_implementation("moesaic")
    return model, decoded


@pytest.mark.parametrize("tokens", (2, 24))  # fewer and more slots than experts: chosen experts decoded, or all
@pytest.mark.parametrize("block,scale_dtype", (((32, 32), torch.float32), ((48, 24), torch.float32),
                                               ((32, 32), torch.float8_e8m0fnu)))  # fmt: skip
def test_fp8_experts_equal_decoded_ones(block, scale_dtype, tokens):
    model, decoded = fp8_model(block, scale_dtype)
    steps = []
    for each in (model, decoded):
        x = each.model.embed_tokens(IDS[:1, :tokens]).detach().requires_grad_()
        logits = each.eval()(inputs_embeds=x).logits
        logits.square().sum().backward()
        steps.append({"logits": logits.detach(), "x": x.grad})
    assert_within(steps[0], steps[1])
    assert "fp8" in str(integration.report(model))


def test_fp8_experts_compile_and_generate():
    torch._dynamo.reset()
    model, decoded = fp8_model((32, 32), torch.float32)
    with torch.no_grad():
        got = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")(input_ids=IDS).logits
        assert_within({"logits": got}, {"logits": decoded.eval()(input_ids=IDS).logits})
    tokens = [m.generate(IDS[:, :8], max_new_tokens=8, do_sample=False) for m in (model, decoded)]
    assert torch.equal(*tokens)


def test_fp8_scale_of_a_whole_matrix():
    q, scale = torch.randn(2, 6, 4).to(torch.float8_e4m3fn), torch.tensor([[[2.0], [3.0]], [[4.0], [5.0]]])
    got = integration.dequantize_blocks(q, scale, None, torch.float32)  # two scales: gate half and up half
    assert torch.equal(got, q.float() * scale.repeat_interleave(3, 1))


def test_packed_fp4_is_refused():
    experts = fp8_model((32, 32), torch.float32)[0].model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(8, 64, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(moesaic.Unsupported, match="FP4"):
        experts(torch.randn(3, 64), *choices(3))


# ---------------------------------------------------------------- recognition and report
@pytest.mark.parametrize("name", integration._SCALAR_NAMES)
def test_scalar_activations_are_what_their_class_computes(name):
    x = integration._probe()
    act = ACT2FN[name]
    entry = moesaic.ACTIVATIONS[integration._SCALARS[type(act)]]
    assert_close(entry.forward(x, 1.0, 1.0), act(x), 1, dtype=torch.float32)


def clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def clamped_after(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


def shifted(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
    return gate * torch.sigmoid(self.swiglu_alpha * gate) * (up + 1)


def widened(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)


def straight_through(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate).detach() * up


def interleaved(self, gate_up):
    return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


@pytest.mark.parametrize("gate,constants,flags,want", (
    (clamped, dict(limit=7.0), {}, "swiglu_clamped(limit=7)"),
    (clamped, dict(limit=1500.0), {}, "swiglu_clamped(limit=1500)"),
    (clamped, dict(limit=None), {}, None),
    (clamped, dict(limit=nn.Parameter(torch.tensor(7.0))), {}, None),
    (clamped_after, dict(limit=7.0), {}, None),
    (shifted, dict(swiglu_alpha=1.5, swiglu_limit=7.0), {}, "swiglu_oai(alpha=1.5)"),
    (widened, {}, {}, "swiglu"),
    (straight_through, {}, {}, None),
    (interleaved, {}, dict(is_concatenated=False), "swiglu"),
    (interleaved, {}, {}, None),
    (None, {}, dict(is_concatenated=False), None),
    (moe._default_apply_gate, dict(act_fn=ACT2FN["gelu_new"]), {}, "geglu_tanh"),
    (moe._default_apply_gate, dict(act_fn=nn.GELU(approximate="tanh")), {}, None),
    (moe._default_apply_gate, dict(act_fn=ACT2FN["gelu_10"]), {}, None),
    (moe._default_apply_gate, dict(_apply_gate=torch.relu), {}, None),
))  # fmt: skip
def test_gates_are_recognised_by_what_they_compute(gate, constants, flags, want):
    experts = custom(Softcapped, gate, **flags)
    for name, value in constants.items():
        setattr(experts, name, value)
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        plan = integration.plan(experts)
    assert (integration._describe(plan.activation) if plan.activation else None) == want, plan.why


def test_a_changed_constant_changes_the_plan():
    experts = custom(Softcapped, clamped)
    experts.limit = 7.0
    first = integration.plan(experts)
    experts.limit = 5.0
    assert (first.activation.limit, integration.plan(experts).activation.limit) == (7.0, 5.0)


def test_report_names_path_layout_and_implementation():
    text = str(integration.report(build("gpt_oss", "moesaic")))
    assert "model.layers.0.mlp.experts and 1 more" in text
    assert all(word in text for word in ("fused", "swiglu_oai", "interleaved, transposed, bias", "8 x 64 x 32"))
    with torch.device("meta"):
        line = integration.report(build("mixtral", "moesaic")).lines[0]
    assert line.choice.chosen == ("triton" if line.choice.problem.device == "cuda" else "torch")
    assert "set_experts_implementation('moesaic')" in str(integration.report(build("mixtral", "eager")))
    assert "no experts found" in str(integration.report(nn.Linear(2, 2)))


def test_report_says_why_a_layer_is_composed():
    model = nn.ModuleDict({"capped": custom(Softcapped), "normed": post_normed(), "plain": custom(Ungated, None, has_gate=False)})
    lines = {line.name: line for line in integration.report(model, tokens=1, training=True).lines}
    assert [lines[n].path for n in ("capped", "normed", "plain")] == ["composed", "composed", "fused"]
    assert "is not in ACTIVATIONS" in lines["capped"].why and "norm" in lines["normed"].why
    assert lines["capped"].choice.problem.op == "grouped_matmul" and lines["plain"].activation == "relu2"
