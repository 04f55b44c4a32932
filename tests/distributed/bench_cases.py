"""benchmarks/ep.py on CPU, small: every section runs (with TRITON_INTERPRET=1, for its pushes)."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from cluster import launch
from push_cases import shared

from moesaic import use
from moesaic.parallel import Push

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ep.py"


def sections(rank: int, size: int, folder: str, names: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_ep", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_ep"] = script
    spec.loader.exec_module(script)
    bench = script.Bench(Path(folder) / "lines.jsonl", "cpu")
    bench.time = functools.partial(bench.time, rounds=1, warm=0)
    clock = bench.time
    bench.time = lambda call, *_: clock(call)
    script.make_push = lambda layer: Push(
        layer.E, max_tokens=layer.T, hidden_size=layer.H, top_k=layer.K, dtype=torch.float32,
        views=functools.partial(shared, folder, rank, size), patience=60.0,
    )  # fmt: skip
    with use("torch"):
        for name in names:
            getattr(script, name)(bench, True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        errors, _, codes = launch(sections, 2, folder, sys.argv[1:], limit=120)
        print(errors, codes, file=sys.stderr)
        assert (Path(folder) / "lines.jsonl").read_text()  # what rank 0 has printed
        sys.exit(any(errors.values()) or len(errors) < 2)
