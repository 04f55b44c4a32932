"""What a product costs on a GPU: the larger of what memory and arithmetic take, rounded where they meet.

Fitted to 185 products of seven models with 16 to 16384 tokens (H200, 2026-11-23), so that choosing by it loses least:
0.3% over the best of the tiles in the mean. A GPU of other rates is priced by its own: how far that carries was seen
on an H100, 1.8% over the best in the mean (486 products, 2026-11-27). Of all models' products: docs/kernels.md.
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
REACHED = {"H100": 0.9}  # of PEAK, on other GPUs, beyond what their published rates say
SOFT = 6  # how sharply a tile's rate gives way to what memory has


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


def peak_of(gpu: Gpu) -> float:
    """TFLOP/s that products reach."""
    return PEAK * gpu.peak / FITTED.peak * REACHED.get(gpu.name, 1.0)


def memory_rate(gpu: Gpu, rate: float) -> float:
    """TB/s of a tile that reaches `rate` on the FITTED GPU: no more than there is, and no more with more of it."""
    return (rate**-SOFT + gpu.bandwidth**-SOFT - FITTED.bandwidth**-SOFT) ** (-1 / SOFT)


def microseconds(spec: GemmSpec, config: Config, cost: Cost) -> float:
    """Estimated time of a product with these tiles."""
    processors = spec.gpu.processors * cost.blocks
    hit = spec.experts * (1 - math.exp(-spec.rows_per_expert))
    elements = hit * spec.width * spec.K + spec.sources * spec.K + spec.rows * spec.N
    if spec.epilogue.preact:
        elements += spec.rows * spec.width
    memory = 2 * elements / memory_rate(spec.gpu, cost.rate) / 1e6
    tiles = spec.experts * expected_rows(config, cost.odd, spec.rows_per_expert) / config.block_m
    waves = tiles * math.ceil(spec.width / config.block_n) / processors
    waves += 0.7 * (math.ceil(waves) - waves)  # the last wave is not full, but its tiles run the faster for it
    step = 2 * config.block_m * config.block_n * config.block_k * processors / peak_of(spec.gpu) / 1e6
    work = waves * (math.ceil(spec.K / config.block_k) * step * cost.slowdown + cost.start)
    return (memory**6 + work**6) ** (1 / 6)


def copy_microseconds(spec: GemmSpec) -> float:
    """Of gathered rows being copied into their order first: a read and a write."""
    rate = COPY_RATE * spec.gpu.bandwidth / FITTED.bandwidth
    return 2 * (spec.rows + spec.sources) * spec.K / rate / 1e6
