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


def test_a_layer_between_guards(device):
    E, K, T, H, I = 4, 2, 9, 32, 24
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(T, E, generator=g).topk(K, -1).indices
    ids[2:, 1] = -1
    shapes = ((T, H), (E, 2 * I, H), (E, H, I))
    plain = [torch.randn(s, generator=g) for s in shapes]
    weights = torch.rand(T, K, generator=g)
    outcomes = []
    for implementation, tensors in (
        ("triton", [guarded(t, device) for t in plain]),
        ("reference", [t.to(device).double() for t in plain]),
    ):
        leaves = [t.detach().requires_grad_() for t in tensors]
        routing = Routing.from_topk(weights.to(device), ids.to(device), E)
        y = fused_experts(*leaves, routing, implementation=implementation)
        outcomes.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for name, out, want in zip(("y", "dx", "dw_gate_up", "dw_down"), *outcomes, strict=True):
        assert_close(out, want, H * K * T, name=name)
