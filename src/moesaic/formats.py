"""FORMATS: how the weights of experts are stored. To add a format, add an entry here.

A format says which dtypes its numbers are stored in, over which block they share a scale, and how torch makes wider
floats of them. Formats that are not here (packed FP4, tensor subclasses of a quantisation library) are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FORMATS", "Format", "dequantize_blocks", "format_of", "why_not_readable"]


@dataclass(frozen=True)
class Format:
    """One way to store weights `(E, N, K)`.

    Attributes:
        storage: the dtypes of the stored numbers.
        scale_block: rows and columns of the block that shares a scale where a checkpoint says nothing else; None for a
            format without scales.
        dequantize: `(w, scale, block, dtype) -> w` in `dtype`; block None stands for one scale a matrix.
    """

    name: str
    storage: tuple[torch.dtype, ...]
    scale_block: tuple[int, int] | None
    dequantize: Callable[[Tensor, Tensor | None, tuple[int, int] | None, torch.dtype], Tensor]


def format_of(w: Tensor) -> Format | None:
    """The entry whose storage has the dtype of `w`, or None."""
    return next((entry for entry in FORMATS.values() if w.dtype in entry.storage), None)


def why_not_readable(w: Tensor) -> str | None:
    """Why weights cannot be read here, or None. It looks at type and dtype only, so any device will do.

    A tensor subclass that wraps other tensors (torchao's quantised weights, a DTensor) states the dtype and shape that
    it stands for, not what is stored; no kernel can read it.
    """
    if type(w) not in _PLAIN and _wraps(w):
        return f"a tensor subclass, {type(w).__name__} ({type(w).__module__})"
    if format_of(w) is None:
        return f"{w.dtype} (packed FP4, or another quantisation)"
    return None


_PLAIN = (Tensor, torch.nn.Parameter)


def _wraps(w: Tensor) -> bool:
    """Whether `w` wraps other tensors. A collective's result that is still under way waits when it is read."""
    kind = type(w)
    return hasattr(kind, "__tensor_flatten__") and kind.__name__ != "AsyncCollectiveTensor"


def _plain(w: Tensor, scale: Tensor | None, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    return w.to(dtype)


def dequantize_blocks(w: Tensor, scale: Tensor | None, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """`w (E, N, K)` in FP8 times its block's scale: `out[e, n, k] = w[e, n, k] · scale[e, n // bn, k // bk]`.

    Args:
        scale: `(E, N/bn, K/bk)` rounded up; fp32, or powers of two in `float8_e8m0fnu`.
        block: `(bn, bk)`, or None for one scale a matrix. A grid that it does not explain (two scales for the two
            halves of a gate/up matrix) divides the matrix evenly.
        dtype: of the result; the product is taken in fp32 and rounded once.

    Raises:
        ValueError: there is no scale, or it has not one grid a matrix.
    """
    if scale is None or scale.dim() != 3 or scale.shape[0] != w.shape[0]:
        got = None if scale is None else tuple(scale.shape)
        raise ValueError(
            f"dequantize: scale must have shape ({w.shape[0]}, N/bn, K/bk) for weights of shape {tuple(w.shape)}, got "
            f"{got}; pass the scales that the checkpoint keeps beside the weights."
        )
    wide, scales = w.detach().to(torch.float32), scale.detach().to(torch.float32)
    sizes = block or (w.shape[1], w.shape[2])
    bn, bk = (
        size if -(-length // size) == grid else -(-length // grid)
        for length, size, grid in zip(w.shape[1:], sizes, scales.shape[1:], strict=True)
    )
    rows = scales.repeat_interleave(bn, dim=1)[:, : w.shape[1]]
    if w.shape[2] % bk:
        return wide.mul_(rows.repeat_interleave(bk, dim=2)[:, :, : w.shape[2]]).to(dtype)
    wide.unflatten(2, (-1, bk)).mul_(rows[..., None])  # broadcast, since a second weight-sized tensor is dear
    return wide.to(dtype)


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("plain", (torch.bfloat16, torch.float16, torch.float32, torch.float64), None, _plain),
        # DeepSeek-V3 and transformers' FineGrainedFP8Config: blocks of 128 x 128, scales in fp32 or UE8M0
        Format(
            "fp8_block",
            (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
            (128, 128),
            dequantize_blocks,
        ),
    )
}
