"""bf16 in Triton's interpreter, as somebody meets it who sets TRITON_INTERPRET=1 and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moesaic import hardware

SCRIPT = """
import torch, moesaic
torch.manual_seed(0)
T, E, K, H, I = 5, 4, 2, 32, 16
x, up, down = (torch.randn(s).bfloat16() for s in ((T, H), (E, 2 * I, H), (E, H, I)))
routing = moesaic.Routing.from_topk(torch.rand(T, K), torch.rand(T, E).topk(K, -1).indices, E)
y = moesaic.fused_experts(x, up, down, routing, implementation="triton")
oracle = moesaic.fused_experts(x.double(), up.double(), down.double(), routing, implementation="reference")
moesaic.testing.assert_close(y, oracle, max(H, I))
"""


@pytest.mark.skipif(not hardware.has_triton(), reason="triton is not installed")
def test_bf16_is_right_in_the_interpreter():
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | {"TRITON_INTERPRET": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
