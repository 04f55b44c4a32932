"""The examples run, and the small language model that they left behind is what it says."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "tiny_lm"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operators(capsys):
    load("operators").main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.strip().split() in (["cpu", "chosen"], ["torch", "chosen"]) for line in lines)
    assert float(next(line for line in lines if "differ" in line).split()[-1]) < 1e-6


def test_layer(capsys):
    load("layer").main(["--steps", "21"])
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(losses) == 2 and losses[1] < 0.5 * losses[0]


def test_hugging_face(capsys):
    pytest.importorskip("transformers")
    load("hugging_face").main()
    out = capsys.readouterr().out
    assert "class Parser" in out
    assert float(out.split("experts: ")[1].split()[0]) < 2e-6


def test_training(tmp_path, monkeypatch, capsys):
    """Two steps of the training script: the checkpoint, the curve and its plot are written, and the model loads."""
    for package in ("transformers", "rich", "matplotlib"):
        pytest.importorskip(package)
    script = load("train_tiny_lm")
    monkeypatch.setattr(script, "LENGTH", 48)
    monkeypatch.setattr(script, "BATCH", 2)
    monkeypatch.setattr(script, "SAMPLE", 8)
    script.main(["--steps", "2", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "loss.json").read_text())
    assert [entry["step"] for entry in record["curve"]] == [1, 2]
    assert all(4 < entry["held_out"] < 6 for entry in record["curve"])  # ln 256 = 5.5 before it has learned anything
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = script.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moesaic")
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_committed_model():
    """It is small, it learned, and it gives code that it never saw (this file's kind) a likely reading."""
    transformers = pytest.importorskip("transformers")
    importlib.import_module("moesaic.integrations.transformers")
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 8e6
    curve = json.loads((CHECKPOINT / "loss.json").read_text())["curve"]
    assert curve[-1]["held_out"] < 1.6 < curve[0]["held_out"]
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, experts_implementation="moesaic")
    model = model.float().eval()
    code = textwrap.dedent(
        '''
        def count_words(text):
            """Return a dictionary of the words in text and how often each of them occurs."""
            result = {}
            for word in text.split():
                if word not in result:
                    result[word] = 0
                result[word] += 1
            return result
        '''
    )
    ids = torch.tensor([list(code.encode())])
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        loss, loss_shuffled = (model(t, labels=t).loss.item() for t in (ids, shuffled))
    assert loss < 2.0 < 3.5 < loss_shuffled
