"""Draw the tables of docs/numbers.md and README.md's chart from the records under benchmarks/results.

python benchmarks/tables.py      # rewrites what stands between the markers in docs/numbers.md, and docs/forward.png
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TITLES = {
    "moesaic": "moesaic", "vllm": "vLLM", "triton_kernels": "triton_kernels", "sonic": "SonicMoE",
    "deepgemm": "DeepGEMM", "liger": "Liger", "hf_grouped_mm": "Hugging Face", "torch_grouped_mm": "torch grouped_mm",
    "torch_loop": "torch loop", "dense_bmm": "dense bound",
}  # fmt: skip


def cells(record: dict) -> dict[tuple[str, str, int], dict[str, dict]]:
    """`(shape, dtype, tokens) -> candidate -> row` of uniform routing, in the order of the record."""
    out: dict[tuple[str, str, int], dict[str, dict]] = {}
    for row in record["rows"]:
        if row.get("why_not") is None and row.get("distribution", "uniform") == "uniform":
            out.setdefault((row["shape"], row["dtype"], row["tokens"]), {})[row["peer"]] = row
    return out


def gpu_table(record: dict) -> str:
    """Milliseconds of every candidate; ours also against the best of the others, the dense bound and its error.

    Of records that were timed at sustained clocks too, those ratios stand behind the others.
    """
    by_cell = cells(record)
    both = any("moesaic" in by and by["moesaic"].get("sustained") for by in by_cell.values())
    dense = any("moesaic" in by and by["moesaic"].get("dense") for by in by_cell.values())
    there = {peer for by in by_cell.values() for peer in by}
    titles = {peer: title for peer, title in TITLES.items() if peer in there}
    heads = ["best other ÷ moesaic", *["share of the dense bound"] * dense]
    heads = [f"{head}{', burst / sustained' * both}" for head in heads]
    heads = ["layer", "T", *titles.values(), *heads, "error: moesaic, vLLM"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (shape, _, tokens), by in by_cell.items():
        protocols = [by, {p: row["sustained"] for p, row in by.items()}] if both else [by]
        others = [best_other(figures) for figures in protocols]
        ratios = [f"{o / f['moesaic']['ms']:.2f}×" if o else "–" for o, f in zip(others, protocols, strict=True)]
        shares = [f"{figures['moesaic']['dense']:.0%}" for figures in protocols] if dense else []
        lines.append("| " + " | ".join([
            shape, str(tokens), *(f"{by[p]['ms']:.3g}" if p in by else "–" for p in titles),
            " / ".join(ratios), *([" / ".join(shares)] if dense else []),
            ", ".join(f"{by[p]['error']:.1e}" if p in by else "–" for p in ("moesaic", "vllm")),
        ]) + " |")  # fmt: skip
    return "\n".join(lines)


def best_other(figures: dict[str, dict]) -> float | None:
    """The fastest peer's milliseconds, of one protocol's figures by candidate; None where none could run."""
    return min((f["ms"] for p, f in figures.items() if p not in ("moesaic", "dense_bmm")), default=None)


def cpu_table(records: list[dict]) -> str:
    """Ours against Hugging Face's grouped_mm, forward and forward + backward."""
    merged: dict[tuple, dict[str, float]] = {}
    for record in records:
        way = "train" if record["plan"]["train"] else "forward"
        for key, by in cells(record).items():
            if "moesaic" in by and "hf_grouped_mm" in by:
                merged.setdefault(key, {})[way] = by["hf_grouped_mm"]["ms"] / by["moesaic"]["ms"]
                merged[key][way + " ms"] = by["moesaic"]["ms"]
    lines = ["| layer | dtype | T | forward, ms | × Hugging Face | forward + backward, ms | × Hugging Face |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for (shape, dtype, tokens), f in merged.items():
        both = (f"{f[w + ' ms']:.3g} | {f[w]:.2f}×" if w in f else "– | –" for w in ("forward", "train"))
        lines.append(f"| {shape} | {dtype} | {tokens} | {' | '.join(both)} |")
    return "\n".join(lines)


def router_table(record: dict) -> str:
    """Microseconds of routing forward and backward, every system in a column."""
    names = ("moesaic", "vllm", "triton_kernels", "sonic", "torch")
    titles = " | ".join({**TITLES, "torch": "torch"}[n] for n in names)
    lines = [f"| router | T | {titles} | best other ÷ moesaic |", "|---" * (len(names) + 3) + "|"]
    cells: dict[tuple, dict[str, float]] = {}
    for row in record["rows"]:
        if row["what"] != "gate" and "us" in row:
            kind = {"softmax": "softmax, E = 128", "grouped": "grouped sigmoid, E = 256"}[row["router"]]
            kind += ", backward" if row["what"] == "backward" else ""
            cells.setdefault((kind, row["tokens"]), {})[row["peer"]] = row["us"]
    for (kind, tokens), us in sorted(cells.items(), key=lambda cell: ("backward" in cell[0][0], cell[0][0][0] == "g")):
        best = min((v for n, v in us.items() if n != "moesaic"), default=None)
        times = " | ".join(f"{us[n]:.1f}" if n in us else "–" for n in names)
        ratio = f"{best / us['moesaic']:.2f}×" if best else "–"
        lines.append(f"| {kind} | {tokens} | {times} | {ratio} |")
    return "\n".join(lines)


def newest(folder: str, kind: str) -> Path:
    return sorted((RESULTS / folder).glob(f"*-{kind}.json"))[-1]


def load(folder: str, kind: str) -> dict:
    return json.loads(newest(folder, kind).read_text())


def conditions(record: dict) -> str:
    """The machine and versions of a record, in one line."""
    machine, versions = record["machine"], record["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    packages = ("torch", "triton", "transformers", "vllm", "sonic-moe", "liger-kernel")
    what = ", ".join(f"{n} {versions[n]}" for n in packages if versions.get(n))
    return f"{where}, {record['date'][:10]}, commit {record['commit']}; {what}"


def render(page: str) -> str:
    """The page with its generated parts made anew."""
    gpu = load("h200", "forward")
    parts = {"h200": f"{conditions(gpu)}\n\n{gpu_table(gpu)}"}
    clocks = load("h200", "forward-clocks")
    parts["clocks"] = f"{conditions(clocks)}\n\n{gpu_table(clocks)}"
    router = load("h200", "router")
    parts["router"] = router_table(router)
    if list((RESULTS / "epyc").glob("*-forward.json")):
        cpu = [load("epyc", "forward"), load("epyc", "train")]
        parts["cpu"] = f"{conditions(cpu[0])}\n\n{cpu_table(cpu)}"
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        page = pattern.sub(lambda m, text=text: f"{m.group(1)}{text}\n{m.group(2)}", page)
    return page


def chart(path: Path) -> None:
    """Bars of speed relative to vLLM for each layer and number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = load("h200", "forward")
    by = cells(record)
    shapes = list(dict.fromkeys(k[0] for k in by))
    colours = {
        "moesaic": "#d1495b", "vllm": "#8d99ae", "triton_kernels": "#edae49", "sonic": "#66a182",
        "hf_grouped_mm": "#2b2d42",
    }  # fmt: skip
    figure, axes = plt.subplots(1, len(shapes), figsize=(13, 3.4), sharey=True, constrained_layout=True)
    for axis, shape in zip(axes, shapes, strict=True):
        tokens = [k[2] for k in by if k[0] == shape]
        for i, (peer, colour) in enumerate(colours.items()):
            speed = [by[shape, "bf16", t]["vllm"]["ms"] / by[shape, "bf16", t][peer]["ms"] for t in tokens]
            axis.bar([x + (i - 2) * 0.17 for x in range(len(tokens))], speed, 0.16, color=colour, label=TITLES[peer])
        axis.axhline(1, color="#8d99ae", linewidth=0.8, zorder=0)
        axis.set_xticks(range(len(tokens)), tokens)
        axis.set_title(shape, fontsize=11)
        axis.set_xlabel("tokens")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("speed, vLLM = 1")
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"One MoE layer forward in bf16 on one {record['machine']['gpu']}: higher is faster", fontsize=12)
    figure.savefig(path, dpi=130)


def main() -> None:
    page = ROOT / "docs" / "numbers.md"
    page.write_text(render(page.read_text()))
    chart(ROOT / "docs" / "forward.png")


if __name__ == "__main__":
    main()
