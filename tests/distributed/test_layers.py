"""Layers with experts on many ranks, against one process."""

from __future__ import annotations

import pytest
from cluster import check, launch
from layer_cases import CASES, CHECKPOINTS, folder_of, loads, saves


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks(size):
    check(size, CASES)


@pytest.mark.parametrize("saved, loaded", CHECKPOINTS)
def test_checkpoints_are_resharded(saved, loaded, tmp_path):
    for function, size in ((saves, saved), (loads, loaded)):
        errors, _, codes = launch(function, size, folder_of(str(tmp_path), saved))
        assert list(errors.values()) == [None] * size, (codes, errors)
