"""However the tokens are cut into ranges and blocks, and however far their values lie apart, routing is the same."""

from __future__ import annotations

import pytest
import torch

from moesaic import RouterConfig, hardware, route

TABLES = ("topk_ids", "tokens_per_expert", "expert_offsets", "row_order", "row_index")
ROUTERS = {
    "softmax": (128, RouterConfig(8)),
    "grouped": (90, RouterConfig(3, "sigmoid", num_groups=5, topk_groups=2)),
    "top-p": (40, RouterConfig(5, policy="top_p", threshold=0.7)),
}


@pytest.fixture
def cut(monkeypatch):
    """Sets the numbers that cut."""
    if not hardware.has_triton():
        pytest.skip("triton is not installed")
    from moesaic.ops.index import _triton as index
    from moesaic.ops.route import _triton

    def forget():
        for made in (*vars(_triton).values(), *vars(index).values()):
            if hasattr(made, "cache_clear"):
                made.cache_clear()

    def set_all(**numbers):
        for name, number in numbers.items():
            for module in (_triton, index):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, number)
        forget()

    yield set_all
    monkeypatch.undo()
    forget()


def values(T: int, E: int, scale: float, device) -> torch.Tensor:
    x = torch.randn(T, E, generator=torch.Generator().manual_seed(T)) * scale
    x[1] = -torch.inf
    x[2, : E - 2] = -torch.inf
    x[3], x[4, 5], x[5, ::3] = torch.nan, torch.nan, torch.nan
    x[6], x[7, ::2] = 0.0, x[7, ::2] * 1e-30
    x[8] = torch.logspace(-37, 30, E) * -x[8].abs()  # many windows of the selection
    x[9] = torch.logspace(-37, 30, E).flip(0)
    return x.to(device)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(
    ("numbers", "tokens"),
    [(dict(SMS=2, ROOM=8192), 150), (dict(SMS=2, FEWEST_ROWS=1), 70), (dict(SMS=3, ROOM=2048), 41), ({}, 11)],
    ids=str,
)
def test_route_is_the_same_however_it_is_cut(name, numbers, tokens, cut, device):
    if reason := hardware.triton_why_not(device, hardware.arch_of(torch.device(device))):
        pytest.skip(reason)
    cut(**numbers)
    E, config = ROUTERS[name]
    for scale in (1.0, 1e-3, 30.0):
        x = values(tokens, E, scale, device)
        got, want = (route(x, config, implementation=i) for i in ("triton", "torch"))
        for table in TABLES:
            assert torch.equal(getattr(got, table), getattr(want, table)), (table, scale)
        whole = ~x.isnan().any(1)
        torch.testing.assert_close(got.topk_weights[whole], want.topk_weights[whole], rtol=1e-5, atol=1e-6)
