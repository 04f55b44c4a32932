"""Kernels read their operands and nothing beside them."""

from __future__ import annotations

import pytest
import torch

from moesaic import Routing, fused_experts, grouped_matmul, hardware
from moesaic.testing import assert_close


@pytest.fixture(autouse=True)
def kernels(device):
    if reason := hardware.triton_why_not(device, hardware.arch_of(torch.device(device))):
        pytest.skip(reason)


def guarded(t: torch.Tensor, device: str) -> torch.Tensor:
    """The same values between NaN, so that what is read beside them shows."""
    rows = t.shape[0]
    whole = torch.full((rows + 2, *t.shape[1:]), float("nan"), dtype=t.dtype)
    whole[1:-1] = t
    return whole.to(device)[1:-1]


@pytest.mark.parametrize("tokens", [1, 40], ids=["by row", "by expert"])
def test_dropped_rows_meet_no_matrix(tokens, device):
    """They lie behind the last expert's, whose matrix may end the allocation: what is not asked for is not written."""
    from moesaic.ops.grouped_matmul import gpu
    from moesaic.ops.grouped_matmul.gpu.schedule import TileTable
    from moesaic.ops.grouped_matmul.gpu.spec import Config, GemmSpec

    E, K, N, width = 3, 2, 24, 32
    ids = torch.randint(0, E, (tokens, K), generator=torch.Generator().manual_seed(0))
    ids[:, 1] = -1
    routing = Routing.from_topk(None, ids.to(device), E)
    w = guarded(torch.randn(E, N, width), device)
    rows = torch.randn(tokens * K, width).to(device)
    poison = torch.full((tokens * K, N), 7.0, device=device)
    spec = GemmSpec(hardware.gpu_of(rows.device), rows.dtype, E, N, width, (width, *w.stride()))
    gemm = gpu.make(spec, gpu.Choice("pointer", Config(16, 32, 32, 4, 2)))
    gemm.run(poison, rows, w, TileTable(routing.expert_offsets, tokens * K), None, None, None, None)
    live = int(routing.expert_offsets[-1])
    want = grouped_matmul(rows.double(), w.double(), routing, implementation="reference")
    assert_close(poison[:live], want[:live], width)
    assert bool((poison[live:] == 7).all())


@pytest.mark.parametrize("whole", [False, True], ids=["weights", "with biases and residual"])
def test_a_layer_between_guards(whole, device):
    """Every operand that lies in memory, forward and backward."""
    E, K, T, H, I = 4, 2, 9, 32, 24
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(T, E, generator=g).topk(K, -1).indices
    ids[2:, 1] = -1
    shapes = dict(x=(T, H), w_gate_up=(E, 2 * I, H), w_down=(E, H, I), weights=(T, K))
    if whole:
        shapes |= dict(b_gate_up=(E, 2 * I), b_down=(E, H), residual=(T, H))
    plain = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    outcomes = []
    for implementation, tensors in (
        ("triton", {name: guarded(t, device) for name, t in plain.items()}),
        ("reference", {name: t.to(device).double() for name, t in plain.items()}),
    ):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        routing = Routing.from_topk(None, ids.to(device), E)
        y = fused_experts(**leaves, routing=routing, implementation=implementation)
        outcomes.append({"y": y} | dict(zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True)))
    got, want = outcomes
    for name in want:
        assert_close(got[name], want[name], H * K * T, name=name)
