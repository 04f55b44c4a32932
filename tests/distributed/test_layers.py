"""Layers with experts on many ranks, against one process."""

from __future__ import annotations

import pytest
from cluster import check, launch, run_cases
from layer_cases import CASES, CHECKPOINTS, folder_of, loads, saves

SIZES = (1, 2, 4)
_said: dict[int, tuple] = {}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_ranks(case, size):
    if size not in _said:
        _said[size] = launch(run_cases, size, CASES)
    check(_said[size], size, case.__name__)


@pytest.mark.parametrize("saved, loaded", CHECKPOINTS)
def test_checkpoints_are_resharded(saved, loaded, tmp_path):
    for function, size in ((saves, saved), (loads, loaded)):
        errors, _, codes = launch(function, size, folder_of(str(tmp_path), saved))
        assert list(errors.values()) == [None] * size, (codes, errors)
