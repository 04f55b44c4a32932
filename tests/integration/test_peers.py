"""The peers of `moesaic bench` whose packages are not here: what is ours in their adapters, and the bound."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from moesaic.bench import Plan, harness, libraries, limits, peers, run
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


# ---------------------------------------------------------------- gpt-oss
def gpt_oss(tokens: int):
    """A small gpt-oss layer, a batch and its exact output."""
    layer = Layer.make(case_named("gpt-oss-120b-small"), torch.float32, torch.device("cpu"))
    batch = layer.batches(tokens)[0]
    return layer, batch, layer.oracle(batch)[1]


def experts(batch_x, up, down, b_up, b_down, ids, weights):
    """gpt-oss's layer in plain torch, of output-major weights with rows g0 u0 g1 u1 ..., as the libraries take it."""
    y = torch.zeros_like(batch_x)
    for t, (row, picked) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for e, weight in zip(row, picked, strict=True):
            h = up[e] @ batch_x[t] + b_up[e]
            gate, linear = h[0::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
            y[t] += weight * (down[e] @ (gate * torch.sigmoid(1.702 * gate) * (linear + 1)) + b_down[e])
    return y


@pytest.mark.parametrize("tokens", [1, 9])
def test_vllm_gets_gpt_oss_as_it_wants_it(monkeypatch, tokens):
    layer, batch, want = gpt_oss(tokens)
    oai = object()

    def fused_experts(x, w1, w2, topk_weights, topk_ids, activation, quant_config):
        assert activation is oai and w1.is_contiguous() and w2.is_contiguous() and topk_ids.dtype == torch.int32
        return experts(x, w1, w2, *quant_config, topk_ids, topk_weights)

    package = "vllm.model_executor.layers.fused_moe"
    modules = {
        "vllm_shim": SimpleNamespace(fused_experts=lambda: fused_experts, __spec__=object()),
        f"{package}.activation": SimpleNamespace(MoEActivation=SimpleNamespace(SWIGLUOAI=oai)),
        f"{package}.config": SimpleNamespace(biased_moe_quant_config=lambda *biases: biases),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    peer = peers.PEERS["vllm"]
    assert_close(peer.build(layer)(batch), want, 64, 8)
    assert peer.comparable(layer)


@pytest.mark.parametrize("tokens", [1, 9])
def test_triton_kernels_gets_gpt_oss_as_it_wants_it(monkeypatch, tokens):
    """Its `routing` sorts the pairs of token and choice by expert; a second product with a scatter sums them."""
    layer, batch, want = gpt_oss(tokens)

    def routing(logits, top_k, expt_indx):
        assert logits.dtype == torch.float32 and expt_indx.dtype == torch.int32 and expt_indx.is_contiguous()
        scores = logits.gather(1, expt_indx.long()).softmax(-1).flatten()
        chosen, order = expt_indx.flatten().long().sort(stable=True)
        return SimpleNamespace(gate_scal=scores[order], chosen=chosen), order, order

    def matmul_ogs(x, w, bias, data, gather_indx=None, scatter_indx=None, gammas=None, fused_activation=None):
        assert bias.dtype == torch.float32 and w.stride(-2) == 1
        rows = x if gather_indx is None else x[gather_indx // layer.case.top_k]
        out = torch.einsum("rk,rkn->rn", rows, w[data.chosen]) + bias[data.chosen]
        if fused_activation is not None:
            (_, swiglu, names), constants, reduction = fused_activation
            assert reduction == 2
            out = swiglu(out, **dict(zip(names, constants, strict=True)))
        if scatter_indx is None:
            return out
        token = scatter_indx // layer.case.top_k
        return torch.zeros_like(batch.x).index_add_(0, token, out * gammas[:, None])

    def swiglu(h, alpha, limit):
        gate, linear = h[:, 0::2].clamp(max=limit), h[:, 1::2].clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (linear + 1)

    tuples = {name: lambda *arguments: arguments for name in ("FnSpecs", "FusedActivation")}
    modules = {
        "matmul_ogs": SimpleNamespace(matmul_ogs=matmul_ogs, **tuples),
        "swiglu": SimpleNamespace(swiglu_fn=swiglu), "routing": SimpleNamespace(routing=routing),
    }  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"triton_kernels.{name}", module)
    peer = peers.PEERS["triton_kernels"]
    assert_close(peer.build(layer)(batch), want, 64, 8)
    plain = Layer.make(case_named("olmoe-small"), torch.float32, torch.device("cpu"))
    assert peer.comparable(layer) and not peer.comparable(plain)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vllm", None),
        ("triton_kernels", None),
        ("deepgemm", libraries.ONE_FORM),
        ("sonic", "sonicmoe has no clipped SwiGLU"),
        ("liger", libraries.ONE_FORM),
    ],
)
def test_libraries_say_whether_they_run_gpt_oss(monkeypatch, name, reason):
    monkeypatch.setattr(libraries, "found", lambda module: True)
    case = case_named("gpt-oss-120b-small")
    layer = Layer.make(case, torch.bfloat16, torch.device("cpu"))
    gpu = dataclasses.replace(layer, device=torch.device("cuda"))
    assert peers.PEERS[name].why_not(gpu) == reason
    other = dataclasses.replace(gpu, case=dataclasses.replace(case, activation="geglu_tanh"))
    assert "its adapter knows concatenated SwiGLU without biases" in peers.PEERS[name].why_not(other)
    assert "has no backward" in (peers.PEERS["vllm"].why_not(dataclasses.replace(gpu, train=True)) or "")


# ---------------------------------------------------------------- peers that fail
class TheirOwn(Exception):
    """As some packages have one that derives from nothing better."""


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), KeyError("a"), subprocess.SubprocessError("a"), TheirOwn("a")])
@pytest.mark.parametrize("place", ["build", "first call", "a later batch", "shape"])
def test_a_peer_that_fails_is_left_out_with_its_error(monkeypatch, error, place):
    def build(layer):
        if place == "build":
            raise error

        def call(batch):
            seen.append(batch)
            if place == "first call" or (place == "a later batch" and batch is not seen[0]):
                raise error
            return batch.x[:, 1:] if place == "shape" else batch.x

        return call

    seen: list = []
    monkeypatch.setitem(sys.modules, "cutlass.base_dsl.common", SimpleNamespace(DSLBaseError=TheirOwn))
    monkeypatch.setitem(peers.PEERS, "odd", peers.Peer("odd", "odd", lambda layer: None, build))
    (result,) = run(Plan(("olmoe-small",), (4,), peers=("odd", "torch_loop"), seconds=0.05))
    assert [row.peer for row in result.measured] == ["moesaic", "torch_loop"] and not result.failed
    ((name, reason),) = result.not_run
    wanted = "ValueError: error_report: out must" if place == "shape" else f"{type(error).__name__}: "
    assert name == "odd" and reason.startswith(wanted) and "\n" not in reason


def test_a_run_ends_with_the_culprit_where_a_peer_breaks_the_device(monkeypatch):
    """An illegal address is one: whatever is asked of the device later fails too."""
    broken = []

    def build(layer):
        broken.append(True)
        raise RuntimeError("an illegal memory access")

    def synchronize(device):
        if broken:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(harness, "_synchronize", synchronize)
    monkeypatch.setitem(peers.PEERS, "odd", peers.Peer("odd", "odd", lambda layer: None, build))
    with pytest.raises(RuntimeError, match=r"odd left the device in an error.*illegal memory.*run again without it"):
        list(run(Plan(("olmoe-small",), (4,), peers=("odd",), seconds=0.05)))
