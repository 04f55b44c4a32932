"""Train a small byte-level Mixture-of-Experts language model on the text of Python's standard library.

    python examples/train_tiny_lm.py                      # a few minutes on 2 cores; writes examples/tiny_lm
    python examples/train_tiny_lm.py --steps 20 --out /tmp/lm

The model is Hugging Face's Qwen3-MoE (4 layers, 16 experts, top-2), its experts run by moesaic through
`experts_implementation`, its router kept balanced by the auxiliary loss. A token is a byte, so there is no tokenizer.
The checkpoint has Hugging Face's layout and loads with `AutoModelForCausalLM.from_pretrained`; beside it go the loss
curve and its numbers. Needs `pip install "moesaic[hf,cli,plot]"`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moesaic
import moesaic.integrations.transformers  # registers experts_implementation="moesaic"
from moesaic.bench.studies import tiny_lm  # the model's shape, its text and one training step
from moesaic.bench.studies.tiny_lm import SEED

LENGTH, BATCH, SAMPLE = 256, 12, 200  # bytes of a window, windows of a batch, bytes to generate at the end


def train(model: PreTrainedModel, steps: int, device: str, console: Console) -> list[dict]:
    """Train for some steps; return the loss curve, one entry for every step that was evaluated."""
    text, held_out = tiny_lm.corpus()
    console.print(f"{len(text) / 1e6:.1f} MB of source, {len(held_out) / 1e6:.2f} MB held out")
    generator = torch.Generator().manual_seed(SEED)
    optimizer = tiny_lm.optimizer_of(model)
    curve, recent, every = [], [], max(steps // 20, 1)
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            ids = tiny_lm.sample_batch(text, generator, BATCH, LENGTH, device)
            loss, auxiliary = tiny_lm.train_step(model, optimizer, ids, tiny_lm.learning_rate(step, steps))
            # Hugging Face's balance loss is top-2's K = 2 when every expert gets the same share
            balance = auxiliary / model.config.num_experts_per_tok
            recent.append(loss)
            progress.update(task, advance=1, description=f"loss {recent[-1]:.3f}  balance {balance:.2f}")
            if (step + 1) % every == 0 or step + 1 == steps:
                seconds = time.perf_counter() - start
                unseen = tiny_lm.evaluate(model, held_out, BATCH, LENGTH, device)
                entry = dict(step=step + 1, train=sum(recent) / len(recent), held_out=unseen, balance=balance)
                curve.append(entry)
                recent.clear()
                console.print(
                    "step {step}  train {train:.3f}  held out {held_out:.3f}".format(**entry), f" {seconds:.0f} s"
                )
    return curve


def plot(curve: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("train", "training text"), ("held_out", "held-out files")):
        axes.plot([e["step"] for e in curve], [e[name] for e in curve], marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Byte-level MoE language model, 16 experts, top-2")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def complete(model: PreTrainedModel, prompt: str) -> str:
    """The model's continuation of a prompt, sampled."""
    ids = torch.tensor([list(prompt.encode())], device=model.device)
    torch.manual_seed(SEED)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE, do_sample=True, temperature=0.6, top_k=40
    )
    return bytes(out[0].tolist()).decode(errors="replace")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_lm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts", default="moesaic", help="experts_implementation: moesaic, grouped_mm, eager")
    args = parser.parse_args(argv)
    console = Console()

    torch.manual_seed(SEED)
    config = AutoConfig.for_model("qwen3_moe", **tiny_lm.MODEL)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=args.experts).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters / 1e6:.2f} million parameters, experts run by {args.experts}")
    curve = train(model, args.steps, args.device, console)

    args.out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(args.out)
    record = dict(
        parameters=parameters, steps=args.steps, batch=BATCH, length=LENGTH, seed=SEED, experts=args.experts,
        device=args.device, threads=torch.get_num_threads(),
        corpus=f"standard library of Python {platform.python_version()}",
        versions=dict(moesaic=moesaic.__version__, torch=torch.__version__, transformers=transformers.__version__),
        curve=[{k: v if isinstance(v, int) else round(v, 4) for k, v in entry.items()} for entry in curve],
    )  # fmt: skip
    (args.out / "loss.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(curve, args.out / "loss.png")
    console.print(
        complete(model.eval(), "class Parser:\n    def __init__(self"), style="dim", markup=False, highlight=False
    )
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
