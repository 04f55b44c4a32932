"""Placement of experts: balance, tables, both modes of update_expert, and what travels when a placement changes."""

from __future__ import annotations

import pytest
import torch

from moesaic import Routing
from moesaic.parallel.placement import Placement, copies, moves, pack, place, update_expert


def zipf(experts: int) -> torch.Tensor:
    return 1000.0 / torch.arange(1, experts + 1)[torch.randperm(experts, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("ranks, nodes, slots, groups", [(8, 1, 72, 1), (8, 2, 80, 4), (4, 4, 64, 4), (16, 4, 96, 8)])
def test_copies_even_the_load(ranks, nodes, slots, groups):
    load = zipf(64)
    placement = place(load, ranks, slots=slots, nodes=nodes, groups=groups)
    assert placement.num_slots == slots and set(placement.experts) == set(range(64))
    before, after = Placement.plain(64, ranks).loads(load), placement.loads(load)
    assert after.sum().item() == pytest.approx(load.sum().item())
    assert after.max() <= before.max()
    if slots >= 72 and nodes == 1:  # EPLB's figure for a load like this: within a few percent of even
        assert after.max() <= 1.05 * after.mean()
    if groups % nodes == 0 and nodes > 1:
        per_node, size = slots // nodes, 64 // groups
        for g in range(groups):
            held = {p // per_node for e in range(g * size, g * size + size) for p in placement.places[e]}
            assert len(held) == 1, f"group {g} is spread over nodes {held}"


def test_no_slot_more_than_needed_is_a_permutation():
    placement = place(zipf(16), 4)
    assert sorted(placement.experts) == list(range(16))
    assert placement.loads(zipf(16)).max() <= Placement.plain(16, 4).loads(zipf(16)).max()


def test_parts_by_hand():
    assert copies([8.0, 4.0, 1.0], 6) == [3, 2, 1]  # 8/3, 4/2, 1
    assert pack([5.0, 4.0, 3.0, 2.0], 2) == [[0, 3], [1, 2]]
    placement = Placement((0, 1, 0, 2), 2, 3)
    assert placement.table().tolist() == [[2, 0, 2], [1, 1, 1], [1, 3, 3]]
    assert placement.loads(torch.tensor([4.0, 1.0, 2.0])).tolist() == [3.0, 4.0]


def test_update_expert_by_hand():
    """Columns: rank // ceil(world / count), or token % count; pruned below threshold x sum; inactive tokens."""
    table = torch.tensor([[2, 0, 3, 0], [1, 1, 1, 1], [3, 2, 4, 5]], dtype=torch.int32)
    ids = torch.tensor([[0, 2], [0, 2], [1, -1], [2, 0]], dtype=torch.int32)
    for rank, want in ((0, [[0, 2], [0, 2], [1, -1], [2, 0]]), (3, [[3, 4], [3, 4], [1, -1], [4, 3]])):
        assert update_expert(ids, table, local_rank_id=rank, world_size=4)[0].tolist() == want
    got, mask = update_expert(
        ids, table, balance_mode=1, expert_scales=torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.8, 0.2], [0.7, 0.3]]),
        pruning_threshold=torch.tensor([0.0, 0.2]), active_mask=torch.tensor([True, True, True, False]),
    )  # fmt: skip
    assert got.tolist() == [[0, 2], [3, 4], [1, -1], [2, 3]]
    assert mask.tolist() == [[True, False], [True, True], [True, True], [False, False]]


def test_every_rank_reaches_a_copy_of_the_right_expert():
    placement = place(zipf(8), 4, slots=12)
    ids = torch.randint(-1, 8, (40, 3), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    routing = Routing.from_topk(torch.rand(40, 3), ids, 8)
    held = torch.tensor([*placement.experts, -1])
    for mode in ("rank", "token"):
        for rank in range(4):
            physical = placement.route(routing, rank, mode=mode)
            assert physical.num_experts == 12
            assert torch.equal(held[physical.topk_ids.long()].int(), ids)  # -1 reads the last entry, -1


def test_only_what_changes_travels():
    old, new = Placement((0, 1, 2, 3), 2, 4), Placement((1, 0, 2, 3, 0, 1), 2, 4)
    assert moves(old, old).count == 0
    assert moves(old, new).count == 3  # 2 to rank 0; 0 and 1 to rank 1
    assert moves(old, new).sends == [[[], [0, 1]], [[2], []]]


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: Placement((0, 1, 2), 2, 3), "multiple of the ranks"),
        (lambda: Placement((0, 0), 1, 2), "every expert below 2"),
        (lambda: place(torch.ones(4), 3, slots=4), "slots must be a multiple"),
        (lambda: place(torch.ones(4), 2, slots=2), "at least the 4 experts"),
        (lambda: place(torch.ones(4), 2, groups=3), "groups must divide"),
        (lambda: place(torch.tensor([1.0, -1.0]), 1), "at least 0"),
        (lambda: update_expert(torch.zeros(1, 1).int(), torch.tensor([[1, 0]])), "needs a rank"),
        (lambda: moves(Placement((0,), 1, 1), Placement((0, 0), 2, 1)), "same experts and ranks"),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(ValueError, match=word):
        call()
