"""The oracle for `expert_index`: plain lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEEDS = ""


def why_not(problem: Any) -> str | None:
    return None


def forward(o: Any, problem: Any) -> tuple[tuple[Tensor, ...], None]:
    return tables(o.topk_ids, problem.num_experts), None


def tables(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """The ids in int32 and their four tables."""
    T, K = topk_ids.shape
    flat = topk_ids.reshape(-1).tolist()
    for slot, e in enumerate(flat):
        if not -1 <= e < num_experts:
            raise ValueError(
                f"Routing.from_topk: topk_ids must lie in [-1, {num_experts}), got {e} at token {slot // K}, "
                f"choice {slot % K}; use -1 to drop a slot."
            )
    rows = [[slot for slot, e in enumerate(flat) if e == expert] for expert in range(num_experts)]
    order = [slot for group in rows for slot in group]
    index = [-1] * (T * K)
    for row, slot in enumerate(order):
        index[slot] = row
    order += [slot for slot, e in enumerate(flat) if e < 0]
    offsets = [0]
    for group in rows:
        offsets.append(offsets[-1] + len(group))

    def i32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=topk_ids.device)

    ids = i32(flat).reshape(T, K)
    return ids, i32([len(group) for group in rows]), i32(offsets), i32(order), i32(index)
