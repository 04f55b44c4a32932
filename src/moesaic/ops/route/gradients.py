"""What comes into the backward of `route`: gradients that somebody took, and zeros or None for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def incoming(grads: Any, logits: Tensor, ids: Tensor, statistics: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the weights, the probability sums and the squares; the last two None where no loss took them."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    grad, sums, squares = grads.weights, grads.probability_sums, grads.logsumexp_squares
    if grad is None:
        grad = logits.new_zeros(ids.shape, dtype=dtype)
    # without statistics a traced graph hands in gradients of the empty outputs
    came = [g for g in (sums, squares) if g is not None and statistics]
    if not came:
        return grad, None, None
    S = came[0].shape[0]
    sums = logits.new_zeros((S, logits.shape[1]), dtype=dtype) if sums is None else sums
    return grad, sums, logits.new_zeros((S,), dtype=dtype) if squares is None else squares
