"""The operators one by one: a router of DeepSeek-V3's kind, the fused expert layer, and the same layer in pieces.

python examples/operators.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import moesaic

T, H, I, E, K = 512, 256, 128, 32, 4  # tokens, hidden, intermediate, experts, choices per token


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(T, H)
    router = torch.randn(E, H) / H**0.5
    w_gate_up = torch.randn(E, 2 * I, H) / H**0.5
    w_down = torch.randn(E, H, I) / I**0.5
    for weight in (router, w_gate_up, w_down):
        weight.requires_grad_()

    # route: logits -> who goes where, with what weight
    config = moesaic.RouterConfig(top_k=K, score="sigmoid", norm_eps=1e-20, scale=2.5, num_groups=4, topk_groups=2)
    routing = moesaic.route(x @ router.T, config)
    print("token 0 goes to experts", routing.topk_ids[0].tolist(), "with weights", routing.topk_weights[0].tolist())

    # fused_experts: the whole layer in one operator
    y = moesaic.fused_experts(x, w_gate_up, w_down, routing)
    (y.square().mean() + 0.01 * moesaic.load_balancing_loss(routing)).backward()
    print("gradient of the router's weight has norm", router.grad.norm().item())

    # the same in pieces, for a layer with something of its own in the middle
    rows = moesaic.permute(x, routing)  # (T·K, H), sorted by expert
    gate, up = moesaic.grouped_matmul(rows, w_gate_up, routing).chunk(2, -1)
    out = moesaic.grouped_matmul(F.silu(gate) * up, w_down, routing)
    pieces = moesaic.unpermute(out, routing, weights=True)  # (T, H), weighted sum over a token's choices
    print("pieces and fused differ by", ((pieces - y).norm() / y.norm()).item())

    # which implementation ran here, and why not the others; the oracle can be asked for by name
    print(moesaic.explain("fused_experts", device="cpu", num_tokens=T, top_k=K, num_experts=E))
    with moesaic.use("reference"):
        oracle = moesaic.fused_experts(x.double(), w_gate_up.double(), w_down.double(), routing)
    print(moesaic.testing.error_report(y, oracle))


if __name__ == "__main__":
    main()
