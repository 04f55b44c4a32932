"""No GPU needed: the shipped configurations compile for every architecture without spills, onto tensor cores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic import hardware


@pytest.mark.skipif(not hardware.has_triton(), reason="triton is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_shipped_kernels_compile(arch):
    # its own process: the interpreter is chosen when triton is imported
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot.py")
    done = subprocess.run([sys.executable, script, arch], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) > 10
    for report in reports:
        assert report["spills"] == 0, report
        # tiles too low for Hopper's warp-group product, and the backward of few tokens, which takes them
        few_rows = re.search(r"pointer (16|32)x|^backward", report["name"])
        if report["needs"] and arch == "sm_90" and not few_rows:
            assert report["tensor_core"]["HGMMA"] > 0, report
        elif report["needs"]:
            assert sum(report["tensor_core"].values()) > 0, report
        if report.get("barriers"):
            # one that is not used to the end may come to lie under data, which the hardware then spoils: there are the
            # ring's two for each of four stages and the board's four, all behind buffers of 208 + 16 KiB
            assert len(set(report["barriers"])) == len(report["barriers"]) == 12, report
            assert min(report["barriers"]) >= 224 * 1024 and report["shared"] <= 232448, report
