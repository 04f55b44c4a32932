"""The grouped product on GPUs: kernels, and the one choice between them.

A kernel is a module of this folder: `why_not(spec)` says once what it cannot run, `candidates(spec)` its tiles,
`estimate(spec, config)` their time in µs, `launch(spec, config)` makes the product. To add one, add its file and its
name to KERNELS.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import json
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ....errors import Unsupported
from ....hardware import has_gluon
from .cost import copy_microseconds
from .spec import BUCKETS, Config, Gemm, GemmSpec

KERNELS = ("swap_ab_sm90", "persistent_tma", "pointer")
GAIN = 1.02  # a tile that gains less over the others of a layer is not compiled
SORT_FROM = 192  # rows an expert; with fewer, copying gathered rows into their order never pays


@dataclass(frozen=True)
class Choice:
    """A way to make a product: kernel, tiles, and whether gathered rows are copied into their order first."""

    kernel: str
    config: Config
    sorts: bool = False

    def __str__(self) -> str:
        return f"{'sorted ' * self.sorts}{self.kernel} {self.config}"


def kernel(name: str) -> ModuleType:
    if name not in KERNELS:
        raise Unsupported(f"grouped products: no kernel {name!r}; there are {', '.join(KERNELS)}.")
    return importlib.import_module(f".{name}", __package__)


def why_not(name: str, spec: GemmSpec) -> str | None:
    """Why a kernel cannot make a product, or None."""
    if name == "swap_ab_sm90" and not has_gluon():
        return "is written in Triton 3.6's Gluon, which is experimental and changes from version to version"
    return kernel(name).why_not(spec)


@functools.lru_cache(maxsize=4096)
def ways(spec: GemmSpec, sorts: bool = False, forced: str = "") -> dict[Choice, float]:
    """Every way to make a product and its estimated µs, the fastest first; `forced` names the only kernel wanted."""
    found: dict[Choice, float] = {}
    for sort in (False, True) if sorts and spec.top_k and spec.rows_per_expert >= SORT_FROM else (False,):
        made = spec.in_order() if sort else spec
        copy = copy_microseconds(spec) if sort else 0.0
        for name in (forced,) if forced else KERNELS:
            if why_not(name, made) is None:
                module = kernel(name)
                for config in module.candidates(made):
                    found[Choice(name, config, sort)] = module.estimate(made, config) + copy
    if not found:
        raise Unsupported(f"grouped product: {forced_why_not(forced, spec)}. It was asked: {spec}.")
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def best(spec: GemmSpec, sorts: bool = False, forced: str = "") -> Choice:
    """What was measured to be fastest, else what the model expects to be."""
    return measured(spec, sorts, forced) or next(iter(ways(spec, sorts, forced)))


class Choices:
    """What runs a product, by its rows: a table for each product of a layer, made when it is first seen.

    Tiles that gain under 2% on others of the table are left out, so that few kernels are compiled.
    """

    def __init__(self, spec: GemmSpec, table: dict[int, Choice]):
        self.spec = spec
        starts = [r for before, r in zip((None, *BUCKETS), BUCKETS, strict=False) if table[r] != table.get(before)]  # type: ignore[arg-type]
        self._starts, self._choices = starts, [table[r] for r in starts]
        self._gemms: list[Gemm | None] = [None] * len(starts)

    def _at(self, rows: int) -> int:
        return max(bisect.bisect_right(self._starts, rows) - 1, 0)

    def choice(self, rows: int) -> Choice:
        return self._choices[self._at(rows)]

    def gemm(self, rows: int) -> Gemm:
        at = self._at(rows)
        gemm = self._gemms[at]
        if gemm is None:
            gemm = self._gemms[at] = make(self.spec, self._choices[at])
        return gemm


@functools.lru_cache(maxsize=1024)
def choices(spec: GemmSpec, sorts: bool = False, kernel: str = "") -> Choices:
    """The table of a product of any number of rows; may gathered rows be sorted first? `kernel` is the only one wanted.

    Where a batch's size must not matter for the bits, all rows have one choice.
    """
    if spec.batch_invariant and not same_bits(spec):
        return Choices(spec, dict.fromkeys(BUCKETS, best(spec.of(64 * spec.experts), False, kernel)))
    found = {rows: ways(spec.of(rows), sorts, kernel) for rows in BUCKETS}
    fixed = {rows: measured(spec.of(rows), sorts, kernel) for rows in BUCKETS}
    table = {rows: fixed[rows] or next(iter(found[rows])) for rows in BUCKETS}
    for rare in sorted(set(table.values()), key=list(table.values()).count):
        instead = {rows: _instead(rare, table, found[rows], fixed[rows]) for rows in BUCKETS if table[rows] == rare}
        if all(instead.values()):
            table |= {rows: choice for rows, choice in instead.items() if choice}
    return Choices(spec, table)


def _instead(rare: Choice, table: dict[int, Choice], times: dict[Choice, float], fixed: Choice | None) -> Choice | None:
    """The choice of the table that is under 2% slower than the best, if the rare one is not measured to be it."""
    others = [c for c in times if c != rare and c in table.values()]
    if fixed is not None or not others or times[others[0]] > GAIN * next(iter(times.values())):
        return None
    return others[0]


def forced_why_not(name: str, spec: GemmSpec) -> str | None:
    """Why a kernel that was asked for by name cannot run a product, or None."""
    if name not in KERNELS:
        return f"there is no kernel {name!r}, only {', '.join(KERNELS)}"
    reason = why_not(name, spec)
    return None if reason is None else f"kernel {name} {reason}"


def explained(what: str, spec: GemmSpec, sorts: bool, forced: str = "") -> list[str]:
    """Lines of `explain`: the choice, and the reason against each kernel that cannot run."""
    lines = [f"{what}: {choices(spec.any_rows, sorts, forced).choice(spec.rows)} ({spec})"]
    for name in KERNELS:
        if reason := why_not(name, spec):
            lines.append(f"  not {name}: {reason}")
    return [*lines, "  operands that do not begin at whole 16 bytes are copied at each launch"]


@functools.lru_cache(maxsize=4096)
def make(spec: GemmSpec, choice: Choice) -> Gemm:
    return kernel(choice.kernel).launch(spec.in_order() if choice.sorts else spec, choice.config)


def same_bits(spec: GemmSpec) -> bool:
    """Do all tiles give the same bits? Seen of all on the products of seven models (H200, 2026-11-23).

    Not of contractions of one step or two: the compiler adds the bias first where a product has no loop.
    """
    return spec.gpu.arch == "sm_90" and spec.half and spec.K > 128


# ---------------------------------------------------------------- what was measured
def cache_folder() -> Path:
    """Where a user's own tuned files lie."""
    return Path(os.environ.get("MOESAIC_CACHE", Path.home() / ".cache" / "moesaic")) / "tuned"


@functools.cache
def tuned(gpu_name: str) -> dict[str, dict[int, tuple[Any, ...]]]:
    """`tuned/<gpu>.json`, and over it the user's own: a product's key -> rows an expert -> a choice's values."""
    table: dict[str, dict[int, tuple[Any, ...]]] = {}
    name = f"{gpu_name.lower().replace(' ', '-')}.json"
    for path in (Path(__file__).with_name("tuned") / name, cache_folder() / name):
        if path.is_file():
            for key, rows in json.loads(path.read_text())["products"].items():
                table.setdefault(key, {}).update({int(r): tuple(way) for r, way in rows.items()})
    return table


def tuned_key(spec: GemmSpec) -> str:
    """What a measurement is of: a product's sizes and the side it is on; it holds for every dtype of 16 bits."""
    gathered = f" gathered by {spec.top_k}" if spec.top_k else ""
    return f"{spec.experts} x {spec.width} x {spec.K}{' gated' * spec.epilogue.gated}{gathered}"


def measured(spec: GemmSpec, sorts: bool, forced: str = "") -> Choice | None:
    """The measured choice of a product, where it can run."""
    way = tuned(spec.gpu.name).get(tuned_key(spec), {}).get(spec.octave) if spec.half else None
    if way is None:
        return None
    choice = choice_of(way)
    made, name = spec.in_order() if choice.sorts else spec, choice.kernel
    refused = (choice.sorts and not sorts) or name != (forced or name) or why_not(name, made) is not None
    return None if refused or choice.config not in kernel(name).candidates(made) else choice


def choice_of(values: Sequence[Any]) -> Choice:
    """The choice that a tuned file holds."""
    name, sorts, *numbers = values
    return Choice(name, Config(*numbers), sorts)


def tuned_values(choice: Choice) -> tuple[Any, ...]:
    """A choice as tuned files hold it."""
    return choice.kernel, choice.sorts, *astuple(choice.config)
