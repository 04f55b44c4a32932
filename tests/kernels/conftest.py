"""The kernel suite: every implementation against the fp64 oracle, on the GPU if there is one, else interpreted.

Without a GPU run it as `TRITON_INTERPRET=1 pytest tests/kernels`; without that variable only torch's side runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moesaic import hardware

sys.path.insert(0, str(Path(__file__).parent))  # the suite's own helpers

if hardware.interpreting():
    import interpreter  # noqa: F401


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(params=["torch", "triton"])
def implementation(request, device) -> str:
    reason = hardware.triton_why_not(device.type, hardware.arch_of(device))
    if request.param == "triton" and reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def poisoned_memory():
    """Memory that is allocated and not written holds NaN (the largest integer in tables)."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
