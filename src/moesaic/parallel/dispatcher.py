"""TokenDispatcher: the one interface of all transports, and `Local`, the transport of one rank.

Legend: T tokens of this rank, H hidden, K choices, E experts in all, W ranks, L = E / W experts of a rank; rank p owns
experts `p·L` to `(p + 1)·L - 1`. R rows are what a rank's experts read.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import check_shape
from ..routing import Routing

Experts = Callable[[Tensor, Routing], Tensor]


def eager(call: Callable) -> Callable:
    """Outside of compiled graphs, as `torch.compiler.disable` has it, whose decorator would import the compiler now."""

    @functools.wraps(call)
    def run(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(call)(*arguments, **options)
        return call(*arguments, **options)

    return run


class TokenDispatcher(ABC):
    """Brings tokens to the ranks that own their experts, and the experts' outputs back.

        rows, local, metadata = dispatcher.dispatch(x, routing)
        y = dispatcher.combine(fused_experts(rows, w_gate_up, w_down, local), metadata)

    `rows (R, H)` and `local`, a `Routing` of R tokens over this rank's L experts, go into the same operator that a
    single rank would call: it weighs and adds what this rank's experts make of a row, in fp32, and one row goes back.
    Calling the dispatcher with the experts does all of it: `y = dispatcher(x, routing, experts)`.

    Differentiable in x, the routing weights and the rows. Every rank of the group must make the same calls in the same
    order, forward and backward, whatever number of tokens it has, none included. A call under `torch.compile` breaks
    the graph where a transport must know counts on the host; activation checkpointing repeats the communication.

    Attributes:
        name: what `choose` and `explain` call it.
        num_experts: E.
        num_local_experts: L.
    """

    name: str
    num_experts: int
    num_local_experts: int

    # The two halves of each way. What lies between them runs while rows travel.
    @abstractmethod
    def send(self, x: Tensor, routing: Routing, plan: Any = None) -> Any:
        """Issue what brings the tokens to their experts."""

    @abstractmethod
    def receive(self, pending: Any) -> tuple[Tensor, Routing, Any]:
        """Wait for what `send` of every rank has brought: `rows, local, metadata`."""

    @abstractmethod
    def give_back(self, rows: Tensor, metadata: Any) -> Any:
        """Issue what brings the experts' outputs back to their tokens."""

    @abstractmethod
    def add(self, pending: Any) -> Tensor:
        """Wait for the outputs and add up each token's, in fp32 and in the order of ranks: `(T, H)`."""

    def plans(self, x: Tensor, routings: list[Routing]) -> list[Any]:
        """What several calls of `send` can agree on at once; by default nothing."""
        return [None] * len(routings)

    @eager
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        """Bring the tokens to their experts.

        Args:
            x: `(T, H)`, this rank's tokens; T may differ between ranks and be 0.
            routing: of T tokens over all E experts; -1 drops a slot.

        Returns:
            rows `(R, H)`; a `Routing` of R tokens over the L experts here; metadata for `combine`.

        Raises:
            ValueError: shapes disagree, or the ranks do. PeerFailed: a rank does not come.
        """
        self.check(x, routing)
        return self.receive(self.send(x, routing))

    @eager
    def combine(self, rows: Tensor, metadata: Any) -> Tensor:
        """Bring the experts' outputs `(R, H)` back and add them: `(T, H)` in the dtype of rows."""
        return self.add(self.give_back(rows, metadata))

    def __call__(
        self, x: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Any] | None = None
    ) -> Tensor:
        """`dispatch`, `experts(rows, local)`, `combine`; `meanwhile` is called while the tokens travel."""
        self.check(x, routing)
        pending = self.send(x, routing)
        if meanwhile is not None:
            meanwhile()
        rows, local, metadata = self.receive(pending)
        return self.add(self.give_back(experts(rows, local), metadata))

    def why_not(self) -> str | None:
        """Why this transport cannot run here, or None."""
        return None

    def explain(self) -> str:
        """One line: what this is, and whether it can run."""
        reason = self.why_not()
        return f"{self!r}: " + ("can run" if reason is None else f"no: {reason}")

    def check(self, x: Tensor, routing: Routing) -> None:
        """Raise `ValueError` unless x and the routing belong together and to this dispatcher."""
        who = f"{type(self).__name__}.dispatch"
        check_shape(who, "x", x, (routing.num_tokens, "H"), "one row for each token of the routing")
        if not x.is_floating_point():
            raise ValueError(f"{who}: x must be floating point, got {x.dtype}; convert it.")
        if routing.num_experts != self.num_experts:
            raise ValueError(
                f"{who}: the routing must be over all {self.num_experts} experts, got {routing.num_experts}; route "
                "with the global number of experts."
            )
        if routing.padded is not None:
            raise ValueError(
                f"{who}: routing must be packed, got one padded to {routing.padded} rows an expert; use the routing "
                "that to_capacity was called on."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(experts={self.num_experts}, here={self.num_local_experts})"


class Local(TokenDispatcher):
    """All experts are here: rows are the tokens, nothing travels."""

    name = "local"

    def __init__(self, num_experts: int):
        self.num_experts = self.num_local_experts = num_experts

    def send(self, x: Tensor, routing: Routing, plan: Any = None) -> Any:
        return x, routing

    def receive(self, pending: Any) -> tuple[Tensor, Routing, Any]:
        return *pending, None

    def give_back(self, rows: Tensor, metadata: Any) -> Any:
        return rows

    def add(self, pending: Any) -> Tensor:
        return pending


def experts_of(num_experts: int, size: int, who: str) -> int:
    """L, or a ValueError that says what to do when E experts cannot be dealt out evenly."""
    if num_experts < 1 or num_experts % size:
        raise ValueError(
            f"{who}: num_experts must be a multiple of the {size} ranks of the group, got {num_experts}; use a smaller "
            "expert-parallel mesh, or redundant experts (moesaic.parallel.place)."
        )
    return num_experts // size
