"""AllToAll: uneven all-to-alls over any backend and any number of nodes, after one small exchange of counts.

Legend: as in `dispatcher`. A *copy* is a token's row on its way to one rank. With `send="token"` a token crosses once
to a rank however many experts it has there, and one sum comes back; with `send="slot"` once for each of its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import check_choice
from ..ops.permute import permute, unpermute
from ..routing import Routing
from .collectives import Flight, arrive, check_wire, gather, group_of
from .dispatcher import TokenDispatcher, experts_of

SENDS = ("token", "slot")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Columns of a rank's header before its counts; all but the last two must agree between ranks.
HEADER = ("hidden_size", "dtype", "num_experts", "top_k", "send", "wire", "weights", "tokens", "rows")
_AGREE = len(HEADER) - 2


@dataclass(frozen=True)
class Plan:
    """One dispatch on one rank, known to the host.

    Attributes:
        copies: a `Routing` whose experts are ranks: which ranks a token goes to; its rows are the copies in order.
        sent: copies to each rank.
        received: copies from each rank.
    """

    copies: Routing
    sent: list[int]
    received: list[int]

    @property
    def messages(self) -> int:
        """Messages with rows in them that the transport sends for one way, to itself excepted where ranks are known."""
        return sum(n > 0 for n in self.sent)


class AllToAll(TokenDispatcher):
    """Copies to the owners of their experts in one uneven all-to-all, sums back in another.

    Before them the ranks gather one line of integers each: their counts and what must agree between ranks. Every rank
    reads the same lines, so that a disagreement raises the same `ValueError` on all of them before any row moves. Then
    the counts are read on the host, the one synchronisation of the call.

    Args:
        num_experts: E, a multiple of W.
        mesh: a one-dimensional `DeviceMesh`, a `ProcessGroup`, or None for all ranks.
        send: `"token"` (one copy a rank, the owner adds up) or `"slot"` (one copy an expert).
        wire: `"same"`, `"bf16"`, or `"fp8"` (e4m3 with a scale a row): how tokens travel to the experts.
        back_wire: how outputs travel back.
        grad_wire: how gradients travel, both ways.
    """

    name = "all_to_all"

    def __init__(
        self, num_experts: int, mesh: Any = None, *, send: str = "token", wire: str = "same", back_wire: str = "same",
        grad_wire: str = "same",
    ):  # fmt: skip
        who = type(self).__name__
        self.group: dist.ProcessGroup = group_of(mesh, who)
        self.num_experts = num_experts
        self.num_local_experts = experts_of(num_experts, self.group.size(), who)
        check_choice(who, "send", send, SENDS)
        for name, value in (("wire", wire), ("back_wire", back_wire), ("grad_wire", grad_wire)):
            check_wire(who, name, value)
        self.copy, self.wire, self.back_wire, self.grad_wire = send, wire, back_wire, grad_wire

    # ------------------------------------------------------------ to the experts
    def plans(self, x: Tensor, routings: list[Routing]) -> list[Plan]:
        """The plans of several dispatches, from one exchange and one synchronisation. `x` is any of their tokens."""
        copies = [self._copies(r.topk_ids) for r in routings]
        lines = torch.stack([self._line(x, r, c) for r, c in zip(routings, copies, strict=True)])
        every = gather(lines, self.group, f"{type(self).__name__}.dispatch, counts").view(
            self.group.size(), len(routings), -1
        )
        table, rank = every.tolist(), self.group.rank()
        self._agree(table)
        plans = []
        for i, c in enumerate(copies):
            sent = table[rank][i][len(HEADER) :]
            received = [line[i][len(HEADER) + rank] for line in table]
            plans.append(Plan(replace(c, row_order=c.row_order[: sum(sent)]), sent, received))
        return plans

    def send(self, x: Tensor, routing: Routing, plan: Plan | None = None) -> Any:
        if plan is None:
            (plan,) = self.plans(x, [routing])
        who, copies, weights = f"{type(self).__name__}.dispatch", plan.copies, routing.topk_weights
        if self.copy == "slot":
            slots = copies.row_order
            rows = permute(x, copies)
            ids = routing.topk_ids.reshape(-1, 1)[slots]
            w = None if weights is None else weights.reshape(-1, 1).index_select(0, slots)
        else:
            rows = permute(x, copies)
            ids = routing.topk_ids.index_select(0, copies.row_order // copies.top_k)
            w = None if weights is None else permute(weights, copies)
        rank = copies.topk_ids.reshape(-1)[copies.row_order][:, None]
        ids = ids - rank * self.num_local_experts
        ids = ids.masked_fill((ids < 0) | (ids >= self.num_local_experts), -1).int()
        ways = (plan.sent, plan.received, self.group)
        flights = (
            Flight(rows, *ways, self.wire, f"{who}, rows"),
            Flight(ids, *ways, "same", f"{who}, ids"),
            None if w is None else Flight(w, *ways, "same", f"{who}, weights"),
        )
        return plan, rows, w, flights

    def receive(self, pending: Any) -> tuple[Tensor, Routing, Plan]:
        plan, rows, w, (rows_flight, ids_flight, w_flight) = pending
        rows = arrive(rows, rows_flight, self.grad_wire)
        ids = ids_flight.wait()
        if w_flight is not None:
            w = arrive(w, w_flight)
        self._check_ids(ids, plan)
        return rows, Routing.from_topk(w, ids, self.num_local_experts), plan

    # ------------------------------------------------------------ and back
    def give_back(self, rows: Tensor, metadata: Plan) -> Any:
        plan, who = metadata, f"{type(self).__name__}.combine"
        return plan, rows, Flight(rows, plan.received, plan.sent, self.group, self.back_wire, f"{who}, rows")

    def add(self, pending: Any) -> Tensor:
        plan, rows, flight = pending
        return unpermute(arrive(rows, flight, self.grad_wire), plan.copies, weights=False)

    # ------------------------------------------------------------ parts
    def _copies(self, ids: Tensor) -> Routing:
        """Which ranks each token goes to, as a routing over ranks in ascending order; -1 where none."""
        W, K = self.group.size(), ids.shape[1]
        ranks = torch.where(ids < 0, W, ids // self.num_local_experts)
        if self.copy == "token" and K > 1:
            ranks = ranks.sort(1).values
            again = ranks[:, 1:] == ranks[:, :-1]
            ranks = torch.cat([ranks[:, :1], ranks[:, 1:].masked_fill(again, W)], 1)
            ranks = ranks.sort(1).values[:, : min(K, W)]
        return Routing.from_topk(None, ranks.masked_fill(ranks == W, -1).int(), W)

    def _line(self, x: Tensor, routing: Routing, copies: Routing) -> Tensor:
        """This rank's header: what `HEADER` names, then its copies to each rank."""
        fixed = (
            x.shape[1], _DTYPES.index(x.dtype) if x.dtype in _DTYPES else -1, self.num_experts, routing.top_k,
            SENDS.index(self.copy), ("same", "bf16", "fp8").index(self.wire), int(routing.topk_weights is not None),
            routing.num_tokens,
        )  # fmt: skip
        head = torch.tensor(fixed, dtype=torch.int64).to(x.device, non_blocking=True)
        return torch.cat([head, copies.expert_offsets[-1:].long(), self._counts(copies).long()])

    def _counts(self, copies: Routing) -> Tensor:
        return copies.tokens_per_expert

    def _agree(self, table: list[list[list[int]]]) -> None:
        """Raise the same ValueError on every rank unless all lines agree and each line's counts are its rows."""
        who = f"{type(self).__name__}.dispatch"
        for i in range(len(table[0])):
            first = table[0][i]
            for rank, line in enumerate(table):
                line = line[i]
                for name, a, b in zip(HEADER[:_AGREE], first, line, strict=False):
                    if a != b:
                        raise ValueError(
                            f"{who}: all ranks must have the same {name}, got {a} on rank 0 and {b} on rank {rank}; "
                            "give every rank the same layer and dtype."
                        )
                tokens, rows = line[_AGREE : len(HEADER)]
                counts = line[len(HEADER) :]
                limit = tokens * (first[HEADER.index("top_k")] if self.copy == "slot" else 1)
                if sum(counts) != rows or min(counts) < 0 or max(counts) > limit:
                    raise ValueError(
                        f"{who}: the counts of every rank must add up to its rows and none exceed {limit}, got "
                        f"{counts} for {rows} rows of {tokens} tokens on rank {rank}; that rank's routing is not sound."
                    )

    def _check_ids(self, ids: Tensor, plan: Plan) -> None:
        """On the CPU, where looking costs nothing: every row that came has an expert here."""
        if ids.device.type != "cpu" or not ids.numel():
            return
        lost = ((ids < 0).all(1) | (ids >= self.num_local_experts).any(1)).nonzero()
        if lost.numel():
            row, rank = int(lost[0]), 0
            ends: Sequence[int] = torch.tensor(plan.received).cumsum(0).tolist()
            rank = next(i for i, end in enumerate(ends) if row < end)
            raise ValueError(
                f"{type(self).__name__}.dispatch: every row must have an expert of this rank, got ids "
                f"{ids[row].tolist()} in row {row}, from rank {rank}; its counts do not match its rows."
            )

    def __repr__(self) -> str:
        wire = "" if self.wire == "same" else f", wire={self.wire}"
        return (
            f"{type(self).__name__}(experts={self.num_experts}, here={self.num_local_experts}, "
            f"ranks={self.group.size()}, send={self.copy}{wire})"
        )
