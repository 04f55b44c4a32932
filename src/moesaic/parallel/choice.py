"""choose and explain: which transport a mesh and a load want, by reasons that can be read.

To add a transport, add a line to `TRANSPORTS`: its name, why it cannot serve a `Need`, and how it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import hardware
from ..errors import Unsupported, check_choice
from .all_gather import AllGather
from .all_to_all import AllToAll
from .collectives import group_of
from .dispatcher import Local, TokenDispatcher
from .hierarchical import Hierarchical
from .overlap import ChunkedOverlap
from .push import DTYPES, Push, one_host

GATHERED_ROWS = 512  # below this many rows of all ranks a collective's latency outweighs its bytes


@dataclass(frozen=True)
class Need:
    """What is asked of a transport.

    Attributes:
        mesh: None (all ranks, or one process), a one-dimensional mesh or group, or a two-dimensional mesh
            (nodes, ranks of a node).
        num_experts: E.
        device: `"cpu"` or `"cuda"`.
        max_tokens: tokens that a rank has at most, if known.
        hidden_size, top_k: H and K, if known.
        dtype: that of the tokens.
        training: gradients are wanted.
        chunks: more than 1 asks for overlap.
    """

    mesh: Any
    num_experts: int
    device: str
    max_tokens: int | None
    hidden_size: int | None
    top_k: int | None
    dtype: torch.dtype
    training: bool
    chunks: int

    @property
    def size(self) -> int:
        if isinstance(self.mesh, DeviceMesh):
            return self.mesh.size()
        ready = dist.is_available() and dist.is_initialized()
        return group_of(self.mesh, "choose").size() if ready else 1

    @property
    def nodes(self) -> int:
        return self.mesh.size(0) if isinstance(self.mesh, DeviceMesh) and self.mesh.ndim == 2 else 1

    @property
    def flat(self) -> Any:
        """The mesh with one dimension that a flat transport takes."""
        if isinstance(self.mesh, DeviceMesh) and self.mesh.ndim == 2:
            if 1 in self.mesh.mesh.shape:
                names = self.mesh.mesh_dim_names
                assert names is not None
                return self.mesh[names[1 if self.mesh.size(0) == 1 else 0]]
            return self.mesh._flatten()
        return self.mesh


def _local(need: Need) -> str | None:
    return None if need.size == 1 else f"the {need.size} ranks of the mesh each hold a part of the experts"


def _push(need: Need) -> str | None:
    if need.device != "cuda":
        return f"it needs GPUs whose memory the ranks of a host can share, got {need.device}"
    if need.nodes > 1:
        return f"the mesh has {need.nodes} nodes, and memory is shared inside one"
    if None in (need.max_tokens, need.hidden_size, need.top_k):
        return "max_tokens, hidden_size and top_k must be given: they are the size of its memory"
    if need.dtype not in DTYPES:
        return f"needs bf16, fp16 or fp32, got {str(need.dtype).removeprefix('torch.')}"
    if need.chunks > 1:
        return "one dispatch must be combined before the next: it cannot be cut into chunks"
    return hardware.triton_why_not("cuda", hardware.arch_of(torch.device("cuda"))) or one_host(need.size)


def _make_push(need: Need) -> TokenDispatcher:
    assert need.max_tokens is not None and need.hidden_size is not None and need.top_k is not None
    return Push(
        need.num_experts, need.flat, max_tokens=need.max_tokens, hidden_size=need.hidden_size, top_k=need.top_k,
        dtype=need.dtype,
    )  # fmt: skip


def _gather(need: Need) -> str | None:
    if need.max_tokens is None:
        return "max_tokens is not given, and every rank would see every token"
    rows = need.max_tokens * need.size
    if rows > GATHERED_ROWS:
        return f"every rank would see {need.size} x {need.max_tokens} = {rows} tokens, more than {GATHERED_ROWS}"
    return None


def _hierarchical(need: Need) -> str | None:
    if not (isinstance(need.mesh, DeviceMesh) and need.mesh.ndim == 2):
        return "the mesh does not say which ranks share a node: give one of two dimensions, (nodes, ranks of a node)"
    if need.mesh.size(0) == 1 or need.mesh.size(1) == 1:
        return f"the mesh has {need.mesh.size(0)} nodes of {need.mesh.size(1)} ranks: there is one level only"
    return None


def _any(need: Need) -> str | None:
    return None


# name, why not, and how it is made; the first that can run is chosen
TRANSPORTS: list[tuple[str, Callable[[Need], str | None], Callable[[Need], TokenDispatcher]]] = [
    ("local", _local, lambda n: Local(n.num_experts)),
    ("push", _push, _make_push),
    ("all_gather", _gather, lambda n: AllGather(n.num_experts, n.flat, max_tokens=n.max_tokens)),
    ("hierarchical", _hierarchical, lambda n: Hierarchical(n.num_experts, n.mesh)),
    ("all_to_all", _any, lambda n: AllToAll(n.num_experts, n.flat)),
]


@dataclass(frozen=True)
class Choice:
    """Which transport a need gets, and why not the others. Prints as a table."""

    need: Need
    reasons: tuple[tuple[str, str | None], ...]
    forced: str | None = None

    @property
    def chosen(self) -> str:
        return self.forced or next(name for name, reason in self.reasons if reason is None)

    def make(self) -> TokenDispatcher:
        """The dispatcher itself. Every rank must call, since it may make process groups and memory."""
        made = next(make for name, _, make in TRANSPORTS if name == self.chosen)(self.need)
        return ChunkedOverlap(made, self.need.chunks) if self.need.chunks > 1 else made

    def __str__(self) -> str:
        n = self.need
        load = "any number of tokens" if n.max_tokens is None else f"up to {n.max_tokens} tokens a rank"
        lines = [f"{n.num_experts} experts on {n.size} ranks ({n.device}), {load}"]
        for name, reason in self.reasons:
            state = "chosen" if name == self.chosen else ("can run" if reason is None else f"no: {reason}")
            lines.append(f"  {name:<13} {state}")
        if n.chunks > 1:
            lines.append(f"  in {n.chunks} chunks")
        return "\n".join(lines)


def explain(
    mesh: Any, *, num_experts: int, max_tokens: int | None = None, hidden_size: int | None = None,
    top_k: int | None = None, dtype: torch.dtype = torch.bfloat16, training: bool = True, chunks: int = 1,
    device: str | None = None, transport: str | None = None,
) -> Choice:  # fmt: skip
    """Which transport `choose` would take, and why not each other.

    Args:
        mesh: None, a one-dimensional `DeviceMesh` or `ProcessGroup`, or one of two (nodes, ranks of a node).
        num_experts: E.
        max_tokens, hidden_size, top_k, dtype, training: the load, as far as known (see `Need`).
        chunks: more than 1 overlaps communication and computation chunk by chunk.
        device: by default the mesh's, or that of the group's backend.
        transport: force one by name.

    Raises:
        Unsupported: the forced transport cannot run; the message holds every reason.
    """
    if device is None:
        if isinstance(mesh, DeviceMesh):
            device = mesh.device_type
        else:
            ready = dist.is_available() and dist.is_initialized()
            device = "cuda" if ready and "nccl" in dist.get_backend(group_of(mesh, "choose")) else "cpu"
    need = Need(mesh, num_experts, device, max_tokens, hidden_size, top_k, dtype, training, chunks)
    choice = Choice(need, tuple((name, why_not(need)) for name, why_not, _ in TRANSPORTS), transport)
    if transport is not None:
        check_choice("choose", "transport", transport, [name for name, _, _ in TRANSPORTS])
        reason = dict(choice.reasons)[transport]
        if reason is not None:
            raise Unsupported(f"choose: transport {transport!r} cannot run: {reason}.")
    return choice


def choose(mesh: Any, *, verbose: bool = True, **need: Any) -> TokenDispatcher:
    """The transport for a mesh and a load; rank 0 prints the table of reasons (`verbose=False` leaves that out).

    Takes what `explain` takes. Every rank of the mesh must call it with the same arguments.
    """
    choice = explain(mesh, **need)
    if verbose and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        print(choice)
    return choice.make()
