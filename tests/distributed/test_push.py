"""`Push`: kernels, protocol and failures on CPU; its kernels compile for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def script(name: str, *arguments: str, interpret: bool) -> list:
    """The JSON lines that a script of this folder prints, in a process whose triton interprets or compiles."""
    environment = dict(os.environ, TRITON_INTERPRET="1" if interpret else "0")
    command = [sys.executable, "-W", "ignore", str(HERE / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "{"))]


def test_protocol_and_a_rank_that_does_not_come():
    """All gradients on 1, 2 and 4 ranks; then rank 1 stalls: NaN, and PeerFailed at the next call."""
    said = {word: rest for word, *rest in script("push_cases.py", "1", "2", "4", "stall2", interpret=True)}
    for size in (1, 2, 4):
        errors, _, codes = said[str(size)]
        assert errors == {str(r): None for r in range(size)}, (codes, errors)
    errors, values, codes = said["stall2"]
    assert errors == {"0": None}, (codes, errors)
    assert len(values["0"]) == 2 and all("rank 0 must be met by all 2 ranks" in text for text in values["0"])


def test_kernels_compile_for_sm_90():
    """Nothing spills, rows are stored 16 bytes a thread, and every rank is told and waited for at system scope."""
    made = script("push_aot.py", "8", interpret=False)
    assert len(made) == 6
    for kernel in made:
        assert kernel["spills"] == 0 and kernel["wide_stores"] >= 1 and kernel["registers"] <= 96, kernel
        peers = 0 if kernel["name"] == "add_kernel" else kernel["size"] - 1
        assert (kernel["releases"], kernel["acquires"]) == (peers, peers), kernel


def test_benchmark_runs():
    """benchmarks/ep.py checks itself before it times: here on CPU, in small."""
    made = script("bench_cases.py", "check", interpret=True)
    assert [line["spread"] for line in made] == ["hot"]
    assert all(line["equals_all_to_all"] and line["graph"] == "equal" for line in made)
