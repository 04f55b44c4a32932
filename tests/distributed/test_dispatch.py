"""Every transport on 1, 2 and 4 gloo processes, against one process.

One test a size: its cases share one set of processes.
"""

from __future__ import annotations

import pytest
from cluster import check
from dispatch_cases import CASES


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks(size):
    check(size, CASES)
