"""`experts_implementation="moesaic"` against transformers' own eager experts, whole models.

The bar for fp32 is `max|d| / max|ref| <= 2e-6` for the logits and for every gradient.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.17")

from hf_models import BAR, IDS, MODELS, assert_within, build, choices, distances, experts_of, train_step
from transformers import AutoModelForCausalLM

import moesaic
import moesaic.integrations.transformers as integration
from moesaic.integrations import recognise


@functools.cache
def eager_step(name: str) -> dict[str, torch.Tensor]:
    return train_step(build(name, "eager"))


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
    recognise._recognise.cache_clear()  # the activation must be recognised while tracing, too
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
    recognise._recognise.cache_clear()
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
    ours, theirs = ((steps[i]["logits"].float() - exact["logits"]).norm() for i in ("moesaic", "eager"))
    assert 0 < ours < 1.5 * theirs


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
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    spec = importlib.util.spec_from_file_location("moesaic.integrations.copy", integration.__file__)
    with pytest.raises(moesaic.MissingExtra, match=r"pip install \"moesaic\[hf\]\""):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
