"""A rank dies or stalls in each phase: the others fail by name, in time, and none returns an output."""

from __future__ import annotations

import pytest
from cluster import launch
from failure_cases import PHASES, VICTIM, one_dies

TIMEOUT = 2.0


def check(size: int, phase: str, how: str, transport: str) -> None:
    errors, values, codes = launch(
        one_dies, size, phase, how, transport, TIMEOUT if how == "stall" else 20.0, limit=TIMEOUT + 6, enough=size - 1
    )
    if how == "die":
        assert codes[VICTIM] == 17
    for rank in set(range(size)) - {VICTIM}:
        assert errors.get(rank, "hung") is None, (rank, errors.get(rank, "hung"))
        kind, message, seconds = values[rank]
        assert kind == "PeerFailed", (rank, kind)
        assert f"rank {rank} " in message or transport == "hierarchical", message
        assert "leave, and restart" in message
        where = dict(counts="counts", rows="rows", experts="combine", combine="combine", backward="backward")[phase]
        if transport == "all_to_all":
            assert where in message, (phase, message)
        assert seconds < TIMEOUT + 3, seconds


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_dies(phase):
    check(4, phase, "die", "all_to_all")


@pytest.mark.parametrize("transport", ["all_gather", "hierarchical"])
@pytest.mark.parametrize("phase", ["rows", "experts", "backward"])
def test_a_rank_of_another_transport_dies(phase, transport):
    check(4, phase, "die", transport)


@pytest.mark.parametrize("phase", ["rows", "experts", "backward"])
def test_a_rank_stalls(phase):
    check(4, phase, "stall", "all_to_all")
