"""A rank that dies or stalls, in each phase of a layer: what the others see."""

from __future__ import annotations

import datetime
import os
import time

import torch
import torch.distributed as dist
from dispatch_cases import E, H, I, K, layer
from torch.distributed.device_mesh import DeviceMesh

from moesaic import Routing
from moesaic.parallel import AllGather, AllToAll, Hierarchical, PeerFailed

PHASES = ("counts", "rows", "experts", "combine", "backward")
VICTIM = 1


def fate(how: str) -> None:
    if how == "die":
        os._exit(17)
    time.sleep(60)


def one_dies(rank: int, size: int, phase: str, how: str, transport: str, timeout: float) -> tuple:
    """Rank 1 meets its fate in a phase; the others return (error's type, message, seconds)."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))
    if transport == "all_to_all":
        dispatcher = AllToAll(E, group)
    elif transport == "all_gather":
        dispatcher = AllGather(E, group)
    else:
        nodes = [dist.new_group(r, timeout=datetime.timedelta(seconds=timeout)) for r in ([0, 2], [1, 3])]
        local = [dist.new_group(r, timeout=datetime.timedelta(seconds=timeout)) for r in ([0, 1], [2, 3])]
        mesh = DeviceMesh.from_group(
            [nodes[rank % 2], local[rank // 2]], "cpu", mesh=[[0, 1], [2, 3]], mesh_dim_names=("node", "local")
        )
        dispatcher = Hierarchical(E, mesh)
    hit = how if rank == VICTIM else None
    torch.manual_seed(rank)
    # every rank sends to every other, so that nobody can do without the one that is missing
    ids = torch.arange(16).view(16, 1).repeat(1, K).add(torch.arange(K) * 2).remainder(E).int()
    x = torch.randn(16, H, requires_grad=True)
    up, down = torch.randn(E // size, I, H, requires_grad=True), torch.randn(E // size, H, I, requires_grad=True)
    group_ready = torch.zeros(1)
    dist.all_reduce(group_ready, group=group)
    start = time.monotonic()
    try:
        routing = Routing.from_topk(torch.ones(16, K), ids, E)
        if hit and phase == "counts":
            fate(hit)
        (plan,) = dispatcher.plans(x, [routing])
        if hit and phase == "rows":
            fate(hit)
        rows, local, metadata = dispatcher.receive(dispatcher.send(x, routing, plan))
        if hit and phase == "experts":
            fate(hit)
        y = layer(rows, local, up, down)
        if hit and phase == "combine":
            fate(hit)
        y = dispatcher.combine(y, metadata)
        if hit and phase == "backward":
            fate(hit)
        y.sum().backward()
    except PeerFailed as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "none", "", time.monotonic() - start
