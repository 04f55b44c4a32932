"""The native CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer, by a driver in C."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from moesaic.ops.fused_experts import _cpu_build

DRIVER = Path(__file__).parent / "cpu_driver.c"
COMPILER = _cpu_build.compiler()
_ALL = list(_cpu_build.candidates())
LEVELS = {_ALL[-1][0]: _ALL[-1][1], _ALL[0][0]: _ALL[0][1]}  # the best and the plainest that this CPU runs
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


def run(folder: Path, flags: list[str]) -> subprocess.CompletedProcess:
    assert COMPILER is not None
    plain = [f for f in _cpu_build.FLAGS if f not in ("-O3", "-shared")]
    line = [*COMPILER, "-O1", "-g", *plain, *flags, f"-I{_cpu_build.SOURCES}", str(DRIVER), "-o", "driver", "-lm"]
    made = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=200)
    if "cannot find" in made.stderr:
        pytest.skip(f"the compiler has no runtime for {flags[0]}")
    assert made.returncode == 0, made.stderr
    # ThreadSanitizer of older compilers refuses the wide address randomisation of newer kernels
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    return subprocess.run(
        [*fixed, str(folder / "driver")], capture_output=True, text=True, timeout=200, env=os.environ | options
    )


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_addresses_and_undefined_behaviour(level, tmp_path):
    done = run(tmp_path, ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", *LEVELS[level]])
    assert done.returncode == 0, done.stdout + done.stderr


def test_threads(tmp_path):
    done = run(tmp_path, ["-fsanitize=thread", *_ALL[0][1]])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: ThreadSanitizer" not in done.stderr
