"""The same layer run on gloo and simulated on the machine as `calibrate` finds it."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from moesaic import Routing, fused_experts
from moesaic.cases import Case
from moesaic.parallel import AllToAll
from moesaic.parallel.scale import Load, calibrate
from moesaic.parallel.simulation import simulate

CASE, TOKENS = Case("wide rows", 2048, 8, 8, 8, "relu"), 512  # every token to every expert: copies differ most


def ordered(rank: int, size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a layer with one copy an expert, and with one copy a rank: run, and simulated."""
    machine = calibrate()
    load = Load(CASE, size, TOKENS, node=size, bytes_per=4)
    ids = torch.arange(8, dtype=torch.int32).repeat(TOKENS, 1)
    routing = Routing.from_topk(torch.ones(TOKENS, 8), ids, 8)
    up, down = torch.randn(8 // size, 8, 2048), torch.randn(8 // size, 2048, 8)
    x = torch.randn(TOKENS, 2048)
    run, simulated = {}, {}
    for design, send in (("plain", "slot"), ("flat", "token")):
        dispatcher, took = AllToAll(8, send=send), []
        for _ in range(4):
            dist.barrier()
            start = time.perf_counter()
            dispatcher(x, routing, lambda rows, local: fused_experts(rows, up, down, local, activation="relu"))
            dist.barrier()
            took.append(time.perf_counter() - start)
        run[design] = statistics.median(took[1:])
        simulated[design] = simulate(machine, load, design).seconds
    return run, simulated
