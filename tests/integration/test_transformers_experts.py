"""One module of Hugging Face experts at a time: the two paths, other ranks' ids, FP8, recognition, `report`.

The oracle is a loop over experts in fp64. Both sides are given the same choices: routing is chaotic at ties (one ulp
may flip a choice), so lower precisions cannot be judged through a whole model.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.17")

import transformers
from hf_models import IDS, MODELS, assert_within, build, choices, experts_of
from transformers.activations import ACT2FN
from transformers.integrations import finegrained_fp8, moe

import moesaic
import moesaic.integrations.transformers as integration
from moesaic import formats
from moesaic.integrations import recognise
from moesaic.testing import STAGES, assert_close


def oracle(wide: nn.Module, x, ids, weights) -> torch.Tensor:
    """A loop over the experts of an fp64 module with its own activation; slots of other ranks are left out."""
    gated = hasattr(wide, "gate_up_proj")
    w_up, act = (wide.gate_up_proj, wide._apply_gate) if gated else (wide.up_proj, wide.act_fn)
    y = torch.zeros_like(x)
    for e in range(wide.down_proj.shape[0]):
        t, k = torch.where(ids == e)
        up, down = (w[e] if wide.is_transposed else w[e].T for w in (w_up, wide.down_proj))
        h = x[t] @ up + (wide.gate_up_proj_bias[e] if wide.has_bias else 0)
        out = act(h) @ down + (wide.down_proj_bias[e] if wide.has_bias else 0)
        out = wide.post_expert_norm(out) if getattr(wide, "has_post_expert_norm", False) else out
        y = y.index_add(0, t, out * weights[t, k, None])
    return y


def check_against_oracle(experts: nn.Module, ids, weights, dtype=torch.float32) -> None:
    """The output and every gradient: tokens, routing weights, parameters."""
    experts = experts.to(dtype)
    wide = copy.deepcopy(experts).double()
    x, grad = (torch.randn(ids.shape[0], 64, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (3, 5))
    results = []
    for call, module in ((integration.experts_forward, experts), (oracle, wide)):
        double = module is wide
        inputs = [(t.double() if double else t.clone()).requires_grad_() for t in (x, weights)]
        y = call(module, inputs[0], ids, inputs[1])
        y.backward(grad.to(y.dtype))
        named = {"x": inputs[0], "weights": inputs[1], **dict(module.named_parameters())}
        results.append((y, {name: t.grad for name, t in named.items()}))
    (y, grads), (y64, grads64) = results
    assert y.dtype == dtype
    assert_close(y, y64, 64, STAGES["fused_experts"])
    for name, g in grads.items():
        assert_close(g, grads64[name], 64, STAGES["fused_experts_backward"], dtype, name)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_layer_with_frozen_routing(name):
    ids, weights = choices(40)
    check_against_oracle(experts_of(build(name, "moesaic")), ids, weights, torch.bfloat16)


@pytest.mark.parametrize("weights_dtype", (torch.float32, torch.bfloat16))
def test_routing_weights_of_either_dtype(weights_dtype):
    ids, weights = choices(9)
    check_against_oracle(experts_of(build("mixtral", "moesaic")), ids, weights.to(weights_dtype), torch.bfloat16)


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


@pytest.mark.parametrize("tokens", (2, 24))
def test_fp8_experts_skip_ids_of_other_ranks(tokens):
    model, decoded = fp8_model((32, 32), torch.float32)
    ids, weights = choices(tokens)
    ids[0, 0], ids[1] = 8, -1
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(3))
    y = integration.experts_forward(experts_of(model), x, ids, weights)
    y64 = oracle(experts_of(decoded).double(), x.double(), ids, weights.double())
    assert_close(y, y64, 64, STAGES["fused_experts"])


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
    got = formats.dequantize_blocks(q, scale, None, torch.float32)  # two scales: gate half and up half
    assert torch.equal(got, q.float() * scale.repeat_interleave(3, 1))


def test_packed_fp4_is_refused():
    experts = fp8_model((32, 32), torch.float32)[0].model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(8, 64, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(moesaic.Unsupported, match="FP4"):
        experts(torch.randn(3, 64), *choices(3))


# ---------------------------------------------------------------- recognition and report
@pytest.mark.parametrize("name", recognise.SCALAR_NAMES)
def test_scalar_activations_are_what_their_class_computes(name):
    x = recognise._probe()
    act = ACT2FN[name]
    entry = moesaic.ACTIVATIONS[recognise.scalar_of(type(act))]
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


def softcapped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    a, b = self.gate_softcap, self.up_softcap
    return a * torch.tanh(gate / a) * torch.sigmoid(gate) * (b * torch.tanh(up / b))


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
    (clamped_after, dict(limit=7.0), {}, "swiglu_step"),
    (softcapped, dict(gate_softcap=4.0, up_softcap=30.0), {}, "swiglu_softcapped(limit=30)"),
    (softcapped, dict(gate_softcap=4.0, up_softcap=0.0), {}, None),
    (moe._default_apply_gate, dict(act_fn=ACT2FN["relu2"]), {}, "reglu2"),
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
    assert (recognise.describe(plan.activation) if plan.activation else None) == want, plan.why


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
    plain = custom(Ungated, None, has_gate=False)
    model = nn.ModuleDict({"capped": custom(Softcapped), "normed": post_normed(), "plain": plain})
    lines = {line.name: line for line in integration.report(model, tokens=1, training=True).lines}
    assert [lines[n].path for n in ("capped", "normed", "plain")] == ["composed", "composed", "fused"]
    assert "is not in ACTIVATIONS" in lines["capped"].why and "norm" in lines["normed"].why
    assert "grouped_matmul" in str(lines["capped"].choice) and lines["plain"].activation == "relu2"


def test_report_lists_experts_that_cannot_be_reached():
    config = transformers.AutoConfig.for_model("llama4_text", hidden_size=64, intermediate_size=32, num_hidden_layers=1,
                                               num_attention_heads=2, num_local_experts=4, vocab_size=16)  # fmt: skip
    with torch.device("meta"):
        text = str(integration.report(transformers.Llama4ForCausalLM(config)))  # not through from_config: not patched
    assert "Llama4TextExperts" in text and "does not go through transformers' experts registry" in text
