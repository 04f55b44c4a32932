"""The epilogue's device code, shared by the kernels: one value says what is done, and each step is a function here."""

from __future__ import annotations

from typing import Any, NamedTuple

from ....activations import ACTIVATIONS
from ....hardware import tl, triton
from .spec import Epilogue


@triton.jit
def identity(x, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    return x


class Code(NamedTuple):
    """An `Epilogue` as kernels take it: a compile-time value of which they read fields."""

    activation: Any
    gated: bool
    interleaved: bool
    alpha: float
    limit: float
    bias: bool
    preact: bool
    scaled: bool
    saturates: bool

    @property
    def cache_key(self) -> str:
        """Triton's cache on disk goes by this: a changed activation is another kernel."""
        return f"{getattr(self.activation, 'cache_key', self.activation)}{tuple(self)[1:]}"


def code(e: Epilogue) -> Code:
    if not e.activation:
        return Code(identity, False, False, 1.0, 0.0, e.bias, e.preact, e.scaled, e.saturates)
    entry = ACTIVATIONS[e.activation]
    return Code(
        entry.device[0], entry.gated, e.interleaved, e.alpha, e.limit, e.bias, e.preact, e.scaled, e.saturates
    )  # fmt: skip


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns)), (0, 2, 1)))


@triton.jit
def gate_up(tile, EPILOGUE: tl.constexpr):
    """Gates and ups of a tile: its columns in turn, or its halves."""
    if EPILOGUE.interleaved:
        return tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))
    else:
        return halves(tile)


@triton.jit
def clamped(x, dtype: tl.constexpr, SATURATES: tl.constexpr):
    """x in dtype; in fp16, where it saturates, what is finite stays finite."""
    if SATURATES:
        kept = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
        x = tl.where(tl.abs(x) <= 3.4028234663852886e38, kept, x)  # NaN and infinity pass
    return x.to(dtype)


@triton.jit
def narrowed(x, dtype: tl.constexpr, EPILOGUE: tl.constexpr):
    return clamped(x, dtype, EPILOGUE.saturates)


@triton.jit
def row_scale(scale_ptr, order_ptr, rows, live):
    """The routing weight of each row's slot, in fp32."""
    slots = tl.load(order_ptr + rows, mask=live, other=0)
    return tl.load(scale_ptr + slots, mask=live, other=0.0).to(tl.float32)
