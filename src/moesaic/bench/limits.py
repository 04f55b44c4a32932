"""What peers that tune themselves may try: all that they list takes minutes a shape, mostly compiling.

Each limit is said in `SONIC` or `LIGER`, which goes with the figures. Within it a peer tunes itself, for every T anew.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

SONIC = "tuned for each T among 3 of quack's Hopper tiles, its default one of them, and among 4-warp reductions"
LIGER = "tuned for each T among its GEMMs of BLOCK_K 64 (weight gradients: 32), 4 stages at most, and 4-warp sums"


def sonic() -> None:
    """Hold SonicMoE to `SONIC`."""
    _few_quack_tiles(importlib.import_module("quack.gemm_interface"))
    _few_configs(importlib.import_module("sonicmoe.functional.reduction_over_k_gather"), _sum)


def liger() -> None:
    """Hold Liger to `LIGER`. Its own tiles of 64 rows are no choice of its tuners."""

    def keep(config: Any) -> bool:
        if "BLOCK_H" in config.kwargs:
            return _sum(config)
        return config.kwargs["BLOCK_K"] == (32 if "BLOCK_M" in config.kwargs else 64) and config.num_stages <= 4

    _few_configs(importlib.import_module("liger_kernel.ops.fused_moe_kernels"), keep)


def _few_configs(module: Any, keep: Callable[[Any], bool]) -> None:
    """Leave the Triton autotuners of a module the configs that `keep` accepts, tuned anew for every cell.

    Their own key has no T in it: the first T that comes would choose for all of them, and one cell for the next. A
    shorter measurement per config (that of quack's tuner) pays for it.
    """
    tuner_type = importlib.import_module("triton.runtime.autotuner").Autotuner
    measure = importlib.import_module("triton.testing").do_bench
    for tuner in vars(module).values():
        if isinstance(tuner, tuner_type):
            tuner.configs = [c for c in tuner.configs if keep(c)] or tuner.configs
            tuner.cache.clear()
            tuner.do_bench = functools.partial(measure, warmup=5, rep=25)


def _sum(config: Any) -> bool:
    """The weighted sum over a token's K rows, in SonicMoE and in Liger: 4 warps on 1024 to 4096 elements."""
    return config.num_warps == 4 and 1024 <= config.kwargs["BLOCK_H"] * config.kwargs["BLOCK_K"] <= 4096


def _few_quack_tiles(interface: Any) -> None:
    """Leave quack's autotuners three Hopper tiles, one of them its default, in each cluster shape that they list.

    quack tunes anew for every T, which is cheap once compiled; compiling, 2 to 5 s a config, is what takes minutes. Its
    compilers are processes that start one after another, so for so few configs this process compiles them sooner.
    """
    os.environ.setdefault("QUACK_COMPILE_WORKERS", "1")
    tiles = {(128, 256, False), (128, 192, True), (128, 128, True)}
    for name in ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned", "gemm_dact_tuned", "gemm_act_tuned"):
        tuner = getattr(interface, name, None)
        if tuner is None or getattr(tuner, "_moesaic_pruned", False):
            continue

        def prune(arguments, every=tuner.prune_configs):
            configs = every(arguments)
            gemms = [c.kwargs["config"] for c in configs]
            picked = [
                c for c, g in zip(configs, gemms, strict=True)
                if (g.tile_m, g.tile_n, g.pingpong) in tiles and not g.swap_ab
            ]  # fmt: skip
            return picked or configs[:3]

        tuner.prune_configs, tuner._moesaic_pruned = prune, True
