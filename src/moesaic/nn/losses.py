"""The layer's auxiliary losses: beside the graph, as the caller adds them, or within it, where a loss may be forgotten.

`layer.losses` are tensors that the caller adds to its own loss. Under reentrant checkpointing
(`torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)`) they come from a forward without gradient, and
would train nothing: their backward says so. `attach_losses` carries them in the graph of the layer's output instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..guards import refusing
from ..ops.route import importance_loss, load_balancing_loss, load_loss, sequence_balance_loss, z_loss

# In the order of `MoE.losses`; each has its coefficient in the configuration, its name with `_coef`.
LOSSES = {loss.__name__: loss for loss in
          (load_balancing_loss, sequence_balance_loss, importance_loss, load_loss, z_loss)}  # fmt: skip
_REFUSAL = (
    "MoE.losses: must be added where a gradient is recorded, got a backward through losses of a forward under no_grad, "
    "the first one of reentrant checkpointing; use use_reentrant=False, or attach_losses inside what is checkpointed."
)


def attach_losses(
    y: Tensor, losses: Mapping[str, Tensor], *, scale: float | Tensor | Callable[[], float | Tensor] = 1.0
) -> Tensor:
    """y, whose backward also gives each loss the gradient `scale`: as if `scale · sum(losses)` were added to the loss.

        y = attach_losses(layer(x), layer.losses, scale=scaler.get_scale)   # inside what is checkpointed

    Args:
        y: what the backward surely reaches, the layer's output; returned unchanged.
        losses: `layer.losses` of the same forward.
        scale: a GradScaler multiplies the caller's loss, which these are no part of: give its `get_scale`, which is
            asked in the backward. With gradient accumulation divide by the number of micro-batches here too.

    Not differentiable twice. The losses are not part of the caller's loss as printed. Source: Megatron-LM's
    `MoEAuxLossAutoScaler`.
    """
    values = [loss for loss in losses.values() if loss.requires_grad]
    return _Attach.apply(y, scale, *values) if values else y


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Any, *losses: Tensor) -> Tensor:
        ctx.scale, ctx.like = scale, [(loss.dtype, loss.device) for loss in losses]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scale = ctx.scale() if callable(ctx.scale) else ctx.scale
        return grads[0], None, *(torch.as_tensor(scale, dtype=dtype, device=device) for dtype, device in ctx.like)


def once_recorded(losses: dict[str, Tensor], gate: torch.nn.Module) -> dict[str, Tensor]:
    """The losses; where no gradient was recorded, their values, whose backward to a gate that learns raises by name."""
    untold = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or torch.is_grad_enabled()
    if untold or not losses or not any(p.requires_grad for p in gate.parameters()):
        return losses
    with torch.enable_grad():
        return dict(zip(losses, refusing(_REFUSAL, list(losses.values())), strict=True))
