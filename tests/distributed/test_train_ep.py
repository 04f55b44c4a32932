"""examples/train_ep.py: the losses of one process, and of a run that was killed and went on with other ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import free_port

SCRIPT = Path(__file__).parents[2] / "examples" / "train_ep.py"
STEPS = 6


def run(folder: Path, ranks: int, *arguments: str, kill: bool = False) -> list[float]:
    """The losses of a run; or [] after all of its ranks were killed once there was a checkpoint."""
    out = folder / "losses.json"
    port = str(free_port())
    whole = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--json", str(out), *arguments]
    processes = [subprocess.Popen(command, env=whole | dict(RANK=str(r), LOCAL_RANK=str(r))) for r in range(ranks)]
    try:
        if kill:
            while not (folder / "ck" / "latest").exists():
                assert all(p.poll() is None for p in processes)
                time.sleep(0.01)
        codes = [] if kill else [p.wait(60) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert codes == [0] * len(codes)
    return [] if kill else json.loads(out.read_text())["losses"]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> list[float]:
    return run(tmp_path_factory.mktemp("one"), 1, "--steps", str(STEPS))


def test_ranks_have_the_losses_of_one_process(one, tmp_path):
    assert len(one) == STEPS and one[-1] < one[0]
    assert run(tmp_path, 4, "--steps", str(STEPS)) == pytest.approx(one, abs=1e-5)


def test_a_killed_run_goes_on(one, tmp_path):
    keep = ("--checkpoint", str(tmp_path / "ck"), "--every", "2")
    run(tmp_path, 2, "--steps", "1000", *keep, kill=True)
    losses = run(tmp_path, 1, "--steps", str(STEPS), *keep)
    assert losses == pytest.approx(one, abs=1e-5)
