"""`expert_index` in torch: any device; no host synchronisation but the id check on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

NEEDS = ""


def why_not(problem: Any) -> str | None:
    return None


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor, ...], None]:
    return tables(o.topk_ids, problem.num_experts), None


def tables(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """The ids in int32 and their four tables."""
    if topk_ids.device.type == "cpu":
        return _cpu_tables(topk_ids, num_experts)
    return _tables(valid(topk_ids, num_experts).int(), num_experts)  # raising would have to wait for the device


def valid(ids: Tensor, num_experts: int) -> Tensor:
    """What is not an expert is -1."""
    return ids.masked_fill((ids < 0) | (ids >= num_experts), -1)


def _cpu_tables(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """The tables through numpy, whose small operations cost a quarter of torch's: decode feels it."""
    ids = topk_ids.numpy()
    if ids.size and (ids.min() < -1 or ids.max() >= num_experts):  # before 64 bits become 32
        t, k = np.argwhere((ids < -1) | (ids >= num_experts))[0].tolist()
        raise ValueError(
            f"Routing.from_topk: topk_ids must lie in [-1, {num_experts}), got {ids[t, k]} at token {t}, choice {k}; "
            "use -1 to drop a slot."
        )
    ids = ids.astype(np.int32, copy=True, order="C")
    flat = ids.reshape(-1)
    key = flat % (num_experts + 1)  # -1 becomes E: dropped slots sort last
    order = key.astype(np.int16).argsort(kind="stable") if num_experts < 2**15 else key.argsort(kind="stable")
    counts = np.bincount(key, minlength=num_experts + 1)[:num_experts]
    offsets = np.zeros(num_experts + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    live = int(offsets[-1])
    index = np.full(flat.size, -1, np.int32)
    index[order[:live]] = np.arange(live, dtype=np.int32)
    tables = (ids, counts.astype(np.int32), offsets, order.astype(np.int32), index)
    return tuple(torch.from_numpy(t) for t in tables)


def _tables(ids: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    flat = ids.reshape(-1)
    key = torch.where(flat < 0, num_experts, flat)
    by_expert, order = torch.sort(key, stable=True)
    bounds = torch.arange(num_experts + 1, dtype=key.dtype, device=key.device)
    offsets = torch.searchsorted(by_expert, bounds, out_int32=True)
    index = torch.empty_like(flat)
    index[order] = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    index = torch.where(flat < 0, -1, index)
    return ids.contiguous(), offsets.diff(), offsets, order.int(), index
