"""What a product costs on a GPU: the larger of what memory and arithmetic take, rounded where they meet.

Fitted to 185 products of seven models with 16 to 16384 tokens (H200, 2026-11-23), so that choosing by it loses least:
0.3% over the best of the tiles in the mean. A GPU of other rates is priced by the shares of its rates that the H200
reached; of all models' products: docs/kernels.md.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ....hardware import GPUS, Gpu
from .spec import Config, GemmSpec

FITTED = GPUS["H200"]
PEAK = 790.0  # TFLOP/s that products on the FITTED reach at its power limit
COPY_RATE = 3.6  # TB/s of rows copied into their order there


@dataclass(frozen=True)
class Cost:
    """What a tile costs: `rate` TB/s that it reaches when memory is what it waits for, `slowdown` of its arithmetic
    against the peak, `start` µs a tile, all on the FITTED GPU. An odd tile (see `Config.padded`) costs `odd` rows
    beyond its own, since it brings in as many weights as any. `blocks` run on a multiprocessor."""

    rate: float
    slowdown: float
    start: float
    odd: int = 0
    blocks: int = 1


@functools.lru_cache(maxsize=16384)
def expected_rows(config: Config, odd: int, mean: float) -> float:
    """What an expert's tiles cost under even routing, in rows: those computed, and `odd` for every odd tile.

    Its number of rows is Poisson's, for which a normal distribution stands in from 30 on.
    """
    if mean == 0:
        return 0.0
    spread = 5 * math.sqrt(mean) + 5
    first = max(0, int(mean - spread))
    n = np.arange(first, int(mean + spread) + 1)
    if mean < 30:
        factorials = np.cumsum(np.log(np.maximum(np.arange(n[-1] + 1), 1)))[first:]
        chances = np.exp(n * math.log(mean) - mean - factorials)
    else:
        chances = np.exp(-((n - mean) ** 2) / (2 * mean))
    full, left = np.divmod(n, config.block_m)
    if config.slack:
        fits = left <= config.slack * np.minimum(full, 2)
        height = -(-left // 64) * 64
        rows = full * config.block_m + np.where(fits, -(-left // 16) * 16, height)
        rows = rows + odd * np.where(fits, -(-left // config.slack), height < config.block_m)
    else:
        rows = (full + (left > 0)) * config.block_m
    return float((chances * rows).sum() / chances.sum())


def shares(gpu: Gpu) -> tuple[float, float]:
    """The GPU's rates over the FITTED one's: of memory, and of arithmetic a multiprocessor."""
    each, fitted = gpu.peak / gpu.processors, FITTED.peak / FITTED.processors
    return gpu.bandwidth / FITTED.bandwidth, each / fitted


def microseconds(spec: GemmSpec, config: Config, cost: Cost) -> float:
    """Estimated time of a product with these tiles."""
    memory_share, peak_share = shares(spec.gpu)
    processors = spec.gpu.processors * cost.blocks
    hit = spec.experts * (1 - math.exp(-spec.rows_per_expert))
    elements = hit * spec.width * spec.K + spec.sources * spec.K + spec.rows * spec.N
    if spec.epilogue.preact:
        elements += spec.rows * spec.width
    memory = 2 * elements / (cost.rate * memory_share) / 1e6
    tiles = spec.experts * expected_rows(config, cost.odd, spec.rows_per_expert) / config.block_m
    waves = tiles * math.ceil(spec.width / config.block_n) / processors
    waves += 0.7 * (math.ceil(waves) - waves)  # the last wave is not full, but its tiles run the faster for it
    rate = PEAK * peak_share * spec.gpu.processors / FITTED.processors
    step = 2 * config.block_m * config.block_n * config.block_k * processors / rate / 1e6
    work = waves * (math.ceil(spec.K / config.block_k) * step * cost.slowdown + cost.start)
    return (memory**6 + work**6) ** (1 / 6)


def copy_microseconds(spec: GemmSpec) -> float:
    """Of gathered rows being copied into their order first: a read and a write."""
    rate = COPY_RATE * shares(spec.gpu)[0]
    return 2 * (spec.rows + spec.sources) * spec.K / rate / 1e6
