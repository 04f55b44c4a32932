"""CANN's operators between ranks on 1, 2 and 4 gloo processes."""

from __future__ import annotations

import pytest
from cann_cases import CASES
from cluster import check, launch, run_cases

_said: dict[int, tuple] = {}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_ranks(case, size):
    if size not in _said:
        _said[size] = launch(run_cases, size, CASES)
    check(_said[size], size, case.__name__)
