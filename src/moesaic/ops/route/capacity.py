"""Capacity: which slots an expert keeps when more tokens want it than it has room for.

Legend: T tokens, E experts, K choices, C slots that an expert keeps; a slot's *place* counts the slots of its expert
that stand before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def places(ids: Tensor, weights: Tensor, policy: str, index: Callable) -> Tensor:
    """`(T, K)` int32: each slot's place in its expert's queue; -1 for a slot without an expert.

    Args:
        policy: `"position"` queues slots by token, then by choice; `"choice"` all first choices before the second
            ones; `"probability"` by falling weight, ties as in `"position"`.
        index: `ids (T', K') -> (ids, counts, offsets, row_order, row_index)`, the index build.
    """
    T, K = ids.shape
    if policy == "choice":
        return _places(ids.mT.contiguous(), index).view(K, T).mT
    if policy == "probability":
        order = torch.sort(weights.detach().reshape(-1), descending=True, stable=True).indices
        sorted_places = _places(ids.reshape(-1)[order][:, None], index)
        return torch.empty_like(sorted_places).scatter_(0, order, sorted_places).view(T, K)
    return _places(ids, index).view(T, K)


def _places(ids: Tensor, index: Callable) -> Tensor:
    ids, _, offsets, _, row_index = index(ids)
    flat = ids.reshape(-1)
    return torch.where(flat < 0, -1, row_index - offsets[flat.clamp_min(0)])


def drop(weights: Tensor, ids: Tensor, capacity: int, policy: str, renorm: bool, index: Callable):
    """`(weights, ids)` with -1 and weight 0 for the slots beyond `capacity`.

    With `renorm` the surviving weights of a token are scaled to the sum that it had before; a token that lost every
    slot keeps zeros.
    """
    kept = (ids >= 0) & (places(ids, weights, policy, index) < capacity)
    left = weights.masked_fill(~kept, 0.0)
    if renorm:
        before = weights.masked_fill(ids < 0, 0.0).sum(-1, keepdim=True)
        after = left.sum(-1, keepdim=True)
        left = left * (before / after.masked_fill(after == 0, 1.0))
    return left, ids.masked_fill(~kept, -1)
