"""The `moesaic` command, as a user runs it: in a process of its own, with its exit code and its two streams."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic.bench import Plan, peers, roofline, run, timing
from moesaic.bench.layer import Layer, case_named
from moesaic.cases import CASES
from moesaic.cli import checks, controls
from moesaic.diagnose import expert_load, heatmap, load_statistics
from moesaic.ops.fused_experts import fused_experts
from moesaic.routing import Routing
from moesaic.testing import assert_close

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "0"}
ESCAPE = "\x1b"
TINY = ("--shapes", "olmoe-small", "--tokens", "1,6", "--seconds", "0.02", "--device", "cpu")


def moesaic(*arguments: str, before: str = "", timeout: int = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command; `before` is Python that runs first in its process."""
    code = f"import sys\n{before}\nsys.argv = ['moesaic', *{list(arguments)!r}]\nfrom moesaic.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENV | env, timeout=timeout, cwd=ROOT
    )


def value(done: subprocess.CompletedProcess[str], code: int = 0):
    """The JSON of a run with `--json`: all of stdout, and nothing else on it."""
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------- env
def test_env_prints_a_table_without_control_codes():
    done = moesaic("env", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    for op in ("route", "permute", "grouped_matmul", "fused_experts"):
        assert f"{op}(" in done.stdout
    assert "needs a GPU" in done.stdout


def test_env_json():
    facts = value(moesaic("env", "--json", "--device", "cpu"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["cores"] == os.cpu_count()
    for told in facts["implementations"]:
        native = told["reasons"].get("cpu", "no such") is None  # where there is a compiler
        assert told["chosen"] == ("cpu" if native else "torch") and "GPU" in told["reasons"]["triton"]
        assert told["reasons"]["torch"] is None


def test_env_imports_no_plotting_and_no_models():
    watch = "import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = moesaic("env", "--json", "--device", "cpu", before=watch)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert done.returncode == 0 and "moesaic" in loaded
    assert not loaded & {"matplotlib", "transformers", "triton", "safetensors"}


def on_a_terminal(*arguments: str, **env: str) -> str:
    """What the command writes when stdout is a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "moesaic.cli", *arguments], stdout=slave, stderr=subprocess.DEVNULL, cwd=ROOT,
        env=ENV | {"TERM": "xterm-256color", "COLUMNS": "120"} | env,
    )  # fmt: skip
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    os.close(master)
    assert process.wait(60) == 0
    return text.decode()


def test_colour_is_for_terminals_and_can_be_declined():
    colour = re.compile(ESCAPE + r"\[(?:\d+;)*3[0-7]m")
    assert colour.search(on_a_terminal("env", "--device", "cpu"))
    assert not colour.search(on_a_terminal("env", "--device", "cpu", NO_COLOR="1"))


# ---------------------------------------------------------------- usage
@pytest.mark.parametrize(
    "arguments, says",
    [
        (("bench", "--shapes", "nonesuch"), "must be one of mixtral-8x7b"),
        (("bench", "--peers", "nonesuch"), "must be one of torch_loop"),
        (("bench", "--dtypes", "int3"), "must be one of bf16"),
        (("bench", "--tokens", "many"), "whole numbers"),
        (("bench", "--tokens", "0"), "at least 1"),
        (("bench", "--tokens", "1.."), "ranges A..B"),
        (("bench", "--distribution", "odd"), "each must be one of uniform"),
        (("bench", "--clocks", "warm"), "must be some of burst, sustained"),
        (("demo", "--checkpoint", "/nonexistent"), "train_tiny_lm.py"),
        (("demo", "--checkpoint", "examples/tiny_lm", "--shapes", "nonesuch"), "must be one of mixtral-8x7b"),
        (("env", "--device", "quantum"), "must be cpu, cuda"),
        (("env", "--device", "cuda:77"), "is not here"),
        (("nonesuch",), "No such command"),
        (("env", "--nonesuch"), "No such option"),
    ],
)
def test_wrong_usage_is_code_2_and_one_sentence(arguments, says):
    done = moesaic(*arguments)
    assert done.returncode == 2, done.stderr
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "package, extra, arguments",
    [
        ("typer", "cli", ("env",)),
        ("rich", "cli", ("env",)),
        ("matplotlib", "plot", ("bench", *TINY, "--plot", "never.png")),
        ("transformers", "hf", ("demo",)),
    ],
)
def test_a_missing_extra_prints_its_install_line(package, extra, arguments):
    done = moesaic(*arguments, before=f"sys.modules[{package!r}] = None")
    assert done.returncode == 2, done.stderr
    assert f'pip install "moesaic[{extra}]"' in done.stderr and "Traceback" not in done.stderr


def test_help_and_version():
    text = moesaic("--help").stdout
    assert all(word in text for word in ("demo", "bench", "verify", "env", "Exit codes"))
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", moesaic("--version").stdout)


# ---------------------------------------------------------------- verify
def test_verify_passes_and_reports_the_distribution():
    report = value(moesaic("verify", "--json", "--device", "cpu"))
    assert report["ok"] and report["failures"] == [] and report["checks"] > 3000
    assert 0 < report["worst"]["ratio"] <= 1
    pairs = {(line["implementation"], line["dtype"]) for line in report["distribution"]}
    assert {(i, d) for i in ("reference", "torch") for d in ("fp32", "bf16", "fp16")} <= pairs
    for line in report["distribution"]:
        assert line["norm"]["median"] <= line["norm"]["p99"] <= line["norm"]["max"]
    assert len(report["controls"]) >= 5 and all(c["caught"] and not c["right"] for c in report["controls"])


PLANTED = """
import moesaic.ops.fused_experts._torch as backend
right = backend.forward
def wrong(*arguments):
    (y,), saved = right(*arguments)
    y[-1:] *= 1.05  # one token, five per cent
    return (y,), saved
backend.forward = wrong
"""


def test_verify_fails_on_a_planted_mistake_and_names_the_worst():
    done = moesaic("verify", "--device", "cpu", before=PLANTED)
    assert done.returncode == 1, done.stderr
    assert ESCAPE not in done.stdout
    text = " ".join(done.stdout.split())
    assert re.search(r"FAILED: \d+ of \d+ checks; worst: fused_experts \[torch, \w+\]", text)


def test_verify_fails_when_its_rule_catches_nothing():
    blind = "import moesaic.testing as t\nt.bounds = lambda *a: (1e9, 1e10)"
    report = value(moesaic("verify", "--json", "--device", "cpu", before=blind), code=1)
    assert not report["ok"] and report["failures"] == []
    assert all(control["caught"] is None for control in report["controls"])


def test_checks_cover_every_operator_and_gradient():
    seen = {(v.operator, v.what) for v in checks.all_checks(torch.device("cpu"), full=False)}
    assert {("fused_experts", f"grad {name}") for name in checks.NAMES} <= seen
    assert {("route", w) for w in ("ids", "weights", "grad logits")} <= seen
    assert {("permute", "rows"), ("unpermute", "grad weights"), ("grouped_matmul", "grad w")} <= seen


def test_the_loose_tolerance_of_the_control_is_really_loose():
    control = next(c for c in controls.all_controls(torch.device("cpu")) if c.name == "loose atol")
    assert "passes it" in control.mistake and control.caught


# ---------------------------------------------------------------- bench
def test_bench_writes_a_record_that_says_everything(tmp_path):
    out, plot = tmp_path / "sub" / "record.json", tmp_path / "plot.png"
    done = moesaic(
        "bench", *TINY, "--dtypes", "bf16,fp32", "--out", str(out), "--plot", str(plot), "--note", "a test", "--json"
    )
    record = value(done)
    assert json.loads(out.read_text())["rows"] == record["rows"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert record["command"].startswith("moesaic bench --shapes olmoe-small") and record["note"] == "a test"
    assert {"date", "commit", "machine", "versions", "roofline"} <= record.keys()
    assert record["machine"]["threads"] == 1 and record["roofline"]["bf16"]["GB/s"] > 0
    cells = {(r["dtype"], r["tokens"], r["peer"]) for r in record["rows"]}
    names = {"moesaic", "torch_loop", "torch_grouped_mm", "dense_bmm"}
    assert {(d, t, n) for d in ("bf16", "fp32") for t in (1, 6) for n in names} <= cells
    for row in record["rows"]:
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["rounds"] >= 5
        assert row["clocks"] == "call" and row["sustained"] is row["launches"] is row["padding"] is None
        assert (row["dense"] is None) == (row["peer"] == "dense_bmm")
        if row["peer"] != "dense_bmm":  # it computes something else
            assert row["error"] < (1e-2 if row["dtype"] == "bf16" else 1e-6)
    assert {(s["dtype"], *s["tokens"]) for s in record["sweep"]} == {("bf16", 1, 6), ("fp32", 1, 6)}
    (line,) = (s for s in record["summary"] if s["peer"] == "torch_loop")
    assert line["cells"] == 4 and 0 < line["ratio"]["lowest"] <= line["ratio"]["mean"]
    reasons = {line["peer"]: line["reason"] for line in record["not_run"]}
    assert reasons["vllm"] == "needs a GPU"


def test_bench_trains_and_prints_plain_text():
    done = moesaic("bench", *TINY, "--train", "--peers", "torch_grouped_mm")
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout and "forward and backward" in done.stdout and "torch_grouped_mm" in done.stdout


def test_bench_says_what_a_cpu_and_a_missing_bound_leave_out():
    done = moesaic("bench", *TINY, "--peers", "torch_loop", "--clocks", "both")
    assert done.returncode == 0, done.stderr
    assert "--clocks is for GPUs" in done.stdout and "where --peers names dense_bmm" in done.stdout
    assert "dense_bmm" not in moesaic("bench", *TINY, "--peers", "torch_loop", "--train").stdout


def test_bench_fails_when_ours_cannot_run():
    done = moesaic("bench", *TINY, "--ours", "moesaic:triton", "--peers", "none")
    assert done.returncode == 1 and "FAILED: moesaic:triton" in done.stdout


def test_a_shape_that_does_not_fit_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    (result,) = run(Plan(("olmoe-small",), (1,), peers=()))
    assert result.rows == [] and "GB are free" in result.skipped["olmoe-small bf16"]


@pytest.mark.parametrize("name", ["olmoe", "gpt-oss-120b", "llama4-scout", "nemotron-h", "gemma4-26b"])
@pytest.mark.parametrize("peer", ["torch_loop", "torch_grouped_mm", "hf_grouped_mm", "moesaic"])
def test_peers_compute_the_layer(name, peer):
    """A ratio to a peer means something only if the peer computes the same."""
    layer = Layer.make(case_named(f"{name}-small"), torch.float32, torch.device("cpu"))
    candidate = peers.peer_named(peer)
    if reason := candidate.why_not(layer):
        pytest.skip(reason)
    batch = layer.batches(9)[0]
    picked, oracle = layer.oracle(batch)
    assert picked.tolist() == list(range(9))
    assert_close(candidate.build(layer)(batch), oracle, 64, 8)


def test_the_oracle_of_bench_is_the_reference():
    layer = Layer.make(case_named("gpt-oss-120b-small"), torch.float64, torch.device("cpu"))
    batch, c = layer.batches(5)[0], layer.case
    _, y = layer.oracle(batch)
    routing = Routing.from_topk(batch.weights.double(), batch.ids, c.num_experts)
    want = fused_experts(
        batch.x, layer.w_gate_up, layer.w_down, routing, activation=c.activation, b_gate_up=layer.b_gate_up,
        b_down=layer.b_down, layout=c.layout, transposed=c.transposed, implementation="reference",
    )  # fmt: skip
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-14)


def test_batches_rotate_their_routing():
    layer = Layer.make(case_named("qwen3-30b-a3b-small"), torch.float32, torch.device("cpu"))
    batches = layer.batches(6)
    assert len(batches) >= 4 and not torch.equal(batches[0].x, batches[1].x)
    assert torch.equal(batches[3].x, layer.batches(6)[3].x)


def test_least_work_of_a_layer():
    case = CASES["mixtral-8x7b"]
    expert = 3 * case.hidden_size * case.intermediate_size * 2
    one = roofline.work(case, torch.bfloat16, 1, 2, False)
    assert one.flops == 2 * 2 * 3 * case.hidden_size * case.intermediate_size
    assert one.bytes == 2 * expert + 2 * case.hidden_size * 2
    peak = roofline.Roofline(bandwidth=1e12, flops=1e15)
    assert peak.seconds(one) == one.bytes / 1e12
    many = roofline.work(case, torch.bfloat16, 16384, 8, True)
    assert many.flops == 3 * case.flops(16384) and peak.seconds(many) == many.flops / 1e15


def test_rounds_visit_every_candidate_and_every_batch():
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    calls = {name: seen[name].append for name in seen}
    samples = timing.interleave(calls, 3, torch.device("cpu"), seconds=0.0, min_rounds=7)
    assert {name: len(s.seconds) for name, s in samples.items()} == {"a": 7, "b": 7, "c": 7}
    assert seen["a"] == seen["b"] == seen["c"] == [0, 1, 2, 0, 1, 2, 0]
    assert timing.interleave({}, 3, torch.device("cpu")) == {}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_candidate_always_follows_another(count):
    """A call leaves its weights in the cache and its pages in the allocator: every place is taken equally often."""
    log: list[str] = []
    calls = {name: lambda i, name=name: log.append(name) for name in "abcd"[:count]}
    timing.interleave(calls, 1, torch.device("cpu"), seconds=0.0, min_rounds=2 * count)
    rounds = [log[i : i + count] for i in range(0, len(log), count)]
    for place in range(count):
        assert sorted(r[place] for r in rounds) == sorted(list(calls) * 2)
    assert all(any(r.index(a) < r.index(b) for r in rounds) for a in calls for b in calls if a != b)


# ---------------------------------------------------------------- load
def test_load_statistics():
    load = expert_load(torch.tensor([[0, 1], [0, -1], [0, 1], [0, 7]]), 4)  # -1 and 7 are dropped slots
    assert load.tolist() == pytest.approx([8 / 3, 4 / 3, 0, 0])
    stats = load_statistics(load)
    assert stats.max_violation == pytest.approx(5 / 3) and stats.dead == 0.5
    even = load_statistics(expert_load(torch.arange(8).view(4, 2), 8))
    assert (even.max_violation, even.cv, even.dead, even.diversity) == pytest.approx((0, 0, 0, 1))
    assert expert_load(torch.zeros(0, 2, dtype=torch.long), 3).tolist() == [0, 0, 0]


def test_heatmap_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    heatmap([torch.ones(6), torch.tensor([6.0, 0, 0, 0, 0, 0])], tmp_path / "a" / "load.png", "load")
    assert (tmp_path / "a" / "load.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- demo
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random byte-level model of two layers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=48,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "random_lm"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_demo_end_to_end(checkpoint, tmp_path):
    out = tmp_path / "out"
    facts = value(moesaic("demo", *TINY, "--checkpoint", str(checkpoint), "--out", str(out), "--json"))
    assert facts["ok"] and json.loads((out / "demo.json").read_text())["ok"]
    for name in ("load.png", "speed.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert [c["same"] for c in facts["completions"]] == [c["length"] for c in facts["completions"]]
    for dtype, bound in (("fp32", 1e-6), ("bf16", 1e-2)):
        layers = facts["layers"][dtype]["layers"]
        assert len(layers) == 2
        for line in layers:
            assert 0 < line["ours"] < bound and sum(line["load"]) == pytest.approx(6)
    assert {row["peer"] for row in facts["speed"]["rows"]} == {"moesaic", "torch_loop", "hf_grouped_mm"}


def test_demo_tells_its_story_in_plain_text(checkpoint, tmp_path):
    done = moesaic("demo", *TINY, "--checkpoint", str(checkpoint), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout
    for text in ("Is every layer right?", "Where do tokens go?", "How fast is one layer?", "What ran, and why?"):
        assert text in done.stdout


def test_demo_fails_when_a_layer_is_off(checkpoint, tmp_path):
    facts = value(
        moesaic(
            "demo",
            *TINY,
            "--checkpoint",
            str(checkpoint),
            "--out",
            str(tmp_path),
            "--json",
            before=PLANTED + PLANTED.replace("_torch", "_cpu").replace("right", "native").replace("wrong", "off"),
        ),
        code=1,
    )
    assert not facts["ok"]
