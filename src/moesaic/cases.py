"""CASES: layer shapes of real models, and the ways tokens spread over experts. Tests, tuning and bench share them.

Shapes are the published checkpoints' (see each model's config.json). To add a model, add a line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One expert layer. `activation`, `layout`, `transposed` and `bias` are those of the model's weights."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str = "swiglu"
    layout: str = "concatenated"
    transposed: bool = False
    bias: bool = False

    def small(self, hidden_size: int = 64, intermediate_size: int = 48, num_experts: int = 8) -> Case:
        """The same layer shrunk for tests: every property but the sizes."""
        return replace(
            self, name=f"{self.name}-small", hidden_size=hidden_size, intermediate_size=intermediate_size,
            num_experts=min(num_experts, self.num_experts), top_k=min(self.top_k, num_experts),
        )  # fmt: skip

    def problem(self, tokens: int, dtype: torch.dtype, device: str = "cpu", **options: Any) -> dict[str, Any]:
        """The call of `fused_experts` that this layer makes, as `explain` takes it; `options` are other fields."""
        return dict(
            device=device, dtype=dtype, num_tokens=tokens, top_k=self.top_k, num_experts=self.num_experts,
            hidden_size=self.hidden_size, intermediate_size=self.intermediate_size, activation=self.activation,
            interleaved=self.layout == "interleaved", transposed=self.transposed, bias=self.bias, **options,
        )  # fmt: skip

    def flops(self, tokens: int) -> int:
        """Multiply-adds times two of the forward pass."""
        return 2 * tokens * self.top_k * self.hidden_size * self.intermediate_size * (3 if self.gated else 2)

    @property
    def gated(self) -> bool:
        from .activations import ACTIVATIONS

        return ACTIVATIONS[self.activation].gated


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("mixtral-8x7b", 4096, 14336, 8, 2),
        Case("qwen3-30b-a3b", 2048, 768, 128, 8),
        Case("qwen3-235b", 4096, 1536, 128, 8),
        Case("qwen3-next-80b", 2048, 512, 512, 10),
        Case("qwen2-moe-a2.7b", 2048, 1408, 60, 4),
        Case("deepseek-v3", 7168, 2048, 256, 8),
        Case("kimi-k2", 7168, 2048, 384, 8),
        Case("gpt-oss-120b", 2880, 2880, 128, 4, "swiglu_oai", "interleaved", True, True),
        Case("olmoe", 2048, 1024, 64, 8),
        Case("glm-4.5", 5120, 1536, 160, 8),
        Case("minimax-m2", 3072, 1536, 256, 8),
        Case("llama4-scout", 5120, 8192, 16, 1, transposed=True),
        Case("granite-3-3b", 1536, 512, 40, 8),
        Case("phi-3.5-moe", 4096, 6400, 16, 2),
        Case("ernie-4.5-21b", 2560, 1536, 64, 6),
        Case("nemotron-h", 4096, 2688, 512, 22, "relu2"),
        Case("gemma4-26b", 2304, 704, 128, 8, "geglu_tanh"),
        Case("sonic-7b", 1536, 256, 128, 8),
        Case("sonic-30b", 4096, 1024, 128, 8),
    )
}


def uniform(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Every expert equally likely."""
    return torch.rand(tokens, experts, generator=generator)


def zipf(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """The r-th most popular expert drawn with probability proportional to 1/r (Gumbel top-k)."""
    popularity = -torch.log(torch.arange(1, experts + 1, dtype=torch.float32))
    popularity = popularity[torch.randperm(experts, generator=generator)]
    return popularity - torch.log(-torch.log(torch.rand(tokens, experts, generator=generator).clamp(1e-9, 1 - 1e-7)))


def hot(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Half of all tokens choose expert 0 first; the rest is uniform."""
    scores = torch.rand(tokens, experts, generator=generator)
    scores[: (tokens + 1) // 2, 0] += 2
    return scores[torch.randperm(tokens, generator=generator)]


def decode(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """What a serving batch looks like: neighbours share most of their experts (a token and its successor are alike)."""
    scores = torch.rand(1, experts, generator=generator) + 0.35 * torch.randn(tokens, experts, generator=generator)
    return scores


DISTRIBUTIONS = {"uniform": uniform, "zipf": zipf, "hot": hot, "decode": decode}
