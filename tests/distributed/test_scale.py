"""The cost model and its simulation: against runs on two GPUs, against numbers made by hand, and on gloo."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cluster import launch

from moesaic.bench.studies import scale as study
from moesaic.cases import CASES, Case
from moesaic.parallel.scale import H100, Load, Machine, experts_time
from moesaic.parallel.simulation import DESIGNS, Simulation, simulate

QWEN, DEEPSEEK = CASES["qwen3-30b-a3b"], CASES["deepseek-v3"]
# Two H100s of one host, microseconds a layer, forward: `push` as a CUDA graph (at 64 tokens with two versions of the
# experts), `plain` eager. The machine's rates of memory and products, launch and host were fitted to these; its links
# were measured apart. Plain layers of up to 1024 tokens are left out: bound by the host, they took 870 to 1540 from
# run to run, which no model can meet.
RUNS = [
    (QWEN, 1, "push", 59), (QWEN, 16, "push", 215), (QWEN, 64, "push", 245), (QWEN, 64, "push", 259),
    (QWEN, 1024, "push", 347), (QWEN, 4096, "push", 746), (DEEPSEEK, 64, "push", 3623), (DEEPSEEK, 64, "push", 3970),
    (DEEPSEEK, 4096, "push", 5868), (QWEN, 4096, "plain", 1519), (QWEN, 4096, "plain", 1646),
    (DEEPSEEK, 4096, "plain", 8087), (DEEPSEEK, 4096, "plain", 8323),
]  # fmt: skip
PARTS = [  # of the push layer: dispatch or give back, experts, add
    (QWEN, 4096, 53, 620, 19), (DEEPSEEK, 4096, 169, 5541, 63), (QWEN, 1024, 18.5, 303, 4),
]  # fmt: skip


@pytest.mark.parametrize("case, tokens, design, us", RUNS, ids=lambda v: getattr(v, "name", str(v)))
def test_within_15_percent_of_runs_on_two_gpus(case, tokens, design, us):
    got = simulate(H100, Load(case, 2, tokens), design).seconds * 1e6
    assert abs(got / us - 1) <= 0.15, f"simulated {got:.0f}, measured {us}"


@pytest.mark.parametrize("case, tokens, way, experts, add", PARTS, ids=lambda v: getattr(v, "name", str(v)))
def test_parts_are_those_of_the_runs(case, tokens, way, experts, add):
    parts = simulate(H100, Load(case, 2, tokens), "push").parts
    assert parts["link"] / 2 * 1e6 == pytest.approx(way, rel=0.15)
    assert parts["experts"] * 1e6 == pytest.approx(experts, rel=0.15)
    assert parts["add"] * 1e6 == pytest.approx(add, rel=0.2)


def test_load_by_hand():
    """Probabilities add up to K, copies to what a token reaches, and all experts are chosen when K is E."""
    load = Load(Case("c", 8, 4, 4, 2), 2, 100)
    assert load.chosen == pytest.approx([0.5] * 4)
    assert load.reach(2) == pytest.approx([5 / 6] * 2)  # of 6 pairs one is elsewhere
    assert load.reach(1) == pytest.approx([1.0]) and load.reach(4) == pytest.approx([0.5] * 4)
    drawn = Load(Case("c", 8, 4, 4, 2), 2, 100, zipf=1e-9)  # the same by drawing
    assert drawn.reach(2) == pytest.approx([5 / 6] * 2, abs=0.02) and drawn.reach(1) == [1.0]
    steep = Load(QWEN, 8, 100, zipf=1.0)
    assert steep.reach(128) == pytest.approx(steep.chosen, abs=0.03)
    assert load.touched == pytest.approx([2.0, 2.0])
    assert Load(Case("c", 8, 4, 4, 4), 2, 1).chosen.tolist() == [1.0] * 4
    skewed = Load(QWEN, 8, 512, zipf=1.0)
    assert skewed.chosen.sum() == pytest.approx(8, rel=1e-6) and skewed.chosen.max() > 5 * skewed.chosen.mean()
    assert skewed.rows.max() > Load(QWEN, 8, 512).rows.max()
    assert (Load(DEEPSEEK, 4096, 1).group, Load(DEEPSEEK, 4096, 1).nodes) == (256, 32)


def test_simulation_by_hand():
    """Two engines: a, then b after it; c waits for its engine; the meeting waits for both."""
    sim = Simulation()
    a = sim.task("a", "x", 2.0)
    b = sim.task("b", "y", 3.0, [a])
    c = sim.task("c", "x", 4.0)
    end = sim.task("meet", None, 0.5, [b, c])
    start, done = sim.run()
    assert start.tolist() == [0, 2, 2, 6] and done.tolist() == [2, 5, 6, 6.5] and end == 3
    stuck = Simulation()
    stuck.task("later", "x", 1.0, [stuck.task("first", "x", 1.0) + 1])
    stuck.waits[1] = [0]
    stuck.waits[0] = [1]
    with pytest.raises(ValueError, match="wait for each other"):
        stuck.run()


def test_a_layer_by_hand():
    """One node of two, no latencies: every time is bytes or operations over a rate."""
    machine = Machine("m", 2, 1e3, 0, 1e3, 0, 1, 0, 0, 1e30, 1e3, 0, 0, 0, 0)
    load = Load(Case("c", 10, 5, 2, 1, "relu"), 2, 4, bytes_per=1)  # a token goes to either rank: 2 of 4, 20 bytes
    experts = experts_time(machine, load)
    assert experts == pytest.approx(load.rows * 2 * 2 * 10 * 5 / 1e3)
    for design in ("plain", "flat", "hierarchical", "push"):
        got = simulate(machine, load, design)
        assert got.seconds == pytest.approx(20 / 1e3 + experts.max() + 20 / 1e3), design


def test_designs_do_what_they_promise():
    even, load = Load(DEEPSEEK, 64, 4096), Load(DEEPSEEK, 64, 4096, zipf=0.5)
    us = {d: simulate(H100, even, d).seconds for d in DESIGNS}
    assert us["plain"] > us["flat"] > us["hierarchical"] > us["push"] > 0
    skewed = {d: simulate(H100, load, d).seconds for d in DESIGNS}
    assert all(skewed[d] > us[d] for d in DESIGNS)  # the busiest rank is waited for
    few = Load(DEEPSEEK, 256, 16)  # many messages: flat pays for each
    assert (
        simulate(H100, few, "hierarchical", captured=True).seconds < simulate(H100, few, "flat", captured=True).seconds
    )
    overlapped = simulate(H100, even, "overlap", chunks=4)
    whole = simulate(H100, even, "overlap", chunks=1)
    assert overlapped.seconds < whole.seconds and overlapped.waited < whole.waited
    # two halves read all weights twice: on two GPUs that costs more than it hides, as was measured
    two = Load(DEEPSEEK, 2, 4096)
    assert simulate(H100, two, "overlap", chunks=2).seconds > simulate(H100, two, "flat").seconds
    rows = np.concatenate([Load(DEEPSEEK, 8, 64, seed=s).rows for s in range(50)])
    assert rows.mean() == pytest.approx(8 * 64 * 8 / 8, rel=0.02)


def test_the_study(tmp_path):
    plan = study.Plan(("mixtral-8x7b", "kimi-k2"), (8, 64, 4096), (64, 4096), (0.0,))
    plan.check()
    told: list[str] = []
    result = study.run(plan, lambda what: told.append(what))
    assert len(result.rows) == plan.cells == len(told) and len(result.cells[0]) == len(result.heads)
    json.dumps(result.record())
    pytest.importorskip("matplotlib")
    study.plot(result, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    for bad in (dict(models=("none",)), dict(chunks=0), dict(gpus=(12,)), dict(gpus=(0,)), dict(machine="Z80")):
        with pytest.raises(ValueError):
            study.Plan(**bad).check()


def test_gloo_is_ordered_as_it_runs():
    from scale_cases import ordered

    errors, values, codes = launch(ordered, 4)
    assert list(errors.values()) == [None] * 4, (codes, errors)
    run, simulated = values[0]
    assert sorted(run, key=run.get) == sorted(simulated, key=simulated.get), (run, simulated)
