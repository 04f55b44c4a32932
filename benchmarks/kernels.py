"""Time the parts of the fused forward and what was chosen about them, on one GPU: the ablations of docs/kernels.md.

python benchmarks/kernels.py --out benchmarks/results/h200/DATE-kernels.json [--commit X] [--shapes a,b] [--tokens 4096]

Every row is one launch or one layer in CUDA graphs of several calls: `burst` and `sustained` as in docs/cli.md. Before
anything is timed, every configuration's result is held against the plain kernel's, bit by bit, and that kernel against
the fp64 oracle on some rows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from moesaic import Routing, fused_experts, launch
from moesaic.activations import ACTIVATIONS, apply
from moesaic.bench import report
from moesaic.bench.layer import Layer
from moesaic.bench.timing import interleave
from moesaic.cases import CASES
from moesaic.ops.grouped_matmul import _triton as products
from moesaic.ops.grouped_matmul._configs import TALL, TILES, WIDE
from moesaic.ops.permute._triton import permute, spread, unpermute
from moesaic.testing import assert_close

LARGE = TILES["large"]
PLAIN = products.Config(128, 256, 64, 8, 3)
SUSTAINED = ("128x256", "256x128", "sorted before", "bmm", "layer")


class Parts:
    """A layer's products on one batch."""

    def __init__(self, case, tokens: int, distribution: str = "uniform"):
        self.case, self.act = case, ACTIVATIONS[case.activation]
        self.layer = Layer.make(case, torch.bfloat16, torch.device("cuda"), False, 0)
        batch = self.layer.batches(tokens, distribution, 0)[0]
        self.x, self.r = batch.x, Routing.from_topk(batch.weights, batch.ids, case.num_experts)
        self.H, self.I, self.K = case.hidden_size, case.intermediate_size, case.top_k
        R = tokens * self.K
        self.problem = case.problem(tokens, torch.bfloat16, "cuda", "sm_90")
        self.tiles = products.TileTable(self.r.expert_offsets, R)
        self.sorted = permute(self.x, self.r.row_order, self.r.expert_offsets, self.K)
        self.a = self.up(PLAIN)
        self.y = self.down(PLAIN)

    def up(self, config, gather: bool = True):
        return products.gemm(
            self.x if gather else self.sorted, self.layer.w_gate_up, self.case.transposed, self.tiles, self.problem,
            N=self.I, K=self.H, gather=self.r.row_order if gather else None, top_k=self.K, bias=self.layer.b_gate_up,
            activation=self.act, config=config,
        )  # fmt: skip

    def down(self, config):
        return products.gemm(
            self.a, self.layer.w_down, self.case.transposed, self.tiles, self.problem, N=self.H, K=self.I,
            bias=self.layer.b_down, config=config,
        )  # fmt: skip

    def whole(self, overlap: bool = True):
        """The layer from the router's choice on."""
        r, w, launch.OVERLAP = self.r, self.layer, overlap
        r = Routing.from_topk(r.topk_weights, r.topk_ids, self.case.num_experts)
        y = fused_experts(
            self.x, w.w_gate_up, w.w_down, r, activation=self.case.activation, layout=self.case.layout,
            transposed=self.case.transposed, b_gate_up=w.b_gate_up, b_down=w.b_down,
        )  # fmt: skip
        launch.OVERLAP = True
        return y

    @property
    def small(self) -> bool:
        return self.a.shape[0] <= 32 * self.case.num_experts and not self.case.bias

    def calls(self) -> dict:
        r, E, R = self.r, self.case.num_experts, self.a.shape[0]
        out = {"combine": lambda: unpermute(self.y, r.topk_weights, r.row_index, self.K)}
        out["sort rows"] = lambda: spread(self.x, r.row_index, self.K)
        out["sort rows, a program a row"] = lambda: permute(self.x, r.row_order, r.expert_offsets, self.K)
        out["tile table"] = lambda: products.TileTable(r.expert_offsets, R).of(128, -(-self.I // 128), 16)
        source = torch.empty((R + self.x.shape[0]) * self.H // 2, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(source)
        out["copy of the combine's bytes"] = lambda: target.copy_(source)
        for config in (PLAIN, *(c for c in TILES.values() if c.group_m == 16)):
            if R > 256 * E and config.block_m <= 32:
                continue  # tens of milliseconds
            name = f"{config.kernel} {config.block_m}x{config.block_n}"
            if config is not WIDE:  # which does not gather
                out[f"up, {name}"] = lambda c=config: self.up(c)
            out[f"down, {name}"] = lambda c=config: self.down(c)
        for config in (LARGE, TALL, WIDE):
            name = f"{config.kernel} {config.block_m}x{config.block_n}"
            out[f"up, rows sorted before, {name}"] = lambda c=config: self.up(c, False)
        for group in (1, 4, 64):
            config = replace(LARGE, group_m=group)
            out[f"up, groups of {group}"] = lambda c=config: self.up(c)
            out[f"down, groups of {group}"] = lambda c=config: self.down(c)
        out["layer"], out["layer, launches one by one"] = self.whole, lambda: self.whole(overlap=False)
        if self.small:
            for parts in (1, 2, 4):
                out[f"down and combine, contraction in {parts}"] = Split(self, parts)
        n, w = max(1, R // E), self.layer
        a, b = (torch.randn(E, n, k, dtype=torch.bfloat16, device="cuda") for k in (self.H, self.I))
        w_up, w_down = (w.w_gate_up, w.w_down) if self.case.transposed else (w.w_gate_up.mT, w.w_down.mT)
        c, d = torch.empty(E, n, w_up.shape[2], **like(a)), torch.empty(E, n, self.H, **like(a))
        out["up, bmm of even groups"] = lambda: torch.bmm(a, w_up, out=c)
        out["down, bmm of even groups"] = lambda: torch.bmm(b, w_down, out=d)
        return out

    def check(self) -> None:
        live = slice(0, 4)
        slots = self.r.row_order[live].long()
        expert = self.r.topk_ids.flatten()[slots].long()
        w = self.layer.w_gate_up[expert].double()
        h = torch.bmm(w.mT if self.case.transposed else w, self.x[slots // self.K].double()[:, :, None])[..., 0]
        if self.layer.b_gate_up is not None:
            h += self.layer.b_gate_up[expert].double()
        assert_close(self.a[live], apply(self.act, h, self.case.layout == "interleaved"), self.H)
        for config in TILES.values():
            assert torch.equal(self.up(config, config is not WIDE), self.a), config
            assert torch.equal(self.down(config), self.y), config
        assert torch.equal(self.up(LARGE, False), self.a) and torch.equal(self.up(TALL, False), self.a)
        y = self.whole()
        assert torch.equal(self.whole(overlap=False), y)
        if self.small:
            for parts in (1, 2, 4):
                assert_close(Split(self, parts)(), y.double(), self.I, stages=4)  # either rounds rows and sums


class Split:
    """Down and combine with the contraction cut in `parts`: a product of as many times more experts, whose results the
    combine adds, as a kernel that splits would leave them to it. On weights stored input-major."""

    def __init__(self, whole: Parts, parts: int):
        case, r, R = whole.case, whole.r, whole.a.shape[0]
        E, I, H, device = case.num_experts, whole.I, whole.H, whole.a.device
        self.depth, self.K, rows = I // parts, whole.K * parts, torch.arange(R, device=device)
        starts, part = r.expert_offsets.long(), torch.arange(parts, device=device)
        counts = starts.diff().repeat_interleave(parts)
        offsets = torch.cat([starts[:1], counts.cumsum(0)])
        expert = torch.bucketize(rows, starts[1:], right=True)
        # where a row's parts stand: (expert, part, row) in this order
        places = offsets[expert[:, None] * parts + part] + (rows - starts[expert])[:, None]
        self.gather = torch.empty(R * parts, dtype=torch.int32, device=device)
        self.gather[places.flatten()] = (rows[:, None] * parts + part).flatten().int()
        self.index = places[r.row_index.flatten().long()].flatten().int()
        self.weights = r.topk_weights.repeat_interleave(parts, 1)
        w = whole.layer.w_down if case.transposed else whole.layer.w_down.mT.contiguous()
        self.w, self.a = w.view(E * parts, self.depth, H), whole.a.view(R * parts, self.depth)
        self.tiles = products.TileTable(offsets.int(), R * parts)
        self.problem = replace(whole.problem, num_experts=E * parts, transposed=True)

    def __call__(self):
        y = products.gemm(
            self.a, self.w, True, self.tiles, self.problem, N=self.w.shape[2], K=self.depth, gather=self.gather, top_k=1
        )
        return unpermute(y, self.weights, self.index, self.K)


def like(t: torch.Tensor) -> dict:
    return {"dtype": t.dtype, "device": t.device}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="qwen3-30b-a3b,olmoe,gpt-oss-120b,mixtral-8x7b")
    parser.add_argument("--tokens", default="512,4096,16384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record = dict(
        what="kernels", date=datetime.now(UTC).isoformat(timespec="seconds"), commit=args.commit,
        command=f"python benchmarks/kernels.py --shapes {args.shapes} --tokens {args.tokens} --rounds {args.rounds}",
        machine=report.machine(torch.device("cuda")), versions=report.versions(), rows=[],
    )  # fmt: skip
    for name in args.shapes.split(","):
        for T in map(int, args.tokens.split(",")):
            parts = Parts(CASES[name], T)
            parts.check()
            calls = {what: (lambda i, call=call: call()) for what, call in parts.calls().items()}
            row = dict(shape=name, tokens=T)
            for clocks in ("burst", "sustained"):
                if clocks == "sustained":  # a tenth of a second a sample: what is large alone
                    calls = {what: call for what, call in calls.items() if any(w in what for w in SUSTAINED)}
                graphs = frozenset(calls)
                times = interleave(calls, 1, torch.device("cuda"), 0.0, args.rounds, graphs=graphs, clocks=clocks)
                row[f"{clocks}_us"] = {what: round(sample.median * 1e6, 1) for what, sample in times.items()}
            record["rows"].append(row)
            print(row, flush=True)
            if args.out:  # kept up to date
                args.out.write_text(json.dumps(record, indent=1))
            del parts, calls
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
