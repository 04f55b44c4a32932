"""Tiles: every configuration that tuning may pick computes the same, wherever the ends of experts fall."""

from __future__ import annotations

import pytest
import torch

from moesaic import Routing, Unsupported, grouped_matmul, hardware
from moesaic.activations import ACTIVATIONS, apply
from moesaic.ops.grouped_matmul._configs import (
    TALL,
    WIDE,
    Config,
    Product,
    configs,
    expected_rows,
    gemm_config,
)
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
    tiles = products.TileTable(routing.expert_offsets, R)
    out = products.gemm(rows, w, False, tiles, problem, N=N, K=K, zero_tail=True, config=config)
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
        x, w, False, products.TileTable(routing.expert_offsets, T * top_k), problem, N=I, K=H,
        gather=routing.row_order, top_k=top_k, activation=act, hidden=hidden,
        config=products.Config(m, n, k, 4, 2, group),
    )  # fmt: skip
    rows = x.double()[routing.row_order.long() // top_k]
    want = grouped_matmul(rows, w.double(), routing, implementation="reference")
    assert_close(hidden, want, H, name="hidden")
    assert_close(out, apply(act, want, interleaved), H, name="activations")


@pytest.mark.parametrize("config", [TALL, WIDE, Config(64, 128, 64, 4, 4)], ids=str)
def test_expected_rows(config):
    """Against counting: rows of 64 experts drawn many times."""
    g = torch.Generator().manual_seed(0)
    for mean in (0.3, 4, 60, 200, 700):
        counts = torch.poisson(torch.full((20000,), float(mean)), generator=g)
        cost = {n: config.padded(n)[0] + 20 * config.padded(n)[1] for n in {int(n) for n in counts}}
        want = sum(cost[int(n)] for n in counts) / len(counts)
        assert expected_rows(config, 20, mean) == pytest.approx(want, rel=0.02)


def read(table):
    """The entries of a tile table as (first row, expert, height, column tile), and what stands behind them."""
    used, taken = table[:2].tolist()
    assert taken == 0
    cells = [
        (e & 0xFFFFFFFF, e >> 32 & 0xFFF, e >> 44 & 0x1FF, e >> 53 & 0x7FF)
        for e in table[4:].view(torch.int64).tolist()
    ]
    return cells[:used], cells[used : used + 1024]


@pytest.mark.parametrize("config", [TALL, WIDE], ids=str)
def test_padding_is_what_the_table_says(config, device):
    """For every number of rows: heights of the table, rounded to what the kernel multiplies."""
    for count in (*range(1, 700, 13), 256, 272, 288, 289, 320, 321, 512, 544, 576):
        offsets = torch.tensor([0, count], dtype=torch.int32, device=device)
        table = products.TileTable(offsets, count).of(config.block_m, 1, 16, config.slack)
        heights = [height for _, _, height, _ in read(table)[0]]
        full = config.block_m
        tails = [h for h in heights if h > full]
        whole = [-(-h // 64) * 64 for h in heights if h <= full]
        rows = sum(whole) + sum(full + -(-(h - full) // 16) * 16 for h in tails)
        assert sum(heights) == count and max(heights) <= full + config.slack
        assert config.padded(count) == (rows, len(tails) + sum(h < full for h in whole))


@pytest.mark.parametrize("gathered", [True, False])
def test_tiles_grow_with_the_rows(gathered):
    """From few rows to many no step back, and none between neighbours by more than the tiles' own difference."""
    heights = []
    for rows in [2**i for i in range(15)] + [3 * 2**i for i in range(13)]:
        R = rows * 64
        config = gemm_config("sm_90", torch.bfloat16, Product(R, 64, 2048, 2048, 1024, R // 8 if gathered else 0))
        heights.append((rows, config.block_m))
    heights.sort()
    assert heights[0][1] == 16 and heights[-1][1] == 128
    assert [h for _, h in heights] == sorted(h for _, h in heights)


@pytest.mark.parametrize(("arch", "dtype", "depth", "tuned"), [
    ("sm_80", torch.bfloat16, 256, False), ("sm_90", torch.float32, 256, False), ("gfx942", torch.float16, 256, False),
    ("sm_90", torch.bfloat16, 128, False), ("sm_90", torch.bfloat16, 192, True),
])  # fmt: skip
def test_batch_invariant_tiles(arch, dtype, depth, tuned):
    """One configuration for every batch, except where all of them give the same bits."""
    sizes = (8, 512, depth, 512, 0, True)
    chosen = {products.choose(arch, dtype, True, products.Product(R, *sizes)) for R in (1, 64, 300, 1000, 100000)}
    assert (len(chosen) > 1) == tuned
    assert len({products.choose(arch, dtype, False, products.Product(R, *sizes)) for R in (1, 100000)}) == 2


def test_batch_invariance_is_refused_where_unknown(device):
    rows, w = torch.randn(4, 8, device=device), torch.randn(2, 8, 8, device=device)
    routing = Routing.from_topk(None, torch.tensor([[0], [1], [1], [0]], device=device), 2)
    for implementation in ("torch", "reference"):
        with pytest.raises(Unsupported, match="depends on the batch"):
            grouped_matmul(rows, w, routing, batch_invariant=True, implementation=implementation)


# ---------------------------------------------------------------- the persistent kernel
def heights(count: int, slack: int) -> list[int]:
    """Tiles of 16 rows; what is left goes to the last two, `slack` at the most to each, or has a tile of its own."""
    full, left = divmod(count, 16)
    tiles = [16] * full
    if left > slack * min(full, 2):
        return [*tiles, left]
    for i in (-2, -1) if left > slack else (-1,):
        if tiles:
            tiles[i] += min(left, slack)
            left -= min(left, slack)
    return tiles


@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("counts", (*COUNTS, (18, 20, 21, 36, 40, 41), (51, 56, 0, 57, 160, 7)), ids=str)
def test_tile_table(counts, slack, device):
    """Groups of two row tiles, three column tiles, an expert after the other; alone and beside another table."""
    routing = Routing.from_topk(None, counts_to_ids(counts).to(device), len(counts))
    tables = products.TileTable(routing.expert_offsets, sum(counts))
    table = tables.of(16, 3, 2, slack)
    entries, behind = read(table)
    want, row = [], 0
    for expert, count in enumerate(counts):
        sizes = heights(count, slack)
        tiles = [(row + sum(sizes[:i]), sizes[i]) for i in range(len(sizes))]
        for group in range(0, len(tiles), 2):
            want += [(first, expert, height, n) for n in range(3) for first, height in tiles[group : group + 2]]
        row += count
    assert entries == want
    assert len(behind) == 1024 and set(behind) == {(0, 0, 0, 0)}, "what looks ahead finds nothing"
    assert tables.of(16, 3, 2, slack) is table, "a table is made once"
    other = (32, 1, 1, 0)
    both = products.TileTable(routing.expert_offsets, sum(counts), other, (16, 3, 2, slack))
    assert read(both.of(16, 3, 2, slack)) == (entries, behind)
    assert read(both.of(*other)) == read(tables.of(*other))
    assert both.of(16, 3, 2, slack).data_ptr() % 16 == 0, "as the kernels are compiled for"


WEIGHTS = ("plain", "transposed")
EPILOGUES = (None, "relu2", "swiglu", "swiglu interleaved")


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kind", EPILOGUES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gathered"])
def test_persistent_product(counts, kind, weights, gathered, device):
    """Every operand that a tensor map holds, ends of experts inside tiles, widths that leave part of the last one."""
    E, N, K, R = len(counts), 40, 72, sum(counts)
    name, interleaved = (kind or "identity").split()[0], "interleaved" in (kind or "")
    act = ACTIVATIONS[name] if kind else None
    width = act.width(N) if act else N
    g = torch.Generator().manual_seed(0)
    routing = Routing.from_topk(None, counts_to_ids(counts).to(device), E)
    x = torch.randn(R, K, generator=g).to(device, torch.float16)
    w = (torch.randn(E, width, K, generator=g) * K**-0.5).to(device, torch.float16)
    bias = torch.randn(E, width, generator=g).to(device, torch.float16)
    hidden = None if act is None else torch.full((R, width), float("nan"), dtype=x.dtype, device=device)
    transposed = weights == "transposed"
    stored = w.mT.contiguous() if transposed else w
    arch = hardware.arch_of(torch.device(device))
    problem = Problem("fused_experts", device, arch, x.dtype, R, 1, E, K, N, name, interleaved, transposed)
    config = products.Config(16, 32, 32, 4, 2, 2, kernel="persistent")
    out = products.gemm(
        x, stored, transposed, products.TileTable(routing.expert_offsets, R), problem, N=N, K=K, bias=bias,
        gather=routing.row_order if gathered else None, top_k=1, activation=act, hidden=hidden, config=config,
    )  # fmt: skip
    rows = x.double()[routing.row_order.long()] if gathered else x.double()
    want = grouped_matmul(rows, w.double(), routing, bias=bias.double(), implementation="reference")
    if act is None:
        assert_close(out, want, K)
    else:
        assert_close(hidden, want, K, name="hidden")
        assert_close(out, apply(act, want, interleaved), K, name="activations")


HEIGHTS = (
    1,
    63,
    64,
    65,
    0,
    127,
    128,
    129,
    144,
    145,
    160,
    161,
    192,
    193,
    256,
    257,
    273,
    288,
    289,
    320,
    321,
    384,
    544,
    600,
)
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and hardware.has_gluon()


@pytest.mark.skipif(not ON_HOPPER, reason="needs an sm_90 GPU and Triton 3.6")
@pytest.mark.parametrize(("kind", "weights", "dtype"), [
    *((kind, weights, torch.bfloat16) for kind in EPILOGUES for weights in WEIGHTS), ("swiglu", "plain", torch.float16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("config", "gathered"), [(TALL, True), (TALL, False), (WIDE, False)], ids=str)
def test_swapped_product(config, gathered, kind, weights, dtype, device):
    """Every height that a tile can have, widths that leave part of the last one; the persistent kernel's bits."""
    E, N, K, R = len(HEIGHTS), 264, 192 if gathered else 328, sum(HEIGHTS)
    name, interleaved = (kind or "identity").split()[0], "interleaved" in (kind or "")
    act = ACTIVATIONS[name] if kind else None
    transposed = weights == "transposed"
    g = torch.Generator().manual_seed(0)
    routing = Routing.from_topk(None, counts_to_ids(HEIGHTS).to(device), E)
    x = torch.randn(R, K, generator=g).to(device, dtype)
    w = (torch.randn(E, act.width(N) if act else N, K, generator=g) * K**-0.5).to(device, dtype)
    bias = torch.randn(E, w.shape[1], generator=g).to(device, dtype)
    problem = Problem("fused_experts", device, "sm_90", dtype, R, 1, E, K, N, name, interleaved, transposed)
    gated = act is not None and act.gated
    if not products.swaps(problem, K=K, gathered=gathered, gated=gated):
        assert transposed and kind == "swiglu"
        pytest.skip("gates and ups lie apart")
    tiles = products.TileTable(routing.expert_offsets, R)
    x[7] = float("nan")  # which no other token may see

    def product(c):
        return products.gemm(
            x, w.mT.contiguous() if transposed else w, transposed, tiles, problem, N=N, K=K, bias=bias, config=c,
            gather=routing.row_order if gathered else None, top_k=1, activation=act,
        )  # fmt: skip

    out = product(config)
    assert all(torch.equal(product(config).nan_to_num(), out.nan_to_num()) for _ in range(20))
    assert torch.equal(product(config.persistent).nan_to_num(), out.nan_to_num())
    rows = x.double()[routing.row_order.long()] if gathered else x.double()
    want = grouped_matmul(rows, w.double(), routing, bias=bias.double(), implementation="reference")
    want = apply(act, want, interleaved) if act else want
    live = ~rows.isnan().any(1)
    assert_close(out[live], want[live], K)
    assert out[~live].isnan().all()


@pytest.mark.parametrize("dropped", [0, 5, 33])
def test_persistent_product_zeroes_dropped_rows(dropped, device):
    """Rows behind the last expert's: no tile has them, and the public operator promises zeros."""
    ids = torch.arange(33) % 3
    ids[:dropped] = -1
    routing = Routing.from_topk(None, ids[:, None].to(device), 3)
    x, w = torch.randn(33, 64).to(device, torch.float16), torch.randn(3, 48, 64).to(device, torch.float16)
    problem = Problem("grouped_matmul", device, hardware.arch_of(torch.device(device)), x.dtype, 33, 1, 3, 64, 48)
    config = products.Config(16, 32, 32, 4, 2, kernel="persistent")
    tiles = products.TileTable(routing.expert_offsets, 33)
    out = products.gemm(x, w, False, tiles, problem, N=48, K=64, zero_tail=True, config=config)
    assert_close(out, grouped_matmul(x.double(), w.double(), routing, implementation="reference"), 64)
    assert not out[33 - dropped :].any()


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
    for config in configs():
        tiles = products.TileTable(routing.expert_offsets, 2 * T)
        out = products.gemm(x, w, False, tiles, problem, N=I, K=H, gather=routing.row_order, top_k=2, activation=act,
                            config=config)  # fmt: skip
        assert_close(out, want, H, name=str(config))
