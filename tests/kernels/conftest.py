"""The kernel suite runs on the GPU if there is one, else in Triton's interpreter (`TRITON_INTERPRET=1`) on the CPU.

What the interpreter computes wrongly in bf16 `moesaic.interpreter` mends.
"""

from __future__ import annotations

import pytest
import torch

from moesaic import hardware


def pytest_configure(config):
    # numpy's warnings about values in lanes that a mask throws away
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not hardware.interpreting() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def implementation(request, device) -> str:
    arch = hardware.arch_of(torch.device(device))
    if request.param == "triton" and (reason := hardware.triton_why_not(device, arch)):
        pytest.skip(reason)
    return request.param
