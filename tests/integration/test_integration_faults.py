"""Faults of the bridge to transformers that users met elsewhere: constants under a tracer, functions as activations,
wide biases, classes that are not dispatched, tensor subclasses, FLOP counters, export of one graph for any T."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers", minversion="5.17")

import transformers
from hf_models import (
    BASE,
    IDS,
    MODELS,
    UNDECORATED,
    assert_within,
    build,
    build_undecorated,
    choices,
    experts_of,
    train_step,
)
from transformers.integrations import moe
from transformers.monkey_patching import (
    apply_patches,
    get_patch_mapping,
    register_patch_mapping,
    unregister_patch_mapping,
)

import moesaic
import moesaic.integrations.transformers as integration
from moesaic.integrations import recognise, undecorated
from moesaic.testing import STAGES, assert_close


class Clamped(nn.Module):
    """Experts whose gate has a constant."""

    def __init__(self, config, limit=7.0, alpha=None):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.num_experts, self.limit, self.alpha = 8, limit, alpha
        self.gate_up_proj = nn.Parameter(torch.randn(8, 64, 64, generator=g))
        self.down_proj = nn.Parameter(torch.randn(8, 64, 32, generator=g) * 0.15)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError("dispatched")

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


class Shifted(Clamped):
    """gpt-oss's gate, with both constants."""

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


class Softcapped(Clamped):
    """A gate with a constant, on the composed path."""

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * torch.tanh(up / self.limit) * self.limit


class Plain(Clamped):
    """transformers' own gate, with whatever `act_fn` is."""

    _apply_gate = moe._default_apply_gate


def dispatched(cls: type, *args, **flags) -> nn.Module:
    made = moe.use_experts_implementation(type(f"{cls.__name__}Experts", (cls,), {}), **flags)
    return made(SimpleNamespace(_experts_implementation="moesaic", num_experts_per_tok=2), *args)


def loop(experts: nn.Module, x, ids, weights) -> torch.Tensor:
    """The layer in fp64, a token and a choice at a time, with biases where the module has them."""
    wide = copy.deepcopy(experts).double()
    flipped = getattr(wide, "is_transposed", False)
    y = torch.zeros_like(x, dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(ids.shape[1]):
            e = ids[t, k]
            up, down = (w[e].T if flipped else w[e] for w in (wide.gate_up_proj, wide.down_proj))
            h = up @ x[t].double()
            h = wide._apply_gate(h + wide.gate_up_proj_bias[e] if wide.has_bias else h)
            out = down @ h
            y[t] += weights[t, k].double() * (out + wide.down_proj_bias[e] if wide.has_bias else out)
    return y


# ---------------------------------------------------------------- constants under a tracer
DYNAMIC = (False, True, None)


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("cls,alpha", ((Clamped, None), (Shifted, 1.5), (Softcapped, None)))
def test_classes_with_constants_compile(cls, alpha, dynamic):
    """One compiled forward sees three limits: with `dynamic=None` the second makes the tracer hold it as a symbol."""
    torch._dynamo.reset()
    recognise._recognise.cache_clear()
    made = type(dispatched(cls))
    layers = [made(SimpleNamespace(_experts_implementation="moesaic"), limit, alpha) for limit in (7.0, 5.0, 2.5)]
    compiled = torch.compile(made.forward, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x, (ids, weights) = 3 * torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), choices(6)
    with torch.no_grad():
        outs = [compiled(layer, x, ids, weights) for layer in (*layers, layers[0])]
        wants = [loop(layer, x, ids, weights) for layer in (*layers, layers[0])]
    for y, want in zip(outs, wants, strict=True):
        assert_close(y, want, 64, STAGES["fused_experts"])
    assert torch.equal(outs[0], outs[3]) and not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("name,dynamic", [(name, True) for name in MODELS] + [("gpt_oss", False), ("gpt_oss", None)])
def test_every_class_compiles(name, dynamic):
    torch._dynamo.reset()
    recognise._recognise.cache_clear()
    experts = experts_of(build(name, "moesaic"))
    compiled = torch.compile(type(experts).forward, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for tokens in (6, 1):
            x, (ids, weights) = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)), choices(tokens)
            assert_close(
                compiled(experts, x, ids, weights), loop(experts, x, ids, weights), 64, STAGES["fused_experts"]
            )


def test_a_model_with_constants_compiles():
    torch._dynamo.reset()
    model = build("gpt_oss", "moesaic").eval()
    model.model.layers = model.model.layers[:1]  # most of the time is spent on tracing attention
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)(input_ids=IDS).logits
        assert_within({"logits": got}, {"logits": model(input_ids=IDS).logits})


# ---------------------------------------------------------------- what is recognised
@pytest.mark.parametrize("act,want", ((F.silu, "swiglu"), (F.gelu, "geglu"), (F.relu, "reglu"), (torch.relu, "reglu"),
                                      (torch.tanh, None), (lambda x: x, None)))  # fmt: skip
def test_activations_that_are_functions(act, want):
    experts = dispatched(Plain)
    del experts.act_fn
    experts.act_fn = act
    activation = integration.plan(experts).activation
    assert (activation.name if activation else None) == want
    x, (ids, weights) = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), choices(6)
    torch._dynamo.reset()
    compiled = torch.compile(type(experts).forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want64 = loop(experts, x, ids, weights)
        for y in (experts(x, ids, weights), compiled(experts, x, ids, weights)):
            assert_close(y, want64, 64, STAGES["fused_experts"])


def test_lfm2_is_fused():
    config = transformers.AutoConfig.for_model(
        "lfm2_moe", **BASE, num_experts=8, moe_intermediate_size=32, intermediate_size=48, num_dense_layers=0,
        layer_types=["full_attention", "conv"],
    )  # fmt: skip
    steps = []
    for implementation in ("eager", "moesaic"):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation).float()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "experts" in name and value.dim() > 1:
                    value.normal_(0, 0.2)
        steps.append(train_step(model))
    assert integration.plan(experts_of(model)).activation is moesaic.ACTIVATIONS["swiglu"]
    assert_within(steps[1], steps[0])


@pytest.mark.parametrize("cls", (Clamped, Softcapped))  # fused, composed
def test_biases_wider_than_the_weights(cls):
    experts = dispatched(cls, has_bias=True).bfloat16()
    g = torch.Generator().manual_seed(4)
    for name, width in (("gate_up_proj_bias", 64), ("down_proj_bias", 64)):
        experts.register_parameter(name, nn.Parameter(torch.randn(8, width, generator=g)))  # fp32
    x, (ids, weights) = torch.randn(6, 64, generator=g).bfloat16(), choices(6)
    y = experts(x, ids, weights)
    assert y.dtype == torch.bfloat16
    wide = copy.deepcopy(experts)
    want = loop(wide, x, ids, weights)
    assert_close(y.detach(), want.detach(), 64, STAGES["fused_experts"] + 1)  # the bias is rounded as well
    theirs = moe.grouped_mm_experts_forward(experts, x, ids, weights)
    assert (y - want).norm() <= 1.5 * (theirs - want).norm()
    y.float().square().sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.abs().sum() > 0


# ---------------------------------------------------------------- classes that are not dispatched
@pytest.mark.parametrize("name", UNDECORATED)
def test_undecorated_models_run_our_operators(name, monkeypatch):
    steps, models, calls = [], {}, []
    for operator in ("fused_experts", "unpermute"):
        whole = getattr(undecorated, operator)
        monkeypatch.setattr(undecorated, operator, lambda *a, f=whole, **k: calls.append(1) or f(*a, **k))
    for implementation in ("eager", "moesaic"):
        calls.clear()
        models[implementation] = build_undecorated(name, implementation)
        steps.append(train_step(models[implementation]))
        assert bool(calls) == (implementation == "moesaic")
    assert_within(steps[1], steps[0])
    assert models["moesaic"].state_dict().keys() == models["eager"].state_dict().keys()
    assert "patched" in str(integration.report(models["moesaic"]))
    switched = models["eager"]
    switched.set_experts_implementation("moesaic")
    with torch.no_grad():
        logits = [m.eval()(input_ids=IDS).logits for m in (switched, models["moesaic"])]
    assert torch.equal(*logits)


def test_step3p7_runs_our_operators():
    """With a limit its gate clamps behind silu, and without one it is SwiGLU."""
    from transformers.models.step3p7 import modeling_step3p7 as theirs

    config = SimpleNamespace(_experts_implementation="moesaic", num_local_experts=8, hidden_size=64,
                             moe_intermediate_size=32, hidden_act="silu", num_experts_per_tok=2)  # fmt: skip
    for limit in (None, 0.5):
        with apply_patches():
            experts = theirs.Step3p7Experts(config, swiglu_limit=limit)
        assert isinstance(experts, theirs.Step3p7Experts) and type(experts) is not theirs.Step3p7Experts
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.normal_(0, 0.2, generator=g)
        x, (ids, weights) = torch.randn(6, 64, generator=g), choices(6)
        assert_close(experts(x, ids, weights).detach(), loop(experts, x, ids, weights).detach(), 64,
                     STAGES["fused_experts"])  # fmt: skip
        assert limit or integration.plan(experts).activation is moesaic.ACTIVATIONS["swiglu"]


def switch(implementation: str) -> nn.Module:
    config = transformers.AutoConfig.for_model(
        "switch_transformers", decoder_start_token_id=0, vocab_size=128, d_model=64, d_kv=16, d_ff=48, num_layers=2,
        num_decoder_layers=2, num_heads=4, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    return transformers.AutoModelForSeq2SeqLM.from_config(config, experts_implementation=implementation)


def test_a_class_without_operators_says_so_once(monkeypatch):
    monkeypatch.setattr(undecorated, "_warned", set())
    quiet, loud = switch("eager").eval(), switch("moesaic").eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        quiet(input_ids=IDS, decoder_input_ids=IDS)
    with pytest.warns(UserWarning, match="SwitchTransformersExperts runs transformers' own code") as record:
        loud(input_ids=IDS, decoder_input_ids=IDS)
        loud(input_ids=IDS, decoder_input_ids=IDS)
    assert sum("moesaic" in str(w.message) for w in record) == 1
    assert "stacked" in str(integration.report(loud))


def test_patched_models_are_copied_and_pickled():
    model = build_undecorated("dbrx", "moesaic").eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_patch_reaches_one_class_only():
    """The mapping's keys are patterns that are searched for: DbrxFFN must not stand for DbrxFFNConfig."""
    from transformers.models.dbrx import configuration_dbrx, modeling_dbrx

    before = configuration_dbrx.DbrxFFNConfig, modeling_dbrx.DbrxFFN
    with apply_patches():
        assert configuration_dbrx.DbrxFFNConfig is before[0] and modeling_dbrx.DbrxFFN is not before[1]
    assert modeling_dbrx.DbrxFFN is before[1]


def test_a_callers_own_patch_comes_first():
    mine = type("Mine", (nn.Module,), {})
    register_patch_mapping({"JetMoeMoE": mine})
    try:
        from transformers.models.jetmoe import modeling_jetmoe

        undecorated.register()
        with apply_patches():
            assert modeling_jetmoe.JetMoeMoE is mine
    finally:
        unregister_patch_mapping(["JetMoeMoE"])


def test_the_table_is_whole():
    """Every class of experts in transformers is dispatched by it, or in our table, or part of a class in it."""
    parts = {"JetMoeParallelExperts", "Llama4TextExperts"}
    named = {entry.name for entry in undecorated.UNDECORATED}
    assert {f"^{name}$" for name in named} <= get_patch_mapping().keys()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = path.read_text()
        if "use_experts_implementation" not in text:
            found = set(re.findall(r"^class (\w+Experts)\(", text, re.MULTILINE))
            assert found <= named | parts, path


# ---------------------------------------------------------------- tensor subclasses
class Int4Tensor(torch.Tensor):
    """A weight of a quantisation library: it states a shape and dtype, and holds something else."""

    @staticmethod
    def __new__(cls, packed, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)

    def __init__(self, packed, shape):
        self.packed = packed

    def __tensor_flatten__(self):
        return ["packed"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, shape, stride):
        return Int4Tensor(inner["packed"], shape)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Int4Tensor(args[0].packed, args[0].shape)
        raise NotImplementedError(f"{function} on Int4Tensor")


def test_wrapped_weights_are_refused_at_the_door():
    experts = dispatched(Clamped)
    packed = Int4Tensor(torch.zeros(8, 64, 16, dtype=torch.uint8), (8, 64, 32))
    experts.down_proj = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(moesaic.Unsupported, match=r"down_proj of ClampedExperts .* Int4Tensor .*dequantise at load"):
        experts(torch.randn(3, 64), *choices(3))
    line = integration.report(nn.ModuleDict({"mlp": experts})).lines[0]
    assert line.path == "refused" and "down_proj is a tensor subclass, Int4Tensor" in line.why


def test_packed_weights_are_refused_in_the_report():
    experts = dispatched(Clamped)
    experts.down_proj = nn.Parameter(torch.zeros(8, 64, 16, dtype=torch.int8), requires_grad=False)
    line = integration.report(nn.ModuleDict({"mlp": experts})).lines[0]
    assert line.path == "refused" and "packed FP4" in line.why


def test_fp8_without_a_scale_is_refused():
    q = torch.zeros(2, 6, 4, dtype=torch.float8_e4m3fn)
    for scale in (None, torch.ones(2, 6), torch.ones(3, 1, 1)):
        with pytest.raises(ValueError, match="scale must have shape"):
            moesaic.formats.FORMATS["fp8_block"].dequantize(q, scale, None, torch.float32)


# ---------------------------------------------------------------- watchers: FLOPs, jit.trace, export
T, K, H, I, E = 16, 2, 32, 24, 4
FORWARD = 2 * T * K * H * I * 3


def small_layer() -> nn.Module:
    torch.manual_seed(0)
    config = moesaic.nn.MoEConfig.preset("qwen3-moe").replace(hidden_size=H, intermediate_size=I, num_experts=8)
    return moesaic.nn.MoE(config).eval()


@pytest.mark.parametrize("frozen,backward", ((set(), 2 * FORWARD), ({"w_gate_up", "w_down"}, FORWARD),
                                             ({"x", "w_gate_up"}, FORWARD // 3),
                                             ({"x"}, 2 * FORWARD - FORWARD * 2 // 3)))  # fmt: skip
@pytest.mark.parametrize("transposed", (False, True))
def test_flops_of_a_layer(frozen, backward, transposed):
    shapes = dict(x=(T, H), w_gate_up=(E, H, 2 * I) if transposed else (E, 2 * I, H),
                  w_down=(E, I, H) if transposed else (E, H, I))  # fmt: skip
    operands = {name: torch.randn(shape, requires_grad=name not in frozen) for name, shape in shapes.items()}
    routing = moesaic.route(torch.randn(T, E), top_k=K)
    with FlopCounterMode(display=False) as counter:
        y = moesaic.fused_experts(*operands.values(), routing, transposed=transposed)
        assert counter.get_total_flops() == FORWARD
        y.sum().backward()
    assert counter.get_total_flops() == FORWARD + backward


def test_flops_of_parts():
    rows, w = torch.randn(T * K, H, requires_grad=True), torch.randn(E, I, H, requires_grad=True)
    x, gate = torch.randn(T, H, requires_grad=True), torch.randn(E, H, requires_grad=True)
    routing = moesaic.route(torch.randn(T, E), top_k=K)
    with FlopCounterMode(display=False) as counter:
        moesaic.grouped_matmul(rows, w, routing).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * T * K * H * I
        torch.ops.moesaic.router_logits(x, gate, True, "").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * T * K * H * I + 3 * 2 * T * H * E


def test_flops_of_a_model_equal_eager_ones():
    """Eager experts run each token through its own experts with products that torch counts."""
    counts = []
    for implementation in ("eager", "moesaic"):
        model = build("mixtral", implementation)
        with FlopCounterMode(display=False) as counter:
            train_step(model)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("first", ("moesaic", "torch.utils.flop_counter"))
def test_formulas_are_there_whatever_is_imported_first(first):
    second = {"moesaic": "torch.utils.flop_counter", "torch.utils.flop_counter": "moesaic"}[first]
    code = (f"import sys, {first}, {second}; from torch.utils.flop_counter import flop_registry as r;"
            "print(sum('moesaic' in str(k) for k in r), any('moesaic' in repr(f) for f in sys.meta_path))")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(len(moesaic.flops.FORMULAS)), "False"]


@pytest.mark.parametrize("kind", ("layer", "operators"))
def test_jit_trace(kind):
    """One trace serves every number of tokens."""
    w, layer = torch.randn(E, I, H), small_layer()

    def operators(x):
        routing = moesaic.route(x[:, :E], top_k=K)
        return moesaic.unpermute(moesaic.grouped_matmul(moesaic.permute(x, routing), w, routing), routing)

    function = layer if kind == "layer" else operators
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the checks of shapes are not in the trace
        traced = torch.jit.trace(function, torch.randn(T, H))
        for tokens in (T, 1, 40):
            x = torch.randn(tokens, H)
            assert_close(traced(x), function(x).double(), H, STAGES["fused_experts"])


@pytest.mark.parametrize("strict", (False, True))
def test_one_exported_graph_of_experts_for_any_number_of_tokens(strict):
    experts = experts_of(build("gpt_oss", "moesaic")).eval()
    dims = {0: torch.export.Dim("tokens", min=1, max=4096)}
    with torch.no_grad():
        program = torch.export.export(
            experts, (torch.randn(24, 64), *choices(24)), dynamic_shapes=(dims, dims, dims), strict=strict
        )
        for tokens in (24, 1, 7, 300):
            x, (ids, weights) = torch.randn(tokens, 64), choices(tokens)
            assert torch.equal(program.module()(x, ids, weights), experts(x, ids, weights))


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("shape", ((24, H), (2, 12, H)))
def test_one_exported_graph_of_a_layer_for_any_number_of_tokens(shape, strict):
    layer = small_layer()
    dims = {i: torch.export.Dim(f"d{i}", min=1, max=4096) for i in range(len(shape) - 1)}
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(shape),), dynamic_shapes=(dims,), strict=strict)
        for tokens in (24, 1, 7, 300):
            x = torch.randn((tokens, H) if len(shape) == 2 else (1, tokens, H))
            assert torch.equal(program.module()(x), layer(x))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_layer_compiles_twice_at_most_for_any_number_of_tokens():
    """One token is a graph of its own, since torch specialises a size of 1."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = small_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for tokens in (24, 300, 7, 17, 1):
            x = torch.randn(tokens, H)
            assert_close(compiled(x), layer(x).double(), H, STAGES["fused_experts"])
    assert graphs() == 2


def test_batches_of_sequences_share_a_compiled_graph():
    """The first is compiled as it comes, the second makes the batch a symbol."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    config = small_layer().config.replace(sequence_balance_loss_coef=0.1)
    layer = moesaic.nn.MoE(config).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 4, 5):
        compiled(torch.randn(batch, 20, H))
    assert graphs() == 2
