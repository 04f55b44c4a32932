"""Operands that are not where the others are, and more slots than the tables can number, are refused at the door."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moesaic import Routing, fused_experts, grouped_matmul, permute, unpermute

E, K, T, H, I = 3, 2, 4, 6, 5
TABLES = ("expert_offsets", "row_order", "row_index")


def operands(what: str) -> dict[str, torch.Tensor]:
    rows = torch.ones(T * K, H)
    return {
        "grouped_matmul": dict(rows=rows, w=torch.ones(E, I, H), bias=torch.ones(E, I)),
        "fused_experts": dict(
            x=torch.ones(T, H), w_gate_up=torch.ones(E, 2 * I, H), w_down=torch.ones(E, H, I),
            b_gate_up=torch.ones(E, 2 * I), b_down=torch.ones(E, H), residual=torch.ones(T, H),
            weights=torch.ones(T, K),
        ),
        "permute": dict(x=torch.ones(T, H)),
        "unpermute": dict(rows=rows, weights=torch.ones(T, K)),
    }[what]  # fmt: skip


CALLS = dict(grouped_matmul=grouped_matmul, fused_experts=fused_experts, permute=permute, unpermute=unpermute)
PLACES = [(what, name) for what in CALLS for name in (*operands(what), *TABLES)]


@pytest.mark.parametrize(("what", "name"), PLACES, ids=[f"{a}-{b}" for a, b in PLACES])
def test_every_operand_is_where_the_others_are(what, name):
    routing = Routing.from_topk(torch.rand(T, K), torch.rand(T, E).topk(K, -1).indices, E)
    given = operands(what)
    CALLS[what](**given, routing=routing)  # warm
    if name in TABLES:
        routing = replace(routing, **{name: getattr(routing, name).to("meta")})
    else:
        given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=rf"{what}: .*(device|must be on)"):
        CALLS[what](**given, routing=routing)


def test_more_slots_than_32_bits_number_are_refused():
    ids = torch.zeros(1, 1, dtype=torch.int32).expand(2**30, 2)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 slots"):
        Routing.from_topk(None, ids, E)
