"""ChunkedOverlap: tokens in chunks, so that one chunk's rows travel while another's experts compute.

The order is what makes it overlap: the next chunk is sent before this one is waited for, and no sum that comes back is
waited for before the last chunk has computed.

    send(0)
    for i: send(i + 1) · receive(i) · experts(i) · give_back(i)
    for i: add(i)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..routing import Routing
from .dispatcher import Experts, TokenDispatcher


class ChunkedOverlap(TokenDispatcher):
    """`inner`, n chunks of tokens at a time. Call it with the experts; `dispatch` and `combine` are the inner's own.

    Args:
        inner: the transport.
        chunks: n; every rank makes n dispatches, empty ones too.

    Forward results are those of `inner` wherever the experts' outputs for a row do not depend on the other rows.
    Gradients of weights are added up chunk by chunk. All chunks' counts travel in one exchange.

    Attributes:
        timeline: what the last call issued and waited for, in order.
    """

    name = "chunked"

    def __init__(self, inner: TokenDispatcher, chunks: int):
        if chunks < 1:
            raise ValueError(f"ChunkedOverlap: chunks must be at least 1, got {chunks}.")
        self.inner, self.chunks = inner, chunks
        self.num_experts, self.num_local_experts = inner.num_experts, inner.num_local_experts
        self.timeline: list[str] = []

    def send(self, x: Tensor, routing: Routing, plan: Any = None) -> Any:
        return self.inner.send(x, routing, plan)

    def receive(self, pending: Any) -> tuple[Tensor, Routing, Any]:
        return self.inner.receive(pending)

    def give_back(self, rows: Tensor, metadata: Any) -> Any:
        return self.inner.give_back(rows, metadata)

    def add(self, pending: Any) -> Tensor:
        return self.inner.add(pending)

    def __call__(
        self, x: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Any] | None = None
    ) -> Tensor:
        self.check(x, routing)
        note = self.timeline.append
        self.timeline.clear()
        parts = list(zip(x.tensor_split(self.chunks), _split(routing, self.chunks), strict=True))
        plans = self.inner.plans(x, [r for _, r in parts])
        going: dict[int, Any] = {}

        def send(i: int) -> None:
            note(f"send {i}")
            going[i] = self.inner.send(*parts[i], plans[i])

        send(0)
        if meanwhile is not None:
            meanwhile()
        coming = []
        for i in range(self.chunks):
            if i + 1 < self.chunks:
                send(i + 1)
            note(f"receive {i}")
            rows, local, metadata = self.inner.receive(going.pop(i))
            note(f"experts {i}")
            y = experts(rows, local)
            note(f"give back {i}")
            coming.append(self.inner.give_back(y, metadata))
        outs = []
        for i, pending in enumerate(coming):
            note(f"add {i}")
            outs.append(self.inner.add(pending))
        return torch.cat(outs)

    def why_not(self) -> str | None:
        return self.inner.why_not()

    def __repr__(self) -> str:
        return f"ChunkedOverlap({self.inner!r}, chunks={self.chunks})"


def _split(routing: Routing, chunks: int) -> list[Routing]:
    ids = routing.topk_ids.tensor_split(chunks)
    weights = [None] * chunks if routing.topk_weights is None else routing.topk_weights.tensor_split(chunks)
    return [Routing.from_topk(w, i, routing.num_experts) for w, i in zip(weights, ids, strict=True)]
