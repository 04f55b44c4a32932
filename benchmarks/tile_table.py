"""The table `ops/grouped_matmul/_tuned.py`, made of the records of tiles.py: which ways beat the model's choice."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesaic.activations import ACTIVATIONS
from moesaic.cases import CASES, Case
from moesaic.ops.grouped_matmul._configs import SORTED, TILES, Product, expected_rows, fastest

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "src" / "moesaic" / "ops" / "grouped_matmul" / "_tuned.py"
LEAD = 1.02  # of the best over the model's choice, from where on it gets an entry
ROLES = ("up", "down")
MANY = (512, 1024, 2048, 4096, 8192)  # rows an expert
PADDING = 0.08  # at the most, of an entry for 128 experts and more with 256 rows and more
Weights = tuple[int, int, int]  # experts, width, depth

HEADER = '''\
"""Where the fastest way to make a product was measured more than {lead:.0%} ahead of what `_configs.py` expects.

In a burst, or in the mean of a burst and settled clocks where the record has both.

`(experts, width, depth)` of the weights -> rows an expert, to the nearest power of two -> tile, with "sorted" before it
where gathered rows are copied into their order first. {machine}, {date}; every tile had passed the oracle.
Made by `python benchmarks/tiles.py --write` of

{records}
"""

Table = dict[tuple[int, int, int], dict[int, str]]
'''


def product_of(case: Case, tokens: int, role: str) -> Product:
    """A layer's product as the model and the table know it."""
    H, I, width = case.hidden_size, case.intermediate_size, ACTIVATIONS[case.activation].width(case.intermediate_size)
    sizes = (width, H, I, tokens) if role == "up" else (H, I, H, 0)
    return Product(tokens * case.top_k, case.num_experts, *sizes, swaps=True)


def counted(cell: dict[str, Any]) -> dict[str, float]:
    """What counts of a product's ways, in µs: the burst, or the mean of it and of settled clocks."""
    us = cell.get("us", {})
    return {way: (us[way] + t) / 2 for way, t in cell.get("settled", {}).items()} or us


def entries(records: Sequence[dict[str, Any]], role: str) -> dict[Weights, dict[int, str]]:
    """Where the best way of those timed leads the model's choice among them, and what it is.

    Of a layer and batch that several records hold, the last is taken. Layers that share a product and an octave of rows
    share an entry: what takes the least time in all. An octave of MANY that nobody measured goes by the next above that
    somebody did, or else by the last: what the model would choose for it is looked up there.
    """
    cells: dict[tuple[Weights, int], list[tuple[Product, dict[str, float]]]] = defaultdict(list)
    for row in {(row["shape"], row["tokens"]): row for record in records for row in record["rows"]}.values():
        product = product_of(CASES[row["shape"]], row["tokens"], role)
        if us := counted(row.get(role, {})):
            cells[(product.num_experts, product.width, product.depth), product.octave].append((product, us))
    for weights in {weights for weights, _ in cells}:
        measured = [rows for w, rows in cells if w == weights]
        for rows in MANY if max(measured) >= MANY[0] else ():
            if rows not in measured:
                there = min((m for m in measured if m > rows), default=max(measured))
                cells[weights, rows] = [(scaled(p, rows, there), us) for p, us in cells[weights, there]]
    out: dict[Weights, dict[int, str]] = {}
    for (weights, rows), found in sorted(cells.items()):
        ways = [way for way in found[0][1] if not pads(weights[0], rows, way)] or list(found[0][1])
        totals = {way: sum(us.get(way, float("inf")) for _, us in found) for way in ways}
        best = min(totals, key=totals.__getitem__)
        choices = [us.get(fastest(p, among=None if rows in MANY else us), float("inf")) for p, us in found]
        if sum(choices) > LEAD * totals[best]:
            out.setdefault(weights, {})[rows] = best
    return out


def pads(experts: int, rows: int, way: str) -> bool:
    tile = TILES[way.removeprefix(SORTED)]
    return experts >= 128 and rows >= 256 and expected_rows(tile, 0, rows) > (1 + PADDING) * rows


def scaled(product: Product, rows: int, of: int) -> Product:
    return replace(product, rows=product.rows * rows // of, sources=product.sources * rows // of)


def layers(weights: Weights, role: str) -> str:
    """The names of those that have such weights."""
    by_name = {name: product_of(case, 1, role) for name, case in CASES.items()}
    return ", ".join(name for name, p in by_name.items() if (p.num_experts, p.width, p.depth) == weights)


def render(paths: Sequence[Path]) -> str:
    """The module, as the formatter would leave it."""
    records = [json.loads(path.read_text()) for path in paths]
    places = [path.resolve() for path in paths]
    names = "\n".join(str(path.relative_to(ROOT)) if ROOT in path.parents else path.name for path in places)
    date, machine = max(record["date"] for record in records)[:10], records[0]["machine"].get("gpu", "CPU")
    parts = [HEADER.format(lead=LEAD - 1, records=names, machine=machine, date=date)]
    for role in ROLES:
        parts.append(f"\n{role.upper()}: Table = {{\n")
        for weights, ways in entries(records, role).items():
            parts.append(f"    # {layers(weights, role)}\n")
            cells = [f'{rows}: "{way}"' for rows, way in ways.items()]
            line = f"    {weights}: {{{', '.join(cells)}}},\n"
            if len(line) > 121:
                line = f"    {weights}: {{\n" + "".join(f"        {cell},\n" for cell in cells) + "    },\n"
            parts.append(line)
        parts.append("}\n")
    return "".join(parts).replace("{\n}", "{}")
