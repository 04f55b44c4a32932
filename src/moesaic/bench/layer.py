"""What is timed: one layer of experts with its weights, and several batches of tokens to rotate through.

Legend: T tokens, H hidden, I intermediate, E experts, K choices per token.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, apply
from ..cases import CASES, DISTRIBUTIONS, Case

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

# Weights are one random block repeated: drawing a gigabyte of normal numbers takes longer than timing it. The length is
# prime, so no two rows of a matrix and no two experts hold the same numbers in the same places.
_BLOCK = 2_097_143
# Tokens whose error is measured; a token's result depends on no other token.
_CHECKED_TOKENS = 128


@dataclass(frozen=True)
class Batch:
    """Tokens and what a router said about them, in the forms that peers take.

    Attributes:
        x: `(T, H)`.
        logits: `(T, E)` fp32, for peers that route by themselves.
        ids, ids_long: `(T, K)` int32 and int64.
        weights, weights_low: `(T, K)` softmax over the chosen logits, in fp32 and in the dtype of x.
        grad: `(T, H)` the gradient that backward starts from.
    """

    x: Tensor
    logits: Tensor
    ids: Tensor
    ids_long: Tensor
    weights: Tensor
    weights_low: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Layer:
    """The weights of a case. `train` says that gradients are wanted of x, the weights and the routing weights."""

    case: Case
    dtype: torch.dtype
    device: torch.device
    train: bool
    w_gate_up: Tensor
    w_down: Tensor
    b_gate_up: Tensor | None
    b_down: Tensor | None

    @classmethod
    def make(cls, case: Case, dtype: torch.dtype, device: torch.device, train: bool = False, seed: int = 0) -> Layer:
        """Random weights, scaled by 1/sqrt(fan in)."""
        E, H, I = case.num_experts, case.hidden_size, case.intermediate_size
        N = ACTIVATIONS[case.activation].width(I)
        block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed)).to(device)

        def weight(*shape: int, scale: float) -> Tensor:
            out = torch.empty(shape, dtype=dtype, device=device)
            scaled = (block * scale).to(dtype)
            for part in out.view(-1).split(_BLOCK):
                part.copy_(scaled[: part.numel()])
            return out.requires_grad_(train)

        return cls(
            case, dtype, device, train,
            weight(*((E, H, N) if case.transposed else (E, N, H)), scale=H**-0.5),
            weight(*((E, I, H) if case.transposed else (E, H, I)), scale=I**-0.5),
            weight(E, N, scale=0.5) if case.bias else None,
            weight(E, H, scale=0.5) if case.bias else None,
        )  # fmt: skip

    @property
    def plain_swiglu(self) -> bool:
        """The one form that every peer has: SwiGLU, halves concatenated, output-major, no bias."""
        c = self.case
        return c.activation == "swiglu" and c.layout == "concatenated" and not c.transposed and not c.bias

    @property
    def gpt_oss(self) -> bool:
        """gpt-oss's form: clipped SwiGLU, gate and up interleaved, biases."""
        c = self.case
        return c.activation == "swiglu_oai" and c.layout == "interleaved" and c.bias

    @property
    def interleaved(self) -> bool:
        return self.case.layout == "interleaved"

    def output_major(self) -> tuple[Tensor, Tensor]:
        """Both weights as `(E, out, in)`, contiguous: copies where they are stored the other way."""
        up, down = (w.mT.contiguous() if self.case.transposed else w for w in (self.w_gate_up, self.w_down))
        return up, down

    def batches(self, tokens: int, distribution: str = "uniform", seed: int = 0) -> list[Batch]:
        """Batches of `tokens`, each with its own routing, enough of them that weights come from memory."""
        count = 16 if tokens <= 64 else 4 if tokens <= 1024 else 2
        return [self._batch(tokens, distribution, seed + i) for i in range(count)]

    def _batch(self, tokens: int, distribution: str, seed: int) -> Batch:
        case, g = self.case, torch.Generator().manual_seed(seed)
        logits = DISTRIBUTIONS[distribution](tokens, case.num_experts, case.top_k, g)
        values, ids = logits.topk(case.top_k, -1)
        weights = values.softmax(-1).to(self.device)
        x = torch.randn(tokens, case.hidden_size, generator=g).to(self.dtype).to(self.device)
        grad = torch.randn(tokens, case.hidden_size, generator=g).to(self.dtype).to(self.device)
        low = weights.to(self.dtype).detach()
        return Batch(
            x.requires_grad_(self.train), logits.to(self.device), ids.int().to(self.device), ids.to(self.device),
            weights.requires_grad_(self.train), low.requires_grad_(self.train), grad,
        )  # fmt: skip

    def loads(self, batch: Batch) -> list[int]:
        """Rows of each expert."""
        return batch.ids_long.flatten().bincount(minlength=self.case.num_experts).tolist()

    def oracle(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`(tokens, y)`: some tokens of the batch, evenly spread, and their exact output in fp64."""
        case, T = self.case, batch.x.shape[0]
        picked = torch.linspace(0, T - 1, min(T, _CHECKED_TOKENS), device=self.device).long().unique()
        x, ids, weights = batch.x.detach()[picked].double(), batch.ids[picked], batch.weights.detach()[picked].double()
        y = torch.zeros(x.shape, dtype=torch.float64, device=self.device)
        for e in ids.unique().tolist():
            t, k = torch.where(ids == e)
            up, down = (w.detach()[e].double() for w in (self.w_gate_up, self.w_down))
            h = x[t] @ (up if case.transposed else up.T)
            if self.b_gate_up is not None:
                h = h + self.b_gate_up.detach()[e].double()
            out = apply(ACTIVATIONS[case.activation], h, self.interleaved) @ (down if case.transposed else down.T)
            if self.b_down is not None:
                out = out + self.b_down.detach()[e].double()
            y.index_add_(0, t, out * weights[t, k, None])
        return picked, y


def case_named(name: str) -> Case:
    """A case of `CASES`; with `-small` at its end, that case shrunk to a size for tests."""
    base = name.removesuffix("-small")
    if base not in CASES:
        raise ValueError(f"shape: must be one of {', '.join(CASES)} (or one of them with -small), got {name!r}.")
    return CASES[base].small() if base != name else CASES[base]


def weight_bytes(case: Case, dtype: torch.dtype) -> int:
    """Bytes of both expert weights of one expert, times E."""
    matrices = ACTIVATIONS[case.activation].width(1) + 1
    return case.num_experts * matrices * case.hidden_size * case.intermediate_size * dtype.itemsize


def memory_why_not(case: Case, dtype: torch.dtype, device: torch.device, train: bool) -> str | None:
    """Why this layer should not be built here, or None. Training holds the weights and two sets of gradients."""
    need = weight_bytes(case, dtype) * (3 if train else 1) * 1.15
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return None
    if need <= free:
        return None
    return f"needs about {need / 1e9:.1f} GB of {device.type} memory, {free / 1e9:.1f} GB are free"
