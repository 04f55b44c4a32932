"""`moesaic demo`: a small real model, run by its own loop and by moesaic, and three large layers timed."""

from __future__ import annotations

import inspect
import json
import shlex
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..bench import Plan, Result, report
from ..bench import run as measure
from ..bench.timing import one_thread
from ..diagnose import Comparison, compare, heatmap, load_statistics
from ..errors import MissingExtra
from .env import explained, implementations_table, typical
from .screen import Clock, Device, Json, Screen, UsageMistake, clean, names, numbers, pick_device

EAGER, GROUPED = "torch_loop", "hf_grouped_mm"  # what a Hugging Face user has without moesaic
REPOSITORY = Path(__file__).parents[3]
SPEED_COLUMNS = (
    "tokens", "loop\nms", "grouped_mm\nms", "moesaic\nms", "vs\nloop", "vs\ngrouped_mm", "of\nroofline", "ran\non",
)  # fmt: skip
NEW_BYTES, SEED = 160, 2

# Beginnings that the model has to continue; a token is a byte, so these need no tokenizer.
PROMPTS = (
    "import os\n\n\ndef read_lines(path):\n    with open(",
    'class Node:\n    """A node of a tree."""\n\n    def __init__(self, ',
    "    def read(self, size=-1):\n        if self.closed:\n            raise ValueError(",
)
# Real code that every layer is judged on.
SOURCES = (textwrap.dedent, textwrap.wrap, shlex.split, inspect.getsource, json.dumps, Path.exists)


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation by both, sampled with one seed; `same` bytes from the start."""

    prompt: str
    eager: str
    ours: str
    same: int
    length: int


def demo(
    checkpoint: Annotated[Path | None, typer.Option(help="A Hugging Face folder of a byte-level MoE model.")] = None,
    shapes: Annotated[str, typer.Option(help="Layers to time.")] = "olmoe,qwen3-30b-a3b,granite-3-3b",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens to time.")] = "1,64,512",
    seconds: Annotated[float, typer.Option(help="Time to spend on one candidate in one cell.")] = 1.0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the record.")] = Path("out/demo"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """See it work: a real small model with moesaic's experts, checked layer by layer, and three big layers timed."""
    screen, here, clock = Screen(as_json), pick_device(device), Clock()
    for package in ("transformers", "safetensors"):
        if not report.found(package):
            raise MissingExtra(package, "hf", "moesaic demo")
    place = _checkpoint(checkpoint)
    plan = Plan(
        names(shapes),
        numbers(tokens, "--tokens"),
        ("bf16",),
        (EAGER, GROUPED),
        str(here),
        seconds=seconds,
        min_rounds=3,
        clocks=("burst",),
    )
    try:
        plan.check()
    except ValueError as error:
        raise UsageMistake(f"demo: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    screen.title(
        "moesaic demo",
        f"Mixture-of-Experts operators for PyTorch, on {report.device_name(here)}.\n"
        "A Mixture-of-Experts layer holds many small networks, its experts; a router sends each token to a few.",
    )
    with screen.alone():
        facts = _model_part(screen, place, here, out)
        facts |= _speed_part(screen, plan, out) | _why_part(screen, here)
    files = [*(f for f in (out / "load.png", out / "speed.png") if f.exists()), out / "demo.json"]
    facts |= {"seconds": clock.seconds, "files": [str(f) for f in files]}
    (out / "demo.json").write_text(json.dumps(clean(facts), indent=1) + "\n")
    _farewell(screen, facts, clock.seconds)
    screen.emit(facts)
    if not facts["ok"]:
        raise typer.Exit(1)


def _checkpoint(given: Path | None) -> Path:
    places = (given,) if given else (REPOSITORY / "examples" / "tiny_lm", Path("examples/tiny_lm"))
    for place in places:
        if (place / "config.json").exists():
            return place
    raise UsageMistake(
        f"demo: no checkpoint at {' or '.join(str(p) for p in places)}; give one with --checkpoint, or make it with: "
        "python examples/train_tiny_lm.py"
    )


# ---------------------------------------------------------------- the model
def _model_part(screen: Screen, checkpoint: Path, device: torch.device, out: Path) -> dict[str, Any]:
    import transformers

    from ..integrations import transformers as _registers_the_name  # noqa: F401

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = model.to(device).eval()
    config, size = model.config, sum(p.numel() for p in model.parameters())
    screen.step(
        1, "A real model, by one line",
        f"{checkpoint.name}: {size / 1e6:.1f} million parameters, {config.num_hidden_layers} layers of "
        f"{config.num_experts} experts, {config.num_experts_per_tok} for each token. It reads and writes bytes.",
    )  # fmt: skip
    screen.print(
        "    model = AutoModelForCausalLM.from_pretrained(\n"
        '        path, [bold]experts_implementation="moesaic"[/bold])\n'
    )
    with screen.progress() as advance, one_thread():
        completions = [_complete(model, prompt, advance) for prompt in PROMPTS]
    _show_completions(screen, completions)
    ids = _real_code(config.max_position_embeddings).to(device)
    compared = {}
    with screen.progress() as advance:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            compared[name] = compare(model.to(dtype), ids, advance)
    _show_layers(screen, compared, ids.numel())
    loads = _show_load(screen, compared["fp32"], out / "load.png", config.num_experts)
    return {
        "ok": _all_close(compared), "checkpoint": str(checkpoint), "parameters": size,
        "completions": [asdict(c) for c in completions],
        "layers": {dtype: _plain(comparison) for dtype, comparison in compared.items()}, "load": loads,
    }  # fmt: skip


def _complete(model: Any, prompt: str, advance: Any) -> Completion:
    ids = torch.tensor([list(prompt.encode())], device=model.device)
    texts = []
    for implementation in ("eager", "moesaic"):
        advance(f"generating with {implementation}")
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            torch.manual_seed(SEED)
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_BYTES, do_sample=True, temperature=0.5
            )
        texts.append(made[0, ids.shape[1] :].tolist())
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    return Completion(prompt, _printable(texts[0]), _printable(texts[1]), same, len(texts[0]))


def _printable(made: list[int]) -> str:
    """What a model wrote, without the control codes that it might have written."""
    text = bytes(made).decode(errors="replace").expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _real_code(limit: int) -> torch.Tensor:
    """`(B, L)` bytes of the standard library's own source."""
    length = min(256, limit)
    text = "\n\n".join(inspect.getsource(source) for source in SOURCES).encode()
    count = len(text) // length
    return torch.frombuffer(bytearray(text[: count * length]), dtype=torch.uint8).long().view(count, length)


def _all_close(compared: dict[str, Comparison]) -> bool:
    """Whether ours is as close to fp64 as eager in every layer: within twice its error, or within 1e-6 in fp32."""
    return all(line.ours <= max(2 * line.eager, 1e-6) for c in compared.values() for line in c.layers)


def _plain(comparison: Comparison) -> dict[str, Any]:
    layers = [asdict(line) | {"load": line.load.tolist()} for line in comparison.layers]
    return {"layers": layers, "logits": comparison.logits, "agreement": comparison.agreement}


def _show_completions(screen: Screen, completions: list[Completion]) -> None:
    panels = []
    for c in completions:
        body = Text(c.prompt, style="bold").append(c.ours.rstrip(), style="cyan not bold")
        identical = c.same == c.length
        verdict = (
            f"the same {c.length} bytes with both" if identical else f"the first {c.same} of {c.length} bytes agree"
        )
        panels.append(Panel(body, subtitle=verdict, border_style="green" if identical else "yellow", padding=(0, 1)))
    screen.print(*panels, sep="")
    screen.print(
        "[dim]bold: the prompt; the rest is the model's, a byte at a time, sampled with the same seed by both.[/dim]"
    )


def _show_layers(screen: Screen, compared: dict[str, Comparison], tokens: int) -> None:
    screen.step(
        2, "Is every layer right?",
        f"{tokens} bytes of real code. Each layer alone, on the routing that eager chose: its relative error against "
        "Hugging Face's loop in fp64. Ours should be as close to the truth as eager. Flips: tokens that choose other "
        "experts when the whole model runs with moesaic, because two were nearly tied.",
    )  # fmt: skip
    table = Table(header_style="bold")
    table.add_column("layer", no_wrap=True)
    for dtype in compared:
        for name in ("eager", "moesaic", "flips"):
            table.add_column(f"{dtype}\n{name}", justify="right", no_wrap=True)
    for i, lines in enumerate(zip(*(c.layers for c in compared.values()), strict=True)):
        cells = []
        for line in lines:
            good = line.ours <= max(2 * line.eager, 1e-6)
            cells += [f"{line.eager:.1e}", Text(f"{line.ours:.1e}", style="green" if good else "red"),
                      str(line.flips)]  # fmt: skip
        table.add_row(str(i), *cells)
    screen.print(table)
    for dtype, c in compared.items():
        difference = f"logits differ by {c.logits:.1e}" if c.logits else "logits are equal bit for bit"
        screen.print(
            f"whole model, {dtype}: {difference}; likeliest next byte the same for {c.agreement:.2%} of tokens"
        )


def _show_load(screen: Screen, comparison: Comparison, path: Path, experts: int) -> list[dict[str, Any]]:
    screen.step(
        3,
        "Where do tokens go?",
        "Tokens of each expert over an even share: 1.0 is even, 0.0 an expert that nobody uses.",
    )
    wide = screen.console.width >= 100
    table = Table(header_style="bold", padding=0, box=None)
    table.add_column("layer ", no_wrap=True, justify="center")
    shown = min(experts, 16)
    for e in range(shown):
        table.add_column(f"{e:^4}", no_wrap=True)
    for name in ("  most", "  unused", "  diversity")[: 3 if wide else 1]:
        table.add_column(name, justify="right", no_wrap=True)
    records = []
    for i, line in enumerate(comparison.layers):
        stats = load_statistics(line.load)
        cells = [Text(f"{v:3.1f}".center(4), style=_heat(v)) for v in line.load.tolist()[:shown]]
        rest = (f"{line.load.max():.1f}x", f"{stats.dead:.0%}", f"{stats.diversity:.0%}")
        table.add_row(f"{i}", *cells, *rest[: 3 if wide else 1])
        records.append({"layer": line.name, "load": line.load.tolist(), **asdict(stats)})
    screen.print(table)
    if report.found("matplotlib"):
        heatmap(
            [line.load for line in comparison.layers], path, "Expert load on Python source: tokens over an even share"
        )
        screen.print(f"picture: {path}")
    else:
        screen.print(Text(f"no picture: {MissingExtra('matplotlib', 'plot', 'the heatmap')}", style="yellow"))
    return records


def _heat(value: float) -> str:
    """Background of a load cell: blue below 1, white at 1, red above, as in the picture."""
    away = min(abs(value - 1.0), 1.0)
    fade, full = round(255 - 175 * away), 235
    red, green, blue = (full, fade, fade) if value > 1 else (fade, fade, full)
    return f"black on rgb({red},{green},{blue})"


# ---------------------------------------------------------------- speed
def _speed_part(screen: Screen, plan: Plan, out: Path) -> dict[str, Any]:
    screen.step(
        4, "How fast is one layer?",
        "Layers of real models with random weights in bf16; medians of interleaved rounds. "
        "loop: the loop over experts that models ship with. grouped_mm: Hugging Face's fastest stock choice.",
    )  # fmt: skip
    result = Result(plan)
    with screen.progress(len(plan.shapes) * len(plan.tokens)) as advance:
        for partial in measure(plan, lambda what: advance(what, 0)):
            result = partial
            advance("", 1)
    screen.print(_speed_table(result, wide=screen.console.width >= 100))
    for what, reason in result.skipped.items():
        screen.print(Text(f"skipped {what}: {reason}", style="yellow"))
    if report.found("matplotlib") and result.measured:
        report.plot(result, out / "speed.png")
        screen.print(f"picture: {out / 'speed.png'}")
    return {"speed": report.record(result)}


def _speed_table(result: Result, wide: bool) -> Table:
    table = Table(header_style="bold")
    table.add_column("layer", no_wrap=True)
    for name in SPEED_COLUMNS if wide else SPEED_COLUMNS[:6]:
        table.add_column(name, justify="right", no_wrap=True)
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for row in result.measured:
        cells.setdefault((row.shape, row.tokens), {})[row.peer] = row
    for i, ((shape, tokens), rows) in enumerate(cells.items()):
        ours, first = rows.get("moesaic"), i % len(result.plan.tokens) == 0
        times = [report.figure(rows[p].ms) if p in rows else "–" for p in (EAGER, GROUPED, "moesaic")]
        ratios = [_ratio(rows[p].ms / ours.ms) if p in rows and ours else Text("–") for p in (EAGER, GROUPED)]
        share = f"{ours.roofline:.0%}" if ours else "–"
        rest = (share, ours.implementation if ours else "–") if wide else ()
        last = (i + 1) % len(result.plan.tokens) == 0
        table.add_row(shape if first else "", str(tokens), *times, *ratios, *rest, end_section=last)
    return table


def _ratio(value: float) -> Text:
    return Text(f"{value:.2f}x", style="green" if value >= 0.97 else "red")


# ---------------------------------------------------------------- why
def _why_part(screen: Screen, device: torch.device) -> dict[str, Any]:
    screen.step(
        5, "What ran, and why?",
        "Each operator has several implementations; the first without a reason against it runs. No trial and error.",
    )  # fmt: skip
    facts = [explained(op, fields) for op, fields in typical(device) if op == "fused_experts"]
    screen.print(implementations_table(facts, "moesaic.explain('fused_experts', ...)"))
    return {"implementations": facts}


def _farewell(screen: Screen, facts: dict[str, Any], seconds: float) -> None:
    screen.print()
    verdict = (
        "Every layer is as close to the truth as the model's own loop."
        if facts["ok"]
        else "A layer is off: see part 2."
    )
    screen.print(Panel(
        f"[bold]{verdict}[/bold]  [dim]{seconds:.0f} s[/dim]\n"
        f"written: {', '.join(facts['files'])}\n\n"
        "next:  [bold]moesaic verify[/bold]   check every operator that runs here\n"
        "       [bold]moesaic bench[/bold]    time it against everything installed\n"
        "       [bold]moesaic env[/bold]      what runs here, and why\n"
        "       [bold]torchrun --nproc-per-node 4 examples/train_ep.py[/bold]   train with experts on four processes",
        border_style="green" if facts["ok"] else "red", padding=(0, 2),
    ))  # fmt: skip
