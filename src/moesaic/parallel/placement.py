"""Where experts live: redundant copies of the busy ones, packed so that ranks carry like loads, and moved while in use.

Legend: E logical experts, S physical places in all, P = S / ranks places of a rank; place s is on rank `s // P`. A
routing over logical experts becomes one over places (`Placement.route`), which any dispatcher of S experts carries.

    placement = place(load, ranks=8, nodes=2, slots=40)
    dispatcher = AllToAll(placement.num_slots, mesh)
    y = dispatcher(x, placement.route(routing, rank), experts)         # experts over w[placement.here(rank)]
    w = move(w, placement, better, mesh)                               # only experts that were not here travel

The method is that of DeepSeek's EPLB: expert groups to nodes, copies to the busiest inside each node, heaviest first to
the least loaded rank with room.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import check_choice, check_shape
from ..routing import Routing
from .collectives import Flight, group_of

MODES = ("rank", "token")


@dataclass(frozen=True)
class Placement:
    """Which logical expert each physical place holds.

    Attributes:
        experts: S logical experts, those of rank 0 first.
        ranks: number of ranks.
        num_experts: E; every one of them has a place.
    """

    experts: tuple[int, ...]
    ranks: int
    num_experts: int

    def __post_init__(self) -> None:
        who, held = "Placement", set(self.experts)
        if self.ranks < 1 or len(self.experts) % self.ranks:
            raise ValueError(f"{who}: {len(self.experts)} places must be a multiple of the ranks, got {self.ranks}.")
        if held != set(range(self.num_experts)):
            lost = sorted(set(range(self.num_experts)) ^ held)
            raise ValueError(
                f"{who}: every expert below {self.num_experts} and no other must have a place, got it otherwise for "
                f"{lost[:8]}."
            )

    @classmethod
    def plain(cls, num_experts: int, ranks: int) -> Placement:
        """Every expert once, in order."""
        return cls(tuple(range(num_experts)), ranks, num_experts)

    @property
    def num_slots(self) -> int:
        return len(self.experts)

    def here(self, rank: int) -> list[int]:
        """The logical experts of a rank's places: which slices of whole weights are its own."""
        P = self.num_slots // self.ranks
        return list(self.experts[rank * P : rank * P + P])

    @cached_property
    def places(self) -> list[list[int]]:
        """The places of each logical expert, in order."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for place, expert in enumerate(self.experts):
            found[expert].append(place)
        return found

    def table(self, device: Any = "cpu") -> Tensor:
        """`(E, 1 + most copies)` int32: how many places an expert has, then which; padded with the first. CANN's."""
        most = max(map(len, self.places))
        rows = [[len(p), *p, *p[:1] * (most - len(p))] for p in self.places]
        return torch.tensor(rows, dtype=torch.int32, device=device)

    def loads(self, load: Tensor) -> Tensor:
        """`(ranks,)`: what each rank carries when an expert's load spreads evenly over its copies."""
        load = load.double().cpu()
        share = torch.tensor([load[e] / len(self.places[e]) for e in self.experts], dtype=torch.float64)
        return share.view(self.ranks, -1).sum(1)

    def route(self, routing: Routing, rank: int, *, mode: str = "token") -> Routing:
        """The routing over places of a routing over logical experts; weights, gradients and drops stay.

        Args:
            routing: over E experts.
            rank: this rank.
            mode: how one of several copies is chosen: `"token"` deals the tokens out in turn, `"rank"` gives each
                rank one copy, near ranks the same.
        """
        check_choice("Placement.route", "mode", mode, MODES)
        if routing.num_experts != self.num_experts:
            raise ValueError(
                f"Placement.route: the routing must be over {self.num_experts} experts, got {routing.num_experts}."
            )
        ids, _ = update_expert(
            routing.topk_ids, self.table(routing.topk_ids.device), local_rank_id=rank, world_size=self.ranks,
            balance_mode=MODES.index(mode),
        )  # fmt: skip
        return Routing.from_topk(routing.topk_weights, ids, self.num_slots)


def update_expert(
    expert_ids: Tensor, eplb_table: Tensor, *, expert_scales: Tensor | None = None,
    pruning_threshold: Tensor | None = None, active_mask: Tensor | None = None, local_rank_id: int = -1,
    world_size: int = -1, balance_mode: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logical ids to places, and which of them stay: the meaning of CANN's `npu_moe_update_expert`.

    Args:
        expert_ids: `(T, K)` logical ids; -1 stays -1.
        eplb_table: `(E, 1 + F)`: the number of places of an expert, then the places.
        expert_scales: `(T, K)`; with `pruning_threshold (K,)` a choice stays while its scale is at least the threshold
            times the token's sum of scales.
        active_mask: `(T,)` bool; tokens that take part.
        local_rank_id, world_size: this rank of how many; needed for mode 0.
        balance_mode: 0 takes column `rank // ceil(world_size / count)`, 1 column `token % count`, of `count` places.

    Returns:
        ids `(T, K)` in the dtype given, and a mask `(T, K)` bool.
    """
    who = "update_expert"
    check_choice(who, "balance_mode", balance_mode, (0, 1))
    T, K = expert_ids.shape
    table, ids = eplb_table.long(), expert_ids.clamp_min(0).long()
    counts = table[ids, 0]
    if balance_mode == 0:
        if not 0 <= local_rank_id < world_size:
            raise ValueError(
                f"{who}: balance_mode=0 needs a rank of a world, got local_rank_id={local_rank_id}, "
                f"world_size={world_size}."
            )
        column = local_rank_id // ((world_size + counts - 1) // counts)
    else:
        column = torch.arange(T, device=ids.device)[:, None] % counts
    places = table[ids, column + 1].to(expert_ids.dtype).masked_fill(expert_ids < 0, -1)
    mask = torch.ones(T, K, dtype=torch.bool, device=ids.device)
    if (expert_scales is None) != (pruning_threshold is None):
        raise ValueError(f"{who}: expert_scales and pruning_threshold must be given together, got one of them.")
    if expert_scales is not None and pruning_threshold is not None:
        check_shape(who, "expert_scales", expert_scales, (T, K))
        check_shape(who, "pruning_threshold", pruning_threshold, (K,))
        mask &= expert_scales >= pruning_threshold * expert_scales.sum(1, keepdim=True)
    if active_mask is not None:
        check_shape(who, "active_mask", active_mask, (T,))
        mask &= active_mask[:, None]
    return places, mask


# ---------------------------------------------------------------- the balancer
def pack(weights: Sequence[float], bins: int) -> list[list[int]]:
    """Indices in bins of equal number: heaviest first, each into the lightest bin with room."""
    room = len(weights) // bins
    filled: list[list[int]] = [[] for _ in range(bins)]
    light = [(0.0, b) for b in range(bins)]
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        total, b = heapq.heappop(light)
        while len(filled[b]) == room:  # a full bin takes no more
            total, b = heapq.heappop(light)
        filled[b].append(i)
        heapq.heappush(light, (total + weights[i], b))
    return filled


def copies(load: Sequence[float], slots: int) -> list[int]:
    """How many places each expert gets: one, and every further one to the expert whose copies carry most."""
    given = [1] * len(load)
    heap = [(-load[e], e) for e in range(len(load))]
    heapq.heapify(heap)
    for _ in range(slots - len(load)):
        _, e = heapq.heappop(heap)
        given[e] += 1
        heapq.heappush(heap, (-load[e] / given[e], e))
    return given


def place(load: Tensor, ranks: int, *, slots: int | None = None, nodes: int = 1, groups: int = 1) -> Placement:
    """A placement under which ranks carry like loads.

    Args:
        load: `(E,)` tokens an expert gets, counted or smoothed.
        ranks: number of ranks, a multiple of `nodes`.
        slots: S, places in all, a multiple of `ranks` and at least E; by default no copy more than needed.
        nodes, groups: experts form that many equal consecutive groups; if nodes divides them, whole groups share a
            node (for routers that choose among groups), and all copies of an expert too.

    Returns:
        the `Placement`. The same load gives the same one on every rank.
    """
    who, E = "place", load.numel()
    slots = -(-E // ranks) * ranks if slots is None else slots
    if ranks < 1 or nodes < 1 or ranks % nodes or slots % ranks or slots < E:
        raise ValueError(
            f"{who}: slots must be a multiple of ranks and at least the {E} experts, and ranks a multiple of nodes, "
            f"got slots={slots}, ranks={ranks}, nodes={nodes}."
        )
    if groups < 1 or E % groups:
        raise ValueError(f"{who}: groups must divide the {E} experts, got {groups}.")
    weight = load.detach().double().cpu().reshape(-1).tolist()
    if min(weight) < 0 or any(w != w for w in weight):
        raise ValueError(f"{who}: load must be at least 0 everywhere, got {min(weight)}.")
    if groups % nodes or E // nodes > slots // nodes:
        nodes, sets = 1, [list(range(E))]
    else:
        size = E // groups
        whole = [sum(weight[g * size : g * size + size]) for g in range(groups)]
        sets = [[e for g in sorted(chosen) for e in range(g * size, g * size + size)] for chosen in pack(whole, nodes)]
    order: list[int] = []
    for members in sets:
        each = copies([weight[e] for e in members], slots // nodes)
        held = [e for e, n in zip(members, each, strict=True) for _ in range(n)]
        share = [weight[e] / n for e, n in zip(members, each, strict=True) for _ in range(n)]
        for bin_ in pack(share, ranks // nodes):
            order += sorted(held[i] for i in bin_)
    return Placement(tuple(order), ranks, E)


# ---------------------------------------------------------------- moving
@dataclass(frozen=True)
class Moves:
    """Who sends what for one change of placement; every rank knows the same.

    Attributes:
        sends: `sends[a][b]`: logical experts that rank a sends to rank b, in b's order of need.
        count: experts that travel in all; one that a rank had before does not.
    """

    sends: list[list[list[int]]]

    @property
    def count(self) -> int:
        return sum(len(e) for row in self.sends for e in row)


def moves(old: Placement, new: Placement) -> Moves:
    """What must travel: an expert to each rank that has it now and had not; holders take turns at sending."""
    if (old.ranks, old.num_experts) != (new.ranks, new.num_experts):
        raise ValueError(
            f"move: both placements must be of the same experts and ranks, got {old.num_experts} on {old.ranks} and "
            f"{new.num_experts} on {new.ranks}."
        )
    had = [set(old.here(r)) for r in range(old.ranks)]
    sent = [0] * old.ranks
    sends: list[list[list[int]]] = [[[] for _ in range(old.ranks)] for _ in range(old.ranks)]
    for b in range(old.ranks):
        for e in dict.fromkeys(new.here(b)):
            if e not in had[b]:
                a = min((r for r in range(old.ranks) if e in had[r]), key=lambda r: (sent[r], r))
                sends[a][b].append(e)
                sent[a] += 1
    return Moves(sends)


@torch.no_grad()
def move(weights: Tensor, old: Placement, new: Placement, mesh: Any = None) -> Tensor:
    """This rank's experts under another placement, in a new tensor: the old one stays usable until it is dropped.

    Args:
        weights: `(P, ...)`, this rank's places under `old`.
        old, new: the placements; numbers of places may differ.
        mesh: the ranks.

    Every rank must call. Only experts that a rank had not travel, each once to a rank. Copies of one expert hold the
    same values, so that every output is the same before and after.
    """
    who, group = "move", group_of(mesh, "move")
    rank = group.rank()
    if old.ranks != group.size():
        raise ValueError(f"{who}: the placements must be of the group's {group.size()} ranks, got {old.ranks}.")
    mine = old.here(rank)
    check_shape(who, "weights", weights, (len(mine), *weights.shape[1:]), "one for each place of this rank")
    plan = moves(old, new)
    flat = weights.reshape(len(mine), -1)
    going = [mine.index(e) for to in plan.sends[rank] for e in to]
    coming = [e for row in plan.sends for e in row[rank]]
    ins, outs = [len(to) for to in plan.sends[rank]], [len(row[rank]) for row in plan.sends]
    came = Flight(flat[going], ins, outs, group, "same", f"{who}, experts").wait()
    made = flat.new_empty(len(new.here(rank)), flat.shape[1])
    for place_, e in enumerate(new.here(rank)):
        made[place_] = flat[mine.index(e)] if e in mine else came[coming.index(e)]
    return made.view(-1, *weights.shape[1:])
