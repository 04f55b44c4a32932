"""Every transport on 1, 2 and 4 gloo processes, against one process."""

from __future__ import annotations

import pytest
from cluster import check, launch, run_cases
from dispatch_cases import CASES

SIZES = (1, 2, 4)
_said: dict[int, tuple] = {}


def said(size: int):
    """What the ranks said of each case; they run once a size."""
    if size not in _said:
        _said[size] = launch(run_cases, size, CASES)
    return _said[size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_ranks(case, size):
    check(said(size), size, case.__name__)
