"""Which tile for which product: a table by architecture, and where one was measured a model of what tiles cost.

What was measured to be better than the model's choice stands in `_tuned.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

from ._tuned import DOWN, UP

SMALL_MEMORY = ("sm_86", "sm_89", "sm_120", "sm_121")  # 99 KiB of shared memory a block


@dataclass(frozen=True)
class Config:
    """Tiles of one launch: `block_m × block_n` of output, `block_k` deep, `group_m` row tiles sharing a weight tile.

    `kernel` names who makes it: `"plain"`, or where the operands have 16-byte strides `"persistent"` (`_triton_tma`) or
    `"swapped"` (`_gluon`), whose last tiles of an expert may take up to `slack` rows more. Operands that one of these
    refuses go to the one before it.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 16
    kernel: str = "plain"
    slack: int = 0

    @property
    def plain(self) -> Config:
        """What the common kernel runs; pointers take registers, and a stage less than tensor maps have is enough."""
        return self if self.kernel == "plain" else replace(_LARGE, num_stages=3, kernel="plain")

    @property
    def persistent(self) -> Config:
        """What `_triton_tma` runs where `_gluon` does not."""
        return _LARGE if self.kernel == "swapped" else self

    def padded(self, rows: int) -> tuple[int, int]:
        """Rows that the tiles of an expert with `rows` compute, and how many of its tiles are odd ones.

        A swapped tile's tail is rounded to 16, what lies behind the tiles that could take it to a multiple of 64.
        """
        full, left = divmod(rows, self.block_m)
        if not self.slack:
            return (full + (left > 0)) * self.block_m, 0
        if left <= self.slack * min(full, 2):
            return full * self.block_m + -(-left // 16) * 16, -(-left // self.slack)
        height = -(-left // 64) * 64
        return full * self.block_m + height, int(height < self.block_m)


@dataclass(frozen=True)
class Product:
    """One product: `rows` of `num_experts` experts, `width` columns of weights, `depth` the contraction.

    `sources` tokens are read where each is gathered for its experts, and 0 says that rows lie in their order. `out`
    columns are written. `swaps`: can `_gluon` make it?
    """

    rows: int
    num_experts: int
    width: int
    depth: int
    out: int
    sources: int
    swaps: bool = False

    @property
    def gathered(self) -> bool:
        return self.sources > 0

    @property
    def rows_per_expert(self) -> float:
        return self.rows / max(self.num_experts, 1)

    @property
    def octave(self) -> int:
        """Rows an expert as the table counts them: the nearest power of two, or 0 below one."""
        return 2 ** round(math.log2(self.rows_per_expert)) if self.rows_per_expert >= 1 else 0


@dataclass(frozen=True)
class Cost:
    """What a tile costs on one GPU: `rate` TB/s that it reaches when memory is what it waits for, `slowdown` of its
    arithmetic against the peak, `start` µs a tile. An odd tile (see `Config.padded`) costs `odd` rows beyond its own,
    since it brings in as many weights as any. `blocks` run on a multiprocessor."""

    rate: float
    slowdown: float
    start: float
    odd: int = 0
    blocks: int = 1


TILES = {
    "plain16": Config(16, 128, 128, 4, 4),
    "plain32": Config(32, 128, 64, 4, 5),
    "low": Config(64, 256, 64, 4, 4, kernel="persistent"),
    "large": Config(128, 256, 64, 8, 4, kernel="persistent"),
    "tall": Config(128, 256, 64, 4, 4, kernel="swapped", slack=32),
    "wide": Config(256, 128, 64, 4, 4, kernel="swapped", slack=32),
    # for experts with thousands of rows, of which fewer row tiles at a time fit the L2
    "tall8": Config(128, 256, 64, 4, 4, group_m=8, kernel="swapped", slack=32),
    "wide4": Config(256, 128, 64, 4, 4, group_m=4, kernel="swapped", slack=32),
}
_LARGE, TALL, WIDE = TILES["large"], TILES["tall"], TILES["wide"]
# (gathered, contiguous), fitted to 185 products of seven models with 16 to 16384 tokens (H200, 2026-11-23), so that
# choosing by them loses least: 0.3% over the best of these tiles in the mean. Of all models' products: docs/kernels.md.
PEAK_TFLOPS, PROCESSORS = 790.0, 132
COPY_RATE = 3.6  # TB/s of rows copied into their order
H200: dict[str, tuple[Cost | None, Cost | None]] = {
    "plain16": (Cost(4.4, 5.65, 0.0), Cost(4.3, 5.4, 0.3)),
    "plain32": (Cost(4.35, 3.0, 1.5, blocks=2), Cost(4.25, 3.125, 1.5, blocks=2)),
    "low": (Cost(4.2, 1.44, 2.5), Cost(4.1, 1.22, 1.5)),
    "large": (Cost(4.05, 1.09, 2.0), Cost(3.95, 1.08, 0.0)),
    "tall": (Cost(4.2, 1.1, 1.0, odd=60), Cost(4.4, 1.04, 1.0, odd=60)),
    "wide": (None, Cost(3.95, 1.04, 0.5, odd=20)),
}
H200 |= {"tall8": H200["tall"], "wide4": H200["wide"]}
SORTED = "sorted "  # before a tile's name: gathered rows are copied into their order first


@functools.lru_cache(maxsize=4096)
def expected_rows(config: Config, odd: int, mean: float) -> float:
    """What an expert's tiles cost under even routing, in rows: those computed, and `odd` for every odd tile.

    Its number of rows is Poisson's, for which a normal distribution stands in from 30 on.
    """
    spread = 5 * math.sqrt(mean) + 5
    counts = range(max(0, int(mean - spread)), int(mean + spread) + 1)
    if mean < 30:
        chances = [math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in counts] if mean > 0 else [1.0]
    else:
        chances = [math.exp(-((n - mean) ** 2) / (2 * mean)) for n in counts]
    total = 0.0
    for n, chance in zip(counts, chances, strict=False):
        rows, odd_tiles = config.padded(n)
        total += chance * (rows + odd * odd_tiles)
    return total / sum(chances)


def microseconds(config: Config, cost: Cost, p: Product) -> float:
    """Estimated time: the larger of what memory and arithmetic take, rounded where they meet."""
    hit = p.num_experts * (1 - math.exp(-p.rows_per_expert))
    memory = 2 * (hit * p.width * p.depth + (p.sources or p.rows) * p.depth + p.rows * p.out) / cost.rate / 1e6
    tiles = p.num_experts * expected_rows(config, cost.odd, p.rows_per_expert) / config.block_m
    waves = tiles * math.ceil(p.width / config.block_n) / (PROCESSORS * cost.blocks)
    waves += 0.7 * (math.ceil(waves) - waves)  # the last wave is not full, but its tiles run the faster for it
    step = 2 * config.block_m * config.block_n * config.block_k * PROCESSORS * cost.blocks / PEAK_TFLOPS / 1e6
    work = waves * (math.ceil(p.depth / config.block_k) * step * cost.slowdown + cost.start)
    return (memory**6 + work**6) ** (1 / 6)


def estimates(product: Product) -> dict[str, float]:
    """What `H200` expects of every way to make a product, in µs, by the name of its tile.

    Gathered rows may be copied into their order first (`SORTED`), a read and a write at `COPY_RATE`.
    """
    times: dict[str, float] = {}
    in_order, prefix, copy = product, "", 0.0
    if product.gathered:
        in_order, prefix = replace(product, sources=0), SORTED
        copy = 2 * (product.rows + product.sources) * product.depth / COPY_RATE / 1e6
    for name, config in TILES.items():
        gathered, contiguous = H200[name]
        if config.kernel == "swapped" and not product.swaps:
            continue
        if product.gathered and gathered is not None:
            times[name] = microseconds(config, gathered, product)
        if contiguous is not None:
            times[prefix + name] = microseconds(config, contiguous, in_order) + copy
    return times


def fastest(product: Product, sorts: bool = True, among: Collection[str] | None = None) -> str:
    """The way that the model finds best, among some or all; may rows be sorted? With few an expert it never pays."""
    times = estimates(product)
    sorts = sorts and product.rows_per_expert >= 192
    ways = [way for way in times if (sorts or not way.startswith(SORTED)) and (among is None or way in among)]
    return min(ways, key=times.__getitem__)


def tuned(product: Product) -> str | None:
    """The way that was measured to be better than the model's, or None.

    Rows that lie in their order may have been copied there because an entry says so: then it names their tile too.
    """
    key, rows = (product.num_experts, product.width, product.depth), product.octave
    way = UP.get(key, {}).get(rows)
    if not product.gathered:
        copied = way.removeprefix(SORTED) if way is not None and way.startswith(SORTED) else None
        way = DOWN.get(key, {}).get(rows, copied)
    if way is None or (TILES[way.removeprefix(SORTED)].kernel == "swapped" and not product.swaps):
        return None
    return way


@functools.lru_cache(maxsize=4096)
def gemm_config(arch: str, dtype: torch.dtype, product: Product) -> Config:
    """The tile for a product: on sm_90 the table's or else the model's, elsewhere by the mean number of rows an expert.

    The other architectures' tiles are sized to shared memory and registers by compiling.
    """
    rows = product.rows_per_expert
    if dtype == torch.float32:
        return Config(16 if rows <= 16 else 64, 64, 32, 4, 2)
    if arch == "sm_90":
        way = tuned(product)
        return TILES[fastest(product, sorts=False) if way is None or way.startswith(SORTED) else way]
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


def sorts_first(arch: str, dtype: torch.dtype, product: Product) -> bool:
    """Is it worth copying gathered rows into their order, so that the product may load them as tiles?

    Mostly for wide weights, as Mixtral's.
    """
    if arch != "sm_90" or dtype == torch.float32 or not product.gathered:
        return False
    return (tuned(product) or fastest(product)).startswith(SORTED)


def choose(arch: str, dtype: torch.dtype, batch_invariant: bool, product: Product) -> Config:
    """`gemm_config`, where a batch's size must not matter for the bits."""
    if batch_invariant and not same_bits(arch, dtype, product.depth):
        product = replace(product, rows=64 * product.num_experts, sources=0)
    return gemm_config(arch, dtype, product)


def wgrad_config(arch: str, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """`block_n, block_k, block_r, num_warps, num_stages` of the weight gradient."""
    if dtype == torch.float32:
        return 64, 64, 32, 4, 2
    if arch.startswith("gfx"):
        return 128, 128, 32, 8, 2
    return 128, 128, 32 if arch in SMALL_MEMORY else 64, 8, 3


def configs() -> Iterator[Config]:
    """What tuning may try."""
    yield from TILES.values()
    for m, n, k, warps, stages in (
        (16, 64, 128, 4, 4), (16, 128, 64, 4, 4), (16, 32, 256, 4, 4), (32, 128, 64, 4, 4), (64, 128, 64, 4, 4),
        (64, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
    ):  # fmt: skip
        yield Config(m, n, k, warps, stages)


def same_bits(arch: str, dtype: torch.dtype, depth: int) -> bool:
    """Do all configurations give the same bits? Seen of all on the products of seven models (H200, 2026-11-23).

    Not of contractions of one step or two: the compiler adds the bias first where a product has no loop.
    """
    return arch == "sm_90" and dtype != torch.float32 and depth > 128
