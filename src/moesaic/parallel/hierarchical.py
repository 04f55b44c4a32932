"""Hierarchical: between nodes first, then inside them; a token crosses to a node once, and one sum comes back from it.

Legend: N nodes of G ranks each; rank g of node n is rank `n·G + g` of all, and owns its experts. A token bound for
several experts of node n goes once to rank g of it (g its own place in its own node), which deals it out inside the
node, adds up what comes back in fp32 and returns one row. Per rank and way: at most N - 1 messages between nodes and
G - 1 inside, against N·G - 1 of a flat all-to-all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..routing import Routing
from .all_to_all import AllToAll
from .dispatcher import TokenDispatcher


class Hierarchical(TokenDispatcher):
    """Two dispatchers, one within the other.

    Args:
        num_experts: E, a multiple of N·G.
        mesh: a two-dimensional `DeviceMesh` (nodes, ranks of a node), in this order.
        wire, back_wire, grad_wire: how rows travel between nodes; inside a node they travel as they are.
        inside: a dispatcher over a node's ranks and `num_experts / N` experts; by default an `AllToAll`.

    A sum of a node is rounded to the rows' dtype before it crosses, one rounding more than a flat transport has.
    """

    name = "hierarchical"

    def __init__(
        self, num_experts: int, mesh: DeviceMesh, *, wire: str = "same", back_wire: str = "same",
        grad_wire: str = "same", inside: TokenDispatcher | None = None,
    ):  # fmt: skip
        if not isinstance(mesh, DeviceMesh) or mesh.ndim != 2:
            got = f"{mesh.ndim} dimension(s)" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
            raise ValueError(
                f"Hierarchical: mesh must be a DeviceMesh of two dimensions (nodes, ranks of a node), got {got}; make "
                'it with init_device_mesh(device, (nodes, ranks), mesh_dim_names=("node", "local")).'
            )
        nodes, local = mesh.get_group(0), mesh.get_group(1)
        self.outer = AllToAll(num_experts, nodes, wire=wire, back_wire=back_wire, grad_wire=grad_wire)
        self.inner = inside or AllToAll(self.outer.num_local_experts, local)
        if self.inner.num_experts != self.outer.num_local_experts:
            raise ValueError(
                f"Hierarchical: inside must be over the {self.outer.num_local_experts} experts of a node, got "
                f"{self.inner.num_experts}."
            )
        self.num_experts, self.num_local_experts = num_experts, self.inner.num_local_experts

    def plans(self, x: Tensor, routings: list[Routing]) -> list[Any]:
        return self.outer.plans(x, routings)

    def send(self, x: Tensor, routing: Routing, plan: Any = None) -> Any:
        return self.outer.send(x, routing, plan)

    def receive(self, pending: Any) -> tuple[Tensor, Routing, Any]:
        rows, routing, outer = self.outer.receive(pending)
        rows, routing, inner = self.inner.receive(self.inner.send(rows, routing))
        return rows, routing, (outer, inner)

    def give_back(self, rows: Tensor, metadata: Any) -> Any:
        outer, inner = metadata
        return self.outer.give_back(self.inner.add(self.inner.give_back(rows, inner)), outer)

    def add(self, pending: Any) -> Tensor:
        return self.outer.add(pending)

    def why_not(self) -> str | None:
        return self.outer.why_not() or self.inner.why_not()

    def __repr__(self) -> str:
        return f"Hierarchical(between={self.outer!r}, inside={self.inner!r})"
