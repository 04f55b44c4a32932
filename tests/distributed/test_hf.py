"""`DistributedConfig(ep_implementation="moesaic")` on 2 and 4 processes, against one."""

from __future__ import annotations

import pytest
from cluster import launch

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.23 has the registry")


@pytest.mark.parametrize("size", [2, 4])
def test_equal_to_one_process(size, tmp_path):
    from hf_cases import equal_to_one_process, save

    save(str(tmp_path))
    errors, _, codes = launch(equal_to_one_process, size, str(tmp_path))
    assert list(errors.values()) == [None] * size, (codes, errors)
