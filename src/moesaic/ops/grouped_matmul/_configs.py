"""Which tile for which product: a table by architecture, and where one was measured a model of what tiles cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

SMALL_MEMORY = ("sm_86", "sm_89", "sm_120", "sm_121")  # 99 KiB of shared memory a block


@dataclass(frozen=True)
class Config:
    """Tiles of one launch: `block_m × block_n` of output, `block_k` deep, `group_m` row tiles sharing a weight tile.

    `persistent` asks for `_triton_tma`'s kernel, which takes 16-byte strides only; other operands go the common way.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 16
    persistent: bool = False

    @property
    def plain(self) -> Config:
        """What the common kernel runs; pointers take registers, and a stage less than tensor maps have is enough."""
        return replace(self, num_warps=8, num_stages=3, persistent=False) if self.persistent else self


@dataclass(frozen=True)
class Product:
    """One product: `rows` of `num_experts` experts, `width` columns of weights, `depth` the contraction.

    `sources` rows are read: fewer than `rows` where a token is gathered for each of its experts. `out` columns are
    written.
    """

    rows: int
    num_experts: int
    width: int
    depth: int
    out: int
    sources: int

    @property
    def gathered(self) -> bool:
        return self.sources < self.rows

    @property
    def rows_per_expert(self) -> float:
        return self.rows / max(self.num_experts, 1)


@dataclass(frozen=True)
class Cost:
    """What a tile costs on one GPU: `rate` TB/s that it reaches when memory is what it waits for, `slowdown` of its
    arithmetic against the peak, `start` µs a tile. `blocks` run on a multiprocessor."""

    rate: float
    slowdown: float
    start: float
    blocks: int = 1


_PLAIN_16, _PLAIN_32, _PLAIN_64 = Config(16, 128, 128, 4, 4), Config(32, 128, 64, 4, 5), Config(64, 128, 64, 4, 4)
_LOW, _SQUARE, _LARGE = (
    Config(64, 256, 64, 4, 4, persistent=True),
    Config(128, 128, 64, 8, 5, persistent=True),
    Config(128, 256, 64, 8, 4, persistent=True),
)
# Fitted to 56 products (qwen3-30b, olmoe, mixtral and gpt-oss, 16 to 2048 tokens) on an H200, 2026-11-23: (gathered,
# contiguous). Choosing by them costs 1.1% over the best of 13 tiles in the mean.
PEAK_TFLOPS, PROCESSORS = 790.0, 132
H200: dict[Config, tuple[Cost, Cost]] = {
    _PLAIN_16: (Cost(4.3, 5.4, 0.6), Cost(4.3, 5.45, 0.3)),
    _PLAIN_32: (Cost(4.3, 3.05, 1.0, 2), Cost(4.3, 3.05, 1.5, 2)),
    _LOW: (Cost(4.3, 1.35, 2.5), Cost(4.15, 1.15, 1.0)),
    _SQUARE: (Cost(3.4, 2.05, 0.6), Cost(4.0, 1.05, 0.6)),
    _LARGE: (Cost(3.7, 1.15, 1.5), Cost(4.0, 1.0, 1.0)),
}


# Where another tile was measured more than 2% ahead of the model's (H200, 2026-11-23; all had passed the oracle):
# (experts, width, depth) -> rows an expert, to the nearest power of two -> tile.
TUNED: dict[tuple[int, int, int], dict[int, Config]] = {
    (8, 28672, 4096): {16: _PLAIN_32},  # mixtral-8x7b
    (8, 4096, 14336): {64: _LARGE, 128: _SQUARE, 256: _SQUARE},
    (128, 5760, 2880): {64: _LARGE},  # gpt-oss-120b
    (128, 2880, 2880): {16: _PLAIN_32, 32: _PLAIN_64},
}


def expected_tiles(product: Product, block_m: int) -> float:
    """Row tiles of even routing: the sum over experts and j of the probability of more than `j · block_m` rows."""
    mean = product.rows_per_expert
    total, j, more = 0.0, 0, 1 - math.exp(-mean)
    while more > 1e-4 or j * block_m < mean:
        total, j = total + more, j + 1
        more = 0.5 * math.erfc((j * block_m + 0.5 - mean) / math.sqrt(2 * mean))
    return product.num_experts * total


def microseconds(config: Config, cost: Cost, p: Product) -> float:
    """Estimated time: the larger of what memory and arithmetic take, rounded where they meet."""
    hit = p.num_experts * (1 - math.exp(-p.rows_per_expert))
    memory = 2 * (hit * p.width * p.depth + p.sources * p.depth + p.rows * p.out) / cost.rate / 1e6
    waves = expected_tiles(p, config.block_m) * math.ceil(p.width / config.block_n) / (PROCESSORS * cost.blocks)
    waves += 0.7 * (math.ceil(waves) - waves)  # the last wave is not full, but its tiles run the faster for it
    step = 2 * config.block_m * config.block_n * config.block_k * PROCESSORS * cost.blocks / PEAK_TFLOPS / 1e6
    work = waves * (math.ceil(p.depth / config.block_k) * step * cost.slowdown + cost.start)
    return (memory**6 + work**6) ** (1 / 6)


@functools.lru_cache(maxsize=4096)
def gemm_config(arch: str, dtype: torch.dtype, product: Product) -> Config:
    """The tile for a product: on sm_90 the cheapest by `H200`, elsewhere by the mean number of rows an expert.

    The other architectures' tiles are sized to shared memory and registers by compiling.
    """
    rows = product.rows_per_expert
    if dtype == torch.float32:
        return Config(16 if rows <= 16 else 64, 64, 32, 4, 2)
    if arch == "sm_90":
        tuned = TUNED.get((product.num_experts, product.width, product.depth), {})
        if rows >= 1 and (config := tuned.get(2 ** round(math.log2(rows)))):
            return config
        return min(H200, key=lambda config: microseconds(config, H200[config][not product.gathered], product))
    if arch.startswith("gfx"):  # 64 KiB of LDS
        if rows <= 16:
            return Config(16, 64, 128, 4, 2)
        return Config(32 if rows <= 32 else 64 if rows <= 64 else 128, 128, 64, 8, 2)
    if arch in ("sm_100", "sm_103"):
        if rows <= 16:
            return Config(16, 128, 128, 4, 4)
        return Config(64, 128, 64, 4, 4) if rows <= 40 else Config(128, 256, 64, 8, 3)
    stages = 3 if arch in SMALL_MEMORY else 4
    if rows <= 16:
        return Config(16, 64, 128, 4, stages)
    if rows <= 64:
        return Config(32 if rows <= 32 else 64, 64 if arch in SMALL_MEMORY else 128, 64, 4, stages)
    return Config(128, 128, 32 if arch in SMALL_MEMORY else 64, 8, 3)


def sorts_first(arch: str, product: Product) -> bool:
    """Is it worth copying gathered rows into their order, so that the product may load them as tiles?

    Gathering costs the product 7.5% where arithmetic bounds it, the copy a read and a write of the rows at 2.5 TB/s
    (H200, 2026-11-23, four models): it pays for wide weights, as Mixtral's.
    """
    if arch != "sm_90" or not product.gathered or product.rows_per_expert < 256:
        return False
    gather = 0.075 * 2 * product.rows * product.width * product.depth / PEAK_TFLOPS / 1e6
    return gather > 2 * (product.rows + product.sources) * product.depth / 2.5e6


def wgrad_config(arch: str, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """`block_n, block_k, block_r, num_warps, num_stages` of the weight gradient."""
    if dtype == torch.float32:
        return 64, 64, 32, 4, 2
    if arch.startswith("gfx"):
        return 128, 128, 32, 8, 2
    return 128, 128, 32 if arch in SMALL_MEMORY else 64, 8, 3


def configs() -> Iterator[Config]:
    """What tuning may try."""
    yield from H200
    for m, n, k, warps, stages in (
        (16, 64, 128, 4, 4), (16, 128, 64, 4, 4), (16, 32, 256, 4, 4), (32, 128, 64, 4, 4), (64, 128, 64, 4, 4),
        (64, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
    ):  # fmt: skip
        yield Config(m, n, k, warps, stages)


def same_bits(arch: str, dtype: torch.dtype) -> bool:
    """Do all configurations give the same bits? Seen of 13 on 56 products of four models (H200, 2026-11-23)."""
    return arch == "sm_90" and dtype != torch.float32
