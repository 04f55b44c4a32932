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
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moesaic
import moesaic.integrations.transformers  # registers experts_implementation="moesaic"

SEED = 0
LENGTH, BATCH, SAMPLE = 256, 12, 200  # bytes of a window, windows of a batch, bytes to generate at the end
PEAK_LR, FINAL_LR, WARMUP = 3e-3, 1e-4, 50
MODEL = dict(
    vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True, router_aux_loss_coef=0.01,
    intermediate_size=256, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def corpus() -> tuple[Tensor, Tensor]:
    """The standard library as bytes: training text, and every twentieth file held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts)]
    train, held_out = bytearray(), bytearray()
    for i, file in enumerate(files):
        (held_out if i % 20 == 19 else train).extend(file.read_bytes())
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def sample_batch(text: Tensor, generator: torch.Generator, device: str) -> Tensor:
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([text[i : i + LENGTH] for i in starts.tolist()]).long().to(device)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(steps - WARMUP, 1)))


@torch.no_grad()
def evaluate(model: PreTrainedModel, text: Tensor, device: str) -> float:
    """Nats per byte of the held-out files, on the same windows every time."""
    generator = torch.Generator().manual_seed(SEED + 1)
    model.eval()
    losses = []
    for _ in range(8):
        ids = sample_batch(text, generator, device)
        losses.append(model(input_ids=ids, labels=ids, output_router_logits=False).loss.item())
    model.train()
    return sum(losses) / len(losses)


def train(model: PreTrainedModel, steps: int, device: str, console: Console) -> list[dict]:
    """Train for some steps; return the loss curve, one entry for every step that was evaluated."""
    text, held_out = corpus()
    console.print(f"{len(text) / 1e6:.1f} MB of source, {len(held_out) / 1e6:.2f} MB held out")
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.1)
    curve, recent, every = [], [], max(steps // 20, 1)
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            ids = sample_batch(text, generator, device)
            out = model(input_ids=ids, labels=ids, output_router_logits=True)  # the loss includes the auxiliary one
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            # Hugging Face's balance loss is top-2's K = 2 when every expert gets the same share
            balance = out.aux_loss.item() / MODEL["num_experts_per_tok"]
            recent.append(out.loss.item() - MODEL["router_aux_loss_coef"] * out.aux_loss.item())
            progress.update(task, advance=1, description=f"loss {recent[-1]:.3f}  balance {balance:.2f}")
            if (step + 1) % every == 0 or step + 1 == steps:
                seconds = time.perf_counter() - start
                entry = dict(step=step + 1, train=sum(recent) / len(recent), held_out=evaluate(model, held_out, device),
                             balance=balance)  # fmt: skip
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
    config = AutoConfig.for_model("qwen3_moe", **MODEL)
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
