"""Tiles: every configuration that tuning may pick computes the same, wherever the ends of experts fall."""

from __future__ import annotations

import pytest
import torch

from moesaic import Routing, Unsupported, grouped_matmul, hardware
from moesaic.activations import ACTIVATIONS, apply
from moesaic.testing import assert_close

gpu = schedule = Config = Epilogue = GemmSpec = None
SM90 = hardware.Gpu("sm_90", "H200", 4)


@pytest.fixture(autouse=True)
def kernels(device):
    global gpu, schedule, Config, Epilogue, GemmSpec
    if reason := hardware.triton_why_not(device, hardware.arch_of(torch.device(device))):
        pytest.skip(reason)
    from moesaic.ops.grouped_matmul import gpu as choice
    from moesaic.ops.grouped_matmul.gpu import schedule as tables
    from moesaic.ops.grouped_matmul.gpu import spec

    gpu, schedule, Config, Epilogue, GemmSpec = choice, tables, spec.Config, spec.Epilogue, spec.GemmSpec


def epilogue(name: str | None, interleaved: bool = False, **more):
    if name is None:
        return Epilogue(**more)
    act = ACTIVATIONS[name]
    return Epilogue(name, act.alpha, act.limit, interleaved, **more)


def product(kernel, config, x, w, offsets, *, gather=None, top_k=0, bias=None, preact=None, scale=None, **fields):
    """A product by one kernel with one tile; w is a view (E, width, K)."""
    e = fields.pop("epilogue", None) or Epilogue(bias=bias is not None)
    N = w.shape[1] // 2 if e.gated else w.shape[1]
    place = hardware.gpu_of(x.device) if x.is_cuda else SM90
    spec = GemmSpec(place, x.dtype, w.shape[0], N, w.shape[2], (x.stride(0), *w.stride()),
                    top_k=top_k if gather is not None else 0, epilogue=e, **fields)  # fmt: skip
    rows = gather.shape[0] if gather is not None and top_k else x.shape[0]
    gemm = gpu.make(spec, gpu.Choice(kernel, config))
    return gemm(x, w, schedule.TileTable(offsets, rows), gather, bias, preact, scale)


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
    out = product("pointer", Config(m, n, k, 4, 2, group), rows, w, routing.expert_offsets, zero_tail=True)
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
    preact = torch.full((T * top_k, act.width(I)), float("nan"), dtype=x.dtype, device=device)
    out = product(
        "pointer", Config(m, n, k, 4, 2, group), x, w, routing.expert_offsets, gather=routing.row_order, top_k=top_k,
        preact=preact, epilogue=epilogue(activation, interleaved, preact=True),
    )  # fmt: skip
    rows = x.double()[routing.row_order.long() // top_k]
    want = grouped_matmul(rows, w.double(), routing, implementation="reference")
    assert_close(preact, want, H, name="preact")
    assert_close(out, apply(act, want, interleaved), H, name="activations")


TALL, WIDE = (128, 256, 64, 4, 4, 16, 32), (256, 128, 64, 4, 4, 16, 32)


@pytest.mark.parametrize("numbers", [TALL, WIDE, (64, 128, 64, 4, 4)], ids=str)
def test_expected_rows(numbers):
    """Against counting: rows of 64 experts drawn many times."""
    from moesaic.ops.grouped_matmul.gpu.cost import expected_rows

    g, config = torch.Generator().manual_seed(0), Config(*numbers)
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


@pytest.mark.parametrize("numbers", [TALL, WIDE], ids=str)
def test_padding_is_what_the_table_says(numbers, device):
    """For every number of rows: heights of the table, rounded to what the kernel multiplies."""
    config = Config(*numbers)
    for count in (*range(1, 700, 13), 256, 272, 288, 289, 320, 321, 512, 544, 576):
        offsets = torch.tensor([0, count], dtype=torch.int32, device=device)
        table = schedule.TileTable(offsets, count).of(schedule.Tiles(config.block_m, 1, 16, config.slack))
        heights = [height for _, _, height, _ in read(table)[0]]
        full = config.block_m
        tails = [h for h in heights if h > full]
        whole = [-(-h // 64) * 64 for h in heights if h <= full]
        rows = sum(whole) + sum(full + -(-(h - full) // 16) * 16 for h in tails)
        assert sum(heights) == count and max(heights) <= full + config.slack
        assert config.padded(count) == (rows, len(tails) + sum(h < full for h in whole))


def spec_of(place, dtype=torch.bfloat16, E=64, N=1024, K=2048, top_k=0, **fields):
    return GemmSpec(place, dtype, E, N, K, (K, N * K, K, 1), top_k=top_k, **fields)


@pytest.mark.parametrize("gathered", [True, False])
def test_tiles_grow_with_the_rows(gathered):
    """From few rows to many no step back."""
    choices = gpu.choices(spec_of(hardware.GPUS["H200"], top_k=8 if gathered else 0))
    heights = [choices.choice(rows * 64).config.block_m for rows in sorted(
        [2**i for i in range(15)] + [3 * 2**i for i in range(13)])]  # fmt: skip
    assert heights[0] == 16 and heights[-1] >= 128
    assert heights == sorted(heights)


@pytest.mark.parametrize(("arch", "dtype", "depth", "tuned"), [
    ("sm_80", torch.bfloat16, 256, False), ("sm_90", torch.float32, 256, False), ("gfx942", torch.float16, 256, False),
    ("sm_90", torch.bfloat16, 128, False), ("sm_90", torch.bfloat16, 192, True),
])  # fmt: skip
def test_batch_invariant_tiles(arch, dtype, depth, tuned):
    """One configuration for every batch, except where all of them give the same bits."""
    place = hardware.gpu_named("", arch)
    same, free = (gpu.choices(spec_of(place, dtype, 8, 512, depth, batch_invariant=b)) for b in (True, False))
    assert (len({str(same.choice(R)) for R in (1, 64, 300, 1000, 100000)}) > 1) == tuned
    assert len({str(free.choice(R)) for R in (1, 100000)}) == 2


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
    mine, other = schedule.Tiles(16, 3, 2, slack), schedule.Tiles(32, 1, 1, 0)
    tables = schedule.TileTable(routing.expert_offsets, sum(counts))
    table = tables.of(mine)
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
    assert tables.of(mine) is table, "a table is made once"
    both = schedule.TileTable(routing.expert_offsets, sum(counts), other, mine)
    assert read(both.of(mine)) == (entries, behind)
    assert read(both.of(other)) == read(tables.of(other))
    assert both.of(mine).data_ptr() % 16 == 0, "as the kernels are compiled for"


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
    preact = None if act is None else torch.full((R, width), float("nan"), dtype=x.dtype, device=device)
    stored = w.mT.contiguous().mT if weights == "transposed" else w
    out = product(
        "persistent_tma", Config(16, 32, 32, 4, 2, 2), x, stored, routing.expert_offsets, bias=bias, preact=preact,
        gather=routing.row_order if gathered else None, top_k=1,
        epilogue=epilogue(name if act else None, interleaved, bias=True, preact=act is not None),
    )  # fmt: skip
    rows = x.double()[routing.row_order.long()] if gathered else x.double()
    want = grouped_matmul(rows, w.double(), routing, bias=bias.double(), implementation="reference")
    if act is None:
        assert_close(out, want, K)
    else:
        assert_close(preact, want, K, name="preact")
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
@pytest.mark.parametrize(("numbers", "gathered"), [(TALL, True), (TALL, False), (WIDE, False)], ids=str)
def test_swapped_product(numbers, gathered, kind, weights, dtype, device):
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
    x[7] = float("nan")  # which no other token may see
    stored = w.mT.contiguous().mT if transposed else w
    if transposed and kind == "swiglu":
        pytest.skip("gates and ups lie apart")

    def made(kernel, *numbers):
        return product(
            kernel, Config(*numbers), x, stored, routing.expert_offsets, bias=bias, top_k=1,
            gather=routing.row_order if gathered else None,
            epilogue=epilogue(name if act else None, interleaved, bias=True),
        )  # fmt: skip

    out = made("swap_ab_sm90", *numbers)
    assert all(torch.equal(made("swap_ab_sm90", *numbers).nan_to_num(), out.nan_to_num()) for _ in range(20))
    assert torch.equal(made("persistent_tma", 128, 256, 64, 8, 4).nan_to_num(), out.nan_to_num())
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
    out = product("persistent_tma", Config(16, 32, 32, 4, 2), x, w, routing.expert_offsets, zero_tail=True)
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
    place = hardware.gpu_of(torch.device(device))
    spec = GemmSpec(place, x.dtype, E, I, H, (H, *w.stride()), top_k=2, epilogue=epilogue("swiglu"))
    rows = x.float()[routing.row_order.long() // 2]
    want = apply(act, grouped_matmul(rows, w.float(), routing, implementation="torch").double(), False)
    for choice in gpu.ways(spec.of(2 * T), sorts=False):
        gemm = gpu.make(spec, choice)
        out = gemm(x, w, schedule.TileTable(routing.expert_offsets, 2 * T), routing.row_order)
        assert_close(out, want, H, name=str(choice))


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("kernel", ["pointer", "persistent_tma"])
def test_fp16_stays_finite(kernel, scaled, device):
    """What is finite and too large for fp16 is its largest number; NaN and infinity are what they were."""
    x = torch.tensor([[200.0], [-200.0], [1.0], [float("nan")], [float("inf")]]).expand(5, 64)
    x = x.to(device, torch.float16).contiguous()
    w = torch.full((1, 48, 64), 10.0, dtype=torch.float16, device=device)
    routing = Routing.from_topk(None, torch.zeros(5, 1, dtype=torch.int32, device=device), 1)
    scale = torch.full((5,), 2.0, device=device)
    out = product(
        kernel, Config(16, 32, 32, 4, 2), x, w, routing.expert_offsets, scale=scale if scaled else None,
        gather=routing.row_order if scaled else None, epilogue=Epilogue(scaled=scaled, saturates=True),
    ).float()  # fmt: skip
    assert out[:3, 0].tolist() == [65504.0, -65504.0, 1280.0 if scaled else 640.0]
    assert out[3].isnan().all() and out[4].isinf().all()
