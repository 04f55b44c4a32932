"""A byte-level language model small enough to train on two cores, and its text: Python's standard library.

`examples/train_tiny_lm.py` trains it once, `study_k` once for every K. A token is a byte, so there is no tokenizer.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import MissingExtra
from ..libraries import found

SEED = 0
PEAK_LR, FINAL_LR, WARMUP = 3e-3, 1e-4, 50
# Hugging Face's Qwen3-MoE
MODEL: dict[str, Any] = dict(
    vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True, router_aux_loss_coef=0.01,
    intermediate_size=256, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def build(experts: str = "moesaic", seed: int = SEED, **changes: Any) -> Any:
    """The model with fresh weights, its experts run by `experts_implementation=experts`.

    Args:
        changes: fields of the model's configuration, in place of those in `MODEL`.

    Raises:
        MissingExtra: transformers is not installed.
    """
    if not found("transformers"):
        raise MissingExtra("transformers", "hf", "the tiny language model")
    from transformers import AutoConfig, AutoModelForCausalLM

    from ...integrations import transformers as _registers_the_name  # noqa: F401

    torch.manual_seed(seed)
    config = AutoConfig.for_model("qwen3_moe", **MODEL | changes)
    return AutoModelForCausalLM.from_config(config, experts_implementation=experts)


def optimizer_of(model: Any) -> torch.optim.AdamW:
    """The optimizer of both; its rate is set at every step by `learning_rate`."""
    return torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.1)


def corpus() -> tuple[Tensor, Tensor]:
    """The standard library as bytes: training text, and every twentieth file held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts)]
    train, held_out = bytearray(), bytearray()
    for i, file in enumerate(files):
        (held_out if i % 20 == 19 else train).extend(file.read_bytes())
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def sample_batch(text: Tensor, generator: torch.Generator, batch: int, length: int, device: str = "cpu") -> Tensor:
    """`(batch, length)` int64: windows of the text from random places."""
    starts = torch.randint(len(text) - length, (batch,), generator=generator)
    return torch.stack([text[i : i + length] for i in starts.tolist()]).long().to(device)


def learning_rate(step: int, steps: int, warmup: int = WARMUP) -> float:
    """Linear warm-up, then half a cosine."""
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@torch.no_grad()
def evaluate(model: Any, text: Tensor, batch: int, length: int, device: str = "cpu", batches: int = 8) -> float:
    """Nats per byte of the held-out files, on the same windows every time."""
    generator = torch.Generator().manual_seed(SEED + 1)
    model.eval()
    losses = []
    for _ in range(batches):
        ids = sample_batch(text, generator, batch, length, device)
        losses.append(model(input_ids=ids, labels=ids, output_router_logits=False).loss.item())
    model.train()
    return sum(losses) / len(losses)


def train_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, rate: float) -> tuple[float, float]:
    """One step at a learning rate: `(loss in nats per byte, the model's auxiliary loss)`, which trains too."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    out = model(input_ids=ids, labels=ids, output_router_logits=True)  # the loss includes the auxiliary one
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    auxiliary = out.aux_loss.item()
    return out.loss.item() - model.config.router_aux_loss_coef * auxiliary, auxiliary
