"""Time every tile on the layers of `moesaic.cases`, and write what choice reads: `ops/grouped_matmul/_tuned.py`.

python benchmarks/tiles.py --jobs 16 --out RECORD.json [--shapes a,b] [--tokens 64,4096]      # on an H200
python benchmarks/tiles.py --write RECORD.json [MORE.json]                                      # needs no GPU

A row of the record is one layer on one batch, with both products as `fused_experts` plans them for inference: burst µs
(docs/cli.md) by *way*, which is a tile's name, or "sorted" and its name where the time of copying rows into their order
is added; with many rows also µs at settled clocks, of which the mean with the burst counts. Ways that the model puts
far behind its best are left out. The plain kernel is held against the fp64 oracle on rows of several experts, and every
tile to the plain kernel's bits; what fails is not timed, and fails the script.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tile_plans import DEVICE, PLAIN, batches, compile_all, jobs, planned, ways
from tile_table import ROLES, TARGET, counted, product_of, render

from moesaic import Routing
from moesaic.activations import ACTIVATIONS, apply
from moesaic.bench import report
from moesaic.bench.layer import Layer
from moesaic.bench.timing import interleave
from moesaic.cases import CASES
from moesaic.ops.grouped_matmul import _triton as products
from moesaic.ops.grouped_matmul._configs import SORTED, fastest, same_bits
from moesaic.ops.permute._triton import spread
from moesaic.testing import failure

SETTLED = 512  # from so many rows an expert on clocks are let settle too, for the ways that a burst finds CLOSE
CLOSE = 1.08


class Batch:
    """A layer's products on one batch, evenly routed. The down product takes what the plain up product makes."""

    def __init__(self, layer: Layer, tokens: int):
        self.layer, self.case, self.tokens = layer, layer.case, tokens
        E, H, self.K, device = self.case.num_experts, self.case.hidden_size, self.case.top_k, layer.device
        g = torch.Generator(device).manual_seed(tokens)
        self.x = torch.randn(tokens, H, generator=g, dtype=layer.dtype, device=device)
        ids = torch.rand(tokens, E, generator=g, device=device).topk(self.K, -1).indices
        self.r = Routing.from_topk(None, ids, E, implementation="torch")  # which has nothing to compile
        self.tiles = products.TileTable(self.r.expert_offsets, tokens * self.K)
        self.plain: dict[str, torch.Tensor] = {}
        for role in ROLES:
            self.plain[role] = self.call(role, PLAIN)(0)

    def copy(self, i: int = 0) -> torch.Tensor:
        return spread(self.x, self.r.row_index, self.K)

    @cached_property
    def sorted(self) -> torch.Tensor:
        return self.copy()

    def call(self, role: str, way: str) -> Callable[[int], torch.Tensor]:
        w, gemm = self.layer, planned(self.case, self.tokens, role, way)
        if role == "down":
            return lambda i: gemm(self.plain["up"], w.w_down, self.tiles, None, w.b_down)
        x, gather = (self.sorted, None) if way.startswith(SORTED) else (self.x, self.r.row_order)
        return lambda i: gemm(x, w.w_gate_up, self.tiles, gather, w.b_gate_up)

    def oracle(self, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of four experts, the first and the last among both, and what they should be in fp64."""
        case, layer, up = self.case, self.layer, role == "up"
        w, bias = (layer.w_gate_up, layer.b_gate_up) if up else (layer.w_down, layer.b_down)
        ends, rows, wanted = self.r.expert_offsets.tolist(), [], []
        live = [e for e in range(case.num_experts) if ends[e] < ends[e + 1]]
        for e in {live[i * (len(live) - 1) // 3] for i in range(4)}:
            begin, last = ends[e], ends[e + 1] - 1
            mine = torch.tensor(sorted({begin + i * (last - begin) // 7 for i in range(8)}), device=layer.device)
            x = self.x[self.r.row_order[mine].long() // self.K] if up else self.plain["up"][mine]
            y = x.double() @ (w[e].double() if case.transposed else w[e].double().T)
            y = y if bias is None else y + bias[e].double()
            wanted.append(apply(ACTIVATIONS[case.activation], y, layer.interleaved) if up else y)
            rows.append(mine)
        return torch.cat(rows), torch.cat(wanted)

    def why_not(self, role: str, way: str, rows: torch.Tensor, want: torch.Tensor) -> str | None:
        """Why a way's result cannot be accepted, or None."""
        depth = product_of(self.case, self.tokens, role).depth
        try:
            out = self.call(role, way)(0)
            reason = failure(out[rows], want, depth)
            if reason is None and same_bits("sm_90", out.dtype, depth) and not torch.equal(out, self.plain[role]):
                reason = "not the plain kernel's bits"
        except Exception as e:  # a tile that cannot run is a finding too
            reason = f"{type(e).__name__}: {str(e)[:300]}"
        return reason

    def measure(self, role: str, rounds: int) -> dict[str, Any]:
        """Accept the ways of a product, and time those accepted."""
        oracle, todo = self.oracle(role), ways(self.case, self.tokens, role)
        reasons = {way: self.why_not(role, way, *oracle) for way in dict.fromkeys((PLAIN, *todo))}
        failed = {way: reason for way, reason in reasons.items() if reason}
        todo = [way for way in todo if not {way, PLAIN} & set(failed)]
        if not todo:
            return dict(failed=failed)
        product, cell = product_of(self.case, self.tokens, role), dict[str, Any](failed=failed)
        cell["us"] = us = self.time({way: self.call(role, way) for way in todo}, rounds, "burst")
        if product.octave >= SETTLED:
            near = [way for way in todo if us[way] < CLOSE * min(us.values()) or way == fastest(product, among=us)]
            cell["settled"] = self.time({way: self.call(role, way) for way in near}, 2, "sustained")
        spent = counted(cell)
        best, model = min(spent, key=spent.__getitem__), fastest(product, among=spent)
        return dict(cell, model=model, best=best, loss=round(spent[model] / spent[best] - 1, 4))

    def time(self, calls: dict[str, Callable], rounds: int, clocks: str) -> dict[str, float]:
        """Microseconds of each way, with the copy's of those that sort."""
        if any(way.startswith(SORTED) for way in calls):
            calls = {**calls, "copy": self.copy}
        samples = interleave(calls, 1, self.layer.device, 0.0, rounds, graphs=frozenset(calls), clocks=clocks)
        us = {name: sample.median * 1e6 for name, sample in samples.items()}
        copied = us.pop("copy", 0.0)
        return {way: round(t + copied * way.startswith(SORTED), 1) for way, t in us.items()}


def timed(layer: Layer, tokens: int, rounds: int) -> dict[str, Any]:
    """A row of the record."""
    rows = product_of(layer.case, tokens, "up").rows_per_expert
    row: dict[str, Any] = dict(shape=layer.case.name, tokens=tokens, rows_per_expert=round(rows, 2))
    try:
        batch = Batch(layer, tokens)
        for role in ROLES:
            row[role] = batch.measure(role, rounds)
    except Exception as e:  # out of memory, say: a smaller batch may do
        row["failed"] = f"{type(e).__name__}: {str(e)[:300]}"
    return row


def failures(row: dict[str, Any]) -> list[str]:
    found = [f"{role} {way}: {why}" for role in ROLES for way, why in row.get(role, {}).get("failed", {}).items()]
    return found + ([row["failed"]] if "failed" in row else [])


def line(row: dict[str, Any]) -> str:
    parts = [f"{row['shape']} T={row['tokens']} rows={row['rows_per_expert']}"]
    for role in ROLES:
        if us := row.get(role, {}).get("us"):
            best, model, loss = (row[role][key] for key in ("best", "model", "loss"))
            parts.append(f"{role} {us[best]} µs {best}" + (f", model's {model} {loss:+.1%}" if loss else ""))
    return "; ".join((*parts, *(f"FAILED {text}" for text in failures(row))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default=",".join(CASES))
    parser.add_argument("--tokens", default="16,64,128,256,512,1024,2048,4096,8192,16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=0, help="compile ahead in as many processes")
    parser.add_argument("--commit", default=report.commit())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", type=Path, nargs="+", metavar="RECORD", help="make the table; nothing is timed")
    args = parser.parse_args()
    if args.write:
        TARGET.write_text(render(args.write))
        return
    shapes, tokens = args.shapes.split(","), [int(T) for T in args.tokens.split(",")]
    record = dict(
        what="tiles", date=datetime.now(UTC).isoformat(timespec="seconds"), commit=args.commit,
        command=shlex.join(("python", *sys.argv)), machine=report.machine(DEVICE), versions=report.versions(), rows=[],
    )  # fmt: skip
    if args.jobs:
        compile_all(jobs(shapes, tokens), args.jobs)
    for name in shapes:
        layer = Layer.make(CASES[name], torch.bfloat16, DEVICE)
        for T in batches(CASES[name], tokens):
            start = time.perf_counter()
            row = timed(layer, T, args.rounds)
            record["rows"].append(row)
            print(line(row), f"({time.perf_counter() - start:.1f} s)", flush=True)
            if args.out:  # kept up to date
                args.out.write_text(json.dumps(record, indent=1))
            torch.cuda.synchronize()  # raises where the device is lost
            torch.cuda.empty_cache()
        del layer
        torch.cuda.empty_cache()
    if sum(len(failures(row)) for row in record["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
