"""CANN's operators between ranks on 1, 2 and 4 gloo processes.

One test a size: its cases share one set of processes.
"""

from __future__ import annotations

import pytest
from cann_cases import CASES
from cluster import check


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks(size):
    check(size, CASES)
