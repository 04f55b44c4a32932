"""The peers of `moesaic bench` whose packages are not here: what is ours in their adapters, and the bound."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from moesaic.bench import Plan, limits, peers, run
from moesaic.bench.layer import Layer, case_named
from moesaic.testing import assert_close


@pytest.mark.parametrize("tokens", [1, 9])
def test_deepgemm_gets_what_its_grouped_gemm_takes(monkeypatch, tokens):
    """A stand-in that keeps its rules: one expert a tile, tiles without one skipped and left unwritten."""
    tile = 4

    def grouped(rows, w, out, owner):
        assert owner.dtype == torch.int32 and rows.shape[0] == len(owner) and len(owner) % tile == 0
        out.fill_(torch.nan)
        for block in torch.arange(len(owner)).split(tile):
            e = owner[block[0]]
            assert ((owner[block] == e) | (owner[block] == -1)).all()
            if e >= 0:
                out[block] = rows[block] @ w[e].T

    fake = SimpleNamespace(
        get_mk_alignment_for_contiguous_layout=lambda: tile, m_grouped_bf16_gemm_nt_contiguous=grouped
    )
    monkeypatch.setitem(sys.modules, "deep_gemm", fake)
    layer = Layer.make(case_named("olmoe-small"), torch.float32, torch.device("cpu"))
    assert peers.PEERS["deepgemm"].why_not(layer) == "needs a GPU"
    batch = layer.batches(tokens)[0]
    assert_close(peers.PEERS["deepgemm"].build(layer)(batch), layer.oracle(batch)[1], 64, 8)


@pytest.mark.parametrize("name", ["olmoe-small", "gpt-oss-120b-small", "nemotron-h-small"])
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_the_bound_does_at_least_the_work_of_the_products(name, tokens):
    layer = Layer.make(case_named(name), torch.float32, torch.device("cpu"))
    call = peers.PEERS["dense_bmm"].build(layer)
    for batch in layer.batches(tokens):
        hit, y = len(batch.ids.unique()), call(batch)
        assert y.shape[1] == layer.case.hidden_size and 0 <= len(y) - batch.ids.numel() < hit
    trained = Layer.make(case_named(name), torch.float32, torch.device("cpu"), train=True)
    assert peers.PEERS["dense_bmm"].why_not(trained) == "has no backward"


def test_ours_is_not_ranked_against_a_bound():
    (result,) = run(Plan(("olmoe-small",), (4,), peers=("torch_loop", "dense_bmm"), seconds=0.1))
    ours, loop, bound = result.measured
    assert ours.vs_best_peer == pytest.approx(loop.ms / ours.ms) and loop.vs_best_peer == pytest.approx(1)
    assert bound.error is None and set(ours.paired) == {"torch_loop", "dense_bmm"}


def test_peers_that_tune_are_held_to_a_few_configs_and_tune_for_every_cell(monkeypatch):
    triton = pytest.importorskip("triton")
    sizes = [(block, stages) for block in (32, 64) for stages in (2, 3, 4, 5)]
    gemm = [triton.Config({"BLOCK_N": 128, "BLOCK_K": k}, num_warps=8, num_stages=s) for k, s in sizes]
    sums = [triton.Config({"BLOCK_H": h, "BLOCK_K": 4}, num_warps=w) for h in (64, 256, 2048) for w in (4, 8)]
    module = SimpleNamespace()
    for name, configs in (("gemm", gemm), ("sum", sums)):
        tuner = object.__new__(triton.runtime.autotuner.Autotuner)
        tuner.configs, tuner.cache = configs, {"tuned": "before"}
        setattr(module, name, tuner)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_moe_kernels", module)
    for _ in range(2):
        limits.liger()
        assert [(c.kwargs["BLOCK_K"], c.num_stages) for c in module.gemm.configs] == [(64, 2), (64, 3), (64, 4)]
        assert [(c.kwargs["BLOCK_H"], c.num_warps) for c in module.sum.configs] == [(256, 4)]
        assert module.gemm.cache == {} and module.sum.cache == {}
    assert all(peers.PEERS[name].limits for name in ("sonic", "liger"))


def test_quack_keeps_three_tiles(monkeypatch):
    def config(m, n, pingpong, swap_ab=False):
        gemm = SimpleNamespace(tile_m=m, tile_n=n, pingpong=pingpong, swap_ab=swap_ab)
        return SimpleNamespace(kwargs={"config": gemm})

    every = [config(128, 192, True), config(128, 192, True, swap_ab=True), config(256, 128, False)]
    interface = SimpleNamespace(gemm_tuned=SimpleNamespace(prune_configs=lambda arguments: every))
    tuned = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", interface)
    monkeypatch.setitem(sys.modules, "sonicmoe.functional.reduction_over_k_gather", tuned)
    monkeypatch.setenv("QUACK_COMPILE_WORKERS", "3")
    for _ in range(2):
        limits.sonic()
        assert interface.gemm_tuned.prune_configs({}) == every[:1]
    every[:] = every[1:]
    assert interface.gemm_tuned.prune_configs({}) == every
