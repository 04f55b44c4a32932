"""Choice: the model, what was measured over it, and how few kernels a layer needs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import moesaic
from moesaic import Unsupported, hardware, tuning
from moesaic.activations import ACTIVATIONS
from moesaic.cases import CASES, Case
from moesaic.launcher import dry
from moesaic.ops import fused_experts as layer

H100, H200 = hardware.GPUS["H100"], hardware.GPUS["H200"]
SMALL = (Case("32x256", 256, 128, 32, 4), Case("8x512", 512, 128, 8, 2), Case("qwen3 shard", 2048, 768, 8, 8))
LAYERS = [*CASES.values(), *SMALL]


@pytest.fixture(autouse=True)
def experts(monkeypatch, tmp_path):
    if not hardware.has_triton():
        pytest.skip("triton is not installed")
    from moesaic.ops.fused_experts import _triton

    monkeypatch.setattr(_triton.gpu, "has_gluon", lambda: True)  # where Triton is another
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    forget(_triton.gpu)
    yield _triton
    forget(_triton.gpu)


def forget(gpu) -> None:
    for cached in (gpu.tuned, gpu.ways, gpu.choices):
        cached.cache_clear()


def problem_of(case: Case, place=H200, dtype=torch.bfloat16, **more):
    fields = case.problem(64, dtype, "cuda", **more)
    act = ACTIVATIONS[case.activation]
    return layer.FusedExpertsProblem(gpu=place, alpha=act.alpha, limit=act.limit, **fields)


@pytest.mark.parametrize("place", [H100, H200], ids=lambda g: g.name)
@pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)
def test_a_layer_needs_few_products(case, place, experts):
    """Over every number of tokens up to 2048: at most ten compiled products, up and down."""
    made = set()
    for spec, sorts in zip(experts._contiguous(problem_of(case, place)), (True, False), strict=True):
        choices = experts.gpu.choices(spec, sorts)
        for T in range(1, 2049):
            choice = choices.choice(T * case.top_k)
            c = choice.config
            made.add((spec.K, choice.kernel, choice.sorts, c.block_m, c.block_n, c.block_k, c.num_warps))
    assert len(made) <= 10


@pytest.mark.skipif(hardware.interpreting(), reason="launches are not collected in the interpreter")
def test_a_layer_launches_few_variants(experts):
    """All variants that Triton is asked for, from 1 to 2048 tokens, beside those of routing."""
    case = SMALL[0]
    requests = launched(case, experts, range(1, 2049))
    assert sum("gemm" in name for name, *_ in requests) <= 10
    assert len({r for r in requests if "gemm" not in r[0]}) <= 3


def launched(case: Case, experts, tokens) -> set:
    problem, E, K = problem_of(case), case.num_experts, case.top_k
    N, meta = ACTIVATIONS[case.activation].width(case.intermediate_size), dict(device="meta")
    with dry() as pending:
        for T in tokens:
            tables = (torch.empty(n, dtype=torch.int32, **meta) for n in (T * K, T * K, E + 1))
            shapes = ((T, case.hidden_size), (E, N, case.hidden_size), (E, case.hidden_size, case.intermediate_size))
            o = layer.Operands(*(torch.empty(s, dtype=torch.bfloat16, **meta) for s in shapes),
                               torch.empty(T, K, **meta), None, None, None, *tables)  # fmt: skip
            experts.forward(o, problem)
    return {(r.bound.kernel.name, r.bound.constants, r.dtypes, r.strides) for r in pending.requests.values()}


def test_one_variant_for_every_number_of_tokens(experts):
    """The same in the interpreter, too: what a launch is told apart by hangs on tiles, not on tokens."""
    few, many = (launched(SMALL[1], experts, tokens) for tokens in (range(200, 203), range(200, 256)))
    assert few == many


@pytest.mark.parametrize("name", ["H200", "H100", "H20", "GH200"])
def test_memory_and_peak_price_a_product(name, experts):
    """Few rows cost what memory takes, many what arithmetic takes."""
    place = hardware.GPUS[name]
    spec, _ = experts._contiguous(problem_of(CASES["qwen3-30b-a3b"], place))
    same, _ = experts._contiguous(problem_of(CASES["qwen3-30b-a3b"], H200))

    def least(spec, rows):
        return next(iter(experts.gpu.ways(spec.of(rows)).values()))

    few, many = (least(spec, rows) / least(same, rows) for rows in (512, 1 << 21))
    if place.peak > 500:  # an H20's arithmetic is so slow that even few rows wait for it
        assert few == pytest.approx(H200.bandwidth / place.bandwidth, rel=0.15)
    assert many == pytest.approx(H200.peak / place.peak, rel=0.15)


@pytest.mark.parametrize("name", ["H100", "H200"])
def test_every_measured_choice_can_run(name, experts):
    """Of the tables that come along: each entry is a way of one of the cases."""
    known = set()
    for case in CASES.values():
        for spec, sorts in zip(experts._contiguous(problem_of(case, hardware.GPUS[name])), (True, False), strict=True):
            key, rows = experts.gpu.tuned_key(spec), experts.gpu.tuned(name)
            for octave, way in rows.get(key, {}).items():
                known.add(key)
                sized = spec.of(octave * spec.experts)
                found = experts.gpu.measured(sized, sorts)
                assert found is not None and experts.gpu.tuned_values(found) == way, (case.name, key, octave)
    assert known == set(experts.gpu.tuned(name))


def test_a_users_own_table_comes_first(experts, tmp_path):
    spec, _ = experts._contiguous(problem_of(CASES["olmoe"]))
    sized = spec.of(256 * 64)
    before = experts.gpu.best(sized, True)
    other = next(way for way in experts.gpu.ways(sized, True) if way != before)
    (tmp_path / "tuned").mkdir()
    entry = {experts.gpu.tuned_key(spec): {"256": experts.gpu.tuned_values(other)}}
    (tmp_path / "tuned" / "h200.json").write_text(json.dumps({"products": entry}))
    forget(experts.gpu)
    assert experts.gpu.best(sized, True) == other
    assert experts.gpu.choices(spec, True).choice(256 * 64) == other
    fp32 = experts._contiguous(problem_of(CASES["olmoe"], dtype=torch.float32))[0]
    assert experts.gpu.best(fp32.of(256 * 64)).kernel == "pointer", "measured in half precision"


def test_tiles_that_gain_little_are_left_out(experts):
    """Whatever is chosen is within 2% of the best, where nothing was measured."""
    for case in CASES.values():
        place = hardware.GPUS["GH200"]
        for spec, sorts in zip(experts._contiguous(problem_of(case, place)), (True, False), strict=True):
            choices = experts.gpu.choices(spec, sorts)
            for rows in (8, 100, 1000, 10000, 100000):
                times = experts.gpu.ways(spec.of(rows), sorts)
                assert times[choices.choice(rows)] <= 1.02 * next(iter(times.values()))


def test_explain_names_kernel_tile_and_reasons(monkeypatch):
    monkeypatch.setattr(hardware, "triton_why_not", lambda *a: None)
    told = str(
        moesaic.explain("fused_experts", gpu="H200", **CASES["gpt-oss-120b"].problem(4096, torch.bfloat16, "cuda"))
    )
    assert "swap_ab_sm90 " in told and "up: " in told and "down: " in told
    told = str(
        moesaic.explain("fused_experts", gpu="H200", **CASES["llama4-scout"].problem(64, torch.bfloat16, "cuda"))
    )
    assert "not swap_ab_sm90: needs K-major weights" in told
    told = str(moesaic.explain("grouped_matmul", arch="sm_80", device="cuda", dtype=torch.bfloat16, num_rows=64,
                               num_experts=4, hidden_size=64, intermediate_size=64))  # fmt: skip
    assert "product: pointer" in told and "not persistent_tma: its tiles are sized for sm_90" in told


def test_a_kernel_by_name_runs_or_raises(device):
    rows, w = torch.randn(4, 8, device=device), torch.randn(2, 8, 8, device=device)
    routing = moesaic.Routing.from_topk(None, torch.tensor([[0], [1], [1], [0]], device=device), 2)
    if hardware.triton_why_not(device, hardware.arch_of(torch.device(device))) is None:
        out = moesaic.grouped_matmul(rows, w, routing, implementation="triton:pointer")
        assert torch.equal(out, moesaic.grouped_matmul(rows, w, routing, implementation="triton"))
        for name, reason in (("swap_ab_sm90", "kernel swap_ab_sm90"), ("nothing", "there is no kernel 'nothing'")):
            with pytest.raises(Unsupported, match=reason):
                moesaic.grouped_matmul(rows, w, routing, implementation=f"triton:{name}")


def test_weights_may_lie_any_way(device):
    """(N, E, K) seen as (E, N, K), and columns so far apart that 32 bits do not reach."""
    from moesaic.ops.grouped_matmul.gpu.spec import GemmSpec

    w = torch.empty(4100, 64, 8192, dtype=torch.bfloat16, device="meta").permute(1, 0, 2)
    assert GemmSpec(H200, w.dtype, 64, 4100, 8192, (8192, *w.stride())).wide
    assert not GemmSpec(H200, w.dtype, 64, 4096, 8192, (8192, 4096 * 8192, 8192, 1)).wide
    if hardware.triton_why_not(device, hardware.arch_of(torch.device(device))):
        pytest.skip("needs Triton")
    from moesaic.ops.grouped_matmul import gpu
    from moesaic.ops.grouped_matmul.gpu.schedule import TileTable
    from moesaic.ops.grouped_matmul.gpu.spec import Config

    rows, w = torch.randn(6, 24, device=device), torch.randn(20, 3, 24, device=device).permute(1, 0, 2)
    routing = moesaic.Routing.from_topk(None, torch.tensor([[0], [2], [2], [0], [1], [2]], device=device), 3)
    want = moesaic.grouped_matmul(rows, w, routing, implementation="reference")

    class Wide(GemmSpec):
        wide = True  # as if it lay that far apart

    spec = Wide(hardware.gpu_of(rows.device), rows.dtype, 3, 20, 24, (24, *w.stride()))
    gemm = gpu.kernel("pointer").launch(spec, Config(16, 32, 32, 4, 2))
    torch.testing.assert_close(gemm(rows, w, TileTable(routing.expert_offsets, 6)), want)


def test_a_table_keeps_few_ways():
    """The way that serves most rows is kept, and a second one only where the first loses more than 2%."""
    ways = {1: (10.0, 10.1, 20.0), 2: (20.0, 20.1, 20.2), 4: (50.0, 40.0, 41.0), 8: (90.0, 90.5, 80.0)}
    rows = {r: [dict(way=[name], us=us) for name, us in zip("abc", times, strict=True)] for r, times in ways.items()}
    assert tuning.table(rows) == {"1": ["b"], "2": ["b"], "4": ["b"], "8": ["c"]}
    assert tuning.table({1: []}) == {}


def test_tune_writes_what_choice_reads(monkeypatch, tmp_path):
    """Of a small layer, with a clock that finds each new way faster than the one before it."""
    if not hardware.interpreting():
        pytest.skip("in the interpreter, where the clock is replaced")
    clock = iter(range(100000, 0, -1))

    def count(run, batches, repeats=7):
        assert run(batches - 1).isfinite().all()
        return float(next(clock))

    monkeypatch.setattr(tuning, "microseconds", count)
    monkeypatch.setattr(tuning.LayerOperands, "clock", staticmethod(count))
    monkeypatch.setattr(tuning, "TOKENS", 16)
    case, record = Case("tiny", 64, 32, 4, 2), tmp_path / "record.jsonl"
    path = moesaic.tune([case], device="cpu", folder=tmp_path, record=record)
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    products = json.loads(path.read_text())["products"]
    assert len(products) == 2 and {row["product"] for row in rows} == set(products)
    for row in rows:
        assert str(row["rows_per_expert"]) in products[row["product"]]
        assert any("in_layer" in way for way in row["ways"])


def test_warmup_reads_how_many_experts_a_token_has():
    """A layer of ours and a model's configuration alike: the kernels hang on it."""
    layer = moesaic.nn.MoE("qwen3-moe", hidden_size=32, intermediate_size=16, num_experts=8, top_k=3)
    experts = layer.experts
    assert tuning._module_layer(layer, experts, experts.gate_up_proj, experts.down_proj).top_k == 3
    theirs = torch.nn.Module()
    theirs.config = SimpleNamespace(num_experts_per_tok=5)
    assert tuning._module_layer(theirs, theirs, experts.gate_up_proj, experts.down_proj).top_k == 5
