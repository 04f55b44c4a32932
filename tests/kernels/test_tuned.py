"""The tuned table: what its records say, in force wherever a product can be made so, and nowhere else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic import hardware
from moesaic.activations import ACTIVATIONS
from moesaic.cases import CASES
from moesaic.ops.grouped_matmul import _configs as choice
from moesaic.ops.grouped_matmul import _tuned
from moesaic.problem import Problem

ROOT = Path(__file__).parents[2]
RECORDS = ("2026-11-23-tiles-cases.json",)  # under benchmarks/results/h200, in the order given to `tiles.py --write`
ENTRIES = [
    (role, weights, rows, way)
    for role in ("up", "down")
    for weights, ways in getattr(_tuned, role.upper()).items()
    for rows, way in ways.items()
]


@pytest.fixture(scope="module")
def tables(benchmark_script):
    return benchmark_script("tile_table")


@pytest.fixture(scope="module")
def experts():
    if not hardware.has_triton():
        pytest.skip("triton is not installed")
    from moesaic.ops.fused_experts import _triton

    return _triton


def product(weights, rows: float, *, gathered: bool, swaps: bool = True) -> choice.Product:
    E, width, depth = weights
    return choice.Product(round(rows * E), E, width, depth, width, round(rows * E) if gathered else 0, swaps)


def layer(case, tokens: int, **options) -> Problem:
    return case.problem(tokens, options.pop("dtype", torch.bfloat16), "cuda", "sm_90", **options)


# ---------------------------------------------------------------- the table that is here
def test_the_table_is_what_its_records_say(tables):
    paths = [ROOT / "benchmarks" / "results" / "h200" / name for name in RECORDS]
    assert not paths or tables.TARGET.read_text() == tables.render(paths)


@pytest.mark.parametrize(("role", "weights", "rows", "way"), ENTRIES, ids=str)
def test_every_entry_is_a_way_that_its_layers_have(role, weights, rows, way, tables, experts, monkeypatch):
    monkeypatch.setattr(hardware, "has_gluon", lambda: True)  # where Triton is another
    names = tables.layers(weights, role).split(", ")
    tile, sorts = choice.TILES[way.removeprefix(choice.SORTED)], way.startswith(choice.SORTED)
    assert rows == 2 ** round(torch.tensor(rows).log2().item()) and not (role == "down" and sorts)
    for case in (CASES[name] for name in names):
        tokens = -(-rows * case.num_experts // case.top_k)
        problem = layer(case, tokens)
        up, down = experts.default_config(problem)
        assert (up if role == "up" else down) == tile
        assert role == "down" or experts._sorts(problem) == sorts
        assert choice.H200[way.removeprefix(choice.SORTED)][role == "down" or sorts] is not None


# ---------------------------------------------------------------- how entries are obeyed
@pytest.fixture
def table(monkeypatch):
    """A table of a made-up layer."""
    weights = (16, 4096, 2048)
    entries = {4: "low", 64: "sorted large", 128: "tall", 1024: "sorted wide", 2048: "large"}
    monkeypatch.setattr(choice, "UP", {weights: entries})
    monkeypatch.setattr(choice, "DOWN", {weights: {256: "tall", 512: "plain16"}})
    choice.gemm_config.cache_clear()
    yield weights
    choice.gemm_config.cache_clear()


def tile(p: choice.Product, arch: str = "sm_90", dtype: torch.dtype = torch.bfloat16) -> choice.Config:
    return choice.gemm_config(arch, dtype, p)


@pytest.mark.parametrize(("rows", "way"), [
    (4, "low"), (3, "low"), (5, "low"), (64, "sorted large"), (128, "tall"), (1024, "sorted wide"),
    (800, "sorted wide"), (2048, "large"),
])  # fmt: skip
def test_up_entries(table, rows, way):
    """One entry says both: are rows sorted, and the tile of what follows, gathered or in order."""
    gathered, in_order = product(table, rows, gathered=True), product(table, rows, gathered=False)
    assert choice.sorts_first("sm_90", torch.bfloat16, gathered) == way.startswith("sorted ")
    assert tile(in_order if way.startswith("sorted ") else gathered) == choice.TILES[way.removeprefix("sorted ")]


def test_what_an_entry_does_not_speak_of_is_the_models(table):
    gathered = product(table, 1024, gathered=True)
    assert tile(gathered) == choice.TILES[choice.fastest(gathered, sorts=False)], "sorted first, but not asked to be"
    in_order = product(table, 128, gathered=False)
    assert tile(in_order) == choice.TILES[choice.fastest(in_order)], "an entry of gathered rows"
    assert tile(product(table, 0.3, gathered=True)) == choice.TILES["plain16"]
    assert tile(product(table, 256, gathered=False)) == choice.TALL
    assert tile(product(table, 512, gathered=False)) == choice.TILES["plain16"]


@pytest.mark.parametrize("rows", [128, 256, 1024])
def test_entries_that_a_product_cannot_follow(table, rows):
    """Training keeps what the activation is given, which swapped tiles do not."""
    for gathered in (True, False):
        p = product(table, rows, gathered=gathered, swaps=False)
        assert choice.tuned(p) is None and tile(p).kernel != "swapped"
    gathered = product(table, rows, gathered=True, swaps=False)
    assert choice.sorts_first("sm_90", torch.bfloat16, gathered) == choice.fastest(gathered).startswith("sorted ")


def test_entries_are_sm_90s_in_half_precision(table):
    p = product(table, 512, gathered=False)
    for arch, dtype in (("sm_90", torch.float32), ("sm_80", torch.bfloat16), ("gfx942", torch.float16)):
        assert tile(p, arch, dtype) != choice.TILES["plain16"]
    assert not choice.sorts_first("sm_80", torch.bfloat16, product(table, 64, gathered=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 100, 1000, 4096, 20000])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_layer_runs_what_it_was_said_to_run(name, tokens, training, experts):
    """Of all cases, one expert a token among them: what `padding` and `explain` are told is what is planned."""
    case = CASES[name]
    problem = layer(case, tokens, training=training)
    H, I, width = case.hidden_size, case.intermediate_size, ACTIVATIONS[case.activation].width(case.intermediate_size)
    strides = [(width * H, width, 1), (I * H, H, 1)] if case.transposed else [(width * H, H, 1), (H * I, I, 1)]
    sorts, *gemms, tiles = experts._plan(
        problem, None, problem.num_slots, 1.0, 0.0, H, *strides, case.bias, case.bias, True, True, -1
    )
    configs = experts.default_config(problem)
    assert sorts == experts._sorts(problem) and set(tiles) == {g.tiles for g in gemms} - {None}
    for config, gemm in zip(configs, gemms, strict=True):
        assert (gemm.tiles is None) == (config.kernel == "plain")
        assert gemm.tiles is None or (gemm.tiles[0], gemm.tiles[3]) == (config.block_m, config.slack)


# ---------------------------------------------------------------- how the table is made
def record(*rows) -> dict:
    named = [dict(shape=shape, tokens=tokens, **{role: dict(us=us)}) for shape, tokens, role, us in rows]
    return dict(date="2026-01-01T00:00:00+00:00", machine={"gpu": "NVIDIA H200"}, rows=named)


def test_an_entry_is_what_leads_the_models_choice(tables):
    """At 2048 tokens of olmoe, with 256 rows an expert."""
    model = choice.fastest(tables.product_of(CASES["olmoe"], 2048, "down"))
    other = "low" if model != "low" else "large"
    for lead, entries in ((100.0, {}), (98.5, {}), (97.0, {(64, 2048, 1024): {256: other}})):
        assert tables.entries([record(("olmoe", 2048, "down", {model: 100.0, other: lead}))], "down") == entries
    failed = record(("olmoe", 2048, "down", {model: 100.0, other: 50.0}))
    failed["rows"][0]["down"] = dict(failed={model: "wrong"})
    assert tables.entries([failed], "down") == {}
    later = record(("olmoe", 2048, "down", {model: 50.0, other: 60.0}))
    first = record(("olmoe", 2048, "down", {model: 100.0, other: 60.0}))
    assert tables.entries([first, later], "down") == {} != tables.entries([later, first], "down")


def test_layers_that_share_a_product_share_an_entry(tables, monkeypatch):
    twin = CASES["olmoe"].__class__(**{**vars(CASES["olmoe"]), "name": "twin"})
    monkeypatch.setitem(CASES, "twin", twin)
    model = choice.fastest(tables.product_of(twin, 2048, "up"))
    assert model != "low"
    rows = [("olmoe", 2048, "up", {model: 100.0, "low": 90.0, "large": 80.0})]
    assert tables.entries([record(*rows)], "up") == {(64, 2048, 2048): {256: "large"}}
    rows.append(("twin", 2048, "up", {model: 100.0, "low": 95.0}))
    assert tables.entries([record(*rows)], "up") == {(64, 2048, 2048): {256: "low"}}, "what both were timed with"
    rows[1] = ("twin", 2048, "up", {model: 100.0, "low": 120.0})
    assert tables.entries([record(*rows)], "up") == {}, "the sum decides"
    assert tables.layers((64, 2048, 2048), "up") == "olmoe, twin"


def test_an_entry_does_not_pad(tables):
    """Of 128 experts with 256 rows each: tiles of 128 rows would compute a quarter too much, and 4% with a tail."""
    rows = ("sonic-7b", 4096, "up", {"sorted wide": 90.0, "tall": 100.0, "large": 50.0})
    assert tables.entries([record(rows)], "up") == {(128, 512, 1536): {256: "sorted wide"}}
    rows = ("sonic-7b", 4096, "up", {"low": 50.0, "large": 100.0})
    assert tables.entries([record(rows)], "up") == {(128, 512, 1536): {256: "low"}}, "where no tile has a tail"


def test_octaves_that_nobody_measured(tables):
    """Many rows an expert: by the next measured octave above, or the last. Few: by the model."""
    down = dict.fromkeys(choice.TILES, 200.0)
    rows = [
        ("mixtral-8x7b", T, "down", {**down, way: 100.0}) for T, way in ((256, "low"), (2048, "tall8"), (8192, "low"))
    ]
    ways = tables.entries([record(*rows)], "down")[8, 4096, 14336]
    assert ways == {64: "low", 512: "tall8", 1024: "low", 2048: "low", 4096: "low", 8192: "low"}
    assert tables.entries([record(rows[0])], "down")[8, 4096, 14336] == {64: "low"}


def test_the_module_is_written_as_formatted(tables, tmp_path):
    """Entries that fill a line and more; it runs, and is what the formatter leaves."""
    ways = {"sorted low": 50.0} | dict.fromkeys(choice.TILES, 100.0)
    rows = [("mixtral-8x7b", 2**i, "up", ways) for i in range(3, 15)]
    (tmp_path / "record.json").write_text(json.dumps(record(*rows)))
    text = tables.render([tmp_path / "record.json"])
    scope: dict = {}
    exec(compile(text, "_tuned.py", "exec"), scope)
    assert scope["UP"] == {(8, 28672, 4096): {2**i: "sorted low" for i in range(1, 14)}} and scope["DOWN"] == {}
    written = tmp_path / "_tuned.py"
    written.write_text(text)
    if importlib.util.find_spec("ruff"):
        flags = ["format", "--check", "--config", str(ROOT / "pyproject.toml"), str(written)]
        subprocess.run([sys.executable, "-m", "ruff", *flags], check=True)
