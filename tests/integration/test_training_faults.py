"""Training that goes wrong in silence: losses without a graph, biases that do not move, hooks that see nothing."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic import Routing
from moesaic.nn import BiasBalancer, MoE, RouterOutput, attach_losses, routing_of

SMALL = dict(hidden_size=32, intermediate_size=16, num_experts=8, top_k=2)


def layer_of(preset="qwen3-moe", **fields):
    torch.manual_seed(0)
    return MoE(preset, **{**SMALL, **fields}).train()


def batch():
    return torch.randn(12, 32, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- losses
def gate_gradient(run, layer):
    layer.zero_grad()
    run()
    return layer.gate.weight.grad.clone()


def test_losses_of_a_forward_without_gradient_refuse_their_backward():
    layer = layer_of(z_loss_coef=0.1)
    checkpoint(layer, batch().requires_grad_(), use_reentrant=True)
    total = sum(layer.losses.values())
    assert total.item() > 0, "their values can be read"
    with pytest.raises(RuntimeError, match=r"MoE\.losses: .*use_reentrant=False, or attach_losses"):
        total.backward()
    with torch.no_grad():
        layer(batch())
    assert all(loss.item() >= 0 for loss in layer.losses.values())
    layer.gate.requires_grad_(False)
    with torch.no_grad():
        layer(batch())
    assert not any(loss.requires_grad for loss in layer.losses.values()), "nobody waits for their gradient"


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_attached_losses_train_the_gate_however_it_is_checkpointed(reentrant, scale):
    layer, x = layer_of(z_loss_coef=0.1), batch()

    def added():
        y = layer(x)
        (scale * (y.square().mean() + sum(layer.losses.values()))).backward()

    def block(x):
        y = layer(x)
        return attach_losses(y, layer.losses, scale=lambda: scale)

    def attached():
        leaf = x.clone().requires_grad_()
        y = block(leaf) if reentrant is None else checkpoint(block, leaf, use_reentrant=reentrant)
        (scale * y.square().mean()).backward()

    want = gate_gradient(added, layer)
    torch.testing.assert_close(gate_gradient(attached, layer), want)
    assert not torch.allclose(want, gate_gradient(lambda: (scale * layer(x).square().mean()).backward(), layer))


def test_attaching_changes_no_bit_and_takes_no_losses():
    layer = layer_of(z_loss_coef=0.1)
    y = layer(batch())
    assert torch.equal(attach_losses(y, layer.losses), y)
    assert attach_losses(y, {}) is y
    layer.eval()
    assert attach_losses(layer(batch()), layer.losses).requires_grad


# ---------------------------------------------------------------- biases
def one_sided(layer, steps, rate=1e-3):
    """Steps of a balancer that finds expert 0 chosen every time."""
    bias = layer.gate.e_score_correction_bias
    balancer = BiasBalancer(layer, rate=rate, centre=False)
    for _ in range(steps):
        balancer._watched["gate"].add(torch.zeros(5, 2, dtype=torch.int64))
        balancer.step()
    return balancer, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_of_any_dtype_moves(dtype):
    layer = layer_of("deepseek-v3", num_groups=1, topk_groups=1)
    layer.gate.e_score_correction_bias.fill_(0.6)
    layer.gate.e_score_correction_bias = layer.gate.e_score_correction_bias.to(dtype)
    balancer, bias = one_sided(layer, 100)
    assert bias[0].item() == pytest.approx(0.5, abs=2e-3) and bias[1].item() == pytest.approx(0.7, abs=4e-3)
    saved = balancer.state_dict()
    assert saved["biases"]["gate"].dtype == torch.float32
    other = copy.deepcopy(layer)
    other.gate.e_score_correction_bias.zero_()
    again = BiasBalancer(other, centre=False)
    again.load_state_dict(saved)
    assert torch.equal(other.gate.e_score_correction_bias, bias)
    for b in (balancer, again):
        b._watched["gate"].add(torch.zeros(5, 2, dtype=torch.int64))
        b.step()
    torch.testing.assert_close(again.state_dict()["biases"], balancer.state_dict()["biases"])


def test_a_bias_that_somebody_sets_stays_set():
    layer = layer_of("deepseek-v3", num_groups=1, topk_groups=1)
    layer.gate.e_score_correction_bias = layer.gate.e_score_correction_bias.bfloat16()
    balancer, bias = one_sided(layer, 3)
    bias.fill_(2.0)
    balancer._watched["gate"].add(torch.zeros(5, 2, dtype=torch.int64))
    balancer.step()
    torch.testing.assert_close(balancer.state_dict()["biases"]["gate"][1], torch.tensor(2.001))


def test_inference_mode_is_not_counted_and_spoils_nothing():
    layer = layer_of("deepseek-v3", num_groups=1, topk_groups=1)
    balancer = BiasBalancer(layer)
    with torch.inference_mode():
        layer(batch())
    layer(batch()).sum().backward()
    with torch.inference_mode():
        layer(batch())
    layer(batch()).sum().backward()
    balancer.step()
    assert balancer.loads["gate"].sum() == 2 * 12 * 2


def test_a_bias_that_is_a_distributed_parameter():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    layer = layer_of("deepseek-v3", num_groups=1, topk_groups=1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    try:
        mesh = DeviceMesh("cpu", [0])
        del layer.gate.e_score_correction_bias
        bias = torch.nn.Parameter(distribute_tensor(torch.zeros(8), mesh, [Shard(0)]), requires_grad=False)
        layer.gate.register_parameter("e_score_correction_bias", bias)
        balancer, _ = one_sided(layer, 5)
        torch.testing.assert_close(bias.full_tensor()[:2], torch.tensor([-0.005, 0.005]))
        saved = balancer.state_dict()["biases"]["gate"]
        assert type(saved) is torch.Tensor
        balancer.load_state_dict({**balancer.state_dict(), "biases": {"gate": saved + 1}})
        torch.testing.assert_close(bias.full_tensor(), saved + 1)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- what is masked touches nothing
@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize(
    "fields",
    [{}, dict(noise="noisy_topk", load_loss_coef=0.1), dict(num_shared_experts=0, router_norm_eps=1e-6)],
    ids=str,
)
def test_a_masked_token_touches_no_gradient(fields, implementation):
    """Whatever stands in its row: gradients are those without it."""
    layer = layer_of(z_loss_coef=0.1, load_balancing_loss_coef=0.1, **fields)
    mask = torch.ones(12, dtype=torch.bool)
    mask[[2, 7]] = False
    found = []
    for value in (0.0, float("nan"), float("inf")):
        layer.zero_grad()
        x = batch()
        x[~mask] = value
        with moesaic.use(implementation):
            y = layer(x.requires_grad_(), token_mask=mask, generator=1)
            (y[mask].square().sum() + sum(layer.losses.values())).backward()
        found.append([p.grad.clone() for p in layer.parameters()] + [x.grad])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b) and a.isfinite().all()


# ---------------------------------------------------------------- what passes between modules
def test_hooks_see_the_routers_tensors():
    layer, seen = layer_of(z_loss_coef=0.1), {}

    def hook(module, inputs, outputs):
        seen[type(module).__name__] = [g is not None for g in outputs]

    for module in (layer.gate, layer.experts):
        module.register_full_backward_hook(hook)
    x = batch().requires_grad_()
    y = layer(x)
    (y.square().sum() + sum(layer.losses.values())).backward()
    assert any(seen["Router"]) and seen["Experts"] == [True]
    other = layer_of(z_loss_coef=0.1)
    plain = batch().requires_grad_()
    y = other(plain)
    (y.square().sum() + sum(other.losses.values())).backward()
    assert torch.equal(x.grad, plain.grad) and torch.equal(layer.gate.weight.grad, other.gate.weight.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_gate_keeps_its_gradient(reentrant):
    layer, x = layer_of(), batch()

    def run(call):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        layer.experts(leaf, call(leaf)).square().sum().backward()
        return layer.gate.weight.grad.clone()

    want = run(layer.gate)
    assert want.abs().sum() > 0
    assert torch.equal(run(lambda leaf: checkpoint(layer.gate, leaf, use_reentrant=reentrant)), want)


def test_routing_weights_stay_fp32_where_the_experts_are_a_unit_of_fsdp():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layer, x = layer_of(), batch()
    plain = copy.deepcopy(layer)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    try:
        fully_shard(layer.experts, mesh=DeviceMesh("cpu", [0]), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
        y = layer(x)
    finally:
        dist.destroy_process_group()
    routing = routing_of(plain.gate(x))
    want = plain.experts.bfloat16()(x.bfloat16(), routing)
    assert torch.equal(y, want)
    rounded = replace(routing, topk_weights=routing.topk_weights.bfloat16().float())
    assert not torch.equal(y, plain.experts(x.bfloat16(), rounded)), "rounding the weights would show"


def test_a_routers_output_has_every_field_of_a_routing():
    assert set(RouterOutput._fields) == {f.name for f in fields(Routing)}
    assert RouterOutput._fields[:3] == ("logits", "topk_weights", "topk_ids")


def test_a_gate_that_returns_something_else_is_named():
    layer = layer_of()
    layer.gate = torch.nn.Linear(32, 8)
    with pytest.raises(ValueError, match="a gate must return a Routing or a RouterOutput, got Tensor"):
        layer(batch())
