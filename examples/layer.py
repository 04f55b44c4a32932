"""The layer as a torch module: take a published model's configuration, shrink it, and train it on a toy problem.

python examples/layer.py --steps 100
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.nn import MoE, MoEConfig


def problem(tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens of eight kinds, each kind with a function of its own: what experts are for."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(8, (tokens,), generator=generator)
    centres, maps = torch.randn(8, 64, generator=generator), torch.randn(8, 64, 64, generator=generator) / 8
    x = centres[kind] + 0.5 * torch.randn(tokens, 64, generator=generator)
    return x, torch.einsum("th,tho->to", x, maps[kind])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    config = MoEConfig.preset("olmoe", hidden_size=64, intermediate_size=64, num_experts=16, top_k=2)
    layer = MoE(config)
    print(layer)
    print(f"{config.num_parameters} parameters, {config.num_active_parameters} of them active for a token\n")

    x, target = problem(1024)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    for step in range(args.steps):
        loss = F.mse_loss(layer(x), target)
        # the auxiliary losses come by name, already weighted by the configuration's coefficients
        (loss + sum(layer.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step + 1 == args.steps:
            auxiliary = ", ".join(f"{name} {value:.4f}" for name, value in layer.losses.items())
            print(f"step {step:3}  loss {loss:.4f}  {auxiliary}")

    print("\ntokens of each expert:", layer.routing.tokens_per_expert.tolist())


if __name__ == "__main__":
    main()
