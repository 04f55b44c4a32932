"""expert_index: ids of chosen experts to the tables that every later operator reads (see `moesaic.routing`).

Legend: T tokens, K choices, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...op import Op, Place, Table, octave

__all__ = ["expert_index"]


class Operands(NamedTuple):
    topk_ids: Table


class Options(NamedTuple):
    num_experts: int


class Outputs(NamedTuple):
    """The ids in int32, with -1 for what is no expert, and the tables of `Routing`."""

    ids: Table
    tokens_per_expert: Table
    expert_offsets: Table
    row_order: Table
    row_index: Table


@dataclass(frozen=True)
class ExpertIndexProblem(Place):
    """What choosing depends on; `dtype` is that of the ids."""

    num_tokens: int = 0
    top_k: int = 1
    num_experts: int = 1


def _describe(o: Operands, options: Options) -> tuple[Any, ...]:
    T, K = o.topk_ids.shape
    return o.topk_ids.dtype, octave(T), K


def _fake(o: Operands, options: Options) -> Outputs:
    def i32(*shape: int) -> Tensor:
        return o.topk_ids.new_empty(shape, dtype=torch.int32)

    (T, K), E = o.topk_ids.shape, options.num_experts
    return Outputs(i32(T, K), i32(E), i32(E + 1), i32(T * K), i32(T * K))


OP = Op(
    "expert_index", __name__, ("triton", "torch", "reference"), operands=Operands, options=Options, outputs=Outputs,
    problem=ExpertIndexProblem, describe=(("dtype", "num_tokens", "top_k"), _describe), fake=_fake,
    differentiable=False,
)  # fmt: skip


def expert_index(topk_ids: Tensor, num_experts: int, *, implementation: str | None = None) -> Outputs:
    """Sort the slots by expert, stably; slots of no expert come last.

    Args:
        topk_ids: `(T, K)` int32 or int64; -1 drops a slot. They may repeat.
        num_experts: E.
        implementation: force one; by default the first that can run.

    Returns:
        `Outputs`, all int32: ids `(T, K)`, tokens_per_expert `(E,)`, expert_offsets `(E + 1,)`, row_order and row_index
        `(T·K,)`.

    Raises:
        ValueError: on the CPU, an id outside `[-1, E)`; a GPU takes it as -1, since looking would stall it.

    Not differentiable. Deterministic, no host synchronisation.
    """
    return OP(Operands(topk_ids), Options(num_experts), implementation)
