"""Tiles: every configuration that tuning may pick computes the same, wherever the ends of experts fall."""

from __future__ import annotations

import pytest
import torch

from moesaic import Routing, grouped_matmul, hardware
from moesaic.activations import ACTIVATIONS, apply
from moesaic.problem import Problem
from moesaic.testing import assert_close

products = None


@pytest.fixture(autouse=True)
def kernels(device):
    global products
    if reason := hardware.triton_why_not(device, hardware.arch_of(torch.device(device))):
        pytest.skip(reason)
    from moesaic.ops.grouped_matmul import _triton

    products = _triton


def counts_to_ids(counts) -> torch.Tensor:
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][:, None]


def shapes():
    """`(block_m, block_n, block_k, group_m)`: several tiles in every direction, groups that do not divide."""
    return [(16, 32, 32, 1), (16, 64, 16, 3), (32, 32, 32, 2), (64, 32, 16, 16)]


COUNTS = ((17, 0, 16, 0, 1, 33), (0, 0, 90, 0, 0, 0), (64, 64, 0, 32, 0, 0), (0, 0, 0, 0, 0, 1), (1, 15, 16, 17, 31, 1))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("tile", shapes(), ids=str)
def test_product_of_any_tile(counts, tile, device):
    m, n, k, group = tile
    E, N, K = len(counts), 72, 40
    g = torch.Generator().manual_seed(0)
    routing = Routing.from_topk(None, counts_to_ids(counts).to(device), E)
    R = sum(counts)
    rows, w = torch.randn(R, K, generator=g).to(device), torch.randn(E, N, K, generator=g).to(device)
    problem = Problem("grouped_matmul", device, hardware.arch_of(torch.device(device)), rows.dtype, R, 1, E, K, N)
    config = products.Config(m, n, k, 4, 2, group)
    out = products.gemm(
        rows, w, False, routing.expert_offsets, problem, rows=R, N=N, K=K, zero_tail=True, config=config
    )
    want = grouped_matmul(rows.double(), w.double(), routing, implementation="reference")
    assert_close(out, want, K)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["concatenated", "interleaved"])
@pytest.mark.parametrize("tile", shapes(), ids=str)
def test_gathered_product_with_activation(activation, interleaved, tile, device):
    """Odd widths: the last tile of columns is part gate, part nothing."""
    m, n, k, group = tile
    act, E, I, H, top_k, T = ACTIVATIONS[activation], 3, 21, 24, 2, 30
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(T, E, generator=g).topk(top_k, -1).indices
    routing = Routing.from_topk(None, ids.to(device), E)
    x, w = (t.to(device, torch.bfloat16) for t in (torch.randn(T, H, generator=g),
                                                   torch.randn(E, act.width(I), H, generator=g) / 5))  # fmt: skip
    arch = hardware.arch_of(torch.device(device))
    problem = Problem("fused_experts", device, arch, x.dtype, T, top_k, E, H, I, activation, interleaved, training=True)
    hidden = torch.full((T * top_k, act.width(I)), float("nan"), dtype=x.dtype, device=device)
    out = products.gemm(
        x, w, False, routing.expert_offsets, problem, rows=T * top_k, N=I, K=H, gather=routing.row_order, top_k=top_k,
        activation=act, hidden=hidden, config=products.Config(m, n, k, 4, 2, group),
    )  # fmt: skip
    rows = x.double()[routing.row_order.long() // top_k]
    want = grouped_matmul(rows, w.double(), routing, implementation="reference")
    assert_close(hidden, want, H, name="hidden")
    assert_close(out, apply(act, want, interleaved), H, name="activations")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_configuration_of_tuning(device):
    """The tiles themselves, at a size that fills them."""
    E, H, I, T = 8, 512, 384, 1000
    act = ACTIVATIONS["swiglu"]
    ids = torch.rand(T, E).topk(2, -1).indices.to(device)
    routing = Routing.from_topk(None, ids, E)
    x = torch.randn(T, H, device=device, dtype=torch.bfloat16)
    w = torch.randn(E, 2 * I, H, device=device, dtype=torch.bfloat16) * H**-0.5
    problem = Problem("fused_experts", "cuda", hardware.arch_of(torch.device(device)), x.dtype, T, 2, E, H, I, "swiglu")
    rows = x.float()[routing.row_order.long() // 2]
    want = apply(act, grouped_matmul(rows, w.float(), routing, implementation="torch").double(), False)
    for config in products.configs():
        out = products.gemm(x, w, False, routing.expert_offsets, problem, rows=2 * T, N=I, K=H,
                            gather=routing.row_order, top_k=2, activation=act, config=config)  # fmt: skip
        assert_close(out, want, H, name=str(config))
