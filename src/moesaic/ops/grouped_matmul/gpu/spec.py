"""GemmSpec: everything that a grouped product depends on. Choice, plans, tuning, explain and bench key on it.

Legend: R rows of E experts, K contraction, N columns of the result; `width` counts the weights' columns, twice N where
gates and ups are multiplied together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ....activations import ACTIVATIONS
from ....hardware import Gpu

if TYPE_CHECKING:
    from .schedule import Tiles, TileTable

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Epilogue:
    """What is done to `x @ w.T` in fp32 before it is stored, in this order.

    Attributes:
        bias: add the expert's bias.
        preact: store the pre-activation too, in the order of the weights' columns.
        activation: name and constants of the activation, which halves the columns if it is gated; "" for none.
        interleaved: gates and ups alternate among the weights' columns, else all gates come first.
        scaled: multiply a row by its slot's routing weight.
        saturates: keep what is finite finite where it is rounded to fp16; for values that are multiplied again.
    """

    activation: str = ""
    alpha: float = 1.0
    limit: float = math.inf
    interleaved: bool = False
    bias: bool = False
    preact: bool = False
    scaled: bool = False
    saturates: bool = False

    @property
    def gated(self) -> bool:
        return bool(self.activation) and ACTIVATIONS[self.activation].gated

    def __str__(self) -> str:
        parts = ["bias"] * self.bias + ["preact"] * self.preact + [self.activation] * bool(self.activation)
        return ", ".join(parts + ["scaled"] * self.scaled) or "none"


@dataclass(frozen=True)
class GemmSpec:
    """One product: `out[r] = epilogue(x[source(r)] @ w[expert(r)].T)`.

    Attributes:
        rows: a bucket of them (see `bucket`); 0 where it does not matter.
        strides: in elements, of x's rows and of w's experts, columns and contraction.
        top_k: x holds tokens, and row r reads token `row_order[r] // top_k`; 0 where x holds the rows in their order.
        zero_tail: zero the result's rows behind the last expert's.
        format: the weights' entry in FORMATS.
    """

    gpu: Gpu
    dtype: torch.dtype
    experts: int
    N: int
    K: int
    strides: tuple[int, int, int, int]
    rows: int = 0
    top_k: int = 0
    epilogue: Epilogue = Epilogue()
    zero_tail: bool = False
    tf32: bool = False
    batch_invariant: bool = False
    format: str = "plain"

    @property
    def width(self) -> int:
        """Columns of the weights."""
        return 2 * self.N if self.epilogue.gated else self.N

    @property
    def input_major(self) -> bool:
        """Do the columns lie next to each other in the weights' memory, and not the contraction?"""
        return self.strides[3] != 1 and self.strides[2] == 1

    @property
    def rows_per_expert(self) -> float:
        """Mean rows an expert: choice assumes even routing."""
        return self.rows / max(self.experts, 1)

    @property
    def octave(self) -> int:
        """Rows an expert to the nearest power of two, or 0 below one."""
        return 2 ** round(math.log2(self.rows_per_expert)) if self.rows_per_expert >= 1 else 0

    @property
    def sources(self) -> int:
        """Rows of x that are read."""
        return self.rows // self.top_k if self.top_k else self.rows

    @property
    def half(self) -> bool:
        return self.dtype in HALVES

    @property
    def wide(self) -> bool:
        """Do offsets into one expert's weights need 64 bits?"""
        return (self.width - 1) * abs(self.strides[2]) + (self.K - 1) * abs(self.strides[3]) >= 2**31

    @cached_property
    def any_rows(self) -> GemmSpec:
        """The same whatever its rows."""
        return replace(self, rows=0)

    def of(self, rows: int) -> GemmSpec:
        return replace(self, rows=bucket(rows))

    def in_order(self) -> GemmSpec:
        """The same of rows that were copied into their order first."""
        return replace(self, top_k=0, strides=(self.K, *self.strides[1:]))

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        rows = f"{self.rows} rows of " if self.rows else ""
        gather = f", gathered by {self.top_k}" if self.top_k else ""
        return f"{rows}{self.experts} experts {self.width}x{self.K} {kind}{gather}, epilogue: {self.epilogue}"


@dataclass(frozen=True)
class Config:
    """Tiles of one launch: `block_m × block_n` of output, `block_k` deep, `group_m` row tiles sharing a weight tile.

    An expert's last tiles may take up to `slack` rows more each, so that few rows need no tile of their own.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 16
    slack: int = 0

    def padded(self, rows: int) -> tuple[int, int]:
        """Rows that the tiles of an expert with `rows` compute, and how many of its tiles are odd ones.

        A tail that tiles take is rounded to 16, what lies behind the tiles that could take it to a multiple of 64.
        """
        full, left = divmod(rows, self.block_m)
        if not self.slack:
            return (full + (left > 0)) * self.block_m, 0
        if left <= self.slack * min(full, 2):
            return full * self.block_m + -(-left // 16) * 16, -(-left // self.slack)
        height = -(-left // 64) * 64
        return full * self.block_m + height, int(height < self.block_m)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} warps={self.num_warps} stages={self.num_stages}"


class Gemm(NamedTuple):
    """A product with everything fixed but its memory and its rows; `tiles` is what it asks of the tile table, if
    anything."""

    spec: GemmSpec
    tiles: Tiles | None
    run: Callable[..., None]

    def __call__(
        self, x: Tensor, w: Tensor, table: TileTable, gather: Tensor | None = None, bias: Tensor | None = None,
        preact: Tensor | None = None, scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`gather` is `row_order` where rows are gathered or scaled, `scale` the routing weights of the slots."""
        out = x.new_empty(table.rows, self.spec.N)
        self.run(out, x, w, table, gather, bias, preact, scale)
        return out


def bucket(rows: int) -> int:
    """The number of rows to three significant bits, downwards: what choice and caches see of it."""
    shift = max(rows.bit_length() - 3, 0)
    return rows >> shift << shift


BUCKETS = tuple(sorted({bucket((4 + quarter) << shift >> 2) for shift in range(31) for quarter in range(4)}))
