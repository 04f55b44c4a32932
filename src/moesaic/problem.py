"""Problem: the frozen description of one call. Choice, configuration, tuning, printing and caches all key on it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Problem:
    """Everything that choosing an implementation depends on, and nothing else: no tensors, no device handles.

    For `grouped_matmul` the contraction is `hidden_size` and the output width `intermediate_size`; rows are
    `num_tokens · top_k`. `option` carries what one operator alone knows (the router's configuration).
    """

    op: str
    device: str = "cpu"
    arch: str = "cpu"
    dtype: torch.dtype = torch.float32
    num_tokens: int = 0
    top_k: int = 1
    num_experts: int = 1
    hidden_size: int = 0
    intermediate_size: int = 0
    activation: str = ""
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    training: bool = False
    allow_tf32: bool = False
    batch_invariant: bool = False
    option: Hashable = None

    @property
    def num_slots(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def rows_per_expert(self) -> float:
        """Mean rows per expert if routing is even: what default configurations are chosen by."""
        return self.num_slots / max(self.num_experts, 1)

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "op"}
        default = {f.name: f.default for f in fields(self)}
        parts = [f"{k}={str(v).removeprefix('torch.')}" for k, v in shown.items() if v != default[k]]
        return f"{self.op}({', '.join(parts)})"
