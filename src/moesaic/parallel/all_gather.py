"""AllGather: every rank sees every token. For few tokens, where one collective costs more than its bytes.

Legend: as in `dispatcher`; M places a rank, at least the T of any. Token t of rank s has one place everywhere: row
`s·M + t`. So nothing is sorted and no count travels when M is given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ops.permute import unpermute
from ..routing import Routing
from .collectives import Flight, gather, group_of
from .dispatcher import TokenDispatcher, experts_of


def placed(present: Tensor, places: int) -> Routing:
    """The routing of tokens whose sum of rank p comes back in row `p·places + t`.

    Args:
        present: `(T, W)` bool: token t has an expert on rank p.
        places: rows of a rank, at least T.

    Returns:
        A `Routing` of T tokens over W ranks, padded to `places` rows a rank.
    """
    T, W = present.shape
    device = present.device
    ranks = torch.arange(W, dtype=torch.int32, device=device)
    tokens = torch.arange(T, dtype=torch.int32, device=device)
    ids = torch.where(present, ranks, -1)
    index = torch.where(present, ranks * places + tokens[:, None], -1)
    order = torch.where(present, tokens[:, None] * W + ranks, -1)
    order = F.pad(order.T, (0, places - T), value=-1)
    return Routing(
        None, ids, present.sum(0, dtype=torch.int32), torch.arange(W + 1, dtype=torch.int32, device=device) * places,
        order.reshape(-1).contiguous(), index.reshape(-1).contiguous(), padded=places,
    )  # fmt: skip


def presence(ids: Tensor, size: int, local: int) -> Tensor:
    """`(T, W)` bool: which ranks own one of a token's experts."""
    owner = torch.where(ids < 0, -1, ids // local)
    return (owner[:, :, None] == torch.arange(size, dtype=owner.dtype, device=ids.device)).any(1)


class _Gather(torch.autograd.Function):
    """`(T, C)` of every rank in its places, `(W·M, C)`; the gradient adds up what each rank says of a token."""

    @staticmethod
    def forward(ctx, x, back, places, group, who):
        ctx.back, ctx.places, ctx.group, ctx.who = back, places, group, who
        return gather(F.pad(x, (0, 0, 0, places - x.shape[0])), group, who)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        each = [ctx.places] * ctx.group.size()
        parts = Flight(grad, each, each, ctx.group, "same", f"{ctx.who}, backward").wait()
        return unpermute(parts, ctx.back, weights=False), None, None, None, None


class _Back(torch.autograd.Function):
    """Every rank's `(M, H)` sums of this rank's tokens, `(W·M, H)`; the gradient goes where a sum was made."""

    @staticmethod
    def forward(ctx, rows, flight):
        ctx.way = (flight.outs, flight.ins, flight.group, "same", f"{flight.who}, backward")
        out = flight.wait()
        return out.view_as(out) if out is rows else out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return Flight(grad, *ctx.way).wait(), None


class AllGather(TokenDispatcher):
    """All tokens to all ranks, and every rank's sums back to the tokens' own ranks, added in fp32 in rank order.

    Args:
        num_experts: E, a multiple of W.
        mesh: a one-dimensional `DeviceMesh`, a `ProcessGroup`, or None for all ranks.
        max_tokens: M, tokens that a rank has at most. With it no count travels and the host waits for nothing, so that
            on NCCL the call can be captured in a CUDA graph. None asks the ranks at every call.
    """

    name = "all_gather"

    def __init__(self, num_experts: int, mesh: Any = None, *, max_tokens: int | None = None):
        who = type(self).__name__
        self.group: dist.ProcessGroup = group_of(mesh, who)
        self.num_experts, self.max_tokens = num_experts, max_tokens
        self.num_local_experts = experts_of(num_experts, self.group.size(), who)
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"{who}: max_tokens must be at least 0, got {max_tokens}.")

    def check(self, x: Tensor, routing: Routing) -> None:
        super().check(x, routing)
        if self.max_tokens is not None and x.shape[0] > self.max_tokens:
            raise ValueError(
                f"AllGather.dispatch: x must have at most max_tokens={self.max_tokens} rows, got {x.shape[0]}; "
                "make the dispatcher with more."
            )

    def _places(self, x: Tensor) -> int:
        if self.max_tokens is not None:
            return self.max_tokens
        line = torch.tensor([[x.shape[0], x.shape[1]]], dtype=torch.int64, device=x.device)
        table = gather(line, self.group, "AllGather.dispatch, counts").tolist()
        for rank, (_, width) in enumerate(table):
            if width != table[0][1]:
                raise ValueError(
                    f"AllGather.dispatch: all ranks must have the same hidden_size, got {table[0][1]} on rank 0 and "
                    f"{width} on rank {rank}; give every rank the same layer."
                )
        return max(tokens for tokens, _ in table)

    def send(self, x: Tensor, routing: Routing, plan: Any = None) -> Any:
        W, L, rank = self.group.size(), self.num_local_experts, self.group.rank()
        places = self._places(x)
        back, pad = placed(presence(routing.topk_ids, W, L), places), places - x.shape[0]
        who = "AllGather.dispatch"
        rows = _Gather.apply(x, back, places, self.group, f"{who}, rows")
        ids = gather(F.pad(routing.topk_ids, (0, 0, 0, pad), value=-1), self.group, f"{who}, ids") - rank * L
        w = routing.topk_weights
        w = None if w is None else _Gather.apply(w, back, places, self.group, f"{who}, weights")
        ids = ids.masked_fill((ids < 0) | (ids >= L), -1)
        return rows, Routing.from_topk(w, ids, L), (back, places)  # pyright: ignore[reportArgumentType]

    def receive(self, pending: Any) -> tuple[Tensor, Routing, Any]:
        return pending

    def give_back(self, rows: Tensor, metadata: Any) -> Any:
        back, places = metadata
        each = [places] * self.group.size()
        return rows, back, Flight(rows, each, each, self.group, "same", "AllGather.combine, rows")

    def add(self, pending: Any) -> Tensor:
        rows, back, flight = pending
        return unpermute(_Back.apply(rows, flight), back, weights=False)  # pyright: ignore[reportArgumentType]

    def __repr__(self) -> str:
        bound = "" if self.max_tokens is None else f", max_tokens={self.max_tokens}"
        return f"AllGather(experts={self.num_experts}, here={self.num_local_experts}, ranks={self.group.size()}{bound})"
