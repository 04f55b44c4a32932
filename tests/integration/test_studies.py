"""The studies of `moesaic bench`: their algorithms are right, they show what they say, and the commands run."""

from __future__ import annotations

import json
import re

import pytest
import torch
from test_cli import ESCAPE, moesaic, value
from typer.testing import CliRunner

from moesaic.bench.studies import balance, study_k, tiny_lm, topk
from moesaic.cli.app import app
from moesaic.cli.screen import UsageMistake


# ---------------------------------------------------------------- topk
def rows_with_ties_and_infinities(N: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N)
    scores = torch.randn(6, N, generator=generator)
    scores[1] = scores[1].round()  # ties
    scores[2] = 0.5
    scores[3, torch.rand(N, generator=generator) < 0.9] = float("-inf")
    scores[4] = float("-inf")
    scores[5, ::2], scores[5, 1::2] = 0.0, -0.0
    return scores


@pytest.mark.parametrize("name", topk.ALGORITHMS)
@pytest.mark.parametrize("N", [1, 255, 256, 257, 2048])
def test_every_algorithm_is_the_stable_sort(name, N):
    scores = rows_with_ties_and_infinities(N)
    for k in {1, min(8, N), min(300, N), N}:
        want = [sorted(range(N), key=lambda i, row=row: -row[i])[:k] for row in scores.tolist()]
        assert topk.select(name, scores, k).tolist() == want
        values = torch.topk(scores, k).values
        torch.testing.assert_close(scores.gather(1, topk.select(name, scores, k)), values, rtol=0, atol=0)


@pytest.mark.parametrize("name", topk.ALGORITHMS)
def test_more_than_there_are_cannot_be_selected(name):
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.N = 8, got 9"):
        topk.select(name, torch.randn(2, 8), 9)
    with pytest.raises(ValueError, match="NaN"):
        topk.select(name, torch.tensor([[1.0, float("nan")]]), 1)


def test_an_algorithm_that_disagrees_is_not_timed(monkeypatch):
    wrong = topk.Algorithm(lambda scores, k: topk.sort_topk(scores, k).flip(1), "O(1)", "torch")
    monkeypatch.setitem(topk.ALGORITHMS, "sort", wrong)
    with pytest.raises(AssertionError, match="disagrees with the stable sort at N = 8, K = 4"):
        topk.run(topk.Plan((8,), 4, 3, 0.0))


def test_topk_command(tmp_path):
    out, picture = tmp_path / "a" / "topk.json", tmp_path / "topk.png"
    record = value(moesaic(
        "bench", "topk", "--candidates", "4,300", "--rows", "3", "--seconds", "0.01", "--device", "cpu", "--json",
        "--out", str(out), "--plot", str(picture), "--commit", "abc",
    ))  # fmt: skip
    assert json.loads(out.read_text()) == record
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert record["commit"] == "abc" and record["versions"]["torch"] == torch.__version__ and record["machine"]["cpu"]
    assert {row["algorithm"] for row in record["rows"]} == {*topk.ALGORITHMS, topk.TORCH, topk.OURS}
    assert all(row["us_per_row"] > 0 and row["rounds"] >= 5 for row in record["rows"])
    assert [row["top_k"] for row in record["rows"]] == [4] * 7 + [8] * 7  # K is cut to N


# ---------------------------------------------------------------- usage
@pytest.mark.parametrize(
    "arguments, says",
    [
        (("topk", "--candidates", "0"), "bench topk: candidates: must be at least 1"),
        (("topk", "--candidates", "some"), "whole numbers"),
        (("topk", "--device", "tpu"), "must be cpu, cuda"),
        (("balance", "--top-k", "9"), "1..E = 8, got 9"),
        (("study-k", "--top-ks", "1,17"), "1..E = 16, got 1, 17"),
        (("study-k", "--order", "post"), "pre or pre_renorm"),
        (("--tokens", "1", "topk"), "come after its name"),
    ],
)
def test_mistakes_are_usage_errors(arguments, says):
    with pytest.raises(UsageMistake, match=re.escape(says)):
        CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)


def test_a_mistake_ends_with_one_line_and_code_2():
    done = moesaic("bench", "topk", "--top-k", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moesaic: bench topk: top_k: must be at least 1, got 0.\n"


def test_a_plot_without_matplotlib_says_how_to_get_it():
    done = moesaic("bench", "balance", "--plot", "b.png", before="sys.modules['matplotlib'] = None")
    assert done.returncode == 2 and 'pip install "moesaic[plot]"' in done.stderr


# ---------------------------------------------------------------- balance
def test_balance_shows_which_losses_balance_and_which_collapses():
    study = balance.run(balance.Plan(steps=60, tokens=512, seed=1))
    rows = {row["way"]: row for row in study.rows}
    first = rows["no loss"]["first_max_over_mean"]
    assert {row["first_max_over_mean"] for row in study.rows} == {first}  # one task, one start
    assert all(len(row["curve"]) == 60 for row in study.rows)
    for name in ("switch", "switch + z-loss", "uniform CE"):
        assert rows[name]["max_over_mean"] < 1.5 < first and rows[name]["alone_max_over_mean"] < 1.5, name
    for figure in ("max_over_mean", "alone_max_over_mean"):
        assert rows["bias update"][figure] < first < rows["literal CE"][figure]
        assert rows["switch"][figure] < rows["no loss"][figure] < rows["literal CE"][figure]
    assert rows["literal CE"]["alone_unused"] > 0
    assert rows["no loss"]["alone_curve"][-1] == pytest.approx(first, rel=0.2)  # nothing trains it


def test_balance_command_prints_plain_text():
    done = moesaic("bench", "balance", "--steps", "2", "--tokens", "32", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout + done.stderr
    assert all(name in done.stdout for name in balance.WAYS)


# ---------------------------------------------------------------- study-k
def test_study_k(tmp_path):
    pytest.importorskip("transformers")
    seen = []
    study = study_k.run(study_k.Plan((1, 2), steps=2, batch=2, length=48), seen.append)
    assert len(seen) == 2 and [row["top_k"] for row in study.rows] == [1, 2]
    assert [row["order"] for row in study.rows] == ["pre", "pre_renorm"]
    for row in study.rows:
        assert 4 < row["validation"] < 6  # ln 256 = 5.5 before it has learned anything
        assert row["tokens_per_second"] > 0 and 0 < row["utilisation"] <= 1 <= row["max_over_mean"]
        assert [point["step"] for point in row["curve"]] == [1, 2]
        for load in row["load"]:
            assert sum(load) == pytest.approx(16, abs=0.01)
    pytest.importorskip("matplotlib")
    study_k.plot(study, tmp_path / "k.png")
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("order, trains", [("pre", True), ("pre_renorm", False)])
def test_one_normalised_weight_trains_no_router(order, trains):
    """Why K = 1 is trained with the probability itself; the balance loss is off, so only the weights can teach."""
    pytest.importorskip("transformers")
    model = tiny_lm.build(
        num_experts_per_tok=1, norm_topk_prob=order == "pre_renorm", num_hidden_layers=1, router_aux_loss_coef=0.0
    )
    ids = torch.arange(40).view(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.model.layers[0].mlp.gate.weight.grad
    assert (gradient is not None and float(gradient.abs().max()) > 1e-9) == trains
